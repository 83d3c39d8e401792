"""Deterministic mode on a real GPU: `make test-gpu`. The bits of a sequence's log-probabilities are its own."""

import random

import jax
import pytest
from helpers.same_bits import logprobs_of

from benchmarks.shapes import make_model_directory
from jaxllm.config import load
from jaxllm.core import SamplingParams
from jaxllm.engine.startup import start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")]
SHAPE = dict(load_format="dummy", max_model_len=512, max_num_seqs=8, page_size=16, cache_dir="")
LENGTHS = (9, 40, 70, 100, 130, 257, 300)


def crowd():
    params = SamplingParams(max_tokens=64, temperature=1.0, seed=4, ignore_eos=True, logprobs=1)
    return [(random.Random(n).choices(range(1000), k=n), params) for n in LENGTHS]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    directory = str(make_model_directory("qwen3-0.6b", tmp_path_factory.mktemp("shape")))
    return lambda **settings: start(load(model=directory, **SHAPE | settings))[0]


def test_logprobs_have_the_same_bits_whatever_the_batch_and_the_schedule(build):
    requests = crowd()
    engine = build(deterministic=True, num_pages=1024)
    alone = [logprobs_of(engine, [one])[0] for one in requests]
    assert logprobs_of(engine, requests) == alone, "together, and all prefix hits"
    assert logprobs_of(engine, requests, order=[3, 0, 6, 1, 5, 2, 4]) == alone
    chunked = build(deterministic=True, num_pages=1024, max_prefill_chunk=37, enable_prefix_caching=False)
    assert logprobs_of(chunked, requests) == alone, "in chunks, all misses"
    tight = build(deterministic=True, num_pages=56)
    assert logprobs_of(tight, requests) == alone, "preempted"
    assert tight.scheduler.metrics.preemptions > 0


def test_without_it_some_bits_follow_the_batch(build):
    free = build(num_pages=1024, decode_buckets=(1, 8), token_buckets=(64, 512))
    requests = crowd()
    assert logprobs_of(free, requests) != [logprobs_of(free, [one])[0] for one in requests]
