"""A grammar beside the other masks, and through the scheduler: preemption, siblings, endings."""

import json

import numpy as np
import pytest
from helpers.byte_tokenizer import EOS, VOCAB_SIZE, decode, encode, tokenizer_json

from jaxllm.core import FinishReason, Request, RowResult, SampledToken, SamplingParams, Sequence
from jaxllm.engine.cache.hashed import PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.decoding import grammars
from jaxllm.engine.decoding.mask import TokenMask
from jaxllm.engine.decoding.structured import TokenizerBridge, compile_spec
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler

SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 40}


@pytest.fixture(scope="module")
def bridge():
    return TokenizerBridge(tokenizer_json(), VOCAB_SIZE, [EOS])


def sequence(bridge, spec, index=0, key="r", prompt=(5, 6, 7), bad_words=(), **params):
    params = SamplingParams(grammar=spec, n=4, **params)
    request = Request(
        id=key, prompt_token_ids=tuple(prompt), params=params, eos_token_ids=(EOS,), bad_word_ids=bad_words
    )
    return Sequence(request, index, grammar=compile_spec(spec, bridge))


def allowed(mask):
    return set(np.flatnonzero(np.unpackbits(mask.bits().view(np.uint8), bitorder="little")).tolist())


def test_what_the_grammar_allows_and_what_is_banned_otherwise_are_intersected(bridge):
    a, b, c = (encode(text)[0] for text in "abc")
    one = sequence(bridge, grammars.regex("[ab]+"), allowed_token_ids=(b, c, EOS))
    mask = TokenMask(one, VOCAB_SIZE)
    assert allowed(mask) == {b}
    one.tokens.append(b)
    assert allowed(mask) == {b, EOS}
    one = sequence(bridge, grammars.regex("[ab]"), bad_words=((a,),))
    assert allowed(TokenMask(one, VOCAB_SIZE)) == {b}


def test_a_long_bad_word_is_banned_within_a_grammar(bridge):
    a, b = encode("a")[0], encode("b")[0]
    one = sequence(bridge, grammars.regex("[ab]{4}"), bad_words=((a, b),))
    mask = TokenMask(one, VOCAB_SIZE)
    assert b in allowed(mask)
    one.tokens.append(a)
    assert allowed(mask) == {a}


def test_min_tokens_hold_the_end_back_until_the_grammar_is_complete(bridge):
    a = encode("a")[0]
    one = sequence(bridge, grammars.regex("a{1,2}"), min_tokens=4, max_tokens=9)
    mask = TokenMask(one, VOCAB_SIZE)
    one.tokens.append(a)
    assert EOS not in allowed(mask)
    one.tokens.append(a)
    assert allowed(mask) == {EOS}


def test_a_conflict_allows_nothing_and_says_why(bridge):
    one = sequence(bridge, grammars.choice(["x"]), allowed_token_ids=(encode("y")[0],))
    mask = TokenMask(one, VOCAB_SIZE)
    assert allowed(mask) == set()
    assert "the grammar leave no token" in mask.why_nothing
    one.tokens.append(encode("y")[0])
    assert allowed(mask) == set()
    assert "could not be followed" in mask.why_nothing


def test_the_prompt_is_not_part_of_what_must_match(bridge):
    one = sequence(bridge, grammars.choice(["x"]), prompt=encode("anything at all"))
    assert allowed(TokenMask(one, VOCAB_SIZE)) == {encode("x")[0]}


class LastAllowed:
    """A runner that takes an allowed token by a rule of its own: what a sequence gets depends only on its tokens."""

    def __init__(self):
        self.masks = {}

    def run(self, plan):
        self.masks |= {one: TokenMask(one, VOCAB_SIZE) for one in plan.admitted}
        return [RowResult(self._sample(row.sequence) if row.sample else None) for row in plan.rows]

    def _sample(self, one):
        choices = sorted(allowed(self.masks[one]))
        return SampledToken(choices[(31 * one.num_output + 7 * one.index) % len(choices)])


def generate(bridge, num_pages, count):
    pool = PagePool(num_pages, 4)
    limits = Limits(token_budget=16, max_num_seqs=8, page_size=4, max_model_len=128)
    scheduler, runner = Scheduler(limits, pool, PrefixCache(pool)), LastAllowed()
    spec = grammars.json_schema(SCHEMA)
    sequences = [
        sequence(bridge, spec, index % 4, f"r{index // 4}", prompt=range(10, 19), max_tokens=60)
        for index in range(count)
    ]
    for one in sequences:
        scheduler.add(one)
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan) if plan else [])
        scheduler.check()
    return sequences, scheduler


def test_preempted_sequences_go_on_in_their_grammar_as_if_nothing_had_been(bridge):
    roomy, _ = generate(bridge, 400, 8)
    tight, scheduler = generate(bridge, 34, 8)
    assert scheduler.metrics.preemptions > 0
    assert [one.tokens for one in roomy] == [one.tokens for one in tight]


def test_each_sibling_follows_the_grammar_by_itself(bridge):
    sequences, _ = generate(bridge, 400, 4)
    texts = [decode(one.output_token_ids).removesuffix("</s>") for one in sequences]
    assert len(set(texts)) > 1
    for one, text in zip(sequences, texts):
        if one.finish_reason is FinishReason.STOP:
            assert isinstance(json.loads(text), list)
    assert any(one.finish_reason is FinishReason.STOP for one in sequences)
