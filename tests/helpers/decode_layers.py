"""decode_layers on a spec, by the name of an implementation."""

import jax
import numpy as np
from helpers.kernel_backends import declined, pairs

from pallas_kernels.decode_layers.api import decode_layers
from pallas_kernels.decode_layers.specs import EPS


def kernels(specs):
    """Without the reference, which is what they are compared with."""
    return [pair for pair in pairs("decode_layers", specs) if pair.values[0] != "reference"]


def run(name, spec, given):
    @jax.jit
    def step(head, *arguments):
        return decode_layers(*arguments, eps=EPS, scale=spec.H**-0.5, head=head, implementation=name)

    try:
        x, pages = step(spec.head(given), *spec.arguments(given))
    except NotImplementedError as reason:
        declined(reason)
    return np.asarray(x), [tuple(map(np.asarray, pair)) for pair in pages]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def slot(spec, given, row):
    at = spec.lengths[row] - 1
    return given["page_table"][row, at // spec.page_size], at % spec.page_size
