"""Progress in logs, and durations."""

import logging

import pytest

from dsmoe_jax import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "1 min 30 s"), (3900, "1 h 5 min"), (float("inf"), "unknown time")],
)
def test_durations_have_two_units(seconds: float, text: str):
    assert progress.duration(seconds) == text


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
