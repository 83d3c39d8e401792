"""Grammars through the whole engine on a tiny random model: whatever it would say, it says within the grammar."""

import json
import re

import pytest
from helpers.byte_tokenizer import EOS, VOCAB_SIZE, tokenizer_json

from jaxllm.config import load
from jaxllm.core import FinishReason, RequestError, SamplingParams
from jaxllm.engine.decoding import grammars
from jaxllm.engine.startup import start
from jaxllm.graph.compile import compile_counter

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
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
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Alan"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(MODEL))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    shape = {"decode_buckets": [8], "token_buckets": [64], "max_num_seqs": 8, "max_num_batched_tokens": 64}
    made = start(
        load(
            model=str(directory),
            load_format="dummy",
            dtype="float32",
            page_size=8,
            seed=3,
            cache_dir=str(directory / "compiled"),
            **shape,
        )
    )[0]
    yield made
    made.grammars.close()
    made.grammars.trial.close()


def run(engine, *params):
    sequences = [one for each in params for one in engine.add(engine.make_request([5, 6, 7, 8], each))]
    while engine.has_work:
        engine.step()
    engine.check()
    return sequences


def text(engine, sequence):
    return engine.tokenizer.decode(sequence.output_token_ids, skip_special_tokens=True)


def test_grammars_of_many_kinds_share_a_batch_with_free_rows_and_compile_nothing(engine):
    schema, pattern = grammars.json_schema(SCHEMA), grammars.regex("[a-f]{3}-[0-9]{2}")
    free = SamplingParams(max_tokens=12, seed=1, temperature=1.0)
    alone = run(engine, free)[0].tokens
    before = compile_counter()
    sequences = run(
        engine,
        free,
        SamplingParams(max_tokens=200, grammar=schema, n=3, seed=2, logprobs=3),
        SamplingParams(max_tokens=200, grammar=pattern, temperature=0),
        SamplingParams(max_tokens=200, grammar=grammars.choice(["left", "right"]), seed=4),
    )
    assert compile_counter() == before
    assert sequences[0].tokens == alone
    assert all(one.finish_reason is FinishReason.STOP for one in sequences[1:])
    for one in sequences[1:4]:
        assert json.loads(text(engine, one)).keys() == {"name", "ok"}
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", text(engine, sequences[4]))
    assert text(engine, sequences[5]) in ("left", "right")


def test_a_grammar_that_cannot_be_compiled_is_refused_and_queues_nothing(engine):
    with pytest.raises(RequestError, match="guided_regex"):
        engine.add(engine.make_request([5, 6], SamplingParams(grammar=grammars.regex("["))))
    assert not engine.has_work


def test_a_loop_can_wait_for_a_grammar_without_waiting_in_add(engine):
    request = engine.make_request([5, 6], SamplingParams(max_tokens=9, grammar=grammars.choice(["new here"])))
    future = engine.prepare(request)
    assert future is not None
    assert future.result(30) is not None
    again = engine.prepare(request)
    assert again is not None
    assert again.done()
    assert engine.prepare(engine.make_request([5], SamplingParams())) is None


def test_a_grammar_against_the_allowed_tokens_ends_only_its_own_sequence(engine):
    bad = SamplingParams(grammar=grammars.choice(["left"]), allowed_token_ids=[40])
    failed, fine = run(engine, bad, SamplingParams(max_tokens=4, seed=1, ignore_eos=True))
    assert failed.finish_reason is FinishReason.ERROR
    assert fine.finish_reason is FinishReason.LENGTH
