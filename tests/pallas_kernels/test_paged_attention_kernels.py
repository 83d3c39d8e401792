"""What the conformance suite cannot say of the GPU kernels: lowering without a GPU, races, bits, tiles, refusals."""

import functools
import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import tuning
from pallas_kernels.paged_attention import api, decode_sm90, interpreted, mosaic_sm90, reference, tiles, triton, units
from pallas_kernels.paged_attention.specs import PagedAttentionSpec
from tools import gate

cpu_only = pytest.mark.skipif(ON_GPU, reason="interpreters and cross-lowering are for machines without a GPU")


def h200():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


def abstract(rows, width, H, pages=jnp.bfloat16):
    pool = jax.ShapeDtypeStruct((64, 8, 64, H), pages)
    return (
        jax.ShapeDtypeStruct((rows, 32, H), jnp.bfloat16),
        pool,
        pool,
        jax.ShapeDtypeStruct((rows, width), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (abstract(32, 16, 128), {}),
        (abstract(256, 1024, 128), {}),
        (abstract(8, 16, 96), {"window": 700, "soft_cap": 30.0}),
        (abstract(8, 16, 128, jnp.float8_e4m3fn), {"k_scale": jnp.ones(8), "v_scale": jnp.ones(8)}),
    ],
    ids=["a program a split", "splits dealt out", "odd head dim, window, cap", "e4m3 pages"],
)
@cpu_only
def test_decode_lowers_to_triton_on_a_machine_without_a_gpu(arrays, options):
    decode = jax.jit(functools.partial(triton.paged_attention_decode, scale=0.1, **options))
    with h200(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend")
        text = decode.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


def decode_inputs(lengths, **changes):
    rows = tuple((1, length) for length in lengths)
    spec = PagedAttentionSpec(**({"name": "rows", "N": 8, "K": 2, "H": 64, "rows": rows} | changes))
    return spec, spec.inputs()[:5]


def bits(array):
    return np.asarray(array).view(np.uint16)


@cpu_only
@pytest.mark.parametrize("changes", [{}, {"window": 600}], ids=["causal", "window"])
def test_a_decode_row_of_triton_has_the_same_bits_alone_in_a_batch_in_a_wide_table_and_dealt_out(changes, monkeypatch):
    spec, arrays = decode_inputs((1300, 1, 512, 513, 700), **changes)
    decode = functools.partial(interpreted.triton_decode, **spec.options)
    whole = bits(jax.jit(decode)(*arrays))
    q, k, v, table, lengths = arrays
    np.testing.assert_array_equal(bits(jax.jit(decode)(q[:1], k, v, table[:1], lengths[:1]))[0], whole[0])
    wide = np.concatenate([table, np.full((5, 200), 2**30, np.int32)], axis=1)
    np.testing.assert_array_equal(bits(jax.jit(decode)(q, k, v, wide, lengths)), whole)
    monkeypatch.setattr(triton, "DIRECT_PROGRAMS", 0)
    monkeypatch.setattr(triton, "DEALT_PROGRAMS", 6)
    np.testing.assert_array_equal(bits(jax.jit(functools.partial(decode))(*arrays)), whole)


@pytest.mark.kernels
@pytest.mark.parametrize("changes", [{}, {"window": 600}], ids=["causal", "window"])
def test_a_decode_row_has_the_same_bits_alone_in_a_batch_in_a_wide_table_and_over_any_number_of_programs(changes):
    spec, arrays = decode_inputs((1300, 1, 512, 513, 700), **changes)

    def decode(programs, *arrays):
        if ON_GPU:
            return decode_sm90.paged_attention_decode(
                *arrays, blocks=decode_sm90.Blocks(programs=programs), **spec.options
            )
        return interpreted.decode_by(programs, *arrays, **spec.options)

    whole = bits(jax.jit(functools.partial(decode, 3))(*arrays))
    q, k, v, table, lengths = arrays
    np.testing.assert_array_equal(bits(jax.jit(functools.partial(decode, 7))(*arrays)), whole)
    np.testing.assert_array_equal(
        bits(jax.jit(functools.partial(decode, 2))(q[:1], k, v, table[:1], lengths[:1]))[0], whole[0]
    )
    wide = np.concatenate([table, np.full((5, 200), 2**30, np.int32)], axis=1)
    np.testing.assert_array_equal(bits(jax.jit(functools.partial(decode, 1))(q, k, v, wide, lengths)), whole)


@pytest.mark.kernels
@pytest.mark.parametrize("changes", [{}, {"window": 40}, {"N": 2}], ids=["causal", "window", "one head a kv head"])
def test_a_verified_query_has_the_bits_of_a_decode_step_at_its_position(changes):
    spec, (q, k, v, table, lengths) = decode_inputs((530, 64, 3), **changes)
    queries = np.stack([np.roll(q, shift, axis=-1) for shift in range(3)], axis=1)
    verify, decode = (
        (decode_sm90.verify, decode_sm90.paged_attention_decode) if ON_GPU else (interpreted.verify, interpreted.decode)
    )
    many = bits(jax.jit(functools.partial(verify, **spec.options))(queries, k, v, table, lengths))
    one = jax.jit(functools.partial(decode, **spec.options))
    for place in range(3):
        step = bits(one(queries[:, place], k, v, table, lengths - np.int32(2 - place)))
        np.testing.assert_array_equal(many[:, place], step)


@pytest.mark.kernels
def test_a_key_and_value_written_in_the_launch_are_read_by_it_and_lie_in_their_page():
    spec, (q, k, v, table, lengths) = decode_inputs((70, 0, 1, 513, 64))
    rng = np.random.default_rng(1)
    new = [rng.standard_normal((5, 2, 64)).astype(q.dtype) for _ in range(2)]
    before, after = [k.copy(), v.copy()], [k.copy(), v.copy()]
    for row in np.flatnonzero(lengths):
        place = table[row, (lengths[row] - 1) // 16], slice(None), (lengths[row] - 1) % 16
        for pool in range(2):
            before[pool][place] = np.nan
            after[pool][place] = new[pool][row]
    write, decode = (
        (decode_sm90.decode_write, decode_sm90.paged_attention_decode)
        if ON_GPU
        else (interpreted.decode_write, interpreted.decode)
    )
    out, *pages = write(q, *new, *map(jnp.asarray, before), table, lengths, **spec.options)
    for got, expected in zip(pages, after, strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))
    np.testing.assert_array_equal(bits(out), bits(decode(q, *after, table, lengths, **spec.options)))
    if not ON_GPU:
        assert not get_races().races_found


@pytest.mark.kernels
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_e4m3_pages_give_what_their_scaled_values_give(soft_cap):
    spec, (q, k, v, table, lengths) = decode_inputs((600, 40), soft_cap=soft_cap)
    narrow = [np.nan_to_num(pool.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn) for pool in (k, v)]
    scales = np.array([0.5, 2.0], np.float32), np.array([0.25, 1.5], np.float32)
    wide = [
        (pool.astype(np.float32) * scale[:, None, None]).astype(np.float32)
        for pool, scale in zip(narrow, scales, strict=True)
    ]
    expected = reference.paged_attention_decode(jnp.asarray(q, jnp.float32), *wide, table, lengths, **spec.options)
    options = {"k_scale": jnp.asarray(scales[0]), "v_scale": jnp.asarray(scales[1]), **spec.options}
    kernels = (
        (decode_sm90.paged_attention_decode, triton.paged_attention_decode)
        if ON_GPU
        else (interpreted.decode, interpreted.triton_decode)
    )
    for decode in (*kernels, reference.paged_attention_decode):
        got = decode(jnp.asarray(q), *map(jnp.asarray, (*narrow, table, lengths)), **options)
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=2e-2)


