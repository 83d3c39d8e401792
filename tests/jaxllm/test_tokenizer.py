"""Tokenizer: ids and text of every kind of vocabulary, what the files beside it say, and errors that name the file."""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizer import Tokenizer, TokenizerError

KINDS = ("byte_level", "sentencepiece", "sentencepiece_unstripped", "metaspace")
EXACT = KINDS[:3]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
words = st.text(st.sampled_from("ab é你🙂\n\t  <>|"), max_size=30)


@pytest.fixture
def copy(vocabulary_directories, tmp_path):
    """A byte-level model directory of the test's own."""
    return shutil.copytree(vocabulary_directories["byte_level"], tmp_path / "model")


@pytest.mark.parametrize("kind", EXACT)
@given(text=st.one_of(unicode_text, words))
def test_any_text_survives_encode_and_decode(tokenizers_by_kind, kind, text):
    tokenizer = tokenizers_by_kind[kind]
    text = text.replace("▁", "_")  # the space mark is a space to these vocabularies
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None)
def test_decoding_any_ids_agrees_with_the_rust_decoder(tokenizers_by_kind, kind, data):
    tokenizer = tokenizers_by_kind[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12))
    skip = data.draw(st.booleans())
    theirs = tokenizer.rust.decode(ids, skip_special_tokens=skip)
    ours = tokenizer.decode(ids, skip_special_tokens=skip)
    if kind.startswith("sentencepiece") and "\ufffd" in theirs:
        # Rust turns a whole run of byte tokens into U+FFFD when any of them is no UTF-8; we keep the good characters.
        assert "\ufffd" in ours
    else:
        assert ours == theirs


@given(data=st.binary(max_size=20))
def test_bytes_that_are_no_utf8_decode_as_rust_does(tokenizers_by_kind, data):
    tokenizer = tokenizers_by_kind["byte_level"]
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids}
    ids = [by_bytes[bytes([byte])] for byte in data]
    assert tokenizer.decode(ids) == tokenizer.rust.decode(ids) == data.decode("utf-8", "replace")


def test_special_tokens_are_recognised_and_may_be_skipped(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    end = tokenizer.rust.token_to_id("<|im_end|>")
    ids = tokenizer.encode("hello<|im_end|>world", add_special_tokens=False)
    assert end in ids
    assert tokenizer.decode(ids) == "helloworld"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<|im_end|>world"


def test_an_id_without_a_token_is_no_text(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    assert tokenizer.decode([tokenizer.vocab_size + 100]) == ""


def test_vocab_size_is_one_more_than_the_largest_id(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    assert tokenizer.vocab_size == tokenizer.rust.token_to_id("</tool_call>") + 1


def test_truncation_and_padding_in_the_file_are_ignored(copy):
    spec = json.loads((copy / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_directory(copy)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert tokenizer.encode("") == []


def test_end_tokens_come_from_generation_config_then_config_then_the_tokenizer(copy):
    end, text_end, start = (
        Tokenizer.from_directory(copy).rust.token_to_id(f"<|{name}|>") for name in ("im_end", "endoftext", "im_start")
    )
    assert Tokenizer.from_directory(copy).eos_token_ids == (end,)
    (copy / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": start}))
    assert Tokenizer.from_directory(copy).eos_token_ids == (5, end)
    assert Tokenizer.from_directory(copy).bos_token_id == start
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [text_end, end]}))
    assert Tokenizer.from_directory(copy).eos_token_ids == (text_end, end)


def test_a_missing_tokenizer_json_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(copy, name, content):
    (copy / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(TokenizerError, match=rf"{name}: (not readable as JSON|must hold a JSON object, not list)"):
        Tokenizer.from_directory(copy)


def test_json_that_is_no_tokenizer_is_named(copy):
    (copy / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not a tokenizer that `tokenizers` .* reads"):
        Tokenizer.from_directory(copy)


def test_a_lone_surrogate_is_refused(tokenizers_by_kind):
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        tokenizers_by_kind["byte_level"].encode("a\ud800")


def test_importing_the_tokenizer_imports_no_jax():
    script = "import sys, jaxllm.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
