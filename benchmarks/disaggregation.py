"""Prefill and decode on devices of their own: what moving pages costs, and whether prompts are felt between tokens.

    python -m benchmarks.disaggregation bandwidth llama-3.1-8b 16,64,128    # GB/s by page size, device to device
    python -m benchmarks.disaggregation bandwidth llama-3.1-8b 64 --host    # the same through this host's memory
    python -m benchmarks.disaggregation itl build/llama-3.1-8b              # p50/p99 gap, idle and loaded
    python -m benchmarks.disaggregation itl build/llama-3.1-8b --role none  # the same load on one engine

`bandwidth`: pages of all layers out of one cache and into another, as the engine moves them (blocks of up to 64 pages,
so many layers at a time, a limit on what is under way); the host's clock from the first call to the last page in place.
`itl`: `batch` sequences of 1024 tokens decode; then, without a pause, prompts of the given length arrive so that
`pressure` of them are always unfinished, each for one token. Gaps are between tokens of one sequence, as its listener
gets them. Lines are JSON; --out keeps them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import load
from jaxllm.core import SamplingParams, Sequence
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.disagg.prefill import PrefillSide
from jaxllm.engine.disagg.startup import start_role
from jaxllm.graph.kv_cache import KVCacheSpec, allocate
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.page_move import Layout, PagePutter, PageTaker

CONTEXT, SKIP = 1024, 20
rows: list[dict[str, Any]] = []


def say(**row: Any) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


# ---- bandwidth ----


def spec_of(shape: str, page_size: int, tokens: int) -> KVCacheSpec:
    path = Path(__file__).parent.parent / "configs" / "models" / f"{shape}.toml"
    model = ModelConfig.from_hf(tomllib.loads(path.read_text()))
    dtype = jnp.dtype(jnp.bfloat16)
    return KVCacheSpec(model.num_layers, model.num_kv_heads, model.head_dim, page_size, tokens // page_size, dtype)


def bandwidth(shape: str, page_size: int, at_once: int, under_way: int, tokens: int, *, host: bool) -> None:
    spec = spec_of(shape, page_size, tokens)
    source, target = (allocate(spec.shapes(jax.sharding.SingleDeviceSharding(device))) for device in jax.devices()[:2])
    layouts = [None if host else Layout.of(kv, spec.num_kv_heads) for kv in (source, target)]
    take = PageTaker.compiled(source, spec.num_kv_heads, at_once, layouts[1], most=64)
    put = PagePutter.compiled(target, spec.num_kv_heads, at_once, layouts[0], most=64)
    order = np.random.default_rng(0).permutation(spec.num_pages).tolist()

    def carry(block: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(block) if host else block, put.block)

    def all_pages() -> None:
        nonlocal target
        waiting: list[tuple[range, jax.Array, list[int]]] = []
        for first in range(0, len(order), take.sizes[-1]):
            pages = order[first : first + take.sizes[-1]]
            for layers in take.groups:
                waiting.append((layers, carry(take(source, layers, pages)), pages))
                while len(waiting) > under_way:
                    group, block, places = waiting.pop(0)
                    target = put(target, group, block.block_until_ready(), places)
        for group, block, places in waiting:
            target = put(target, group, block, places)
        jax.block_until_ready(target)

    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        all_pages()
        seconds.append(time.perf_counter() - began)
    num_bytes, best = spec.num_pages * spec.bytes_per_page, min(seconds[1:])
    say(
        what="bandwidth",
        through="host" if host else "devices",
        shape=shape,
        page_size=page_size,
        layers_at_once=at_once,
        blocks_under_way=under_way,
        block_mib=round(at_once * 64 * spec.bytes_per_page / spec.num_layers / 2**20, 1),
        gib=round(num_bytes / 2**30, 2),
        ms=round(best * 1e3, 2),
        gb_per_s=round(num_bytes / best / 1e9, 1),
        us_a_block=round(best * 1e6 / len(take.groups) / -(-spec.num_pages // 64), 1),
    )
    for array in jax.tree.leaves((source, target)):
        array.delete()


# ---- gaps between tokens ----


class Gaps:
    """Drives an engine and notes when each sequence's tokens come."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.last: dict[Sequence, float] = {}
        self.watched: set[Sequence] = set()
        self.gaps: list[float] = []
        self.turns: list[float] = []
        self.parts: dict[str, list[float]] = {}  # of a turn: where the host's time goes
        if isinstance(engine, DisaggregatedEngine):
            side = engine.prefill
            for owner, name in ((engine.decode, "step"), (side, "_launch"), (side, "_take"), (side, "_collect")):
                setattr(owner, name, self._timed(name.strip("_"), getattr(owner, name)))
            engine.put = self._timed("put", engine.put)
            if isinstance(side, PrefillSide) and side.feeder is not None:  # in its thread
                side.feeder.runner.launch = self._timed("fed", side.feeder.runner.launch)

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.parts.setdefault(name, []).append(time.perf_counter() - began)

        return timed

    def add(self, length: int, tokens: int, salt: int) -> Sequence:
        vocab = self.engine.model_config.vocab_size
        ids = np.random.default_rng(salt).integers(0, vocab, length).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return self.engine.add(self.engine.make_request(ids, params))[0]

    def step(self) -> None:
        began = time.perf_counter()
        outputs = self.engine.step()
        now = time.perf_counter()
        self.turns.append(now - began)
        for output in outputs:
            sequence = output.sequence
            if output.token_id is not None and sequence in self.watched:
                if sequence in self.last:
                    self.gaps.append(now - self.last[sequence])
                self.last[sequence] = now

    def summary(self) -> dict[str, Any]:
        gaps, turns = np.array(self.gaps[SKIP:]) * 1e3, np.array(self.turns) * 1e3
        found = {f"p{q}_ms": round(float(np.percentile(gaps, q)), 3) for q in (50, 90, 99)}
        parts = {name: np.percentile(times, (50, 99)) * 1e3 for name, times in self.parts.items()}
        found |= {f"{name}_p50_p99_ms": [*map(float, pair.round(2))] for name, pair in parts.items()}
        return {**found, "max_ms": round(float(gaps.max()), 3), "gaps": len(gaps), "turn_max_ms": round(turns.max(), 2)}

    def forget(self) -> None:
        self.gaps, self.turns, self.last = [], [], {}
        self.parts.clear()