def test_the_ragged_kernel_reads_e4m3_pages_as_their_scaled_values():
    spec = PagedAttentionSpec("e4m3", N=2, K=2, H=64, page_size=32, rows=((40, 170), (1, 5)))
    q, k, v, *rest = spec.inputs()
    narrow = [pool.astype(ml_dtypes.float8_e4m3fn) for pool in (k, v)]  # NaN where nothing is written
    scales = np.array([0.5, 2.0], np.float32), np.array([0.25, 1.5], np.float32)
    wide = [pool.astype(np.float32) * s[:, None, None] for pool, s in zip(narrow, scales, strict=True)]
    expected = reference.paged_attention(jnp.asarray(q, jnp.float32), *map(jnp.asarray, (*wide, *rest)), **spec.options)
    ragged = mosaic_sm90.paged_attention if ON_GPU else interpreted.ragged
    options = {"k_scale": jnp.asarray(scales[0]), "v_scale": jnp.asarray(scales[1]), **spec.options}
    got = ragged(*map(jnp.asarray, (q, *narrow, *rest)), **options)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=2e-2)
    if not ON_GPU:
        assert not get_races().races_found


@pytest.mark.kernels
@cpu_only
@pytest.mark.parametrize("changes", [{}, {"window": 100, "soft_cap": 2.0}, {"page_size": 128}])
def test_the_decode_kernel_has_no_races(changes):
    spec, arrays = decode_inputs((600, 0, 1), **changes)
    jax.block_until_ready(interpreted.decode(*arrays, **spec.options))
    assert not get_races().races_found


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("programs", [1, 5, 132])
def test_programs_share_all_units_of_all_rows_in_order(programs, window):
    lengths = np.array([1300, 0, 1, 512, 513, 5000], np.int32)
    rows = units.Rows(B=6, K=2, queries=1, window=window, programs=programs)
    firsts, counts = map(np.asarray, rows.splits(jnp.asarray(lengths)))
    everything = [(r, h, firsts[r] + s) for r in range(6) for h in range(2) for s in range(counts[r])]
    plan = np.asarray(units.plan(jnp.asarray(lengths), rows))
    assert (plan[:, 5] == len(everything)).all()
    assert plan[0, 3] == 0
    assert plan[-1, 4] == len(everything)
    np.testing.assert_array_equal(plan[1:, 3], plan[:-1, 4])
    for number, (row, head, split, begin, end, total) in enumerate(plan):
        share = units.Share(*map(jnp.int32, (begin, end, total)))
        for unit in range(begin, end):
            assert int(share.holder(jnp.int32(unit), programs)) == number
        if end > begin:
            assert (row, head, split) == everything[begin]


