"""Guesses of the next layer's experts: what is sent, and what the table says of it."""

from bench import look_ahead

NONE = dict.fromkeys(look_ahead.COUNTED, 0)


def row(how, **counted):
    base = {"slots": 2, "look_ahead": how, "schedules": 100, "ttft_ms": 50.0}
    return base | NONE | {"experts_us": 1000.0} | counted


def test_every_load_has_prompts_of_its_own():
    loads = look_ahead.prompts(seed=1)
    flat = [prompt for load in loads for prompt in load]
    assert len(loads) == look_ahead.LOADS
    assert {len(load) for load in loads} == {look_ahead.AT_ONCE}
    assert len(set(flat)) == len(flat)
    assert all(len(set(prompt.split())) == 1 for prompt in flat)


def test_the_table_adds_servers_of_an_arm_up():
    rows = [
        row("off", fetches=60, hits=40, fetched_bytes=600, wasted_bytes=300),
        row("router", fetches=10, early_fetches=40, hits=90, early_hits=30, fetched_bytes=500,
            wasted_bytes=100, fetch_wait_us=50.0, look_ahead_us=100.0),
        row("router", fetches=20, early_fetches=60, hits=80, early_hits=30, fetched_bytes=500,
            wasted_bytes=100, fetch_wait_us=150.0, look_ahead_us=100.0, ttft_ms=70.0),
    ]  # fmt: skip
    *_, off, router = look_ahead.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (off, router)]
    assert cells[0] == ["2", "off", "40.0%", "0.60", "0.00", "-", "50.0%", "0.0%", "0.0%", "50"]
    assert cells[1] == ["2", "router", "85.0%", "0.15", "0.50", "60.0%", "20.0%", "10.0%",
                        "10.0%", "60"]  # fmt: skip
