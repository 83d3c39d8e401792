"""MFU and MBU of each phase over the last seconds, from the engine's counters and its device's peak (docs/metrics.md).

In: heartbeats. Out: two gauges with a phase label; none for a phase without a step in that time, and none at all where
the device's peak is not known. Knows nothing of how work is counted (jaxllm.engine.utilisation does).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

WINDOW_S = 10.0
PHASES = ("prefill", "decode")
SHARES = {
    "mfu": ("flops", "share of the device's peak arithmetic while steps of the phase ran"),
    "mbu": ("bytes", "share of the device's peak memory bandwidth while steps of the phase ran"),
}


class Utilisation(Collector):
    def __init__(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """`facts`: of the engine's start; peaks are those of all devices that a step runs on."""
        self._facts = facts
        self._seen: deque[tuple[float, Mapping[str, float]]] = deque()

    def beat(self, stats: Mapping[str, float], now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        seen = self._seen
        if seen and stats.get("steps", 0) < seen[-1][1].get("steps", 0):
            seen.clear()  # another engine: it counts from zero
        seen.append((now, stats))
        while len(seen) > 2 and seen[1][0] <= now - WINDOW_S:
            seen.popleft()

    def share(self, phase: str, what: str) -> float | None:
        """Work done over work possible."""
        peak = self._facts().get(f"peak_{what}_per_s")
        if peak is None or len(self._seen) < 2:
            return None
        first, last = self._seen[0][1], self._seen[-1][1]
        seconds, work = (last.get(f"{phase}_{name}", 0) - first.get(f"{phase}_{name}", 0) for name in ("step_s", what))
        return work / (seconds * peak) if seconds > 0 else None

    def collect(self) -> Iterable[Metric]:
        for name, (what, text) in SHARES.items():
            found = {phase: self.share(phase, what) for phase in PHASES}
            gauge = GaugeMetricFamily(f"jaxllm_{name}", text, labels=["phase"])
            for phase, value in found.items():
                if value is not None:
                    gauge.add_metric([phase], value)
            if gauge.samples:
                yield gauge
