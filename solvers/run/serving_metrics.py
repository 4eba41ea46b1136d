"""Prometheus metrics of an `Engine`, in a registry of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from fewstep.solvers.locks import lock
from fewstep.solvers.options import needs

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

OUTCOMES = ("finished", "failed", "cancelled", "expired", "refused")

# Seconds: from a step of a small network to a sample of a large one that waited.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class _Histogram:
    """Plain numbers: an observation of prometheus_client's own costs several times as much, and a tick has four.

    counts  of the observations up to each bound and above the one before; the last are above all bounds
    """

    def __init__(self, name: str, what: str, bounds: Sequence[float]) -> None:
        self.name, self.what, self.bounds = f"fewstep_{name}", what, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """The engine's counters, gauges and histograms, made into Prometheus's when they are asked for. On a GPU, times are
    those of the host.

    Raises ImportError, with the command that adds it, without `prometheus-client`.
    """

    registry: CollectorRegistry

    def __init__(self, places: int, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        needs("Engine.metrics", "prometheus_client", extra="serve")
        from prometheus_client import CollectorRegistry

        def seconds(name: str, what: str) -> _Histogram:
            return _Histogram(f"{name}_seconds", what, _SECONDS)

        self._gauges: list[tuple[str, str, Callable[[], int]]] = [
            ("fewstep_places", "Places of the batch", lambda: places),
            ("fewstep_active", "Requests in a place", active),
            ("fewstep_waiting", "Requests in the queue", waiting),
        ]
        # All at 0 from the start: a dashboard of a fresh server has them, too.
        self._settled, self._lock = dict.fromkeys(OUTCOMES, 0), lock()  # settled by any thread
        self._ticks = self._calls = 0
        self._occupancy = _Histogram(
            "occupancy", "Share of the places that were active in a tick", [(i + 1) / 8 for i in range(8)]
        )
        self._queue = seconds("queue", "From arrival to a place")
        self._latency = seconds("request", "From arrival to the sample")
        self._tick = seconds("tick", "A whole tick")
        self._network = seconds("network", "The network's part of a tick")
        self._step = seconds("step", "The rest of a tick: solver, conditions, results")
        self._places = places
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def placed(self, waited: float) -> None:
        self._queue.observe(waited)

    def ticked(self, active: int, seconds: float, network: float) -> None:
        self._ticks += 1
        self._calls += active
        self._occupancy.observe(active / self._places)
        self._tick.observe(seconds)
        self._network.observe(network)
        self._step.observe(seconds - network)

    def settled(self, outcome: str, seconds: float) -> None:
        """outcome: finished, failed, cancelled, expired or refused (by a full queue)."""
        with self._lock:
            self._settled[outcome] += 1
            if outcome == "finished":
                self._latency.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """For the registry: all values are floats, as those of prometheus_client's own metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily("fewstep_requests", "Requests by how they ended", labels=["outcome"])
        for outcome, count in self._settled.items():
            requests.add_metric([outcome], float(count))
        yield requests
        yield CounterMetricFamily("fewstep_ticks", "Ticks, each of them one stage of every request", float(self._ticks))
        yield CounterMetricFamily("fewstep_calls", "Calls of the network for one request each", float(self._calls))
        for name, what, now in self._gauges:
            yield GaugeMetricFamily(name, what, float(now()))
        for each in (self._occupancy, self._queue, self._latency, self._tick, self._network, self._step):
            bounds = [*map(str, each.bounds), "+Inf"]
            buckets = [*zip(bounds, map(float, accumulate(each.counts)), strict=True)]
            yield HistogramMetricFamily(each.name, each.what, buckets, each.sum)
