"""Rows of tokens to train on, made by many processes: packed code, packed conversations, held-out rows of each.

In: the standard library, the task generators and the tokenizer. Out: a directory of `.npy` files, tokens [rows,
length + 1] uint16 and loss weights [rows, length] uint8 (per token predicted, in 1/16). Knows nothing of the model.
A row starts at a document's start; documents follow each other after <|endoftext|>.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.train import corpus
from tools.train import tokenizer as tokenizers
from tools.train.tasks import mixture
from tools.train.tasks.sample import END_OF_TEXT, IM_END, IM_START, render
from tools.train.tasks.words import Words

ANSWER_WEIGHT, PROMPT_WEIGHT, WEIGHT_UNIT = 16, 1, 16
_SHARD_SAMPLES = 20_000
_OPEN_ROWS = 24

type Document = tuple[np.ndarray, np.ndarray]  # tokens, weight of each token as a target


@dataclass(frozen=True)
class Rows:
    tokens: np.ndarray  # uint16 [rows, length + 1]
    weights: np.ndarray  # uint8 [rows, length]

    def save(self, directory: Path, name: str) -> None:
        np.save(directory / f"{name}.tokens.npy", self.tokens)
        np.save(directory / f"{name}.weights.npy", self.weights)

    @staticmethod
    def load(directory: Path, name: str) -> Rows:
        return Rows(np.load(directory / f"{name}.tokens.npy"), np.load(directory / f"{name}.weights.npy"))


def chat_document(tokenizer: Tokenizer, text: str) -> Document:
    """A rendered conversation; what the assistant says weighs fully, the rest little."""
    ids = np.asarray(tokenizer.encode(text).ids, dtype=np.uint16)
    weights = np.full(ids.shape, PROMPT_WEIGHT, dtype=np.uint8)
    start, end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
    assistant = tokenizer.encode("assistant").ids
    ends = np.flatnonzero(ids == end)
    for begin in np.flatnonzero(ids == start):
        head = begin + 1 + len(assistant)
        weights[begin : head + 1] = 0  # the header is given, at serving as here
        if list(ids[begin + 1 : head]) == assistant:
            stop = ends[np.searchsorted(ends, begin)]
            weights[head + 1 : stop + 1] = ANSWER_WEIGHT
    return ids, weights


def code_documents(tokenizer: Tokenizer, text: str, length: int, line_ends: np.ndarray) -> Iterator[Document]:
    """A source file in pieces of whole lines, each short enough for a row. `line_ends` is true for such tokens."""
    ids = np.asarray(tokenizer.encode(text).ids, dtype=np.uint16)
    cuts = np.flatnonzero(line_ends[ids]) + 1
    begin = 0
    while ids.size - begin > length - 1:
        within = cuts[(cuts > begin) & (cuts <= begin + length - 1)]
        stop = int(within[-1]) if within.size else begin + length - 1
        yield ids[begin:stop], np.full(stop - begin, ANSWER_WEIGHT, dtype=np.uint8)
        begin = stop
    yield ids[begin:], np.full(ids.size - begin, ANSWER_WEIGHT, dtype=np.uint8)


def pack(documents: Iterable[Document], length: int, separator: int) -> Rows:
    """First fit into a few open rows; what stays free at a row's end is padding of weight 0."""
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    filling: list[tuple[list[np.ndarray], list[np.ndarray], int]] = []

    def close(index: int) -> None:
        tokens, weights, _ = filling.pop(index)
        row = np.full(length + 1, separator, dtype=np.uint16)
        weight = np.zeros(length + 1, dtype=np.uint8)
        joined = np.concatenate(tokens)[: length + 1]
        row[: joined.size], weight[: joined.size] = joined, np.concatenate(weights)[: length + 1]
        rows.append((row, weight[1:]))

    for ids, weight in documents:
        size = ids.size + 1  # the separator that follows
        if size > length + 2:
            continue
        place = next((i for i, row in enumerate(filling) if row[2] + size <= length + 2), None)
        if place is None:
            if len(filling) >= _OPEN_ROWS:
                close(max(range(len(filling)), key=lambda i: filling[i][2]))
            filling.append(([], [], 0))
            place = len(filling) - 1
        tokens, weights, used = filling[place]
        tokens += [ids, np.asarray([separator], dtype=np.uint16)]
        weights += [weight, np.asarray([weight[-1]], dtype=np.uint8)]
        filling[place] = tokens, weights, used + size
    while filling:
        close(0)
    if not rows:
        return Rows(np.zeros((0, length + 1), np.uint16), np.zeros((0, length), np.uint8))
    return Rows(np.stack([row for row, _ in rows]), np.stack([weight for _, weight in rows]))


