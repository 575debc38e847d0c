"""Metrics in the format of Prometheus: `Metrics`. Names and buckets are those of vLLM, with the prefix `dsmoe`."""

import collections
import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_WINDOW: Final = 10.0  # seconds of `generation_tokens_per_second`
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_TOTAL: Final = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Metrics:
    """Counters, gauges and histograms of one server; the thread of the engine updates most of them."""

    def __init__(self) -> None:
        """Create metrics in a registry of their own."""
        self.registry = CollectorRegistry()
        gauge = lambda name, text: Gauge(f"dsmoe_{name}", text, registry=self.registry)  # noqa: E731
        counter = lambda name, text: Counter(f"dsmoe_{name}", text, registry=self.registry)  # noqa: E731
        self.running = gauge("num_requests_running", "Outputs in a row of the batch.")
        self.waiting = gauge("num_requests_waiting", "Outputs waiting for a row of the batch.")
        self.tokens_per_second = gauge(
            "generation_tokens_per_second", f"Output tokens, mean of the last {_WINDOW:g} s."
        )
        self.kv_cache_bytes = gauge("kv_cache_bytes", "Size of the KV cache of the batch.")
        self.kv_cache_usage = gauge("kv_cache_usage_ratio", "Fraction of its slots that hold a token.")
        self.prefix_cache_bytes = gauge("prefix_cache_bytes", "Size of the retained prefixes.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, read or reused.")
        self.reused_tokens = counter("prefix_cache_hit_tokens", "Prompt tokens whose keys and values were reused.")
        self.generation_tokens = counter("generation_tokens", "Output tokens.")
        self.scored_tokens = counter("scored_tokens", "Prompt tokens that were scored.")
        self.finished = Counter("dsmoe_outputs_finished", "Outputs by reason.", ["reason"], registry=self.registry)
        self.responses = Counter("dsmoe_http_responses", "Responses.", ["path", "status"], registry=self.registry)
        histogram = lambda name, text, buckets: Histogram(  # noqa: E731
            f"dsmoe_{name}_seconds", text, buckets=buckets, registry=self.registry
        )
        self.first_token = histogram("time_to_first_token", "From submission to the first token.", _FIRST)
        self.between_tokens = histogram("inter_token_latency", "Between two tokens of an output.", _BETWEEN)
        self.duration = histogram("e2e_request_latency", "From submission to the last token.", _TOTAL)
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def add_tokens(self, count: int, now: float) -> None:
        """Count output tokens."""
        self.generation_tokens.inc(count)
        self._recent.append((now, count))
        while self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def render(self) -> bytes:
        """Return the text format."""
        start = time.perf_counter() - _WINDOW
        self.tokens_per_second.set(sum(count for at, count in [*self._recent] if at >= start) / _WINDOW)
        return generate_latest(self.registry)
