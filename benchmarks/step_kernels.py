"""Which kernels a step launches, layer by layer, counted without a GPU: XLA's own list of a compiled step.

In: a shape of configs/models, decode or mixed, rows or tokens. Out: on the terminal, the kernels of one layer in the
middle and how many the step has besides. Compiled for an H200 from its textual description (tools/gate.py), without
autotuning: which products become which kernel is a guess here, what lies between them is not. Needs a venv with
jax[cuda13] and flax; no driver, no GPU.

    python -m benchmarks.step_kernels llama-3.1-8b decode 1 [--parts]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools import gate

LAYERS, PAGES, PAGE_SIZE, WIDTH, MOST_ROWS = 3, 4096, 16, 512, 256
SHAPES = Path(__file__).parent.parent / "configs" / "models"


def model_of(shape: str, **changes: Any) -> Any:
    from jaxllm.graph.models.config import ModelConfig

    return ModelConfig.from_hf(tomllib.loads((SHAPES / f"{shape}.toml").read_text()) | changes, file=shape)


@contextlib.contextmanager
def abstract_h200() -> Iterator[None]:
    """What is lowered inside is lowered for that card, with its kernels."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from pallas_kernels import dispatch

    dispatch.current_platform = lambda: "gpu"  # of the machine that this is compiled for
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    ):
        yield


def compile_step(shape: str, kind: str, size: int, *, parts: bool) -> None:
    """Leaves XLA's dump where the flags say."""
    import jax
    import jax.numpy as jnp

    from jaxllm.graph import steps
    from jaxllm.graph.inputs import StepShape
    from jaxllm.graph.models.decoder import abstract

    config = model_of(shape, num_hidden_layers=LAYERS)
    graphdef, params = abstract(config)
    graph = steps.Graph(graphdef, config, PAGE_SIZE, PAGES, parts=parts)
    decode = kind == "decode"
    step = StepShape(size, size if decode else MOST_ROWS, decode)
    pages = jax.ShapeDtypeStruct((PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((step.rows, config.vocab_size), jnp.float32)
    sizes = (MOST_ROWS + 1, WIDTH), (MOST_ROWS + 1,), (step.packed_size,)
    table, last_tokens, packed = (jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes)
    arguments: Any = params, [(pages, pages)] * config.num_layers, table, last_tokens, logits, packed
    arguments = jax.tree.map(functools.partial(gate.placed, gate.sharding()), arguments)
    function = functools.partial(steps.step, graph, step)
    with abstract_h200():
        jax.jit(function, donate_argnums=(1, 2, 3, 4), keep_unused=True).lower(*arguments).compile()


def kernels(dump: Path) -> list[str]:
    """Names in the order of launches."""
    found = max(dump.glob("*jit_step.thunk_sequence.txt"), key=lambda path: path.stat().st_size)
    lines = (re.match(r"\s*\d+: (\w+)\s*\[[^\]]*\]\s*(\S*)", line) for line in found.read_text().splitlines())
    return [match.group(2) or match.group(1) for match in lines if match]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("kind", choices=("decode", "mixed"))
    parser.add_argument("size", type=int)
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step_") as directory:
        gate.prepare(directory)
        compile_step(args.shape, args.kind, args.size, parts=args.parts)
        names = kernels(Path(directory))
    calls = [place for place, name in enumerate(names) if name == "kCustomCall"]  # a layer's first is attention
    each = len(calls) // LAYERS
    layer = names[calls[each] : calls[2 * each]]  # from one attention to the next
    besides = len(names) - LAYERS * len(layer)
    print(f"{args.shape} {args.kind} {args.size}: {len(layer)} kernels a layer, {besides} besides")
    print("\n".join(f"  {name}" for name in layer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
