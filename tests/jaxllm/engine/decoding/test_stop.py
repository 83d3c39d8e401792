"""Streaming text: the pieces join to the whole, no half characters, and stop strings wherever the cuts fall."""

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.engine.decoding.stop import IncrementalDetokenizer, StopChecker

KINDS = ("byte_level", "sentencepiece", "sentencepiece_unstripped", "metaspace")
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(st.sampled_from("ab é你🙂\n  \ufffd"), max_size=30),
)


def stream(detokenizer, ids):
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def split_randomly(data, tokenizer, text):
    """Ids whose bytes are the text's, but cut anywhere: single bytes, or what the tokenizer makes of random pieces."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    ids, rest = [], text
    while rest:
        size = data.draw(st.integers(1, 8))
        piece, rest = rest[:size], rest[size:]
        if data.draw(st.booleans()):
            ids += tokenizer.encode(piece, add_special_tokens=False)
        else:
            ids += [single[bytes([byte])] for byte in piece.encode()]
    return ids


# ---- detokenizer ----


@given(data=st.data(), text=texts)
def test_pieces_join_to_the_text_however_it_is_split_into_tokens(tokenizers_by_kind, data, text):
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = split_randomly(data, tokenizer, text)
    pieces = stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), ids)
    assert "".join(pieces) == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_streaming_any_ids_joins_to_decoding_them_whole(tokenizers_by_kind, kind, data):
    tokenizer = tokenizers_by_kind[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=15))
    skip = data.draw(st.booleans())
    pieces = stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=texts, text=texts)
def test_text_after_a_prompt_is_what_the_prompt_lacks_of_the_whole(tokenizers_by_kind, kind, prompt, text):
    tokenizer = tokenizers_by_kind[kind]
    before, ids = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text))
    pieces = stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=before), ids)
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode([*before, *ids])


@given(text=texts)
def test_an_emitted_piece_is_never_taken_back_or_half_a_character(tokenizers_by_kind, text):
    tokenizer = tokenizers_by_kind["byte_level"]
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    detokenizer, seen = IncrementalDetokenizer(tokenizer), ""
    for byte in text.encode():
        seen += detokenizer.push(single[bytes([byte])])
        assert text.startswith(seen)
    assert seen == text  # each character comes with its last byte, the very last one included


def test_a_character_that_never_completes_is_replaced_at_the_end(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece"]
    half = [tokenizer.rust.token_to_id(name) for name in ("<0xF0>", "<0x9F>")]
    assert stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=[300]), half) == ["", "", "\ufffd"]


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_at_the_start_of_a_text(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece"]
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False) for text in ("hello", "world"))
    start = tokenizer.bos_token_id
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt), ids)) == " world"
    assert "".join(stream(IncrementalDetokenizer(tokenizer), ids)) == "world"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=[start]), ids)) == "world"


def test_special_tokens_are_skipped_only_when_asked(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(stream(IncrementalDetokenizer(tokenizer), ids)) == "ab"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), ids)) == "a<|im_end|>b"


# ---- stop strings ----

letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def cut(data, text):
    pieces = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def by_definition(text, stops, include):
    """The shortest beginning of the text that ends in a stop string; of several, the longest stop string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(data=st.data(), text=letters, stops=stop_lists, include=st.booleans())
def test_any_chunking_gives_what_the_definition_gives_for_the_whole_text(data, text, stops, include):
    checker = StopChecker(stops, include_stop_str=include)
    shown = "".join([*map(checker.push, cut(data, text)), checker.flush()])
    assert (shown, checker.matched) == by_definition(text, stops, include)


@given(data=st.data(), text=letters, stops=stop_lists)
def test_what_is_shown_is_final_and_what_is_held_back_may_still_become_a_stop_string(data, text, stops):
    checker, shown, seen = StopChecker(stops), "", ""
    for piece in cut(data, text):
        shown += checker.push(piece)
        seen += piece
        if checker.matched is None:
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops)
            longer = [seen[i:] for i in range(len(shown))]
            assert not any(stop.startswith(ending) for stop in stops for ending in longer if ending)
    assert by_definition(text, stops, False)[0].startswith(shown)


@given(data=st.data(), early=letters, late=letters, stops=stop_lists)
def test_a_stop_string_that_ends_too_early_does_not_count_but_one_that_reaches_over_does(data, early, late, stops):
    checker = StopChecker(stops)
    shown = "".join(checker.push(piece, may_stop=False) for piece in cut(data, early))
    assert checker.matched is None
    shown += "".join([*map(checker.push, cut(data, late)), checker.flush()])
    whole = early + late
    ends = [e for e in range(len(early) + 1, len(whole) + 1) if any(whole[:e].endswith(stop) for stop in stops)]
    if not ends:
        assert (shown, checker.matched) == (whole, None)
    else:
        longest = max((stop for stop in stops if whole[: ends[0]].endswith(stop)), key=len)
        assert (shown, checker.matched) == (whole[: ends[0] - len(longest)], longest)


def test_nothing_passes_after_the_match():
    checker = StopChecker(["END"])
    assert checker.push("a END b") == "a "
    assert checker.push("more") == ""
    assert checker.flush() == ""


def test_no_stop_strings_hold_nothing_back():
    checker = StopChecker()
    assert checker.push("anything") == "anything"
    assert (checker.flush(), checker.matched) == ("", None)


def test_a_stop_string_over_many_tokens_is_found(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    detokenizer, checker = IncrementalDetokenizer(tokenizer), StopChecker(["fox jumps🙂"])
    ids = tokenizer.encode("The quick brown fox jumps🙂 over")
    assert "".join(checker.push(detokenizer.push(i)) for i in ids) == "The quick brown "
    assert checker.matched == "fox jumps🙂"


def test_time_grows_linearly_with_the_text():
    """The worst case for a naive search: one long stop string, a text of its beginnings."""

    def seconds(length):
        checker = StopChecker(["a" * 1000 + "b"])
        start = time.perf_counter()
        for _ in range(length // 10):
            checker.push("a" * 10)
        return time.perf_counter() - start

    seconds(10_000)
    assert seconds(160_000) < 16 * 4 * max(seconds(10_000), 0.002)


def test_importing_it_imports_no_jax():
    script = "import sys, jaxllm.engine.decoding.stop; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
