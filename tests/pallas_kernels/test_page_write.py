import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import jitted, pairs

from pallas_kernels.page_write.api import page_write
from pallas_kernels.page_write.specs import PAGE_WRITE_SPECS


@pytest.mark.parametrize(("name", "spec"), pairs("page_write", PAGE_WRITE_SPECS))
def test_every_token_lands_in_its_slot_and_nothing_else_changes(name, spec):
    *pools, k, v, slots = spec.inputs()
    expected = [pool.copy() for pool in pools]
    for pool, tokens in zip(expected, (k, v), strict=True):
        for t, slot in enumerate(slots):
            if 0 <= slot < spec.P * spec.page_size:
                pool[slot // spec.page_size, :, slot % spec.page_size] = tokens[t].astype(pool.dtype)
    got = jitted(page_write, name)(*pools, k, v, slots)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize(("name", "spec"), pairs("page_write", PAGE_WRITE_SPECS[5:6]))
def test_scaled_pages_hold_the_nearest_multiple_the_largest_where_that_is_exceeded_and_nan(name, spec):
    k = np.zeros((3, 2, 32), np.float32)
    k[:, :, :4] = 1.2, -1e30, np.nan, 2.0**-12
    scales = np.array([1.0, 4.0], np.float32), np.array([0.5, 2.0], np.float32)
    pages = jnp.zeros((2, 2, 16, 32), jnp.float8_e4m3fn)
    slots = jnp.array([3, 17, -1], jnp.int32)
    options = {"k_scale": jnp.asarray(scales[0]), "v_scale": jnp.asarray(scales[1])}
    for pool, scale in zip(jitted(page_write, name, **options)(pages, pages, k, k, slots), scales):
        held = np.asarray(pool[:, :, [3, 1]], np.float32)[[0, 1], :, [0, 1], :4]  # [slot, head]
        wanted = np.stack([[1.25, -448 * s, np.nan, 0.0] for s in scale])
        np.testing.assert_array_equal(held[0] * scale[:, None], wanted)
        np.testing.assert_array_equal(held[1] * scale[:, None], wanted)
        assert np.asarray(pool.view(jnp.uint8) != 0).any(axis=-1).sum() == 4


@pytest.mark.parametrize(("name", "spec"), pairs("page_write", PAGE_WRITE_SPECS[:1]))
def test_donated_pages_are_written_in_place(name, spec):
    arrays = spec.inputs()
    write = jax.jit(lambda *a: page_write(*a, implementation=name), donate_argnums=(0, 1))
    memory = write.lower(*arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes == arrays[0].nbytes + arrays[1].nbytes
    assert memory.temp_size_in_bytes < arrays[0].nbytes / 4  # no copy of a pool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_pages": jnp.zeros((3, 2, 4, 32))}, r"must agree as \[P, K, page_size, H\].*float32\[3, 2, 4, 32\]"),
        ({"k": jnp.zeros((5, 2, 16))}, r"k and v must agree as \[T, 2, 32\].*got float32\[5, 2, 16\]"),
        ({"v": jnp.zeros((4, 2, 32))}, r"k and v must agree.*float32\[4, 2, 32\]"),
        ({"k_scale": jnp.ones(2)}, "k_scale goes with float8_e4m3fn pages and only with them; pages are float32"),
        ({"slots": jnp.zeros(4, jnp.int32)}, r"slots must be i32\[T\] = i32\[5\], got int32\[4\]"),
        ({"slots": jnp.zeros(5, jnp.uint32)}, r"got uint32\[5\]"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(changes, message):
    arguments = {
        "k_pages": jnp.zeros((3, 2, 8, 32)),
        "v_pages": jnp.zeros((3, 2, 8, 32)),
        "k": jnp.zeros((5, 2, 32)),
        "v": jnp.zeros((5, 2, 32)),
        "slots": jnp.zeros(5, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        page_write(**(arguments | changes))
