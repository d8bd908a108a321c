"""The report: one file that works in a real browser, on a desk and on a phone."""

import json
import re
import shutil
import sys
import time

import pytest
from measured import latency, look_ahead_row, recorder_bursts, recovery_bursts, row, rows
from playwright.sync_api import expect, sync_playwright
from typer.testing import CliRunner

from vllm_balance import commands
from vllm_balance.commands import recovery_plot
from vllm_balance.commands.report import _section, _section_of, report
from vllm_balance.commands.report_plots import (
    COLOURS,
    over_time,
    panels,
    pareto,
    tokens_per_expert_SE,
)
from vllm_balance.errors import BalancerError
from vllm_balance.measurement import Measurement
from vllm_balance.own_benchmarks.recovery import Burst

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 120_000
"""Servers of other tests may take both cores meanwhile."""
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}


def sweep() -> list[Measurement]:
    """Three arms at three concurrencies, with an SLO."""
    return [
        row(
            arm,
            run="batch",
            title="Batch 1 to 64",
            load=f"batch {n}",
            concurrency=n,
            tpot_ms=tpot_ms + n,
            slo_tpot_ms=90.0,
            goodput_per_s=n / 8,
        )
        for arm, tpot_ms in (("static", 50.0), ("eplb", 60.0), ("metro", 40.0))
        for n in (1, 8, 64)
    ]


def written(path, measured):
    path.write_text("".join(one.model_dump_json() + "\n" for one in measured))
    return path


PHASES = {"traffic of the map": 3, "other traffic": 7, "a rank slowed by 28 %": 7}
"""Of a run of `bench.recovery`, and bursts in each."""


def recovery():
    """Servers of three arms, there and back but for the last: ms rise by 100 more with every phase,
    and fall to 1000 plus the server's place."""
    return [
        burst
        for position, arm in enumerate(("static", "online", "gem", "gem", "static"))
        for rise, (phase, count) in enumerate(PHASES.items())
        for burst in recovery_bursts(
            arm,
            position,
            [1000.0 + 100 * rise] + [1000.0 + position] * (count - 1),
            swaps=list(range(count)) if arm == "online" else None,
            phase=phase,
        )
    ]


OWN = {
    "recorder": recorder_bursts({"off": [100.0, 104.0], "counts": [110.0] * 2, "ids": [121.0] * 2}),
    "recovery": recovery(),
    "look_ahead": [
        look_ahead_row(how, fetches=60, hits=40, fetched_bytes=600) for how in ("off", "router")
    ],
}
"""Rows of benchmarks of their own."""


