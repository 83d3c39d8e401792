"""The bundled model's data: splits that do not touch, tasks that are the same everywhere and right about themselves."""

import json
import random
from pathlib import Path

import pytest

from jaxllm.config import bundled_model_dir
from jaxllm.tokenizer import Tokenizer
from tools.train import corpus
from tools.train.evaluate import fits_schema, judge, parse_calls
from tools.train.tasks import mixture
from tools.train.tasks.sample import render
from tools.train.tasks.words import Words


@pytest.fixture(scope="module")
def words():
    """Words from a few standard modules: reading all of them takes seconds that a test does not need."""
    read = corpus.load(held_out=False)
    few = {path: read.files[path] for path in sorted(read.files)[:60]}
    return Words.build(corpus.Corpus(files=few, held_out=False))


@pytest.fixture(scope="module")
def samples(words):
    return list(mixture.samples(words, stream="test", shard=0, count=1500))


def test_no_source_file_is_in_both_splits_and_both_have_some():
    paths = [f"package/module_{i}.py" for i in range(4000)]
    held_out = [path for path in paths if corpus.is_held_out(path)]
    assert 0 < len(held_out) < len(paths) / 10
    seen, unseen = corpus.load(), corpus.load(held_out=True)
    assert not set(seen.files) & set(unseen.files)
    assert unseen.files


def test_a_stream_and_shard_give_the_same_conversations_every_time(words, samples):
    again = list(mixture.samples(words, stream="test", shard=0, count=1500))
    assert again == samples


def test_held_out_conversations_of_any_length_are_not_those_of_training(samples):
    unseen = Words.build(corpus.load(held_out=True), held_out=True)
    other = list(mixture.samples(unseen, stream="held-out", shard=0, count=1500))
    seen = {render(sample.messages, sample.tools) for sample in samples}
    shared = [s for s in other if render(s.messages, s.tools) in seen]
    # Greetings, facts and the like have few forms; what is scored as copying, extracting or calling has none in common.
    assert not [s for s in shared if s.check != "exact"]
    assert not [s for s in shared if s.kind.startswith(("copy", "extract", "look_up", "needle", "to_json"))]


def test_every_answer_passes_its_own_judgement_and_a_damaged_one_does_not(samples):
    judged = [sample for sample in samples if sample.check != "open"]
    assert len({sample.kind for sample in judged}) > 30
    for sample in judged:
        assert all(judge(sample, sample.answer).values()), sample
        assert not judge(sample, sample.answer + " and more")["exact"], sample


def test_json_answers_parse_and_tool_calls_fit_their_schema(samples):
    of_json = [sample for sample in samples if sample.check == "json"]
    with_calls = [sample for sample in samples if sample.check == "tool_calls"]
    assert len(of_json) > 100
    assert len(with_calls) > 50
    for sample in of_json:
        json.loads(sample.answer)
    for sample in with_calls:
        calls = parse_calls(sample.answer)
        assert calls
        assert all(fits_schema(call, sample.tools) for call in calls)


def test_sorted_answers_are_sorted(samples):
    found = 0
    for sample in samples:
        if sample.kind == "sort_numbers" and "," in sample.answer:
            numbers = [float(part) for part in sample.answer.strip("[].").split(",")]
            assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
            found += 1
    assert found > 5


def test_the_bundled_chat_template_renders_what_the_model_was_trained_on(samples):
    tokenizer = Tokenizer.from_directory(bundled_model_dir())
    for sample in random.Random(0).sample(samples, 150):
        rendered = tokenizer.apply_chat_template(
            sample.messages[:-1], tools=list(sample.tools) or None, add_generation_prompt=True
        )
        assert rendered == render(sample.messages[:-1], sample.tools, prompt=True)


def test_a_packed_library_reads_as_the_directory_it_was_made_from(tmp_path):
    source = tmp_path / "lib"
    source.mkdir()
    for i in range(40):
        body = "\n".join(f"    x{j} = {j}" for j in range(10))
        Path(source / f"module_{i}.py").write_text(f'"""Module number {i} of the test."""\n\n\ndef f{i}():\n{body}\n')
    corpus.pack(tmp_path / "lib.tar.gz", source)
    for held_out in (False, True):
        try:
            plain = corpus.load(source, held_out=held_out).files
        except ValueError:  # forty files need not reach the small split
            continue
        assert corpus.load(tmp_path / "lib.tar.gz", held_out=held_out).files == plain
