"""Engines whose experts lie on several simulated devices: tokens sent to them, copies of hot ones, experts moved."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxllm.config import load
from jaxllm.core import SamplingParams
from jaxllm.engine.loop import EngineLoop
from jaxllm.engine.operations import OPERATIONS, Refused
from jaxllm.engine.startup import start
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.weights.names import to_checkpoint

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1}
MODELS = {
    "mixtral": SIZES | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
    "qwen2-moe": SIZES
    | QWEN
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": False,
    },
    "qwen3-moe": SIZES | QWEN | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
}
SHAPE = dict(
    cache_dir="",
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=32,
    decode_buckets=[4],
    token_buckets=[32],
    page_size=8,
    num_pages=64,
    threads=2,
)
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=5, prompt_logprobs=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model's name -> its directory."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        config, rng = ModelConfig.from_hf(MODELS[name]), np.random.default_rng(0)

        def leaf(path, shape):
            kind = path[-1].key
            spread = {"embed": 1.0, "head": 0.1}.get(kind, 0.1 if "norm" in kind or "bias" in kind else 0.2)
            return (rng.normal(0, spread, shape.shape) + ("norm" in kind)).astype(np.float32)

        params = jax.tree_util.tree_map_with_path(leaf, abstract(config, jnp.float32)[1])
        safetensors.numpy.save_file(to_checkpoint(params, config), folder / "model.safetensors")
        return str(folder)

    return made


def observe(engine):
    """The tokens of five requests in company, and every log-probability of theirs."""
    prompts = [np.random.default_rng(n).integers(2, 256, n).tolist() for n in (3, 8, 19, 37, 5)]
    sequences = [engine.add(engine.make_request(ids, PARAMS))[0] for ids in prompts]
    found = {sequence.id: [] for sequence in sequences}
    while engine.has_work:
        for output in engine.step():
            told = [*output.prompt_logprobs, *([output.logprobs] if output.logprobs else [])]
            found[output.sequence.id] += [value for p in told for value in (p.logprob, *(v for _, v in p.top))]
        engine.check()
    assert engine.scheduler.pool.num_held == 0
    return [s.output_token_ids for s in sequences], np.concatenate([found[s.id] for s in sequences])


@pytest.fixture(scope="module")
def lone(directory):
    """A model's name -> its engine on one device."""
    return functools.cache(lambda name: start(load(model=directory(name), **SHAPE))[0])


@pytest.fixture(scope="module")
def alone(lone):
    return functools.cache(lambda name: observe(lone(name)))


def assert_same(seen, expected):
    assert seen[0] == expected[0]
    assert np.abs(seen[1] - expected[1]).max() < 1e-5


