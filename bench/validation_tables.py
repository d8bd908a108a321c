"""Tables of docs/simulator.md from the rows of bench/results/validation.jsonl."""

from __future__ import annotations

from typing import Any

from bench import markdown

Row = dict[str, Any]
SHOWN = {
    "tpot_ms": "TPOT ms",
    "ttft_ms": "TTFT ms",
    "activated_worst_rank": "experts on the worst rank",
    "tokens_worst_rank": "tokens on the worst rank",
}


def table(name: str, rows: list[Row], hardware: dict[str, str]) -> str:
    """One table of docs/simulator.md; `hardware` names the file of each machine."""

    def file(row: Row) -> str:
        return hardware.get(row["machine"], row["machine"])

    if name == "measured":
        own = [row for row in rows if row["kind"] == "measured"]
        own.sort(key=lambda row: (file(row), row["run"], list(SHOWN).index(row["what"])))
        head = ["machine", "run", "arm", "what", "measured", "predicted", "error"]
        body = [
            [file(row), row["run"], row["arm"], SHOWN[row["what"]], f"{row['reference']:.1f}",
             f"{row['predicted']:.1f}", f"{row['error']:+.1%}"]
            for row in own
        ]  # fmt: skip
        return markdown.table(head, body, left=4)
    if name == "pairs":
        own = sorted((row for row in rows if row["kind"] == "pair"), key=file)
        head = ["machine", "run", "arms", "measured", "predicted", "ranked"]
        body = [
            [file(row), row["run"], row["arm"], f"{row['reference']:+.1%}",
             f"{row['predicted']:+.1%}",
             ("right" if row["ranked"] else "wrong") if row["far_apart"] else "within 3 %"]
            for row in own
        ]  # fmt: skip
        return markdown.table(head, body, left=3)
    own = [row for row in rows if row["kind"].startswith("published") and row["paper"] == name]
    head = ["what", "published", "predicted", "remark"]
    body = [
        [row["what"], row["published"], f"{row['predicted']:{row['format']}}", row["remark"]]
        for row in own
    ]
    return markdown.table(head, body, left=1)
