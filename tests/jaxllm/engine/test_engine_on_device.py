"""The whole engine on a tiny random model: what the schedule does must not be seen in the tokens."""

import json
import random

import jax
import numpy as np
import pytest
from helpers.same_bits import logprobs_of

from jaxllm.config import load
from jaxllm.core import FinishReason, RequestError, SamplingParams
from jaxllm.engine.retry import ShrinkingRunner
from jaxllm.engine.startup import start
from jaxllm.graph import steps
from jaxllm.graph.compile import compile_counter
from pallas_kernels.dispatch import explain

pytestmark = pytest.mark.usefixtures("compiled_as_served")

VOCAB = 128
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
SHAPE = dict(
    load_format="dummy",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    page_size=8,
    decode_buckets=[8],
    token_buckets=[64],
    dtype="float32",
    seed=3,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def build(directory, cache):
    """An engine with the given settings; engines of one setting are shared, as nothing may stay behind in them."""
    made = {}

    def make(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = start(load(model=directory, cache_dir=cache, **SHAPE | settings))[0]
        return made[key]

    return make


def prompt(length, salt=0):
    return random.Random(1000 * salt + length).choices(range(2, VOCAB), k=length)


def run(engine, requests):
    """[(prompt, params)] -> [(token ids, finish reason, cached tokens)]; pages are accounted for after each step."""
    sequences = [engine.add(engine.make_request(ids, params))[0] for ids, params in requests]
    while engine.has_work:
        engine.step()
        engine.check()
    pool = engine.scheduler.pool
    assert pool.num_held == 0
    assert pool.num_free + pool.num_cached == pool.num_pages
    return [(tuple(s.output_token_ids), s.finish_reason, s.num_cached) for s in sequences]


def tokens(results):
    return [ids for ids, _, _ in results]


def greedy(n=12, **more):
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, **more)


def everything():
    """One request for each kind of thing a client may ask for."""
    seeded = dict(max_tokens=9, seed=11)
    return [
        greedy(),
        SamplingParams(**seeded),
        SamplingParams(**seeded, temperature=0.7, top_p=0.8, top_k=20, min_p=0.02),
        SamplingParams(**seeded, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingParams(**seeded, logit_bias={5: 8.0, 9: -100.0}, logprobs=3),
        SamplingParams(**seeded, allowed_token_ids=[4, 6, 8], min_tokens=4),
        SamplingParams(**seeded, prompt_logprobs=2, logprobs=0),
        SamplingParams(**seeded, stop_token_ids=[7, 8, 9], n=1),
    ]


def test_sequences_that_are_preempted_give_the_tokens_they_would_have_given_undisturbed(build):
    requests = [(prompt(20 + 3 * i), greedy(40)) for i in range(8)]
    roomy, tight = build(num_pages=256), build(num_pages=24)
    undisturbed = tokens(run(roomy, requests))
    before = tight.scheduler.metrics.preemptions
    assert tokens(run(tight, requests)) == undisturbed
    assert tight.scheduler.metrics.preemptions > before


@pytest.mark.parametrize("chunk", [1, 5, 17])
def test_a_prompt_gives_the_same_tokens_in_chunks_of_any_size(build, chunk):
    requests = [(prompt(50, salt=2), greedy()), (prompt(23, salt=2), greedy())]
    whole = tokens(run(build(num_pages=256, enable_prefix_caching=False), requests))
    chunked = build(num_pages=256, enable_prefix_caching=False, max_prefill_chunk=chunk)
    assert tokens(run(chunked, requests)) == whole


@pytest.mark.parametrize(
    ("kernels", "op"), [("chain", "decode_chain"), ("layers", "decode_layers"), ("launched", "decode_layers")]
)
def test_layers_in_larger_kernels_give_the_same_tokens(build, kernels, op):
    requests = [(prompt(5 + 9 * i, salt=4), greedy(20)) for i in range(4)]
    plain = tokens(run(build(num_pages=256), requests))
    assert tokens(run(build(num_pages=256, kernels=kernels), requests)) == plain
    assert f"{op} on cpu: reference" in explain()


def test_a_step_launched_ahead_of_the_last_ones_result_changes_no_token(build):
    rng = random.Random(8)
    requests = [(prompt(rng.randrange(1, 60), salt=i), params) for i, params in enumerate(everything() * 3)]
    requests += [(prompt(25, salt=50 + i), greedy(40)) for i in range(6)]  # 40 pages are too few: some are preempted
    behind, ahead = build(num_pages=40, async_scheduling=False), build(num_pages=40)
    preempted = ahead.scheduler.metrics.preemptions
    assert tokens(run(ahead, requests)) == tokens(run(behind, requests))
    assert ahead.scheduler.metrics.preemptions > preempted


def test_a_prefix_hit_gives_the_tokens_of_a_miss(build):
    engine = build(num_pages=256)
    shared = prompt(40, salt=3)
    requests = [(shared + prompt(5, salt=i), greedy()) for i in (4, 5)]
    misses = [run(build(num_pages=256, enable_prefix_caching=False), [r])[0] for r in requests]
    hits = [run(engine, [r])[0] for r in (requests[0], requests[1], requests[0])]
    assert [cached for _, _, cached in misses] == [0, 0]
    assert [cached for _, _, cached in hits] == [0, 40, 40]
    assert tokens(hits) == tokens([*misses, misses[0]])


def run_and_watch_table(engine, requests):
    """The pages of each sequence that runs are in the device's table, as far as a step may have read them."""
    sequences = [engine.add(engine.make_request(ids, params))[0] for ids, params in requests]
    runner, seen = getattr(engine.runner, "inner", engine.runner), set()
    while engine.has_work:
        engine.step()
        table = np.asarray(runner.page_table)
        for sequence in sequences:
            if sequence.row is not None and sequence.num_computed:
                have = -(-sequence.num_computed // SHAPE["page_size"])
                assert table[sequence.row, :have].tolist() == sequence.pages[:have]
                seen.add(sequence)
    assert len(seen) == len(sequences)


def test_the_table_on_the_device_has_every_rows_pages(build):
    engine = build()
    table, whole = engine.runner.executables.table, []
    call = table["set_pages",]
    table["set_pages",] = lambda *given: whole.append(given) or call(*given)
    try:
        run_and_watch_table(engine, [(prompt(60), greedy(30)), (prompt(4), greedy(30))])
        assert not whole
        shared = prompt(150)  # 19 pages, where a step of 64 tokens brings 12
        short = [(prompt(n, 2), greedy(9)) for n in (5, 50)]
        run_and_watch_table(engine, [*((shared + prompt(n, 1), greedy(30)) for n in (3, 20, 41)), *short])
        assert len(whole) == 3
    finally:
        table["set_pages",] = call


def test_what_a_refused_launch_was_to_bring_to_the_table_is_brought_again(build):
    engine = build()
    runner, pack, brought = engine.runner, engine.runner._pack, []

    def refused(shape, parts):
        before = list(runner._num_pages)
        packed = pack(shape, parts)
        if len(parts[0]) > 1 and runner._num_pages != before:
            brought.append(shape)
            if len(brought) % 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: nothing left")
        return packed

    runner._pack, engine.runner = refused, ShrinkingRunner(runner)
    try:
        run_and_watch_table(engine, [(prompt(n, 5), greedy(30)) for n in (30, 17, 60)])
        assert engine.runner.retries >= 3
    finally:
        del runner._pack
        engine.runner = runner


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch(build):
    engine = build(num_pages=256)
    params = SamplingParams(temperature=1.0, seed=42, max_tokens=15, ignore_eos=True)
    alone = run(engine, [(prompt(9), params)])[0]
    others = [(prompt(7 + i), SamplingParams(temperature=1.5, max_tokens=5 + i, seed=i)) for i in range(6)]
    crowded = run(engine, [*others[:3], (prompt(9), params), *others[3:]])[3]
    assert crowded[0] == alone[0]
    other_seed = run(engine, [(prompt(9), params.replace(seed=43))])[0]
    assert other_seed[0] != alone[0]


def test_nothing_compiles_after_ready_whatever_a_client_asks_for(build):
    engine = build(num_pages=64)
    counter = compile_counter()
    run(engine, [(prompt(3), greedy(2))])  # the process's first use of helpers outside the step graphs
    before, metrics = counter.compiles, engine.scheduler.metrics
    rng, kinds = random.Random(5), everything()
    lengths = [rng.randrange(1, 90) for _ in range(1000)]
    asked = [(prompt(length, salt=rng.randrange(50)), rng.choice(kinds)) for length in lengths]
    sequences = [engine.add(engine.make_request(ids, params))[0] for ids, params in asked]
    while engine.has_work:
        engine.step()
    engine.check()
    assert all(sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for sequence in sequences)
    assert counter.compiles == before
    assert metrics.compiles_after_ready == before - engine.runner._compiles_when_ready
    jax.jit(lambda x: x * 3)(np.float32(1))  # the counter has teeth
    assert counter.compiles == before + 1


def test_log_probabilities_are_those_of_the_model(build):
    engine = build(num_pages=256, enable_prefix_caching=False)
    ids = prompt(30, salt=6)
    sequence = engine.add(engine.make_request(ids, greedy(4, logprobs=5, prompt_logprobs=5)))[0]
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    of_prompt = [lp for out in outputs for lp in out.prompt_logprobs]
    generated = [out.logprobs for out in outputs if out.logprobs]
    assert [lp.token_id for lp in of_prompt] == ids[1:]
    assert [lp.token_id for lp in generated] == sequence.output_token_ids
    # The generated tokens fed back as a prompt must be given the log-probabilities they were sampled with.
    again = engine.add(engine.make_request(sequence.tokens, greedy(1, prompt_logprobs=5)))[0]
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    replayed = [lp for out in outputs for lp in out.prompt_logprobs][-4:]
    assert again.num_output == 1
    assert [lp.token_id for lp in replayed] == [lp.token_id for lp in generated]
    np.testing.assert_allclose([lp.logprob for lp in replayed], [lp.logprob for lp in generated], atol=1e-5)
    assert all(lp.rank == 1 and lp.top[0][0] == lp.token_id for lp in generated)
    assert all(lp.logprob < 0 and len(lp.top) == 5 for lp in generated)


def test_allowed_tokens_and_bans_are_obeyed(build):
    engine = build(num_pages=256)
    asked = [
        SamplingParams(allowed_token_ids=[4, 6, 8], max_tokens=20, seed=1, ignore_eos=True),
        SamplingParams(logit_bias=dict.fromkeys(range(2, VOCAB, 2), -100.0), max_tokens=20, seed=1, ignore_eos=True),
        SamplingParams(allowed_token_ids=[1, 5], min_tokens=7, max_tokens=30, seed=2),
    ]
    (allowed, odd, late), endings = zip(*[(r[0], r[1]) for r in run(engine, [(prompt(5), p) for p in asked])])
    assert set(allowed) <= {4, 6, 8}
    assert all(token % 2 or token < 2 for token in odd)
    assert set(late[:7]) == {5}
    assert endings[2] is FinishReason.STOP
    assert late[-1] == 1


def test_a_bad_request_says_why_and_the_others_finish(build):
    engine = build(num_pages=256)
    limit = TINY["max_position_embeddings"]
    bad = [
        ([], "at least one token"),
        ([VOCAB], f"[0, {VOCAB - 1}]"),
        ([-1], f"[0, {VOCAB - 1}]"),
        ([True], "integers"),
        (prompt(limit), f"at most {limit - 1} tokens"),
        ("text", "token ids"),
    ]
    good = engine.add(engine.make_request(prompt(8), greedy(5)))[0]
    for ids, said in bad:
        with pytest.raises(RequestError, match="prompt") as error:
            engine.make_request(ids, greedy())
        assert said in str(error.value)
    with pytest.raises(RequestError, match="logit_bias"):
        engine.make_request([5], SamplingParams(logit_bias={VOCAB: 1.0}))
    while engine.has_work:
        engine.step()
    assert good.finish_reason is FinishReason.LENGTH
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_pages - pool.num_cached


def test_abort_frees_everything_and_the_others_go_on(build):
    engine = build(num_pages=256)
    alone = run(engine, [(prompt(11), greedy(20))])[0]
    kept = engine.add(engine.make_request(prompt(11), greedy(20)))[0]
    for i in range(5):
        engine.add(engine.make_request(prompt(30 + i), greedy(50).replace(n=2), request_id=f"gone-{i}"))
    for step in range(5):
        engine.step()
        engine.abort(f"gone-{step}")
        engine.check()
    while engine.has_work:
        engine.step()
    assert tuple(kept.output_token_ids) == alone[0]
    assert engine.scheduler.pool.num_held == 0


def crowd():
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True, logprobs=1)
    return [(prompt(9 + 5 * i, salt=80 + i), params) for i in range(7)]


def test_in_deterministic_mode_logprobs_have_the_same_bits_whatever_the_batch_and_the_schedule(build):
    fixed = dict(deterministic=True, decode_buckets=(), token_buckets=(), dtype="bfloat16")
    requests = crowd()
    engine = build(num_pages=256, **fixed)
    alone = [logprobs_of(engine, [one])[0] for one in requests]  # misses; every later prompt is a hit
    assert logprobs_of(engine, requests) == alone
    assert logprobs_of(engine, requests, order=[3, 0, 6, 1, 5, 2, 4]) == alone
    chunked = build(num_pages=256, max_prefill_chunk=7, enable_prefix_caching=False, **fixed)
    assert logprobs_of(chunked, requests) == alone
    tight = build(num_pages=26, **fixed)
    assert logprobs_of(tight, requests) == alone
    assert tight.scheduler.metrics.preemptions > 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_in_deterministic_mode_rows_of_one_query_are_asked_to_attend_as_others_do(
    directory, monkeypatch, deterministic
):
    """On a CPU they do in either mode; on a GPU their bits would be those of another kernel."""
    asked, ragged = set(), steps._ragged
    monkeypatch.setattr(steps, "_ragged", lambda *arrays, **how: asked.add(how["uniform"]) or ragged(*arrays, **how))
    buckets = dict(decode_buckets=(), token_buckets=()) if deterministic else {}
    start(load(model=directory, cache_dir="", deterministic=deterministic, **SHAPE | buckets))
    assert asked == {deterministic}


def test_without_deterministic_mode_some_bits_follow_the_batch(build):
    """The test above has teeth: the same comparison fails where buckets choose the executable."""
    free = build(num_pages=256, dtype="bfloat16", decode_buckets=(1, 8), token_buckets=(16, 64))
    requests = crowd()
    alone = [logprobs_of(free, [one])[0] for one in requests]
    assert logprobs_of(free, requests) != alone