def itl(engine: Any, batch: int, prompt: int, pressure: int, steps: int) -> None:
    gaps, salts = Gaps(engine), itertools.count(1000)
    decoding = [gaps.add(CONTEXT, 4 * steps + 400, salt) for salt in range(batch)]
    gaps.watched = set(decoding)
    while any(not sequence.num_output for sequence in decoding):
        gaps.step()
    gaps.forget()
    while len(gaps.gaps) < steps * batch:
        gaps.step()
    idle = gaps.summary()
    gaps.forget()
    filling: list[Sequence] = []
    done, began, moved = 0, time.perf_counter(), _moved(engine)
    while len(gaps.gaps) < steps * batch:
        before = len(filling)
        filling = [sequence for sequence in filling if not sequence.finished]
        done += before - len(filling)
        while len(filling) < pressure:
            filling.append(gaps.add(prompt, 1, next(salts)))
        gaps.step()
    seconds, loaded = time.perf_counter() - began, gaps.summary()
    for sequence in (*decoding, *filling):
        engine.abort(sequence.request.id)
    while engine.has_work:
        engine.step()
    engine.check()
    say(
        what="itl",
        role="both" if isinstance(engine, DisaggregatedEngine) else "none",
        batch=batch,
        prompt_tokens=prompt,
        pressure=pressure,
        idle=idle,
        loaded=loaded,
        p99_ratio=round(loaded["p99_ms"] / idle["p99_ms"], 3),
        prompts_per_s=round(done / seconds, 2),
        prefill_tokens_per_s=round(done * prompt / seconds),
        moved_gb_per_s=round((_moved(engine) - moved) / seconds / 1e9, 2),
    )


def _moved(engine: Any) -> float:
    return engine.prefill.stats()["transferred_bytes"] if isinstance(engine, DisaggregatedEngine) else 0.0


def settings_of(given: list[str]) -> Iterator[tuple[str, Any]]:
    for pair in given:
        name, _, value = pair.partition("=")
        yield name, tomllib.loads(f"value = {value}")["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bandwidth", "itl"))
    parser.add_argument("model", help="a shape of configs/models, or a model directory")
    parser.add_argument("pages", nargs="?", default="64", help="bandwidth: page sizes")
    parser.add_argument("--layers", default="8", help="bandwidth: layers at once, several with commas")
    parser.add_argument("--under-way", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--batch", default="8,32")
    parser.add_argument("--prompts", default="2048")
    parser.add_argument("--pressure", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--role", default="both", choices=("both", "none"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    say(device=jax.devices()[0].device_kind, devices=jax.device_count(), jax=jax.__version__)
    if given.what == "bandwidth":
        for page_size, layers in itertools.product(given.pages.split(","), given.layers.split(",")):
            bandwidth(given.model, int(page_size), int(layers), given.under_way, given.tokens, host=given.host)
    else:
        settings: dict[str, Any] = {"enable_prefix_caching": False} | dict(settings_of(given.set))
        config = load(model=given.model, load_format="dummy", role=given.role, **settings)
        engine, report = start_role(config)
        say(start=str(report))
        for batch, prompt in itertools.product(given.batch.split(","), given.prompts.split(",")):
            itl(engine, int(batch), int(prompt), given.pressure, given.steps)
    if given.out is not None:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
