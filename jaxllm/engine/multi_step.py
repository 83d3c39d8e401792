"""How many decode steps go into one dispatch (graph.multi_step), and why no more.

In: the resolved config, what a step costs, the device. Out: the config with that number in it. Several steps pay where
the device is done with one before the host has launched the next: a step's floor tells which models those are. They
cost the start a few executables, an arriving request the rest of a dispatch, and a sequence that ends that of its row.
"""

from __future__ import annotations

import dataclasses
import logging

from jaxllm.config import AUTO, EngineConfig
from jaxllm.graph.compile import FEW_ROWS, MULTI_STEP_ROWS
from pallas_kernels.roofline import StepCost, peak_of

log = logging.getLogger(__name__)
STEPS = 4  # where it pays: the host's turn is then shared by so many
# Floor of a step that the host's turn may outlast: that takes up to 1.5 ms, and steps reach half their floor.
SHORT_S = 2e-3
CONTEXT = 1024  # tokens of each row, for the floor


def with_decode_steps(config: EngineConfig, cost: StepCost, device_kind: str) -> EngineConfig:
    """`config` is resolved otherwise."""
    asked = config.scheduler.decode_steps
    steps, why = _decided(config, cost, device_kind)
    told = log.warning if asked not in (AUTO, steps) else log.info
    told("decode steps in one dispatch: %d, as %s", steps, why)
    return dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, decode_steps=steps))


def _decided(config: EngineConfig, cost: StepCost, device_kind: str) -> tuple[int, str]:
    asked, mesh = config.scheduler.decode_steps, config.mesh
    few = [rows for rows in config.compile.decode_buckets if rows <= MULTI_STEP_ROWS]
    if asked == 1:
        return 1, "configured"
    if config.scheduler.deterministic:
        return 1, "deterministic mode computes every step with one executable"
    if not few:
        return 1, f"no decode bucket has {MULTI_STEP_ROWS} rows or fewer"
    alone = {"pipe": mesh.pipe > 1, "seq": mesh.seq > 1, "attention_data": mesh.attention_data}
    for name, used in (alone | {"experts that move": mesh.balances}).items():
        if used:
            return 1, f"a mesh with {name} goes step by step"
    if asked != AUTO:
        return asked, "configured"
    rows = max((each for each in few if each <= FEW_ROWS), default=few[0])
    floor_s = _floor_s(cost, rows, min(CONTEXT, config.model.max_model_len), device_kind, mesh.tensor * mesh.expert)
    if floor_s is None:
        return 1, f"nothing is known of the speed of {device_kind}"
    said = f"the floor of a step of {rows} rows is {floor_s * 1e3:.2f} ms"
    return (STEPS if floor_s < SHORT_S else 1), said


def _floor_s(cost: StepCost, rows: int, context: int, device_kind: str, devices: int) -> float | None:
    peak = peak_of(device_kind)
    if peak is None:
        return None
    keys = [rows * min(context, window or context) for window, _ in cost.windows]
    work = cost(rows, rows, [(count, count) for count in keys], decode=True)
    return max(work.bytes / peak.bytes_per_s, work.flops / peak.bf16_flops_per_s) / devices
