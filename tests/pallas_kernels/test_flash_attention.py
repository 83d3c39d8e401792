import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernel_oracles as oracles
from helpers.kernel_backends import ON_GPU, jitted, pairs
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.specs import FLASH_ATTENTION_SPECS

TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


@pytest.mark.parametrize(("name", "spec"), pairs("flash_attention", FLASH_ATTENTION_SPECS))
def test_packed_attention_matches_a_float64_oracle_and_reads_no_key_of_another_row(name, spec):
    q, k, v, query_starts, key_starts = spec.inputs()
    options = {"return_lse": True, "aligned": spec.align > 1, **spec.options}
    out, lse = jitted(flash_attention, name, **options)(q, k, v, query_starts, key_starts)
    lengths = np.diff(key_starts)
    table = key_starts[:-1, None] + np.arange(lengths.max())
    pages = (array[:, :, None] for array in (k, v))
    expected = oracles.attention_and_log_sums(q, *pages, table, lengths, query_starts, **spec.options)
    assert out.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=0, atol=TOLERANCE[spec.heads.dtype])
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], rtol=1e-5, atol=1e-5)
    if not ON_GPU and name != "reference":
        assert not get_races().races_found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((5, 32))}, r"need q\[T, N, H\] and k\[S, K, H\], none empty; got \(5, 32\)"),
        ({"v": jnp.zeros((7, 1, 32))}, r"k float32\[7, 2, 32\] and v float32\[7, 1, 32\] must agree"),
        ({"q": jnp.zeros((5, 3, 32))}, r"\(5, 3, 32\) does not fit .*\(7, 2, 32\)"),
        ({"key_starts": jnp.zeros(4, jnp.int32)}, r"key_starts must be i32\[R \+ 1\], R at least 1, got int32\[4\]"),
        ({"sinks": jnp.zeros(3)}, r"sinks must be f32\[N\] = f32\[4\], got float32\[3\]"),
        ({"window": 0}, "window must be None or at least 1"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(changes, message):
    k = jnp.zeros((7, 2, 32))
    right = {"q": jnp.zeros((5, 4, 32)), "k": k, "v": k, "query_starts": jnp.zeros(3, jnp.int32), "scale": 0.1}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(right | changes))