@pytest.mark.skipif(not ON_GPU, reason="where a slice lies in memory matters to the copy engine alone")
@pytest.mark.gpu
@pytest.mark.parametrize("op", ["decode", "ragged"])
def test_kernels_take_slices_of_packed_arrays(op):
    spec, (q, k, v, table, lengths) = decode_inputs((600, 40, 7), N=8)
    width = table.shape[1]
    packed = np.concatenate([np.array([5], np.int32), table.reshape(-1), lengths, np.arange(4, dtype=np.int32)])

    def step(q, k, v, packed):
        table = packed[1 : 1 + 3 * width].reshape(3, width)
        lengths, starts = packed[1 + 3 * width :][:3], packed[-4:]
        if op == "decode":
            return decode_sm90.paged_attention_decode(q, k, v, table, lengths, **spec.options)
        return mosaic_sm90.paged_attention(q, k, v, table, lengths, starts, **spec.options)

    stacked = np.concatenate([np.zeros_like(q[:1]), q])  # queries that start at no aligned address either
    got = jax.jit(lambda all_q, *rest: step(all_q[1:], *rest))(stacked, k, v, packed)
    decode = (decode_sm90 if op == "decode" else api).paged_attention_decode  # rows of one query have its bits
    expected = jax.jit(functools.partial(decode, **spec.options))(q, k, v, table, lengths)
    np.testing.assert_array_equal(bits(got), bits(expected))


RAGGED = PagedAttentionSpec("ragged", N=2, K=1, H=64, rows=((130, 390), (20, 150)), page_size=32)


@cpu_only
def test_the_ragged_kernel_has_no_races():
    q, *rest = RAGGED.inputs()
    jax.block_until_ready(interpreted.ragged(q, *rest, **RAGGED.options))
    assert not get_races().races_found


