"""Our CUDA kernels as a model's steps want them: libraries that are built on the first machine that has nvcc.

In: how weights are stored and over how many devices. Out: nothing; builds go on in threads while
weights are read, so that a first start waits for the longest of them and not for all. Knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Callable

from pallas_kernels.all_reduce import cuda as all_reduce
from pallas_kernels.compiled import prepare
from pallas_kernels.decode_attention import cuda as decode_attention
from pallas_kernels.decode_chain import cuda as decode_chain
from pallas_kernels.decode_layers import cuda as decode_layers
from pallas_kernels.decode_layers import launched as launched_layers
from pallas_kernels.decode_layers import wide as wide_layers
from pallas_kernels.gated_matmul import cuda as gated_matmul
from pallas_kernels.sampling import cuda as sampling

# By the name of the custom call: built, or found built, when a kept step that calls one is read.
_ALONE = decode_attention, decode_chain, wide_layers, launched_layers, gated_matmul, sampling
LIBRARIES = {each.TARGET: each for each in _ALONE} | {each.target: each for each in decode_layers.KINDS.values()}
PLAIN = "bf16"


def wanted(weights: str, devices: int) -> list[Callable[[], object]]:
    """What builds them, of weights stored as jaxllm.config's `quantization` names it."""
    kind = PLAIN if weights == "none" else weights
    found: list[Callable[[], object]] = [decode_attention.library, sampling.library]
    if kind in decode_layers.KINDS:
        found.append(decode_layers.KINDS[kind].library)
    if kind == PLAIN:
        found += [wide_layers.library, launched_layers.library, decode_chain.library, gated_matmul.library]
    return [*found, all_reduce.library] if devices > 1 else found


def begin(platform: str, dtype: str, weights: str, devices: int) -> None:
    """Builds what is not built yet, in the background."""
    if platform == "gpu" and dtype == "bfloat16":
        prepare(wanted(weights, devices))
