"""Kernels on a GPU, one table: ours, the XLA reference, cuDNN and JAX's own, with the share of what the card can do.

In: nothing but a GPU. Out: a table on the terminal, and kernels.json and kernels.md in --out. Every implementation is
first compared with the reference on the ops' hostile specs. Times are of calls chained inside one jitted function (so
captured in one CUDA graph); decode calls share lengths and table and have pages of their own, as the layers of a step,
more of them than the L2 cache holds; each is the best of a few
repetitions on the host's clock. The two ceilings (read-only reduce, bf16 matrix product) are measured in the same run.

    python -m benchmarks.kernels --out benchmarks/results [--only decode|ragged] [--match TEXT,TEXT] [--commit HASH]
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import implementations
from pallas_kernels.flash_attention import api as flash_api
from pallas_kernels.flash_attention.specs import FLASH_ATTENTION_SPECS
from pallas_kernels.paged_attention import api, specs

N, K, H = 32, 8, 128  # Llama-3.1-8B's heads
CHAIN_BYTES = 3e9  # what a chain of calls reads: many times the L2
DECODE = [
    (B, S, page)
    for B, S in ((8, 1024), (1, 8192), (32, 1024), (128, 1024), (32, 8192), (1, 32768))
    for page in (16, 64)
]
BARS = {  # issue 3: TB/s for decode, TFLOP/s for the rest; ours only
    ("paged_attention.decode", "8x1024"): 2.6,
    ("paged_attention.decode", "1x8192"): 2.3,
    ("paged_attention.decode", "32x1024"): 3.6,
    ("paged_attention.decode", "128x1024"): 4.0,
    ("paged_attention.decode", "32x8192"): 4.2,
    ("paged_attention.decode", "1x32768"): 3.6,
    ("paged_attention", "4x4096"): 600,
    ("paged_attention", "1x16384"): 640,
    ("paged_attention", "2k over 16k"): 480,  # 80% of the dense rate's bar
    ("paged_attention", "mixed lengths"): 540,  # 90%
    ("paged_attention", "1x16384 H64"): 479,
    ("paged_attention", "1x16384 H256"): 680,
}
RAGGED = {
    "4x4096": ([(4096, 4096)] * 4, 32, 8, 128),
    "1x16384": ([(16384, 16384)], 32, 8, 128),
    "2k over 16k": ([(2048, 18432)], 32, 8, 128),
    "mixed lengths": ([(1000, 1000), (3000, 5001), (4096, 4096), (777, 9000), (2048, 2048)], 32, 8, 128),
    "1x16384 H64": ([(16384, 16384)], 32, 8, 64),
    "1x16384 H80": ([(16384, 16384)], 32, 8, 80),
    "1x16384 H96": ([(16384, 16384)], 32, 8, 96),
    "1x16384 H256": ([(16384, 16384)], 16, 4, 256),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    shape: str
    implementation: str
    microseconds: float
    rate: float  # TB/s of the pages' bytes that must be read, or TFLOP/s of the products that must be computed
    share: float  # of the ceiling measured in the same run
    bar: float | None = None  # what the issue asks for, in the rate's unit


@dataclass(frozen=True)
class Job:
    """A compiled chain of calls, how to make its arguments, and the work of one call."""

    op: str
    shape: str
    implementation: str
    compiled: Future[Any]
    make: Callable[[], tuple[Any, ...]]
    calls: int
    work: float
    repeat: int


@dataclass(frozen=True)
class Ceilings:
    read_TBps: float
    matmul_TFLOPs: float


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...], repeat: int) -> float:
    jax.block_until_ready(run(*arguments))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(repeat)][-1])
        best = min(best, (time.perf_counter() - start) / repeat)
    return best


def ceilings() -> Ceilings:
    ones = jnp.ones((1 << 31,), jnp.bfloat16)
    read = ones.nbytes / seconds(jax.jit(jnp.max), (ones,), 20)
    del ones
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = 2 * 8192**3 / seconds(jax.jit(jnp.matmul), (square, square), 20)
    return Ceilings(read / 1e12, product / 1e12)


def check(pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Relative error of every GPU implementation against the reference, on every spec it accepts."""
    found, waiting = [], []
    suites: tuple[tuple[str, Callable[..., Any], tuple[Any, ...]], ...] = (
        ("paged_attention", api.paged_attention, specs.PAGED_ATTENTION_SPECS),
        ("paged_attention.decode", api.paged_attention_decode, specs.PAGED_ATTENTION_DECODE_SPECS),
        ("flash_attention", flash_api.flash_attention, FLASH_ATTENTION_SPECS),
    )
    for op, call, cases in suites:
        for spec in cases:
            arrays = spec.inputs()
            if op.endswith("decode"):
                q = np.zeros((len(arrays[4]), *arrays[0].shape[1:]), arrays[0].dtype)
                q[arrays[4] > 0] = arrays[0]
                arrays = (q, *arrays[1:5])
            compiled = {}
            for each in implementations(op, "gpu"):
                line = {"op": op, "spec": spec.name, "implementation": each.name}
                run = jax.jit(functools.partial(call, implementation=each.name, **spec.options))
                try:
                    compiled[each.name] = pool.submit(run.lower(*arrays).compile)
                except NotImplementedError as reason:
                    found.append({**line, "declined": str(reason)})
            waiting.append((op, spec.name, arrays, compiled))
    for op, name, arrays, compiled in waiting:
        results = {each: np.asarray(run.result()(*arrays), np.float32) for each, run in compiled.items()}
        *ours, reference = results
        expected = results[reference]
        for each in ours:
            error = float(np.linalg.norm(results[each] - expected) / (np.linalg.norm(expected) or 1.0))
            zeros = bool((results[each][expected == 0] == 0).all())
            found.append(
                {"op": op, "spec": name, "implementation": each, "error": error, "good": zeros and error < 1e-2}
            )
    return found