@pytest.mark.parametrize(
    ("spec", "cut"),
    [(replace(RAGGED, rows=((6, 30), (3, 60))), 3), pytest.param(RAGGED, 50, marks=pytest.mark.kernels)],
    ids=["small", "several tiles"],
)
def test_a_ragged_row_has_the_same_bits_in_chunks_and_at_any_place_in_the_batch(spec, cut):
    q, k, v, table, lengths, starts = spec.inputs()
    ragged = mosaic_sm90.paged_attention if ON_GPU else interpreted.ragged
    attend = jax.jit(functools.partial(ragged, **spec.options))
    whole = bits(attend(q, k, v, table, lengths, starts))
    own, count = slice(starts[1], starts[2]), starts[1]  # starts at no multiple of 8: its tile cannot be copied whole
    alone = bits(attend(q[own], k, v, table[[1]], lengths[[1]], starts[1:] - count))
    np.testing.assert_array_equal(alone, whole[own])
    begun = lengths[:1] - count + np.int32(cut)
    first = bits(attend(q[:cut], k, v, table[[0]], begun, np.array([0, cut], np.int32)))
    rest = bits(attend(q[cut:count], k, v, table[[0]], lengths[[0]], np.array([0, count - cut], np.int32)))
    chunks = np.concatenate([first, rest])
    # The interpreter's products are the CPU's, whose last bit may depend on a row's place in its tile.
    apart = np.abs(chunks.astype(np.int32) - whole[:count].astype(np.int32))
    assert apart.max() <= (0 if ON_GPU else 1)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_query_has_the_same_bits_alone_as_among_others_of_its_row_where_that_is_asked_for(uniform):
    spec = replace(RAGGED, rows=((5, 300), (1, 60)))
    q, k, v, table, lengths, starts = spec.inputs()
    ragged = mosaic_sm90.paged_attention if ON_GPU else interpreted.ragged
    attend = jax.jit(functools.partial(ragged, uniform=uniform, **spec.options))
    whole = bits(attend(q, k, v, table, lengths, starts))
    alone = []
    for number in range(5):
        held = np.concatenate([q[number : number + 1], q[5:]])
        each = np.array([300 - 4 + number, 60], np.int32)
        alone.append(bits(attend(held, k, v, table, each, np.array([0, 1, 2], np.int32)))[0])
    apart = np.abs(np.stack(alone).astype(np.int32) - whole[:5].astype(np.int32))
    if uniform:
        # The interpreter's products are the CPU's, whose last bit may depend on a row's place in its tile.
        assert apart.max() <= (0 if ON_GPU else 1)
    else:
        assert apart.max() > (0 if ON_GPU else 1)


@pytest.mark.parametrize("fewest", [1, 2])
@pytest.mark.parametrize(("counts", "padding"), [((1, 0, 128, 129, 5), 0), ((300, 1, 1), 70), ((0, 0), 3), ((1,), 0)])
def test_tiles_cover_every_query_of_long_enough_rows_and_the_padding_once_longest_first(counts, padding, fewest):
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lengths = np.array(counts, np.int32) + np.arange(len(counts), dtype=np.int32) * 40
    T = int(starts[-1]) + padding
    table, count = tiles.tile_list(T, jnp.asarray(lengths), jnp.asarray(starts), fewest)
    covered, ends = [], []
    for row, token, position, reach, kv_len, _ in np.asarray(table)[: int(count[0])]:
        room, live = divmod(reach, tiles.ROOM)
        assert 0 < live <= room == min(T - token, tiles.TILE)
        covered += range(token, token + live)
        ends.append(position + live)
        if token < starts[-1]:
            assert kv_len == lengths[row]
            assert position == lengths[row] - counts[row] + token - starts[row]
        else:
            assert kv_len == 0
            assert position < 0
    wanted = [t for r, n in enumerate(counts) if n >= fewest for t in range(starts[r], starts[r] + n)]
    assert sorted(covered) == wanted + list(range(starts[-1], T))
    real = [end for end in ends if end > 0]
    assert real == sorted(real, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((8, 2, 64))}, "bfloat16 or float16 queries here, got float32"),
        ({"pages": jnp.zeros((2, 2, 16, 64))}, "pages must be bfloat16 like the queries or float8_e4m3fn, got float32"),
        ({"q": jnp.zeros((8, 2, 72), jnp.bfloat16)}, "head dim must be 64, 80, 96, 128 or 256, got 72"),
        ({"pages": jnp.zeros((2, 2, 16, 64), jnp.float8_e4m3fn)}, "k_scale and v_scale go together"),
        ({"pages": jnp.zeros((2, 2, 12, 64), jnp.bfloat16)}, "page size must divide 128.*got 12"),
        ({"scale": -1.0}, "assumes a positive scale, got -1.0"),
    ],
)
def test_the_ragged_kernel_says_why_it_declines(changes, message):
    base = {"q": jnp.zeros((8, 2, 64), jnp.bfloat16), "pages": jnp.zeros((2, 2, 16, 64), jnp.bfloat16), "scale": 1.0}
    q, pages, scale = (base | changes).values()
    with pytest.raises(NotImplementedError, match=message):
        mosaic_sm90.refuse(q, pages, scale, mosaic_sm90.default_blocks(q.shape[2]))