@functools.cache
def _context(source: Path | None, directory: Path, held_out: bool) -> tuple[Words, Tokenizer]:
    """What a worker process keeps between shards."""
    return Words.build(corpus.load(source, held_out=held_out), held_out=held_out), tokenizers.load(directory)


def _separator(tokenizer: Tokenizer) -> int:
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert token is not None, f"the tokenizer has no {END_OF_TEXT}"
    return token


def chat_rows(source: Path | None, directory: Path, stream: str, shard: int, samples: int, length: int) -> Rows:
    words, tokenizer = _context(source, directory, stream == "held-out")
    drawn = mixture.samples(words, stream=stream, shard=shard, count=samples)
    documents = (chat_document(tokenizer, render(sample.messages, sample.tools)) for sample in drawn)
    return pack(documents, length, _separator(tokenizer))


def code_rows(directory: Path, texts: list[str], length: int) -> Rows:
    tokenizer = tokenizers.load(directory)
    line_ends = np.asarray([tokenizer.decode([i]).endswith("\n") for i in range(tokenizer.get_vocab_size())])
    documents = (document for text in texts for document in code_documents(tokenizer, text, length, line_ends))
    return pack(documents, length, _separator(tokenizer))


def build(
    target: Path, tokenizer: Path, source: Path | None, *, length: int, shards: int, samples: int = _SHARD_SAMPLES
) -> dict[str, int]:
    """Make every file of a training set; returns tokens by name. One process per core."""
    target.mkdir(parents=True, exist_ok=True)
    read, unseen = corpus.load(source), corpus.load(source, held_out=True)
    code = [*read.files.values(), *read.snippets()]
    groups = max(1, min(shards, 32))
    jobs = [("code", functools.partial(code_rows, tokenizer, code[i::groups], length)) for i in range(groups)]
    jobs += [
        ("chat", functools.partial(chat_rows, source, tokenizer, "train", i, samples, length)) for i in range(shards)
    ]
    jobs.append(("code-held-out", functools.partial(code_rows, tokenizer, list(unseen.files.values()), length)))
    jobs.append(
        ("chat-held-out", functools.partial(chat_rows, source, tokenizer, "held-out", 0, min(samples, 4000), length))
    )
    made: dict[str, list[Rows]] = {}
    with multiprocessing.get_context("spawn").Pool() as pool:
        results = [(name, pool.apply_async(job)) for name, job in jobs]
        for name, result in results:
            made.setdefault(name, []).append(result.get())
    counts: dict[str, int] = {}
    for name, parts in made.items():
        rows = Rows(np.concatenate([p.tokens for p in parts]), np.concatenate([p.weights for p in parts]))
        rows.save(target, name)
        counts[name] = int(rows.weights.size)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--samples", type=int, default=_SHARD_SAMPLES, help="conversations in a shard")
    arguments = parser.parse_args()
    began = time.monotonic()
    counts = build(
        arguments.target, arguments.tokenizer, arguments.stdlib, length=arguments.length, shards=arguments.shards,
        samples=arguments.samples,
    )  # fmt: skip
    print({name: f"{count / 1e6:.1f}M tokens" for name, count in counts.items()}, f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
