"""Numbers for Prometheus, one registry for each app."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("ubmoe_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "ubmoe_request_seconds",
            "From request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram("ubmoe_batch_texts", "Texts embedded together.", buckets=_TEXTS, registry=registry)
        self._embedded = Counter("ubmoe_embedded_tokens", "Tokens embedded.", registry=registry)
        self._generated = Counter("ubmoe_generated_tokens", "Tokens generated.", registry=registry)
        self.queue = Gauge("ubmoe_waiting_texts", "Texts that wait to be embedded.", registry=registry)
        self.running = Gauge("ubmoe_running_generations", "Texts being generated.", registry=registry)
        self.waiting = Gauge("ubmoe_waiting_generations", "Requests that wait to generate.", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, texts: int, tokens: int) -> None:
        """A batch was embedded."""
        self._batches.observe(texts)
        self._embedded.inc(tokens)

    def generated(self, tokens: int) -> None:
        """A text was generated."""
        self._generated.inc(tokens)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