def own_file(path, own):
    """Behind rows of another machine, which make other tables."""
    other = [one | {"machine": "Another machine", "tpot_ms": 7.0, "e2e_ms": 7.0} for one in own]
    path.write_text("".join(json.dumps(one) + "\n" for one in other + own))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two runs, a run of other settings in front of one of them, three benchmarks of their own, and
    a file of something else."""
    folder = tmp_path_factory.mktemp("results")
    old = [row("metro", title="Old", config_hash="0")]
    written(folder / "decode.jsonl", old + rows())
    written(folder / "batch.jsonl", sweep())
    for name, own in OWN.items():
        own_file(folder / f"{name}.jsonl", own)
    (folder / "exchange.jsonl").write_text('{"run": "exchange", "ranks": 2}\n')
    return folder


@pytest.fixture(scope="module")
def page_file(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    ended = CliRunner().invoke(commands.app, ["report", str(results), "-o", str(path)])
    assert ended.exit_code == 0, ended.output
    assert "batch, decode, look_ahead, recorder, recovery." in " ".join(ended.output.split())
    return path


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            f"No browser: none of {', '.join(BROWSERS)} is installed. `make test` installs "
            f"chromium where it may (Debian: apt-get install chromium)."
        )
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        # A container has no user namespaces for the sandbox, and little in /dev/shm.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        running = playwright.chromium.launch(executable_path=found, args=flags)
        yield running
        running.close()


@pytest.fixture(scope="module", params=SCREENS)
def screen(request, browser, page_file):
    """The report on a screen, drawn once, and what has gone wrong there."""
    width, height = SCREENS[request.param]
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda asked: wrong.append(asked.url) if not local(asked.url) else None)
    opened.goto(page_file.as_uri())
    yield opened, wrong
    opened.close()


@pytest.fixture
def page(screen):
    """As the tests before left it; any error of its scripts and any request to elsewhere fails."""
    opened, wrong = screen
    yield opened
    assert wrong == []


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


on_a_desk = pytest.mark.parametrize("screen", ["desk"], indirect=True)


def test_it_shows_the_first_run_and_fits_the_screen(page):
    expect(page.get_by_role("heading", name="Batch 1 to 64")).to_be_visible()
    expect(page.locator("section:visible .js-plotly-plot")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    for plot in page.locator("section:visible .js-plotly-plot").all():
        box = plot.bounding_box()
        assert box["width"] > 250 and box["height"] > 150
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]


def test_tabs_change_the_run_and_its_table_has_the_numbers(page):
    page.get_by_role("tab", name="decode").click()
    expect(page.get_by_role("heading", name="Decode <of> a test")).to_be_visible()
    expect(page.get_by_role("heading", name="Batch 1 to 64")).to_be_hidden()
    expect(page.get_by_text("Old")).to_have_count(0)
    cells = page.locator("section:visible tbody tr").nth(1).locator("td")
    assert cells.first.inner_text() == "eplb"
    assert [cells.nth(1).inner_text(), cells.nth(4).inner_text()] == ["+29.9%", "130.5"]
    expect(page.locator("section:visible .js-plotly-plot")).to_have_count(4)
    page.get_by_role("tab", name="batch").click()
    expect(page.get_by_role("heading", name="Decode <of> a test")).to_be_hidden()


def test_the_slo_has_a_table_of_its_own(page):
    first = page.locator("section:visible table").first
    expect(first.locator("th").nth(1)).to_have_text("tokens/s within the SLO")
    assert first.locator("tbody tr").count() == 3


def test_a_choice_draws_another_figure(page):
    choice = page.get_by_role("combobox", name="Latency: which")
    plot = page.locator("section:visible figure").filter(has=choice).locator(".js-plotly-plot")
    largest = "Math.max(...element.data[0].x)"
    assert plot.evaluate(f"element => {largest}") == 1.5 * 51
    choice.select_option("TTFT, batch 64")
    assert plot.evaluate(f"element => {largest}") == pytest.approx(1.5 * 10 * 114)


def test_a_click_into_the_legend_hides_an_arm(page):
    plot = page.locator("section:visible .js-plotly-plot").first
    assert plot.locator(".scatter .lines path").count() == 3
    plot.locator(".legendtoggle").nth(1).click(force=True)
    expect(plot.locator(".scatterlayer .trace .lines path")).to_have_count(2)
    assert plot.evaluate("element => element._fullData[1].visible") == "legendonly"


def test_recovery_is_drawn_burst_by_burst_with_marks_where_something_changed(page):
    page.get_by_role("tab", name="recovery").click()
    plot = page.locator("section:visible .js-plotly-plot")
    expect(plot.locator(".scatter .lines path")).to_have_count(5)
    assert plot.locator(".shapelayer path").count() == 2
    labels = plot.locator(".annotation")
    expect(labels).to_have_text([re.compile(phase.replace(" ", r"\s*")) for phase in PHASES])
    frame, width = plot.bounding_box(), page.viewport_size["width"]
    for label in labels.all():
        box = label.bounding_box()
        assert frame["y"] <= box["y"] and box["x"] + box["width"] <= width
    title, legend = plot.locator(".xtitle").bounding_box(), plot.locator(".legend").bounding_box()
    assert title["y"] + title["height"] <= legend["y"]
    page.get_by_role("combobox", name="Latency burst by burst: which").select_option("TTFT")
    assert plot.evaluate("element => element.data[0].y[3]") == 1100 / 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.locator("section:visible table")
    assert table.locator("tbody tr").nth(1).locator("td").nth(1).inner_text() == "online"
    expect(page.locator("section:visible").get_by_text("Another machine")).to_have_count(0)
    page.get_by_role("tab", name="batch").click()


@on_a_desk
def test_hovering_says_what_a_point_is(page):
    plot = page.locator("section:visible .js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .trace").first.locator(".point").nth(1)
    said = plot.locator(".hoverlayer .hovertext").first
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while said.count() == 0:  # A plot that is still being drawn does not see the mouse.
        assert time.monotonic() < deadline, "nothing is said"
        page.mouse.move(0, 0)
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(200)
    expect(said).to_contain_text("batch 8")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("recorder", ["counts", "2", "110.0"]),
        ("recovery", ["traffic of the map", "online", "1", "1000", "1001"]),
        ("look_ahead", ["2", "router", "40.0%", "0.60"]),
    ],
)
def test_a_benchmark_of_its_own_has_its_table_from_the_newest_run(tmp_path, name, line):
    section = _section_of(own_file(tmp_path / "rows.jsonl", OWN[name]))
    (table,) = section["tables"]
    assert table.body[1][: len(line)] == line
    assert section["run"] == name and section["facts"]["rows"] == str(len(OWN[name]))
    assert table.origin == "Measured on A machine; commit abc1234"
    assert table.command.startswith(f"python -m bench.{name}")


def test_a_benchmark_of_its_own_says_what_it_is_about_and_what_was_served(page_file):
    text = page_file.read_text()
    assert "<h2>What recording costs while serving</h2>" in text
    assert "Prefill &lt;of&gt; a test. Sums over ranks" in " ".join(text.split())


def test_a_damaged_row_of_a_benchmark_of_its_own_is_named(tmp_path):
    broken = {key: value for key, value in OWN["recorder"][0].items() if key != "tpot_ms"}
    path = own_file(tmp_path / "recorder.jsonl", OWN["recorder"])
    with path.open("a") as file:
        file.write(json.dumps(broken) + "\n")
    with pytest.raises(BalancerError, match=r"Line 13 of .* is no row of bench\.recorder"):
        report([tmp_path], tmp_path / "report.html")


def test_servers_of_an_arm_have_one_colour_and_bursts_say_when_they_were():
    (panel,) = recovery_plot.panels([Burst.model_validate(one) for one in OWN["recovery"]])
    assert list(panel.figures) == ["end to end", "TPOT", "TTFT"]
    figure = panel.figures["end to end"]
    first, online, *_ = figure["data"]
    assert [each["name"] for each in figure["data"]] == [
        *("static, server 1", "online", "gem, server 1", "gem, server 2", "static, server 2")
    ]
    lines = [each["line"] for each in figure["data"]]
    assert [line["color"] for line in lines] == [COLOURS[arm] for arm in (0, 1, 2, 2, 0)]
    assert [line["dash"] for line in lines] == ["solid"] * 3 + ["dot"] * 2
    assert online["x"] == list(range(1, 18)) and online["y"][3:5] == [1100.0, 1001.0]
    assert online["text"][2] == "traffic of the map, after 10 s, 2 swaps"
    assert first["text"][2] == "traffic of the map, after 10 s"
    assert [mark["x0"] for mark in figure["layout"]["shapes"]] == [3.5, 10.5]


def test_heat_is_by_expert_and_rank():
    # Slots 0 1 2 | 2 3 0 with 5 4 0 | 3 1 3 pairs.
    assert tokens_per_expert_SE([row()], 0).tolist() == [[5, 4, 0, 0], [3, 0, 3, 1]]
    assert tokens_per_expert_SE([row(), row()], 0).sum() == 2 * 16
    heat = panels(rows())[2].figures["layer 0"]["data"][0]
    assert heat["x"] == ["0", "1", "2", "3"]
    assert heat["y"][:2] == ["static 0", "static 1"]
    assert heat["z"][0] == [31.25, 25.0, 0.0, 0.0]


def test_an_arm_has_one_colour_and_its_ranks_differ_by_dashes():
    lines = [trace["line"] for trace in over_time(rows())["data"]]
    assert [line["color"] for line in lines] == [COLOURS[arm] for arm in (0, 0, 1, 1, 2, 2)]
    assert [line["dash"] for line in lines] == ["solid", "dot"] * 3


def test_every_panel_has_a_figure_for_every_case_and_load():
    counts = [len(panel.figures) for panel in panels(sweep())]
    assert counts == [1, 3, 3 * 2, 3 * 4]


def test_text_from_rows_cannot_become_markup(page_file):
    text = page_file.read_text()
    assert "Decode &lt;of&gt; a test" in text
    own = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert "http://" not in own and "https://" not in own


def test_no_measurement_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "exchange.jsonl").write_text('{"run": "exchange"}\n')
    with pytest.raises(BalancerError, match=r"no measurement in .* Measure with `python -m bench"):
        report([tmp_path], tmp_path / "report.html")


def test_only_files_of_a_folder_are_looked_at_and_others_are_named(results, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    written(tmp_path / "decode.jsonl", rows())
    report([tmp_path], tmp_path / "report.html")
    assert "Decode" in (tmp_path / "report.html").read_text()
    (tmp_path / "trace.npz").write_bytes(b"PK\x03\x04\xff\xfe\n")
    with pytest.raises(BalancerError, match=r"trace\.npz is no measurement"):
        report([tmp_path / "trace.npz"], tmp_path / "report.html")


def test_an_output_that_cannot_be_written_is_named(results, tmp_path):
    with pytest.raises(BalancerError, match=r"no/report\.html cannot be written: No such file"):
        report([results], tmp_path / "no" / "report.html")


def test_without_plotly_the_error_names_the_extra(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(BalancerError, match=r"pip install '\.\[report\]'"):
        report([results], tmp_path / "report.html")


def test_a_run_of_several_skews_is_compared_with_its_bound():
    measured = [
        row(arm, run="skews", load=load, total_tokens_per_s=speed, output_tokens=1)
        for load, speeds in (("even", (100.0, 98.0)), ("0.9 onto 10", (50.0, 90.0)))
        for arm, speed in zip(("static", "harmoeny"), speeds, strict=True)
    ]
    bounded, *others = _section(measured)["tables"]
    at = bounded.headings.index("of the bound")
    assert [line[at] for line in bounded.body] == ["100.0%", "98.0%", "50.0%", "90.0%"]
    assert len(others) == 1
    assert len(_section(rows())["tables"]) == 1


def test_skews_of_decode_have_no_bound():
    """Even routing activates the most experts there."""
    measured = [row("static", load=load) for load in ("even", "Zipf 1.2")]
    (table,) = _section(measured)["tables"]
    assert "of the bound" not in table.headings


def test_loads_of_first_tokens_are_drawn_over_ttft_and_have_no_time_per_token():
    few = {"output_tokens": 1, "total_tokens_per_s": 900.0, "ttft_ms": latency(400.0)}
    first, *_, last = panels([row(arm, **few) for arm in ("static", "harmoeny")])
    (figure,) = first.figures.values()
    assert list(first.figures) == ["TTFT"]
    assert [(trace["x"], trace["y"]) for trace in figure["data"]] == [([400.0], [900.0])] * 2
    assert figure["layout"]["xaxis"]["title"]["text"] == "TTFT, ms (median)"
    assert list(last.figures) == ["TTFT", "end to end"]
    both = [row("static", load="decode"), row("static", load="prefill", **few)]
    assert list(panels(both)[0].figures) == ["TPOT", "TTFT"]


def test_a_line_joins_numbers_of_requests_and_nothing_else():
    assert {trace["mode"] for trace in pareto(sweep(), "TPOT")["data"]} == {"lines+markers"}
    skews = [row("static", load=load) for load in ("Zipf 0.8", "Zipf 1.2")]
    (trace,) = pareto(skews, "TPOT")["data"]
    assert trace["mode"] == "markers" and len(trace["x"]) == 2
