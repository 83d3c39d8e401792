"""What the engine counts, as plain numbers. Names end in their unit; rates and exposition formats are made elsewhere.

In: increments by the scheduler and the engine. Out: attributes. Knows nothing of Prometheus, HTTP or clocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from jaxllm.core import FinishReason


@dataclass
class Metrics:
    # Counters: they only grow.
    steps: int = 0
    dispatches: int = 0  # of steps: fewer where several decode steps went in one
    scheduled_tokens: int = 0  # computed on the device, recomputation included
    prompt_tokens: int = 0  # of admitted sequences, once each
    generated_tokens: int = 0
    prefix_query_tokens: int = 0  # prompt tokens looked up in the prefix cache, once a sequence
    prefix_hit_tokens: int = 0
    evicted_pages: int = 0
    preemptions: int = 0
    compiles_after_ready: int = 0  # anything but 0 is a defect
    exposed_host_s: float = 0.0  # upper bound on the time the device waited for the host between steps in a row
    # Of steps, by phase; see engine.utilisation.
    prefill_step_s: float = 0.0
    prefill_flops: float = 0.0
    prefill_bytes: float = 0.0
    decode_step_s: float = 0.0
    decode_flops: float = 0.0
    decode_bytes: float = 0.0
    expert_rebalances: int = 0  # arrangements of routed experts that were changed
    moved_experts: int = 0  # slots that got another expert, by layer
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    # Gauges: the state after the last step.
    running: int = 0
    waiting: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    held_pages: int = 0
    expert_imbalance: float = 0.0  # measured: the fullest device's tokens over the mean; 0 = not measured

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0

    def as_dict(self) -> dict[str, float]:
        """Flat, for printing and for exposition: finished reasons become finished_stop, finished_length ..."""
        flat: dict[str, float] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                flat |= {f"{item.name}_{key}": count for key, count in value.items()}
            else:
                flat[item.name] = value
        return flat
