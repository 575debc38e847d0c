"""Progress in logs, and numbers as text."""

import logging

import pytest

from dsmoe_jax import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "1 min 30 s"), (3900, "1 h 5 min"), (float("inf"), "unknown time")],
)
def test_durations_have_two_units(seconds: float, text: str):
    assert progress.duration(seconds) == text


def test_sizes_have_three_digits_and_a_prefix():
    sizes = {0: "0 bytes", 999: "999 bytes", 999.6: "1 kB", 54_120_000: "54.1 MB", 8.16e18: "8.16 EB", 1e30: "1e+06 YB"}

    assert {size: progress.byte_size(size) for size in sizes} == sizes
    assert progress.with_prefix(1.6069e10, "FLOP") == "16.1 GFLOP"


def test_nouns_have_their_plural():
    assert [progress.plural(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
    assert [progress.plural(n, "token") for n in (0, 1, 2000)] == ["0 tokens", "1 token", "2,000 tokens"]


def test_logs_have_the_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), progress.logged("requests", 100) as advance:
        for _ in range(20):
            now += 6.0
            advance(1)

    assert [record.message for record in caplog.records] == [
        "requests: 10 of 100, 9 min 0 s left",
        "requests: 20 of 100, 8 min 0 s left",
    ]
