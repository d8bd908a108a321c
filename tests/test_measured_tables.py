"""Tables from rows: medians, ratios within a case and a load, throughput within an SLO."""

import pytest
from measured import row, rows

from vllm_balance import slo_table
from vllm_balance.measured_tables import arms_table, grouped, slow_table
from vllm_balance.measurement import KernelTime
from vllm_balance.run_tables import main_table, tables


def column(table, heading):
    place = table.headings.index(heading)
    return [line[place] for line in table.body]


def test_a_line_per_arm_with_medians_and_ratios():
    table = arms_table(rows())
    assert column(table, "arm") == ["static", "eplb", "metro"]
    assert column(table, "TPOT ms") == ["100.5", "130.5", "100.5"]
    assert column(table, "TPOT against static") == ["+0.0%", "+29.9%", "+0.0%"]
    assert column(table, "TPOT against eplb") == ["-23.0%", "+0.0%", "-23.0%"]
    assert column(table, "memory GiB") == ["3.0"] * 3
    assert (table.title, table.caption) == (
        "Decode <of> a test",
        "Medians of 2 measurements per line.",
    )
    assert table.origin == "Measured on A machine; commit abc1234"
    assert table.command == "python -m bench.run configs/runs/decode.toml"


def test_what_the_machine_took_beside_each_load_is_the_last_column():
    def watched(ms, **changes):
        batches = ((1, [ms * 1e3, ms * 3e3]), (64, [ms * 2e4] * 2))
        times = [KernelTime(activated=16, tokens_each=n, time_us=t) for n, t in batches]
        return row("static", machine_speed=times, **changes)

    table = arms_table([watched(20.0), watched(30.0)])
    assert (table.headings[-1], column(table, "cores ms")) == ("cores ms", ["50"])
    assert "timed beside each load while no server ran" in table.caption
    assert column(arms_table([watched(20.0, output_tokens=2)]), "cores ms") == ["400"]
    assert "cores ms" not in arms_table([watched(20.0), row("static")]).headings


def test_loads_in_turn_are_compared_with_their_neighbours():
    # The machine gets slower; metro is 10, 20, 30 and 40 % ahead.
    drift = [(100.0, 90.0), (200.0, 160.0), (300.0, 210.0), (400.0, 240.0)]
    measured = [
        row(arm, tpot_ms=tpot_ms, repeat=repeat, in_turns=True)
        for repeat, pair in enumerate(drift)
        for arm, tpot_ms in zip(("static", "metro"), pair, strict=True)
    ]
    table = arms_table(measured)
    assert column(table, "TPOT against static") == [
        "+0.0% (+0.0 to +0.0)",
        "-25.0% (-32.5 to -17.5)",
    ]
    assert "Ratios are of loads in turn on one server of each arm" in table.caption
    assert column(arms_table(measured[:4]), "TPOT against static") == ["+0.0%", "-16.7%"]


def test_in_several_rounds_in_turn_the_neighbour_is_of_the_same_round():
    # The second round's machine takes twice as long; its arms are started in the other order.
    rounds = [
        (position, arm, scale * tpot_ms)
        for scale, positions in ((1, {"static": 0, "metro": 1}), (2, {"metro": 2, "static": 3}))
        for (arm, position), tpot_ms in zip(sorted(positions.items()), (90.0, 100.0), strict=True)
    ]
    measured = [
        row(arm, tpot_ms=tpot_ms, position=position, repeat=repeat, in_turns=True)
        for position, arm, tpot_ms in rounds
        for repeat in range(2)
    ]
    table = arms_table(measured)
    found = dict(zip(column(table, "arm"), column(table, "TPOT against static"), strict=True))
    assert found["metro"] == "-10.0% (-10.0 to -10.0)"
    assert "in turn on 2 servers of each arm" in table.caption


def test_an_arm_of_several_redundancies_is_compared_with_the_base_of_its_own():
    arms = {"static": 100.0, "eplb 1.25": 120.0, "metro 1.25": 90.0, "eplb 1.5": 200.0}
    table = arms_table([row(arm, tpot_ms=ms) for arm, ms in (arms | {"metro 1.5": 100.0}).items()])
    assert column(table, "arm") == ["static", "eplb 1.25", "metro 1.25", "eplb 1.5", "metro 1.5"]
    assert column(table, "TPOT against eplb") == ["-", "+0.0%", "-25.0%", "+0.0%", "-50.0%"]
    assert column(table, "TPOT against static") == ["+0.0%", "+20.0%", "-10.0%", "+100.0%", "+0.0%"]


