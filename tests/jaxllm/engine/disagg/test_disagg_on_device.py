"""Two sides on devices of their own, with a real model: what one engine says, to the last token and log-probability."""

import json
import random

import numpy as np
import pytest
from helpers.byte_tokenizer import EOS, tokenizer_json

from jaxllm.config import load
from jaxllm.core import FinishReason, SamplingParams
from jaxllm.engine.decoding import grammars
from jaxllm.engine.disagg.startup import start_role
from jaxllm.graph.compile import compile_counter
from jaxllm.llm import LLM
from sharding.axes import MeshError

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "bos_token_id": 0,
}
SHAPE = dict(
    load_format="dummy",
    cache_dir="",
    dtype="float32",
    max_num_seqs=8,
    max_num_batched_tokens=32,
    decode_buckets=[8],
    token_buckets=[32],
    page_size=8,
    num_pages=64,
    transfer_layers=1,
    threads=2,
    seed=3,
)
NAMES = {"type": "object", "properties": {"name": {"enum": ["Ada", "Alan"]}}, "required": ["name"]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return str(folder)


def close(engine):
    engine.grammars.close()
    engine.grammars.trial.close()


@pytest.fixture(scope="module")
def engine(directory):
    made = start_role(load(model=directory, role="both", **SHAPE))[0]
    yield made
    close(made)


def prompt(length, salt=0):
    return random.Random(1000 * salt + length).choices(range(3, 256), k=length)


def kinds():
    """One request for each kind of thing a client may ask for, most of them with log-probabilities."""
    seeded = dict(max_tokens=9, seed=11, logprobs=3)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    return [
        greedy,
        SamplingParams(**seeded, temperature=0.7, top_p=0.8, top_k=20, min_p=0.02),
        SamplingParams(**seeded, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingParams(**seeded, logit_bias={5: 8.0, 9: -100.0}),
        SamplingParams(**seeded, allowed_token_ids=[4, 6, 8], min_tokens=4),
        SamplingParams(**seeded, prompt_logprobs=2),
        SamplingParams(max_tokens=40, seed=6, grammar=grammars.json_schema(NAMES)),
        greedy.replace(max_tokens=1),
        greedy.replace(max_tokens=40, logprobs=None, n=2),
    ]


def run(engine, requests):
    """[(prompt, params)] -> what each sequence said; the books balance after every step and nothing stays behind."""
    sequences = [s for ids, params in requests for s in engine.add(engine.make_request(ids, params))]
    told = {sequence: [] for sequence in sequences}
    while engine.has_work:
        for output in engine.step():
            told[output.sequence].append(output)
        engine.check()
    for side in (engine, getattr(engine, "prefill", engine)):
        assert side.scheduler.pool.num_held == 0
    return [(s.output_token_ids, s.finish_reason, told[s]) for s in sequences]


def numbers(outputs):
    """Log-probabilities in the order of the stream: of prompt tokens, then generated ones, with alternatives."""
    found = [lp for out in outputs for lp in (*out.prompt_logprobs, *([out.logprobs] if out.logprobs else []))]
    return np.array([value for lp in found for value in (lp.logprob, *(p for _, p in lp.top))])


def alone(engine, requests):
    """The decode side as an engine by itself, with empty caches before and after."""
    engine.scheduler.evict(1000)
    found = run(engine.decode, requests)
    engine.scheduler.evict(1000)
    return found


def compare(found, wanted):
    for (tokens, reason, outputs), (other_tokens, other_reason, other_outputs) in zip(found, wanted, strict=True):
        assert tokens == other_tokens
        assert reason is other_reason
        assert [out.token_id for out in outputs if out.token_id is not None] == tokens
        np.testing.assert_allclose(numbers(outputs), numbers(other_outputs), atol=1e-5)


def mix():
    return [(prompt(length, salt), one) for salt, one in enumerate(kinds()) for length in (3, 16, 41)]


def test_a_mix_of_requests_is_answered_as_by_one_engine(engine):
    wanted = alone(engine, mix())
    compare(run(engine, mix()), wanted)
    assert engine.prefill.moved_pages > 80
    assert {reason for _, reason, _ in wanted} == {FinishReason.LENGTH, FinishReason.STOP}
    assert len({token for tokens, _, _ in wanted for token in tokens}) > 100, "the model says one thing only"


def test_prefixes_that_either_side_has_change_nothing(engine):
    shared = prompt(40, salt=77)
    asked = [(shared + prompt(6, salt), one) for salt, one in enumerate(kinds()) if one.prompt_logprobs is None]
    wanted = alone(engine, asked)
    found = [run(engine, [one])[0 if one[1].n == 1 else slice(None)] for one in asked]
    compare([r for one in found for r in (one if isinstance(one, list) else [one])], wanted)
    engine.decode.scheduler.cache.evict(1000)  # now only the prefill side has them
    compare(run(engine, asked[:2]), wanted[:2])


def test_pages_that_are_too_few_for_all_change_no_token(engine):
    greedy = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    asked = [(prompt(30 + 3 * i, salt=i), greedy) for i in range(7)]  # up to 15 pages each, of 64
    wanted = alone(engine, asked)
    before = engine.decode.scheduler.metrics.preemptions
    compare(run(engine, asked), wanted)
    assert engine.decode.scheduler.metrics.preemptions > before


def test_requests_that_are_taken_back_at_any_moment_leave_nothing_behind(engine):
    rng = random.Random(4)
    greedy = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    kept = [(prompt(37, salt=900 + i), greedy) for i in range(3)]
    wanted = alone(engine, kept)
    sequences, gone = [], []
    for turn in range(60):
        if turn % 4 == 0:
            gone += engine.add(engine.make_request(prompt(rng.randrange(1, 90), salt=turn), greedy))
        if turn % 20 == 5:
            sequences += engine.add(engine.make_request(*kept[len(sequences)]))
        if live := [s for s in gone if not s.finished and rng.random() < 0.2]:
            engine.abort(live[0].request.id)
        engine.step()
        engine.check()
    for sequence in gone:
        engine.abort(sequence.request.id)
    while engine.has_work:
        engine.step()
        engine.check()
    assert [s.output_token_ids for s in sequences] == [tokens for tokens, _, _ in wanted]
    for pool in (engine.scheduler.pool, engine.prefill.scheduler.pool):
        assert pool.num_held == 0
        assert pool.num_free + pool.num_cached == pool.num_pages


def test_nothing_is_compiled_once_both_sides_are_ready(engine):
    run(engine, mix())
    before = compile_counter().compiles
    engine.scheduler.evict(1000)
    run(engine, mix())
    assert compile_counter().compiles == before
    stats = engine.scheduler.metrics.as_dict()
    assert stats["compiles_after_ready"] == 0
    assert stats["transferred_bytes"] >= stats["transferred_pages"] * 2 * 2 * 2 * 8 * 16 * 4


def test_an_llm_speaks_through_two_sides(engine):
    llm = LLM(engine=engine)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    whole = llm.generate("the quick brown", params)[0]
    assert whole.finished
    text = "".join(delta.outputs[0].text for delta in llm.stream("the quick brown", params) if delta.outputs)
    assert text == whole.outputs[0].text


def test_fewer_devices_than_both_sides_need_is_said_in_one_line(directory):
    with pytest.raises(MeshError, match=r"prefill side needs 8 devices \(tp8\) and the decode side 1 .* there are 8"):
        start_role(load(model=directory, role="both", prefill_tensor=8, **SHAPE))


@pytest.mark.mesh
@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4)])
def test_sides_that_are_cut_unlike_say_the_same(directory, engine, prefill, decode):
    wanted = alone(engine, mix())
    meshed = start_role(load(model=directory, role="both", prefill_tensor=prefill, tensor=decode, **SHAPE))[0]
    try:
        compare(run(meshed, mix()), wanted)
        assert meshed.prefill.moved_pages > 80
    finally:
        close(meshed)
