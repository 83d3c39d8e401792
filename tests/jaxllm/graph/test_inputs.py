"""What the runner packs is what the step unpacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph.inputs import SampleRow, StepShape, pack, pack_samples, set_pages, unpack, unpack_samples

PAGE, PAGES, SCRATCH, WIDTH = 4, 32, 9, 3
LAST = jnp.arange(100, 110, dtype=jnp.int32)  # what each state row sampled last


def table_of(**rows):
    """i32[SCRATCH + 1, WIDTH]; poison where nothing was ever written."""
    table = np.full((SCRATCH + 1, WIDTH), PAGES - 1, np.int32)
    for name, pages in rows.items():
        table[int(name[3:]), : len(pages)] = pages
    return jnp.asarray(table)


def test_a_mixed_step_gives_every_token_its_position_and_slot():
    shape = StepShape(tokens=12, rows=4, decode=False)
    # Row 0: tokens 5..8 of a sequence in pages 7, 2, 9; row 1: its first token, in page 4; row 2: token 3, page 30.
    packed = pack(
        shape,
        [50, 51, -1 - 6, 53, 60, 70],  # the third is what state row 6 sampled last
        [4, 1, 1],
        [9, 1, 4],
        [6, SCRATCH, 2],
        [6, 5, 2],
        [(6 * WIDTH + 2, 9), (5 * WIDTH, 4)],
        SCRATCH,
    )
    table = table_of(row6=[7, 2], row2=[30])
    inputs, after = unpack(shape, jnp.asarray(packed), LAST, table, page_size=PAGE, num_pages=PAGES)
    dropped = PAGE * PAGES
    assert inputs.token_ids[:6].tolist() == [50, 51, 106, 53, 60, 70]
    assert inputs.state_rows.tolist() == [6, SCRATCH, 2, SCRATCH]
    assert inputs.positions.tolist() == [5, 6, 7, 8, 0, 3, *[0] * 6]
    assert inputs.slots.tolist() == [2 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 9 * 4, 4 * 4, 30 * 4 + 3, *[dropped] * 6]
    assert inputs.kv_lens.tolist() == [9, 1, 4, 0]
    assert inputs.query_starts.tolist() == [0, 4, 5, 6, 6]
    assert inputs.last_token.tolist() == [3, 4, 5, 5]
    np.testing.assert_array_equal(after, table_of(row6=[7, 2, 9], row5=[4], row2=[30]))
    np.testing.assert_array_equal(inputs.page_table, after[np.array([6, 5, 2, SCRATCH])])


def test_a_decode_step_has_one_token_a_row_and_drops_padding():
    shape = StepShape(tokens=4, rows=4, decode=True)
    packed = pack(shape, [11, -1], [1, 1], [6, 1], [3, 0], [3, 0], [(0, 8)], SCRATCH)
    table = table_of(row3=[3, 5])
    inputs, after = unpack(shape, jnp.asarray(packed), LAST, table, page_size=PAGE, num_pages=PAGES)
    assert inputs.token_ids.tolist() == [11, 100, 0, 0]
    assert inputs.state_rows.tolist() == [3, 0, SCRATCH, SCRATCH]
    assert inputs.positions.tolist() == [5, 0, 0, 0]
    assert inputs.slots.tolist() == [5 * 4 + 1, 8 * 4, PAGE * PAGES, PAGE * PAGES]
    assert inputs.query_starts is None
    assert inputs.last_token is None
    np.testing.assert_array_equal(after, table_of(row3=[3, 5], row0=[8]))


@pytest.mark.parametrize("decode", [True, False])
def test_a_step_that_brings_nothing_leaves_the_table_as_it_is(decode):
    shape = StepShape(tokens=4, rows=4, decode=decode)
    packed = pack(shape, [1], [1], [1], [0], [0], [], SCRATCH)
    table = table_of(row0=[1])
    np.testing.assert_array_equal(unpack(shape, packed, LAST, table, page_size=PAGE, num_pages=PAGES)[1], table)


def test_a_whole_row_of_the_table_is_set_at_one_time():
    table = table_of(row1=[1, 2, 3], row2=[4])
    set_to = set_pages(table, jnp.array([2]), jnp.array([9, 8, 7]))
    np.testing.assert_array_equal(set_to, table_of(row1=[1, 2, 3], row2=[9, 8, 7]))


@pytest.mark.parametrize("decode", [True, False])
def test_no_kernel_is_given_a_slice_of_the_packed_integers(decode):
    shape = StepShape(tokens=4, rows=4, decode=decode)
    packed, last_tokens, table = (
        jax.ShapeDtypeStruct(each, jnp.int32) for each in ((shape.packed_size,), (5,), (5, 2))
    )

    def read(packed, last_tokens, table):
        inputs, _ = unpack(shape, packed, last_tokens, table, page_size=4, num_pages=8)
        return inputs.kv_lens, inputs.page_table

    traced = jax.make_jaxpr(read)(packed, last_tokens, table)
    barriers = [each for each in traced.eqns if each.primitive.name == "optimization_barrier"]
    behind = {variable for each in barriers for variable in each.outvars}
    assert set(traced.jaxpr.outvars) <= behind


def test_sampling_columns_travel_bit_for_bit():
    rows = [
        SampleRow(row=3, key0=2**32 - 1, key1=2**31, position=7, top_k=40, temperature=0.7, top_p=0.9, presence=-2.0),
        SampleRow(row=0, min_p=0.05, frequency=1.5, repetition=1.1),
    ]
    columns = unpack_samples(jnp.asarray(pack_samples(4, rows, scratch_row=9)))
    assert columns["row"].tolist() == [3, 0, 9, 9]
    assert np.asarray(columns["key0"]).view(np.uint32).tolist() == [2**32 - 1, 0, 0, 0]
    assert np.asarray(columns["key1"]).view(np.uint32).tolist() == [2**31, 0, 0, 0]
    for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition"):
        expected = [getattr(row, name) for row in [*rows, SampleRow(9), SampleRow(9)]]
        np.testing.assert_array_equal(columns[name], np.array(expected, np.float32))
