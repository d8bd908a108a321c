"""The report: one file that works in a real browser, on a desk and on a phone."""

import re
import shutil
import sys
import time

import pytest
from measured import latency, row, rows
from playwright.sync_api import expect, sync_playwright
from typer.testing import CliRunner

from vllm_balance import commands
from vllm_balance.commands.report import _section, report
from vllm_balance.commands.report_plots import (
    COLOURS,
    over_time,
    panels,
    pareto,
    tokens_per_expert_SE,
)
from vllm_balance.errors import BalancerError
from vllm_balance.measurement import Measurement

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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two runs, a run of other settings in front of one of them, and a file of something else."""
    folder = tmp_path_factory.mktemp("results")
    old = [row("metro", title="Old", config_hash="0")]
    written(folder / "decode.jsonl", old + rows())
    written(folder / "batch.jsonl", sweep())
    (folder / "exchange.jsonl").write_text('{"run": "exchange", "ranks": 2}\n')
    return folder


@pytest.fixture(scope="module")
def page_file(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    ended = CliRunner().invoke(commands.app, ["report", str(results), "-o", str(path)])
    assert ended.exit_code == 0, ended.output
    assert "batch, decode" in ended.output
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
