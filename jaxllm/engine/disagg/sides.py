"""One config as two: what the prefill side runs, and what the decode side runs. No JAX here.

In: an EngineConfig with a [disaggregation] table. Out: an EngineConfig without one for each side, or a ConfigError.
"""

from __future__ import annotations

import dataclasses

from jaxllm.config import AUTO, ConfigError, DisaggregationConfig, EngineConfig


def check(config: EngineConfig) -> None:
    """What pages cannot be moved between, yet."""
    for name in ("data", "pipe", "seq"):
        if getattr(config.mesh, name) > 1:
            raise ConfigError(
                f"mesh.{name} = {getattr(config.mesh, name)} with disaggregation.role = "
                f"{config.disaggregation.role!r}: pages move between a tensor x expert mesh on either side only; "
                f"leave mesh.{name} at 1"
            )


def decode_side(config: EngineConfig) -> EngineConfig:
    check(config)
    return dataclasses.replace(config, disaggregation=DisaggregationConfig())


def prefill_side(config: EngineConfig) -> EngineConfig:
    """Its decode buckets are one: it decodes nothing, and rows of a prefill step always take the largest."""
    check(config)
    own = config.disaggregation
    seqs = own.prefill_max_num_seqs or config.scheduler.max_num_seqs
    budget = own.prefill_token_budget or config.scheduler.token_budget
    if seqs and budget and budget < seqs:
        raise ConfigError(
            f"disaggregation.prefill_token_budget = {budget}: must be at least the prefill side's sequences ({seqs}): "
            "lower disaggregation.prefill_max_num_seqs"
        )
    same_budget = own.prefill_token_budget in (AUTO, config.scheduler.token_budget)
    return dataclasses.replace(
        config,
        disaggregation=DisaggregationConfig(),
        mesh=dataclasses.replace(config.mesh, tensor=own.prefill_tensor or config.mesh.tensor),
        model=dataclasses.replace(config.model, packed_weights=False),
        scheduler=dataclasses.replace(config.scheduler, max_num_seqs=seqs, token_budget=budget, decode_steps=1),
        cache=dataclasses.replace(config.cache, num_pages=own.prefill_num_pages or config.cache.num_pages),
        compile=dataclasses.replace(
            config.compile,
            decode_buckets=(seqs,) if seqs else (),
            token_buckets=config.compile.token_buckets if same_budget else (),
        ),
    )