def assert_counts(engine):
    """Of a prefill of 19 tokens and a decode: every token counts its two experts in each of two layers, once."""
    engine.add(engine.make_request(list(range(2, 21)), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    for tokens in (19, 1):
        engine.step()
        np.testing.assert_array_equal(np.asarray(engine.runner.load).sum(axis=1), [2 * tokens] * 2)
    while engine.has_work:
        engine.step()


def rebalance(engine):
    """As an operator asks for it."""
    return finished(OPERATIONS["rebalance_experts"](EngineLoop(engine, lambda _: [], lambda _: None), {}))


def finished(job):
    """What a job of the loop gives in the end."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def test_experts_are_sent_their_tokens_and_moved_between_steps_and_nothing_changes(directory, alone):
    """With a shared expert, spare slots and all-to-all; tensors cut as well are below."""
    mesh = dict(ep=2, sp=True, expert_exchange="all_to_all", redundant_experts=2, rebalance_interval=2)
    expected = alone("qwen2-moe")  # first: what is compiled after the engine is ready is counted
    engine, _ = start(load(model=directory("qwen2-moe"), **SHAPE, **mesh))
    steps = {key: traced for key, traced in engine.runner.executables.table.items() if key[0] == "step"}
    text = {key[1].decode: traced.as_text() for key, traced in steps.items()}
    assert "all-to-all" in text[False]
    assert "all-to-all" not in text[True], "in a decode step every device has every token"
    assert_same(observe(engine), expected)
    assert_counts(engine)
    before = [slots.copy() for slots in engine.balancer.slots]
    assert 1 < engine.scheduler.metrics.expert_imbalance < 2
    engine.balancer.known = np.tile([0.0, 0, 0, 0, 10, 50, 30, 10], (2, 1))  # most of it on the second device
    said = rebalance(engine)
    assert said["layers"] == 2
    assert said["expected"] < said["imbalance"] - 0.3
    assert all((a != b).any() for a, b in zip(before, engine.balancer.slots))
    assert_same(observe(engine), expected)
    metrics = engine.scheduler.metrics
    assert metrics.compiles_after_ready == 0
    moved = sum((old != new).sum() for old, new in zip(before, engine.balancer.slots))
    assert (metrics.expert_rebalances, metrics.moved_experts) == (1, moved)


MIXES = {
    "mixtral ep4 sp, all-to-all": ("mixtral", dict(ep=4, sp=True, expert_exchange="all_to_all")),
    "mixtral ep2 tp2 sp, all-to-all": ("mixtral", dict(ep=2, tp=2, sp=True, expert_exchange="all_to_all")),
    "qwen2-moe ep4 sp, sums": ("qwen2-moe", dict(ep=4, sp=True, expert_exchange="sum", redundant_experts=4)),
    "qwen2-moe ep2 tp2 sp": ("qwen2-moe", dict(ep=2, tp=2, sp=True, expert_exchange="all_to_all", redundant_experts=2)),
    "qwen3-moe ep2, copies": ("qwen3-moe", dict(ep=2, redundant_experts=8)),
    "qwen3-moe ep2 cp2 sp": ("qwen3-moe", dict(ep=2, cp=2, sp=True, expert_exchange="all_to_all", redundant_experts=2)),
    "qwen3-moe ep2 pp2 sp": ("qwen3-moe", dict(ep=2, pp=2, sp=True, expert_exchange="all_to_all")),
    "qwen3-moe ep2 dp2": ("qwen3-moe", dict(ep=2, dp=2, sp=True, expert_exchange="all_to_all", redundant_experts=2)),
}


@pytest.mark.mesh
@pytest.mark.parametrize("name", MIXES)
def test_every_mix_of_experts_gives_what_one_device_gives(name, directory, alone):
    model, mesh = MIXES[name]
    engine, _ = start(load(model=directory(model), **SHAPE, **mesh, rebalance_interval=2))
    assert_same(observe(engine), alone(model))
    if "redundant_experts" in mesh:
        rebalance(engine)
        assert_same(observe(engine), alone(model))
        if "dp" not in mesh:
            assert_counts(engine)
        assert engine.scheduler.metrics.as_dict()["expert_imbalance"] >= 1


@pytest.mark.mesh
def test_over_the_threshold_experts_move_by_themselves(directory, alone):
    mesh = dict(ep=2, redundant_experts=2, rebalance_threshold=1.01, rebalance_interval=3)
    engine, _ = start(load(model=directory("qwen3-moe"), **SHAPE, **mesh))
    for _ in range(3):
        assert_same(observe(engine), alone("qwen3-moe"))
    metrics = engine.scheduler.metrics
    assert metrics.expert_rebalances > 0
    assert metrics.moved_experts > 0
    assert metrics.compiles_after_ready == 0


SHARED = dict(attention_data=True, ep=2, num_pages=32)


def test_shards_of_attention_have_rows_and_pages_of_their_own_and_share_the_experts(directory, lone, alone):
    """Penalties, biases, masks, seeds and embeddings too: each finds its own shard."""
    expected, wanted = alone("qwen2-moe"), observe_sampling(lone("qwen2-moe"))
    engine, _ = start(load(model=directory("qwen2-moe"), **SHAPE | SHARED, expert_exchange="sum", redundant_experts=2))
    leaf = engine.runner.kv[0][0]
    assert leaf.shape[:2] == (64, 2), "pages are dealt, heads are whole"
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 32
    assert_same(observe(engine), expected)
    assert min(shard.metrics.generated_tokens for shard in engine.scheduler.each) > 0
    assert engine.scheduler.metrics.generated_tokens == 40
    found = observe_sampling(engine)
    assert found[0] == wanted[0]
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    assert engine.scheduler.metrics.compiles_after_ready == 0


def observe_sampling(engine):
    """Tokens of requests that ask the sampler for all it does, one taken back on the way; an embedding."""
    asked = [
        dict(temperature=1.0, seed=5, top_p=0.9),
        dict(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.3, logit_bias={7: 4.0}),
        dict(temperature=1.0, seed=9, min_tokens=6, stop_token_ids=list(range(2, 200))),
        dict(temperature=0.7, seed=1, presence_penalty=1.0, logprobs=2),
        dict(temperature=0.0, frequency_penalty=2.0),
    ]
    sequences = []
    for number, more in enumerate(asked):
        params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True} | more)
        made = engine.make_request(list(range(10 * number + 2, 10 * number + 9)), params)
        sequences += engine.add(made)
    gone = engine.add(engine.make_request([3, 4, 5], PARAMS.replace(max_tokens=60)))[0]
    for _ in range(3):
        engine.step()
    engine.abort(gone.request.id)
    while engine.has_work:
        engine.step()
        engine.check()
    job = OPERATIONS["embed"](EngineLoop(engine, lambda _: [], lambda _: None), EMBEDDED)
    return [sequence.output_token_ids for sequence in sequences], finished(job)


EMBEDDED = {"token_ids": list(range(5, 45)), "pooling": "mean"}


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("mixtral", dict(expert_exchange="all_to_all")),
        ("qwen2-moe", dict(ep=4, expert_exchange="all_to_all", redundant_experts=4)),
        ("qwen2-moe", dict(tp=2, sp=True, expert_exchange="all_to_all")),
        ("qwen2-moe", dict(tp=2, expert_exchange="sum", redundant_experts=2)),
        ("qwen3-moe", dict(ep=4, tp=2)),
        ("qwen3-moe", dict(dp=2)),
    ],
    ids=str,
)
def test_every_mix_with_shards_of_attention_gives_what_one_device_gives(model, mesh, directory, alone):
    engine, _ = start(load(model=directory(model), **SHAPE | SHARED | mesh))
    assert_same(observe(engine), alone(model))
    if "redundant_experts" in mesh:
        rebalance(engine)
        assert_same(observe(engine), alone(model))
        assert_counts(engine)


def test_an_engine_whose_experts_stay_says_so():
    from helpers.byte_model import build_engine

    with pytest.raises(Refused, match=r"mesh.redundant_experts"):
        OPERATIONS["rebalance_experts"](EngineLoop(build_engine()[0], lambda _: [], lambda _: None), {})