def test_with_few_tokens_the_first_one_is_compared():
    few = [
        row("static", output_tokens=2),
        row("metro", output_tokens=2).model_copy(update={"ttft_ms": row(tpot_ms=50.0).ttft_ms}),
    ]
    table = arms_table(few)
    assert column(table, "TTFT against static") == ["+0.0%", "-50.0%"]
    assert column(table, "TTFT ms, lowest to highest") == ["1000 to 1000", "500 to 500"]
    assert table.headings[3:6] == ["TTFT ms", "p99", "prompt tokens/s"]
    assert table.headings[6] == "experts on the worst rank"
    assert [line[3:6] for line in table.body] == [["1000", "1490", "100"], ["500", "745", "100"]]
    assert column(table, "memory GiB") == ["3.0", "3.0"]


def test_a_run_that_has_loads_with_many_tokens_too_keeps_all_columns():
    mixed = [row("static", load="prefill", output_tokens=2), row("static", load="decode")]
    headings = arms_table(mixed).headings
    assert headings[2] == "TTFT or TPOT against static"
    assert headings[4:7] == ["TPOT ms", "p99", "ITL p99 ms"]
    assert "prompt tokens/s" not in headings


def test_ratios_stay_within_a_case_and_a_load():
    varied = [
        row(arm, tpot_ms=tpot_ms * factor, case=case, load=load)
        for case, factor in (("TP2", 1), ("DP2", 3))
        for arm, tpot_ms in (("static", 100.0), ("metro", 80.0))
        for load in ("batch 1", "batch 8")
    ]
    table = arms_table(varied)
    assert table.headings[:3] == ["case", "load", "arm"]
    assert [line[:3] for line in table.body[:4]] == [
        ["TP2", "batch 1", "static"],
        ["TP2", "batch 1", "metro"],
        ["TP2", "batch 8", "static"],
        ["TP2", "batch 8", "metro"],
    ]
    assert column(table, "TPOT against static") == ["+0.0%", "-20.0%"] * 4
    assert "TPOT against eplb" not in table.headings


def test_an_arm_without_its_base_in_that_case_has_no_ratio():
    table = arms_table([row("static", case="a"), row("metro", case="b")])
    assert column(table, "TPOT against static") == ["+0.0%", "-"]


def test_groups_keep_the_order_of_measuring_and_lose_no_row():
    found = grouped(rows())
    assert list(found) == [("", "", arm) for arm in ("static", "eplb", "metro")]
    assert sum(map(len, found.values())) == len(rows())


def slo_rows():
    """static and metro keep the SLO at 8 at once, eplb nowhere.

    At 100 ms static is half way from 10 to 30 tokens/s, metro from 20 to 40; eplb is above it.
    """
    goodputs = {"static": {8: 2.0, 16: 1.0}, "eplb": {8: 0.0, 16: 0.0}, "metro": {8: 2.0, 16: 3.0}}
    tpots_ms = {"static": {8: 90.0, 16: 110.0}, "eplb": {8: 120.0, 16: 150.0}}
    tokens_per_s = {"static": {8: 10.0, 16: 30.0}, "metro": {8: 20.0, 16: 40.0}}
    return [
        row(
            arm,
            load=f"{n}",
            concurrency=n,
            slo_tpot_ms=100.0,
            goodput_per_s=goodput,
            tpot_ms=tpots_ms.get(arm, tpots_ms["static"])[n],
            tokens_per_s=tokens_per_s.get(arm, {}).get(n, 5.0),
        )
        for arm, by_load in goodputs.items()
        for n, goodput in by_load.items()
    ]


def test_throughput_within_the_slo_is_the_most_of_concurrencies_that_keep_it():
    table = slo_table.table(slo_rows())
    assert [line[:6] for line in table.body] == [
        ["static", "10.0", "8", "90.0", "1 of 1", "2.00"],
        ["eplb", "-", "-", "-", "-", "-"],
        ["metro", "20.0", "8", "90.0", "1 of 1", "2.00"],
    ]
    assert column(table, "tokens/s at 100 ms") == ["20.0", "-", "30.0"]
    assert column(table, "tokens/s at 200 ms") == ["-", "-", "-"]
    assert column(table, "against static") == ["+0.0%", "-", "+50.0%"]
    assert column(table, "against eplb") == ["-", "-", "-"]
    assert "within 100 ms" in table.caption


