"""Routed experts over the GPUs of one host: every device sees every token, or tokens are sent to their experts.

One layer of the shape of Qwen3-30B-A3B (or --shape), tokens dealt out over the devices as attention data does. Ways:
`sum` (gather all tokens, sum over all devices), `ragged` (lax.ragged_all_to_all) and `dense` (padded all-to-all), each
whole and as the exchange alone. Routing is by a random router, or `hot`: half of all choices fall on the first device's
experts. Microseconds a layer: a chain of layers in one jit, long minus short; each way's result is compared with `sum`.

    python -m benchmarks.expert_exchange 4 --tokens 8,32,128,1024,8192 --out FILE.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.tensor_parallel import model_of
from jaxllm.graph.layers.moe import MoE
from jaxllm.graph.models.config import ModelConfig
from sharding.axes import MeshConfig
from sharding.collectives import AttentionData
from sharding.dispatch import Dispatch, choose, moved
from sharding.mesh import stage_meshes
from sharding.placement import Placement

SHORT, LONG = 2, 10
WAYS = ("sum", "ragged", "dense")
rows: list[dict[str, Any]] = []


def say(**row: Any) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


def leaves_of(placement: Placement, model: ModelConfig) -> tuple[Any, dict[str, jax.Array], dict[str, P]]:
    """One layer's experts, random and made where they lie, how a module is made of them, and their specs."""
    assert model.experts is not None
    graphdef, shapes = nnx.split(MoE(model, dataclasses.replace(model.experts, shared_d_ff=0), jnp.bfloat16, None))
    axes = {"experts_gate_up": ("expert", "gate_up", "embed"), "experts_down": ("expert", "embed", "ffn")}
    pure, made, specs = nnx.to_pure_dict(shapes), {}, {}
    for number, (name, leaf) in enumerate(sorted(pure.items())):
        specs[name] = placement.spec(axes.get(name, (None, None)))
        spread = 0.3 if name == "router" else leaf.shape[-1] ** -0.5
        fill = lambda key, leaf=leaf, spread=spread: (spread * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)  # noqa: E731
        made[name] = jax.jit(fill, out_shardings=NamedSharding(placement.mesh, specs[name]))(jax.random.key(number))
    return graphdef, made, specs


def exchange_of(way: str, placement: Placement, tokens: int) -> AttentionData:
    found = placement.exchange(tokens, decode=tokens <= 256)
    assert isinstance(found, AttentionData)
    dispatch = None if way == "sum" else Dispatch(placement.config.expert, ragged=way == "ragged")
    return dataclasses.replace(found, dispatch=dispatch)


def layer(graphdef: Any, exchange: AttentionData, leaves: Any, x: jax.Array) -> jax.Array:
    return x + nnx.merge(graphdef, leaves)(x, exchange)


def alone(graphdef: Any, exchange: AttentionData, leaves: Any, x: jax.Array) -> jax.Array:
    """The exchange without the experts: what comes is sent back as it is."""
    if exchange.dispatch is None:
        return x + exchange.far(exchange.near(x))
    module = nnx.merge(graphdef, leaves)
    slots, weights = module._choose(x)
    parcel, sent = exchange.dispatch.send(x, slots, weights, module.experts_gate_up[...].shape[0])
    return x + exchange.dispatch.back(parcel.tokens, sent)


def microseconds(placement: Placement, one: Any, leaves: Any, specs: Any, x: jax.Array) -> tuple[float, np.ndarray]:
    """A link of a chain, and one layer's result."""

    def chain(count: int) -> Any:
        def run(leaves: Any, x: jax.Array) -> jax.Array:
            scale = jnp.asarray(0.7, x.dtype)  # keeps a chain finite
            return functools.reduce(lambda x, _: one(leaves, x) * scale, range(count), x)

        mapped = jax.shard_map(
            run, mesh=placement.mesh, in_specs=(specs, P("expert")), out_specs=P("expert"), check_vma=False
        )
        return jax.jit(mapped)

    result = np.asarray(chain(1)(leaves, x), np.float32)
    seconds = []
    for count in (SHORT, LONG):
        run = chain(count)
        for _ in range(2):
            jax.block_until_ready(run(leaves, x))
        times = []
        for _ in range(15):
            start = time.perf_counter()
            jax.block_until_ready(run(leaves, x))
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return (seconds[1] - seconds[0]) / (LONG - SHORT) * 1e6, result


