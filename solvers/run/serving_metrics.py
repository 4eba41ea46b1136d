"""Prometheus metrics of an `Engine`, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fewstep.solvers.options import needs

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OUTCOMES = ("finished", "failed", "cancelled", "expired", "refused")

# Seconds: from a step of a small network to a sample of a large one that waited.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The engine's counters, gauges and histograms. On a GPU, times are those of the host.

    Raises ImportError, with the command that adds it, without `prometheus-client`.
    """

    registry: CollectorRegistry

    def __init__(self, places: int, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        needs("Engine.metrics", "prometheus_client", extra="serve")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        self._settled = Counter(
            "fewstep_requests", "Requests by how they ended", ["outcome"], registry=registry
        )  # fmt: skip
        for outcome in OUTCOMES:  # at 0 from the start: a dashboard of a fresh server has them, too
            self._settled.labels(outcome)
        self._ticks = Counter("fewstep_ticks", "Ticks, each of them one stage of every request", registry=registry)
        self._calls = Counter("fewstep_calls", "Calls of the network for one request each", registry=registry)
        Gauge("fewstep_places", "Places of the batch", registry=registry).set(places)
        Gauge("fewstep_active", "Requests in a place", registry=registry).set_function(active)
        Gauge("fewstep_waiting", "Requests in the queue", registry=registry).set_function(waiting)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"fewstep_{name}_seconds", what, buckets=_SECONDS, registry=registry)

        self._occupancy = Histogram(
            "fewstep_occupancy", "Share of the places that were active in a tick",
            buckets=[(i + 1) / 8 for i in range(8)], registry=registry,
        )  # fmt: skip
        self._queue = seconds("queue", "From arrival to a place")
        self._latency = seconds("request", "From arrival to the sample")
        self._tick = seconds("tick", "A tick, all told")
        self._network = seconds("network", "The network's part of a tick")
        self._step = seconds("step", "The rest of a tick: solver, conditions, results")
        self._places = places

    def placed(self, waited: float) -> None:
        self._queue.observe(waited)

    def ticked(self, active: int, seconds: float, network: float) -> None:
        self._ticks.inc()
        self._calls.inc(active)
        self._occupancy.observe(active / self._places)
        self._tick.observe(seconds)
        self._network.observe(network)
        self._step.observe(seconds - network)

    def settled(self, outcome: str, seconds: float) -> None:
        """outcome: finished, failed, cancelled, expired or refused (by a full queue)."""
        self._settled.labels(outcome).inc()
        if outcome == "finished":
            self._latency.observe(seconds)