def test_a_concurrency_is_within_the_slo_by_its_median_and_says_how_often_it_was():
    tpots_ms = {
        ("static", 1): (70.0, 66.0),
        ("static", 8): (164.0, 145.0),
        ("metro", 8): (154.0, 144.0),
    }
    table = slo_table.table(
        [
            row(arm, load=f"{n}", concurrency=n, slo_tpot_ms=150.0, tpot_ms=ms, position=turn)
            for (arm, n), times in tpots_ms.items()
            for turn, ms in enumerate(times)
        ]
    )
    assert [line[2:5] for line in table.body] == [["1", "68.0", "2 of 2"], ["8", "149.0", "1 of 2"]]


def test_requests_within_the_slo_are_those_that_the_client_counted_at_that_concurrency():
    heading = "requests/s within the SLO, by vLLM's client"
    counted = [
        row("static", load="8", concurrency=8, slo_tpot_ms=100.0, tpot_ms=90.0, goodput_per_s=rate)
        for rate in (1.5, 0.0, 1.0)
    ]
    assert column(slo_table.table(counted), heading) == ["1.00"]
    assert column(slo_table.table([counted[0], row("metro", slo_tpot_ms=100.0)]), heading) == [
        "1.50",
        "-",
    ]


def test_a_slowed_rank_is_a_table_of_end_to_end_latencies():
    slowed = [
        row(arm, load="prefill", tpot_ms=tpot_ms * slow, slow=slow, slow_shown=1 + (slow - 1) * 0.9)
        for slow in (1.0, 1.16)
        for arm, tpot_ms in (("static", 100.0), ("eplb", 110.0), ("gem", 90.0))
    ]
    (table,) = tables(slowed)
    assert table.headings == [
        *("load", "asked", "shown", "static ms", "eplb ms", "gem ms"),
        *("gem against static", "gem against eplb"),
    ]
    assert table.body[0] == ["prefill", "+0%", "+0.0%", "7300", "8030", "6570", "-10.0%", "-18.2%"]
    assert table.body[1][:3] == ["prefill", "+16%", "+14.4%"]
    assert table.command.endswith("--traces DIR")
    assert [load for _, load, arm in grouped(slowed) if arm == "gem"] == [
        "prefill",
        "prefill, one rank +16%",
    ]


def test_a_server_whose_memory_was_fragmented_is_named():
    whole, half = (row("static", huge_page_share=share) for share in (1.0, 0.5))
    assert "huge pages" not in arms_table([whole, row("eplb")]).caption
    assert "Only 50% of the expert weights lay in huge pages" in arms_table([whole, half]).caption


def test_cases_of_a_slowed_rank_have_lines_of_their_own():
    slowed = [
        row(arm, case=case, tpot_ms=tpot_ms, slow=1.16)
        for case, gem_ms in (("rank 0", 80.0), ("rank 1", 95.0))
        for arm, tpot_ms in (("static", 100.0), ("gem", gem_ms))
    ]
    table = slow_table(slowed)
    assert column(table, "case") == ["rank 0", "rank 1"]
    assert column(table, "gem against static") == ["-20.0%", "-5.0%"]


def test_an_arm_that_a_run_did_not_come_to_has_no_latency():
    measured = [
        row(arm, tpot_ms=tpot_ms, slow=slow)
        for slow, arms in ((1.0, ("static", "gem")), (1.16, ("static",)), (1.28, ("gem",)))
        for arm, tpot_ms in (("static", 100.0), ("gem", 90.0))
        if arm in arms
    ]
    table = slow_table(measured)
    assert column(table, "static ms") == ["7300", "7300", "-"]
    assert column(table, "gem ms") == ["6570", "-", "6570"]
    assert column(table, "gem against static") == ["-10.0%", "-", "-"]


@pytest.mark.parametrize(("own", "count"), [(rows, 1), (slo_rows, 2)])
def test_a_run_with_an_slo_has_one_table_more(own, count):
    assert len(tables(own())) == count
    assert tables(own())[-1] == arms_table(own())


def test_loads_of_every_kind_in_turn_are_compared_end_to_end():
    loads = (("decode", 20), ("prefill", 2))
    in_turn = [
        row(arm, load=load, output_tokens=tokens, in_turns=True)
        for load, tokens in loads
        for arm in ("static", "gem")
    ]
    assert main_table(in_turn) == slow_table(in_turn)
    decode = [each for each in in_turn if each.load == "decode"]
    assert main_table(decode) == arms_table(decode)
