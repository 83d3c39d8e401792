import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs

from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.specs import MATMUL_SPECS, REAL_MATMUL_SPECS
from pallas_kernels.matmul.streamed_sm90 import Blocks, Plan, Stage

SPECS = MATMUL_SPECS + (REAL_MATMUL_SPECS if ON_GPU else ())


@pytest.mark.parametrize(("name", "spec"), pairs("matmul", SPECS))
def test_agrees_with_exact_arithmetic(name, spec):
    x, weight, bias = spec.inputs()
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    want = want if bias is None else want + bias.astype(np.float64)
    got = jitted(matmul, name)(x, weight, *([] if bias is None else [bias]))
    assert got.dtype == jnp.dtype(spec.dtype)
    limit = 4e-3 if spec.dtype == "bfloat16" else 1e-5
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= limit * np.linalg.norm(want)


def test_wrong_shapes_raise_an_error_that_names_them():
    x, weight = jnp.zeros((2, 64)), jnp.zeros((32, 64))
    with pytest.raises(ValueError, match=r"got \[2, 64\] and \[64, 32\]"):
        matmul(x, weight.T)
    with pytest.raises(ValueError, match=r"bias must be \[32\]"):
        matmul(x, weight, jnp.zeros(31))


@pytest.mark.parametrize(("ins", "outs"), [(4096, 28672), (4096, 4096), (14336, 4096), (2048, 1024), (1024, 6144)])
def test_every_piece_of_a_tile_is_added_by_the_program_that_begins_it(ins, outs):
    """The arithmetic between programs, which the interpreter cannot run: it has one program."""
    stage = Stage(0, ins, outs)
    plan = Plan(8, (stage,), Blocks(), 1e-5, interpret=False, pdl=False)
    steps, programs = plan.steps(stage), Blocks().programs
    firsts = [int(plan.first(stage, jnp.int32(program))) for program in range(programs + 1)]
    assert firsts[0] == 0
    assert firsts[-1] == stage.tiles * steps
    begun, handed = {}, {}
    for program, (first, last) in enumerate(itertools.pairwise(firsts)):
        assert first < last
        for tile in range(first // steps, (last - 1) // steps + 1):
            if first <= tile * steps:
                begun[tile] = program
            else:
                assert program not in handed  # one place each for a piece
                handed[program] = tile
    assert sorted(begun) == list(range(stage.tiles))
    for tile, program in begun.items():
        others = list(range(program + 1, plan.final(stage, tile) + 1))
        assert others == [other for other, its in handed.items() if its == tile]
        assert len(others) < plan.pieces(stage)
