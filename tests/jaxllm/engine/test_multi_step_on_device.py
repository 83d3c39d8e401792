"""Several decode steps in one dispatch, on a tiny random model: what users get is what single steps give."""

import dataclasses
import json
import random

import numpy as np
import pytest
from helpers.byte_tokenizer import EOS, VOCAB_SIZE, tokenizer_json

from jaxllm.config import load
from jaxllm.core import FinishReason, SamplingParams
from jaxllm.engine.faults import FaultyRunner, parse_faults
from jaxllm.engine.startup import start
from jaxllm.graph.compile import compile_counter
from jaxllm.llm import LLM

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
    "bos_token_id": 0,
}
SHAPE = dict(
    load_format="dummy",
    dtype="float32",
    page_size=8,
    seed=3,
    decode_buckets=[4],
    token_buckets=[64],
    max_num_seqs=4,
    max_num_batched_tokens=64,
    num_pages=24,  # too few for four long sequences
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Engines by their settings; each is shared, as nothing may stay behind in it."""
    directory, made = tmp_path_factory.mktemp("tiny"), {}
    (directory / "config.json").write_text(json.dumps(MODEL))
    (directory / "tokenizer.json").write_text(tokenizer_json())

    def make(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            config = load(model=str(directory), cache_dir=str(directory / "compiled"), **SHAPE | settings)
            made[key] = start(config)[0]
        return made[key]

    yield make
    for engine in made.values():
        engine.grammars.close()
        engine.grammars.trial.close()


@pytest.fixture(scope="module")
def single(build):
    return build(decode_steps=1)


@pytest.fixture(scope="module")
def several(build):
    return build(decode_steps=4)


def prompt(length, salt=0):
    return random.Random(1000 * salt + length).choices(range(3, 320), k=length)


def greedy(n=25, **more):
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, **more)


def steady():
    """What the device does by itself, from one token to the next."""
    seeded = dict(max_tokens=25, seed=11)
    return [
        greedy(),
        SamplingParams(**seeded),
        SamplingParams(**seeded, temperature=0.7, top_p=0.8, top_k=20, min_p=0.02),
        SamplingParams(**seeded, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingParams(**seeded, logit_bias={5: 8.0, EOS: 5.0}),
        SamplingParams(**seeded, allowed_token_ids=[4, 6, 8, EOS], min_tokens=4),
        SamplingParams(**seeded, stop_token_ids=[*range(40, 80)], n=2),
        greedy(repetition_penalty=1.2, logit_bias={7: 1.0}),
    ]


def dispatches(engine, run):
    """What `run` gives, and how many steps and dispatches it took."""
    before = dataclasses.replace(engine.scheduler.metrics)
    found, after = run(), engine.scheduler.metrics
    assert engine.scheduler.pool.num_held == 0
    engine.check()
    return found, after.steps - before.steps, after.dispatches - before.dispatches


def generate(engine, prompts, params):
    """Everything users see."""
    return [
        [(one.text, one.token_ids, one.finish_reason, one.stop_reason, one.logprobs) for one in output.outputs]
        for output in LLM(engine=engine).generate(prompts, params, use_tqdm=False)
    ]


def both(single, several, prompts, params):
    """What is the same in both ways, and the dispatches that were saved."""
    expected, steps, each = dispatches(single, lambda: generate(single, prompts, params))
    found, more, together = dispatches(several, lambda: generate(several, prompts, params))
    assert found == expected
    assert steps == each
    return found, more - together


@pytest.mark.parametrize("params", steady(), ids=range(len(steady())))
def test_each_kind_of_request_gives_the_same_alone(single, several, params):
    _, saved = both(single, several, [prompt(9)], [params])
    assert saved > 0


def test_all_kinds_together_give_the_same_as_step_by_step(single, several):
    asked = steady() * 3
    found, saved = both(single, several, [prompt(3 + 5 * i, salt=i) for i in range(len(asked))], asked)
    assert saved > 0
    ends = {reason for outputs in found for _, _, reason, _, _ in outputs}
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(len(ids) % 4 != 1 and reason is FinishReason.STOP for o in found for _, ids, reason, _, _ in o)


def test_requests_that_need_the_host_between_tokens_are_served_beside_them(single, several):
    asked = [greedy(logprobs=3), SamplingParams(max_tokens=20, seed=1, bad_words=["the quick"]), greedy(30)]
    asked += [SamplingParams(max_tokens=20, seed=2, prompt_logprobs=2), greedy(40)]
    found, saved = both(single, several, [prompt(5 + i, salt=60) for i in range(5)], asked)
    assert len(found[0][0][4]) == 25  # log-probabilities
    assert saved > 0  # by those that went on alone


def test_a_stop_string_in_the_midst_ends_the_text_where_single_steps_end_it(single, several):
    seeded = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    (((text, *_),),) = generate(single, [prompt(12, salt=70)], [seeded])
    asked = [seeded.replace(stop=text[at : at + 2]) for at in range(4, 16)]
    found, saved = both(single, several, [prompt(12, salt=70)] * len(asked), asked)
    assert saved > 0
    lengths = {len(ids) for ((_, ids, *_),) in found}
    assert len({length % 4 for length in lengths}) > 1
    assert all(reason is FinishReason.STOP for ((_, _, reason, *_),) in found)


def test_preempted_sequences_give_the_same_tokens(single, several):
    asked = [greedy(60), SamplingParams(max_tokens=60, seed=3, ignore_eos=True)] * 4
    prompts = [prompt(10 + 3 * i, salt=80) for i in range(8)]
    before = several.scheduler.metrics.preemptions
    _, saved = both(single, several, prompts, asked)
    assert saved > 0
    assert several.scheduler.metrics.preemptions > before


def test_what_is_taken_back_in_the_midst_leaves_nothing_and_the_others_go_on(single, several):
    (((_, alone, *_),),) = generate(single, [prompt(11)], [greedy(40)])
    kept = several.add(several.make_request(prompt(11), greedy(40)))[0]
    for i in range(3):
        several.add(several.make_request(prompt(7 + i), greedy(60), request_id=f"gone-{i}"))
    for step in range(9):
        several.step()
        if step > 5:
            several.abort(f"gone-{step - 6}")
        several.check()
    while several.has_work:
        several.step()
        several.check()
    assert kept.output_token_ids == alone
    assert several.scheduler.pool.num_held == 0


def test_a_step_that_fails_for_one_row_fails_that_row_alone(several):
    whole = several.runner
    try:
        several.runner = FaultyRunner(whole, parse_faults("step:4:nan_row=1"))
        made = [several.make_request(prompt(5 + i, salt=90), greedy(30)) for i in range(3)]
        sequences = [several.add(request)[0] for request in made]
        while several.has_work:
            several.step()
            several.check()
    finally:
        several.runner = whole
    reasons = [sequence.finish_reason for sequence in sequences]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert several.scheduler.pool.num_held == 0


def test_nothing_compiles_after_ready(several):
    generate(several, [prompt(3)], [greedy(2)])  # the process's first use of helpers outside the step graphs
    before, rng, kinds = compile_counter().compiles, random.Random(5), [*steady(), greedy(5, logprobs=1)]
    asked = [rng.choice(kinds) for _ in range(60)]
    generate(several, [prompt(rng.randrange(1, 60), salt=i) for i in range(60)], asked)
    assert compile_counter().compiles == before
    assert several.scheduler.metrics.compiles_after_ready == before - several.runner._compiles_when_ready


def test_deterministic_mode_keeps_to_its_one_executable(build):
    fixed = dict(deterministic=True, decode_buckets=(), token_buckets=())
    engine = build(decode_steps=4, **fixed)
    assert engine.config.scheduler.decode_steps == 1
    assert not [key for key in engine.runner.executables.table if key[0] == "multi_step"]
    _, steps, each = dispatches(engine, lambda: generate(engine, [prompt(5)], [greedy(9)]))
    assert steps == each


def test_the_meter_counts_the_work_of_every_step(single, several):
    def work(engine):
        before = dataclasses.replace(engine.scheduler.metrics)
        engine.scheduler.cache.evict(engine.scheduler.pool.num_cached)
        generate(engine, [prompt(9, salt=95)] * 2, [greedy(22)] * 2)
        after = engine.scheduler.metrics
        return [getattr(after, name) - getattr(before, name) for name in ("decode_flops", "decode_bytes", "steps")]

    np.testing.assert_allclose(work(several), work(single), rtol=1e-12)
