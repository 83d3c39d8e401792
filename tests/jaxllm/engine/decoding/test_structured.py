"""Grammars: what they allow, what is refused before and while compiling, and how matchers follow their sequences."""

import json
import random
import threading
import time

import numpy as np
import pytest
from helpers.byte_tokenizer import EOS, OTHER_EOS, VOCAB_SIZE, decode, encode, tokenizer, tokenizer_json

from jaxllm.core import GrammarKind, GrammarSpec, RequestError
from jaxllm.engine.decoding import grammars
from jaxllm.engine.decoding.grammar_trial import GrammarTrial
from jaxllm.engine.decoding.structured import GrammarCompiler, TokenizerBridge, compile_spec

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


def make_bridge():
    return TokenizerBridge(tokenizer_json(), VOCAB_SIZE, [EOS, OTHER_EOS])


@pytest.fixture(scope="module")
def bridge():
    return make_bridge()


@pytest.fixture
def compiler():
    made = GrammarCompiler(make_bridge)
    yield made
    made.close()


def allowed(matcher):
    bits = np.unpackbits(matcher.bits().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def accepts(spec, text, bridge):
    """Whether the text is a whole sentence of the grammar, by masks alone."""
    matcher = compile_spec(spec, bridge).matcher()
    for token in encode(text):
        if token not in allowed(matcher) or not matcher.advance(token):
            return False
    return EOS in allowed(matcher)


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


# ---- what grammars allow ----

TAGS = {
    "triggers": ["<tool_call>"],
    "structures": [
        {"begin": '<tool_call>{"name": "f", "arguments": ', "schema": SCHEMA, "end": "}</tool_call>"},
        {"begin": '<tool_call>{"name": "g", "arguments": ', "schema": {"type": "object"}, "end": "}</tool_call>"},
    ],
}
CALL = '<tool_call>{"name": "f", "arguments": {"city":"x","n":1}}</tool_call>'
SENTENCES = [
    (grammars.json_object(), ['{"a": [1, null]}', "{}", '{\n    "a" : 1\n}'], ["[1]", '{"a"', "x", "{\n\n}", "{   }"]),
    (grammars.json_schema(SCHEMA), ['{"city":"Oslo","n":3}'], ['{"n":3}', '{"city":"Oslo","n":3.5}', "{}"]),
    (grammars.json_schema(True), ["1", '"x"', "[]"], ["x"]),
    (grammars.regex("[0-9]{2}(/a|b)"), ["12b", "12/a"], ["1b", "12"]),
    (grammars.choice(["yes", 'say "no"', "日本", "/"]), ["yes", 'say "no"', "日本", "/"], ["ye", "no"]),
    (grammars.grammar('start: "a" start "b" | "a" "b"'), ["ab", "aabb"], ["aab", "b"]),
    (grammars.grammar('root ::= "x" digit+\ndigit ::= [0-9]'), ["x1", "x12"], ["x", "1"]),
    (grammars.structural_tag(TAGS), ["hello", CALL, f"sure {CALL}{CALL} done"], [CALL[:-3], CALL.replace("1", "y")]),
    (
        grammars.after_thinking(grammars.json_object(), "<think>", "</think>", inside=False),
        ["{}", "<think>so { it } is</think>\n\n{}"],
        ["<think>so{}", "so</think>{}"],
    ),
    (
        grammars.after_thinking(grammars.regex("a+"), "<think>", "</think>", inside=True),
        ["so</think>aa", "</think>\na"],
        ["aa", "so</think>b"],
    ),
    (grammars.after_thinking(grammars.grammar('start: "a"'), "<t>", "</t>", inside=False), ["a", "<t>b</t>a"], ["b"]),
    (
        grammars.structural_tag(
            {
                "format": {
                    "type": "tags_with_separator",
                    "separator": "; ",
                    "at_least_one": True,
                    "tags": [
                        {"type": "tag", "begin": "<", "content": {"type": "regex", "pattern": "[ab]"}, "end": ">"}
                    ],
                }
            }
        ),
        ["<a>", "<a>; <b>"],
        ["", "<a>;", "<c>"],
    ),
]


@pytest.mark.parametrize(
    ("spec", "good", "bad"), SENTENCES, ids=[f"{i}-{s.kind}" for i, (s, _, _) in enumerate(SENTENCES)]
)
def test_a_grammar_allows_its_sentences_and_no_others(spec, good, bad, bridge):
    assert [text for text in good if not accepts(spec, text, bridge)] == []
    assert [text for text in bad if accepts(spec, text, bridge)] == []


def test_a_literal_that_is_a_special_token_is_that_token(bridge):
    form = {"type": "tag", "begin": "[TOOL_CALLS]", "content": {"type": "json_schema", "json_schema": {}}, "end": ""}
    matcher = compile_spec(grammars.structural_tag({"format": form}), bridge).matcher()
    assert allowed(matcher) == {tokenizer().token_to_id("[TOOL_CALLS]")}


def test_whatever_the_masks_allow_is_valid_json(bridge):
    grammar = compile_spec(grammars.json_schema(SCHEMA), bridge)
    for seed in range(20):
        matcher, chosen, ids = grammar.matcher(), random.Random(seed), []
        while not (matcher.finished or len(ids) > 200):
            ids.append(chosen.choice(sorted(allowed(matcher))))
            assert matcher.advance(ids[-1])
        if matcher.finished:
            value = json.loads(decode([i for i in ids if i not in (EOS, OTHER_EOS)]))
            assert value.keys() == {"city", "n"}
            assert isinstance(value["n"], int)


def test_masks_have_no_bit_beyond_the_vocabulary_nor_for_ids_without_a_token(bridge):
    matcher = compile_spec(grammars.regex("(.|\n)*"), bridge).matcher()
    row = matcher.bits()
    assert row.dtype == np.uint32
    assert row.shape == (-(-VOCAB_SIZE // 32),)
    assert max(allowed(matcher)) < tokenizer().get_vocab_size()
    assert {EOS, OTHER_EOS} <= allowed(matcher)


def test_a_complete_grammar_allows_only_the_end_and_goes_on_doing_so(bridge):
    matcher = compile_spec(grammars.choice(["ab"]), bridge).matcher()
    for token in encode("ab"):
        assert not matcher.finished
        assert matcher.advance(token)
    for _ in range(3):
        assert matcher.finished
        assert allowed(matcher) == {EOS, OTHER_EOS}
        assert matcher.advance(EOS)


def test_after_a_refused_token_nothing_is_allowed_and_the_reason_is_kept(bridge):
    matcher = compile_spec(grammars.choice(["abc"]), bridge).matcher()
    assert not matcher.advance(encode("z")[0])
    assert "doesn't satisfy the grammar" in matcher.error
    assert not matcher.finished
    assert not matcher.bits().any()
    assert not matcher.advance(encode("a")[0])
    with pytest.raises(ValueError, match="cannot roll back"):
        matcher.rollback(1)


def test_rolling_back_tokens_restores_every_mask(bridge):
    matcher = compile_spec(grammars.json_schema(SCHEMA), bridge).matcher()
    tokens = encode('{"city":"Oslo","n":3}')
    masks = []
    for token in tokens:
        masks.append(allowed(matcher))
        matcher.advance(token)
    for count in (1, 3):
        matcher.rollback(count)
        assert allowed(matcher) == masks[len(tokens) - count]
        assert all(matcher.advance(token) for token in tokens[len(tokens) - count :])


def test_matchers_of_one_grammar_do_not_see_each_other(bridge):
    grammar = compile_spec(grammars.choice(["ab", "cd"]), bridge)
    one, two = grammar.matcher(), grammar.matcher()
    one.advance(encode("a")[0])
    assert allowed(two) == allowed(grammar.matcher())


# ---- what is refused ----

REFUSED_AT_ONCE = {
    "10k properties": lambda: grammars.json_schema({"properties": {f"p{i}": {} for i in range(10_000)}}),
    "1001 properties over two objects": lambda: grammars.json_schema(
        {"properties": {"a": {"properties": {f"p{i}": {} for i in range(1000)}}}}
    ),
    "65 deep": lambda: grammars.json_schema(nested(65)),
    "20k deep": lambda: grammars.json_schema(nested(20_000)),
    "100k enum": lambda: grammars.json_schema({"enum": list(range(100_000))}),
    "5 MB": lambda: grammars.json_schema({"const": "x" * 5_000_000}),
    "remote reference": lambda: grammars.json_schema({"$ref": "http://169.254.169.254/"}),
    "file reference": lambda: grammars.json_schema({"items": {"$ref": "file:///etc/passwd"}}),
    "huge number": lambda: grammars.json_schema({"minimum": 10**30}),
    "huge multiple": lambda: grammars.json_schema({"multipleOf": 9_999_991}),
    "schema is a list": lambda: grammars.json_schema([1]),
    "lone surrogate": lambda: grammars.json_schema({"const": "\ud800"}),
    "compiler options": lambda: grammars.json_schema({"x-guidance": {"lenient": True}}),
    "long regex": lambda: grammars.regex("a?" * 15_000),
    "no choices": lambda: grammars.choice([]),
    "empty choice": lambda: grammars.choice(["a", ""]),
    "2,000 choices": lambda: grammars.choice([str(i) for i in range(2000)]),
    "3,500 rules": lambda: grammars.grammar("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500))),
    "bracket tower": lambda: grammars.grammar("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "GBNF that is none": lambda: grammars.grammar("root ::= ((("),
    "tag without a trigger": lambda: grammars.structural_tag({"structures": TAGS["structures"], "triggers": ["<x>"]}),
    "unknown tag type": lambda: grammars.structural_tag({"format": {"type": "telepathy"}}),
    "tag without content": lambda: grammars.structural_tag({"format": {"type": "tag", "begin": "a", "end": "b"}}),
}


@pytest.mark.parametrize("make", REFUSED_AT_ONCE.values(), ids=REFUSED_AT_ONCE.keys())
def test_what_is_too_large_or_malformed_is_refused_without_compiling(make):
    with pytest.raises(RequestError) as caught:
        make()
    assert caught.value.field in ("response_format", "guided_regex", "guided_choice", "guided_grammar")
    assert len(str(caught.value)) < 400


REFUSED_BY_COMPILER = {
    "unclosed class": grammars.regex("["),
    "look-ahead": grammars.regex("(?=a)b"),
    "matches nothing": grammars.regex(r"[^\x00-\x{10FFFF}]"),
    "bad type": grammars.json_schema({"type": "foo"}),
    "bad pattern": grammars.json_schema({"type": "string", "pattern": "("}),
    "unsatisfiable": grammars.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "reference cycle": grammars.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "keyword that cannot be enforced": grammars.json_schema({"type": "array", "uniqueItems": True}),
    "rule of itself": grammars.grammar("start: start"),
    "unknown rule": grammars.grammar("start: foo"),
}


@pytest.mark.parametrize("spec", REFUSED_BY_COMPILER.values(), ids=REFUSED_BY_COMPILER.keys())
def test_what_cannot_be_compiled_or_begun_names_its_field(spec, bridge):
    with pytest.raises(RequestError) as caught:
        compile_spec(spec, bridge)
    assert caught.value.field == spec.field
    assert "/" not in caught.value.allowed or "regex" in caught.value.allowed


HOSTILE = {
    "nested plus": grammars.regex("(a+)+b"),
    "counted counted": grammars.regex("a{1,100000}{1,100000}"),
    "left recursion": grammars.grammar('start: start "a" | "a"'),
    "ambiguous": grammars.grammar('start: e\ne: e e e | e e | "a" | ""'),
    "1000 properties": grammars.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),
    "recursive": grammars.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
    "many optional": grammars.regex("a?" * 200 + "a" * 200),
}


@pytest.mark.parametrize("spec", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_grammar_within_the_limits_stays_quick(spec, bridge):
    started = time.process_time()
    matcher = compile_spec(spec, bridge).matcher()
    for _ in range(20):
        tokens = sorted(allowed(matcher) - {EOS, OTHER_EOS})
        if not tokens:
            break
        matcher.advance(tokens[0])
    assert time.process_time() - started < 2


def test_a_schema_that_is_not_strict_ignores_what_cannot_be_enforced(bridge):
    spec = grammars.json_schema({"type": "array", "uniqueItems": True}, strict=False)
    assert accepts(spec, "[1,1]", bridge)


def test_a_spec_that_came_past_its_maker_is_checked_before_it_compiles(compiler):
    hostile = GrammarSpec(GrammarKind.REGEX, "a?" * 15_000)
    with pytest.raises(RequestError, match="8192"):
        compiler.compile(hostile)
    with pytest.raises(RequestError, match="nested"):
        compiler.compile(GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * 5000 + "{}" + "}" * 5000))


# ---- the compiler ----


def test_a_grammar_compiles_once_whatever_field_it_came_in(compiler):
    specs = [grammars.json_object("response_format"), grammars.json_object("tools")]
    assert grammars.spec_key(specs[0]) == grammars.spec_key(specs[1])
    assert compiler.compile(specs[0]) is compiler.compile(specs[1])
    assert (compiler.hits, compiler.misses) == (1, 1)


def test_specs_that_differ_in_kind_source_or_leniency_have_different_keys():
    kinds = [GrammarSpec(kind, "{}") for kind in GrammarKind]
    specs = [*kinds, GrammarSpec(GrammarKind.REGEX, "a"), GrammarSpec(GrammarKind.JSON_SCHEMA, "{}", lenient=True)]
    assert len({grammars.spec_key(spec) for spec in specs}) == len(specs)


def test_the_least_recently_used_grammar_leaves_first(compiler):
    compiler.cache_size = 2
    a, b, c = (grammars.choice([text]) for text in "abc")
    first = compiler.compile(a)
    compiler.compile(b)
    assert compiler.compile(a) is first
    compiler.compile(c)
    assert compiler.compile(a) is first
    compiler.compile(b)
    assert compiler.misses == 4


def test_an_error_is_told_again_and_not_kept(compiler):
    for _ in range(2):
        with pytest.raises(RequestError, match="guided_regex"):
            compiler.compile(grammars.regex("["))
    assert compiler.misses == 2


def test_compiling_runs_in_a_worker_while_the_caller_goes_on():
    entered, go = threading.Event(), threading.Event()

    def trial(spec):
        entered.set()
        assert go.wait(10)

    compiler = GrammarCompiler(make_bridge, trial)
    future = compiler.submit(grammars.json_object())
    assert entered.wait(10)
    assert not future.done()
    go.set()
    assert future.result(10).matcher().bits().any()
    compiler.close()


def test_a_model_without_an_end_token_refuses_grammars():
    compiler = GrammarCompiler(lambda: TokenizerBridge(tokenizer_json(), VOCAB_SIZE, []))
    with pytest.raises(RequestError, match="end-of-sequence"):
        compiler.compile(grammars.json_object())
    compiler.close()


def test_a_tokenizer_that_cannot_be_read_refuses_grammars():
    compiler = GrammarCompiler(lambda: TokenizerBridge('{"version": "1.0"}', VOCAB_SIZE, [1]))
    with pytest.raises(RequestError, match="not available with this model's tokenizer"):
        compiler.compile(grammars.json_object())
    compiler.close()


# ---- the trial ----


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trial") / "tokenizer.json"
    path.write_text(tokenizer_json())
    return path


def test_a_grammar_that_kills_or_stalls_its_compiler_is_an_error_of_that_request_alone(tokenizer_file):
    trial = GrammarTrial(tokenizer_file, VOCAB_SIZE, (EOS,), deadline_s=1.0, processes=1)
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(6000)) + '\nr6000: "a"'
    for source, kind in ((chain, GrammarKind.LARK), ("a?" * 15_000 + "a" * 15_000, GrammarKind.REGEX)):
        with pytest.raises(RequestError, match="takes more than 1 s"):
            trial(GrammarSpec(kind, source))
        trial(grammars.json_object())
    assert trial.restarts == 2
    with pytest.raises(RequestError, match="cannot be used"):
        trial(grammars.regex("["))
    assert trial.restarts == 2
    with pytest.raises(RequestError, match=r"too slow to follow|takes more than"):
        trial(grammars.regex("a?" * 1700 + "a" * 1700))
    trial.close()


def test_what_passed_its_trial_is_not_tried_again(tokenizer_file):
    trial = GrammarTrial(tokenizer_file, VOCAB_SIZE, (EOS,), processes=1)
    trial(grammars.json_object())
    trial._children._idle.get_nowait().stop()  # nobody is left to ask
    trial(grammars.json_object("tools"))


def test_trials_run_beside_each_other_up_to_the_number_of_processes(tokenizer_file):
    trial = GrammarTrial(tokenizer_file, VOCAB_SIZE, (EOS,), deadline_s=5.0, processes=2)
    errors = []

    def one(text):
        try:
            trial(grammars.choice([text]))
        except RequestError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(f"text {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert trial._children._idle.qsize() == 2
    trial.close()