def measure(placement: Placement, model: ModelConfig, total: int, hot: bool) -> None:
    n, experts = placement.config.expert, model.experts
    assert experts is not None
    graphdef, leaves, specs = leaves_of(placement, model)
    if hot:  # the first device's experts are liked by all tokens that have a positive first number: half of them
        liked = (jnp.arange(experts.count, dtype=jnp.int32) < experts.count // n)[:, None]
        leaves["router"] = leaves["router"].at[:, :1].set(jnp.where(liked, 8.0, 0.0).astype(jnp.bfloat16))
    share = max(1, -(-total // n))
    x = jax.jit(
        lambda key: jax.random.normal(key, (share * n, model.d_model)).astype(jnp.bfloat16),
        out_shardings=NamedSharding(placement.mesh, P("expert")),
    )(jax.random.key(7))
    rule = choose("auto", share, n, experts.per_token, 2 * model.d_model)
    wanted = None
    for way in WAYS:
        exchange = exchange_of(way, placement, share)
        row = {"devices": n, "tokens": share * n, "way": way, "hot": hot, "auto": rule.all_to_all}
        try:
            whole, got = microseconds(placement, functools.partial(layer, graphdef, exchange), leaves, specs, x)
            bare, _ = microseconds(placement, functools.partial(alone, graphdef, exchange), leaves, specs, x)
        except Exception as error:  # one way's failure is a finding, not the end of the run
            say(**row, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        wanted = got if wanted is None else wanted
        apart = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        say(**row, us=round(whole, 1), exchange_us=round(bare, 1), apart_from_sum=apart, why=rule.why)


def moves(placement: Placement, model: ModelConfig) -> None:
    """How long a layer's experts take to be moved, all of them."""
    _, leaves, specs = leaves_of(placement, model)
    n, total = placement.config.expert, leaves["experts_down"].shape[0]
    source = jax.device_put(np.roll(np.arange(total, dtype=np.int32), total // n), placement.whole)
    names = ("experts_gate_up", "experts_down")
    body = lambda a, b, s: (moved(a, s, "expert", n), moved(b, s, "expert", n))  # noqa: E731
    into = tuple(specs[name] for name in names)
    run = jax.jit(jax.shard_map(body, mesh=placement.mesh, in_specs=(*into, P()), out_specs=into, check_vma=False))
    parts = [leaves[name] for name in names]
    got = jax.block_until_ready(run(*parts, source))
    same = bool((np.asarray(got[1][0]) == np.asarray(parts[1][int(source[0])])).all())
    start = time.perf_counter()
    jax.block_until_ready(run(*parts, source))
    say(devices=n, what="move all experts of a layer", ms=round((time.perf_counter() - start) * 1e3, 2), same_bits=same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", type=int)
    parser.add_argument("--tokens", default="1,8,32,128,1024,8192")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--small", action="store_true", help="a layer that a CPU can do, to try this program")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = model_of(options.shape)
    if options.small and model.experts is not None:
        small = dataclasses.replace(model.experts, count=16, d_ff=32)
        model = dataclasses.replace(model, d_model=64, experts=small)
    config = MeshConfig(expert=options.devices, attention_data=True)
    placement = Placement(stage_meshes(config)[0][0], config, model)
    for total in map(int, options.tokens.split(",")):
        for hot in (False, True) if total >= 1024 else (False,):
            measure(placement, model, total, hot)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))
    moves(placement, model)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