def table_of(rows: list[tuple[int, int]], page_size: int, P: int, seed: int = 0) -> np.ndarray:
    needed = [-(-length // page_size) for _, length in rows]
    table = np.full((len(rows), max(needed)), 2**30, np.int32)
    pages = np.random.default_rng(seed).permutation(P)
    for r, count in enumerate(needed):
        table[r, :count], pages = pages[:count], pages[count:]
    return table


class Bench:
    """Collects jobs (lowered at once, compiled side by side) and then times them one by one."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(12)
        self.jobs: list[Job] = []

    def add(
        self,
        names: tuple[str, str, str],
        chain: Callable[..., Any],
        make: Callable[[], tuple[Any, ...]],
        calls: int,
        work: float,
        repeat: int,
    ) -> None:
        try:
            lowered = jax.jit(chain).lower(*jax.eval_shape(make))
        except NotImplementedError as reason:
            print(f"{' '.join(names)}: declined: {reason}")
            return
        self.jobs.append(Job(*names, self.pool.submit(lowered.compile), make, calls, work, repeat))

    def run(self, ceilings: Ceilings) -> list[Row]:
        rows = []
        for job in self.jobs:
            try:
                arguments = job.make()
                each = seconds(job.compiled.result(), arguments, job.repeat) / job.calls
            except Exception as error:  # a baseline that fails must not cost the rest of the table
                print(f"{job.op} {job.shape} {job.implementation}: failed: {str(error)[:300]}", flush=True)
                continue
            rate = job.work / each / 1e12
            ceiling = ceilings.read_TBps if job.op.endswith("decode") else ceilings.matmul_TFLOPs
            ours = job.implementation in ("mosaic_sm90", "triton")
            bar = BARS.get((job.op, job.shape.partition(" page")[0])) if ours else None
            rows.append(Row(job.op, job.shape, job.implementation, each * 1e6, rate, rate / ceiling, bar))
            print(line(rows[-1]), flush=True)
            del arguments
        return rows

    def decode(self, B: int, S: int, page_size: int) -> None:
        work = 2.0 * B * S * K * H * 2
        calls = int(max(2, min(16, CHAIN_BYTES // work)))
        pages = B * S // page_size

        def make(dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
            keys = jax.random.split(jax.random.key(0), 2 * calls + 1)
            pools = [
                tuple(jax.random.normal(key, (pages, K, page_size, H), jnp.bfloat16).astype(dtype) for key in pair)
                for pair in zip(keys[1::2], keys[2::2], strict=True)
            ]
            order = np.random.default_rng(0).permutation(pages).reshape(B, -1).astype(np.int32)
            q = jax.random.normal(keys[0], (B, N, H), jnp.bfloat16)
            return q, pools, jnp.asarray(order), jnp.full((B,), S, jnp.int32)

        shape = f"{B}x{S} page {page_size}"
        names = "paged_attention.decode", shape
        ones = jnp.ones((K,), jnp.float32)
        for each in implementations("paged_attention.decode", "gpu"):
            repeat = 3 if "reference" in each.name else 20
            call = jax.jit(functools.partial(api.paged_attention_decode, scale=H**-0.5, implementation=each.name))
            self.add((*names, each.name), _layers(call), make, calls, work, repeat)
            if "reference" not in each.name:
                scaled = functools.partial(call, k_scale=ones, v_scale=ones)
                narrow = functools.partial(make, jnp.float8_e4m3fn)
                self.add((names[0], f"{shape} e4m3", each.name), _layers(scaled), narrow, calls, work / 2, repeat)
        self._jax_decode(names, make, calls, work)

    def _jax_decode(self, names: tuple[str, str], make: Callable[[], tuple[Any, ...]], calls: int, work: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu import paged_attention as theirs

        def make_theirs() -> tuple[Any, ...]:
            q, pools, *rest = make()
            return q, [tuple(each.swapaxes(0, 1) for each in pair) for pair in pools], *rest

        def call(q: Any, *arrays: Any) -> Any:
            return theirs.paged_attention(q * H**-0.5, *arrays, k_splits=8)

        self.add((*names, "jax.experimental"), _layers(call), make_theirs, calls, work, 10)

    def ragged(self, label: str, rows: list[tuple[int, int]], N: int, K: int, H: int, page_size: int) -> None:
        T, calls = -(-sum(count for count, _ in rows) // 8) * 8, 3  # a step's tokens are a bucket's, with padding
        P = sum(-(-length // page_size) for _, length in rows)
        work = float(sum(4 * N * H * (count * (length - count) + count * count / 2) for count, length in rows))

        def make() -> tuple[Any, ...]:
            keys = jax.random.split(jax.random.key(0), 3)
            # Values of standard deviation 16: outputs, which are the next call's queries, stay far from 0.
            return (
                jax.random.normal(keys[0], (T, N, H), jnp.bfloat16),
                jax.random.normal(keys[1], (P, K, page_size, H), jnp.bfloat16),
                jax.random.normal(keys[2], (P, K, page_size, H), jnp.bfloat16) * 16,
                jnp.asarray(table_of(rows, page_size, P)),
                jnp.asarray([length for _, length in rows], jnp.int32),
                jnp.asarray(np.cumsum([0] + [count for count, _ in rows]), jnp.int32),
            )

        def make_narrow() -> tuple[Any, ...]:
            q, k, v, *rest = make()
            return q, k.astype(jnp.float8_e4m3fn), v.astype(jnp.float8_e4m3fn), *rest

        names = "paged_attention", f"{label} page {page_size}"
        for each in implementations("paged_attention", "gpu"):
            call = functools.partial(api.paged_attention, scale=H**-0.5, implementation=each.name)
            repeat = 1 if "reference" in each.name else 5
            self.add((*names, each.name), _chained(call, calls), make, calls, work, repeat)
            if "reference" not in each.name and page_size == 64:
                ones = jnp.ones((K,), jnp.float32)
                scaled = functools.partial(call, k_scale=ones, v_scale=ones)
                lse = functools.partial(call, return_lse=True)
                self.add((names[0], f"{label} lse", each.name), _chained(lse, calls), make, calls, work, repeat)
                if H <= 128:
                    self.add(
                        (names[0], f"{label} e4m3", each.name),
                        _chained(scaled, calls),
                        make_narrow,
                        calls,
                        work,
                        repeat,
                    )

    def flash(self, label: str, rows: list[tuple[int, int]], N: int, K: int, H: int, aligned: bool) -> None:
        """Packed keys without pages, of rows that are all their own keys; read in place if `aligned`, else copied."""
        T, calls = sum(count for count, _ in rows), 3
        work = float(sum(4 * N * H * count * count / 2 for count, _ in rows))

        def make() -> tuple[Any, ...]:
            keys = jax.random.split(jax.random.key(0), 3)
            return (
                jax.random.normal(keys[0], (T, N, H), jnp.bfloat16),
                jax.random.normal(keys[1], (T, K, H), jnp.bfloat16),
                jax.random.normal(keys[2], (T, K, H), jnp.bfloat16) * 16,
                jnp.asarray(np.cumsum([0] + [count for count, _ in rows]), jnp.int32),
            )

        call = functools.partial(
            flash_api.flash_attention, scale=H**-0.5, aligned=aligned, implementation="mosaic_sm90"
        )
        names = "flash_attention", f"{label}{'' if aligned else ' copied'}", "mosaic_sm90"
        self.add(names, _chained(call, calls), make, calls, work, 5)

    def cudnn(self, label: str, B: int, T: int, N: int, K: int, H: int) -> None:
        def make() -> tuple[Any, ...]:
            keys = jax.random.split(jax.random.key(0), 3)
            return (
                jax.random.normal(keys[0], (B, T, N, H), jnp.bfloat16),
                jax.random.normal(keys[1], (B, T, K, H), jnp.bfloat16),
                jax.random.normal(keys[2], (B, T, K, H), jnp.bfloat16) * 16,
            )

        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

        def chain(q: Any, k: Any, v: Any) -> Any:
            return functools.reduce(lambda q, _: attend(q, k, v), range(3), q)

        self.add(("paged_attention", f"{label} dense", "cudnn"), chain, make, 3, 4.0 * B * N * H * T * T / 2, 5)


def _chained(call: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Each call's outputs are the next one's queries; log-sum-exps are kept, so that they are computed."""

    def chain(q: Any, *rest: Any) -> Any:
        kept = []
        for _ in range(calls):
            found = call(q, *rest)
            q = found[0] if isinstance(found, tuple) else found
            kept += [found[1].max()] if isinstance(found, tuple) else []
        return q, kept

    return chain


def _layers(call: Callable[..., Any]) -> Callable[..., Any]:
    """Calls of one step: each has pages of its own, and its queries are the outputs of the one before."""
    return lambda q, pools, table, lens: functools.reduce(lambda q, pair: call(q, *pair, table, lens), pools, q)


def line(row: Row) -> str:
    unit = "TB/s" if row.op.endswith("decode") else "TFLOP/s"
    bar = "" if row.bar is None else f"{row.bar:g} {'met' if row.rate >= row.bar else 'missed'}"
    return (
        f"| {row.op} | {row.shape} | {row.implementation} | {row.microseconds:.1f} | {row.rate:.4g} {unit} "
        f"| {row.share:.0%} | {bar} |"
    )


def write(out: Path, rows: list[Row], checks: list[dict[str, Any]], ceilings: Ceilings, commit: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit, **asdict(ceilings)}
    data = {"machine": machine, "checks": checks, "rows": [asdict(row) for row in rows]}
    (out / "kernels.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = [
        f"{machine['device']}, jax {machine['jax']}, commit {commit}, `python -m benchmarks.kernels`: read-only reduce "
        f"{ceilings.read_TBps:.2f} TB/s, bf16 8192^3 product {ceilings.matmul_TFLOPs:.0f} TFLOP/s.",
        "",
        "| op | shape | implementation | us a call | rate | share of ceiling | bar |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(line, rows),
        "",
        f"Worst relative error against the reference over the specs: "
        f"{max((each['error'] for each in checks if 'error' in each), default=0.0):.1e}.",
    ]
    (out / "kernels.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("decode", "ragged"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--match", default="", help="only shapes whose label holds one of these, separated by commas")
    options = parser.parse_args()
    wanted = options.match.split(",")
    bench = Bench()
    checks = check(bench.pool)
    bad = [each for each in checks if each.get("good") is False]
    for each in bad:
        print("WRONG", each)
    print(f"{len(checks)} checks against the reference, {len(bad)} wrong", flush=True)
    if options.only != "ragged":
        for B, S, page_size in DECODE:
            if any(text in f"{B}x{S}" for text in wanted):
                bench.decode(B, S, page_size)
    if options.only != "decode":
        for label, (rows, *heads) in RAGGED.items():
            if not any(text in label for text in wanted):
                continue
            bench.ragged(label, rows, *heads, page_size=64)
            if label in ("4x4096", "1x16384"):
                bench.ragged(label, rows, *heads, page_size=16)
            if all(count == length for count, length in rows):  # what cuDNN and packed keys can do
                bench.cudnn(label, len(rows), rows[0][0], *heads)
                for aligned in (True, False):
                    bench.flash(label, rows, *heads, aligned=aligned)
    measured = ceilings()
    print(measured, flush=True)
    write(options.out, bench.run(measured), checks, measured, options.commit)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