@pytest.mark.parametrize(
    ("q", "pages", "message"),
    [
        (jnp.zeros((1, 2, 64)), jnp.zeros((2, 2, 16, 64)), "bfloat16 or float16 for the tensor cores, got float32"),
        (jnp.zeros((1, 2, 512), jnp.bfloat16), jnp.zeros((2, 2, 16, 512), jnp.bfloat16), "head dim 512.*at most 256"),
        (jnp.zeros((1, 2, 64), jnp.bfloat16), jnp.zeros((2, 2, 16, 64), jnp.int8), "float8_e4m3fn, got int8"),
    ],
)
def test_the_triton_decode_kernel_says_why_it_declines(q, pages, message):
    with pytest.raises(NotImplementedError, match=message):
        triton.refuse(q, pages, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((1, 1, 2, 64))}, "bfloat16 or float16 queries here, got float32"),
        ({"pages": jnp.zeros((2, 2, 16, 64), jnp.int8)}, "or float8_e4m3fn, got int8"),
        ({"pages": jnp.zeros((2, 2, 16, 64), jnp.float8_e4m3fn)}, "k_scale and v_scale go together"),
        ({"q": jnp.zeros((1, 1, 2, 96), jnp.bfloat16)}, "head dim must be 64, 128 or 256.*got 96"),
        ({"pages": jnp.zeros((2, 2, 12, 64), jnp.bfloat16)}, "page size must divide 64.*got 12"),
        ({"q": jnp.zeros((1, 9, 8, 64), jnp.bfloat16)}, "9 queries of 4 heads a kv head: at most 16 together"),
    ],
)
def test_the_decode_kernel_says_why_it_declines(changes, message):
    base = {"q": jnp.zeros((1, 1, 2, 64), jnp.bfloat16), "pages": jnp.zeros((2, 2, 16, 64), jnp.bfloat16)}
    q, pages = (base | changes).values()
    with pytest.raises(NotImplementedError, match=message):
        decode_sm90.refuse(q, pages, None, None)


def test_tuned_numbers_replace_the_heuristics_and_a_wrong_field_names_its_file(tmp_path, monkeypatch):
    heuristic = triton.Blocks()
    assert tuning.choose("op/kernel", "key", heuristic, directory=tmp_path) == heuristic  # no GPU, no file
    monkeypatch.setattr(tuning, "device_name", lambda: "some_gpu")
    assert tuning.choose("op/kernel", "key", heuristic, directory=tmp_path) == heuristic
    path = tuning.save({"op/kernel": {"key": {"num_stages": 9}}}, "some_gpu", "the command", tmp_path)
    assert json.loads(path.read_text())["command"] == "the command"
    assert tuning.choose("op/kernel", "key", heuristic, directory=tmp_path).num_stages == 9
    assert tuning.choose("op/kernel", "other", heuristic, directory=tmp_path) == heuristic
    tuning.save({"op/kernel": {"key": {"stages": 9}}}, "some_gpu", "the command", tmp_path)
    with pytest.raises(ValueError, match=r"some_gpu\.json: op/kernel: key: unknown stages; known: block_keys"):
        tuning.choose("op/kernel", "key", heuristic, directory=tmp_path)


def test_every_kernel_registered_for_the_gpu_has_a_case_in_the_gate():
    assert gate.missing_cases() == []
