"""Which generators there are, how often each is drawn, and the conversation around a sample.

In: a seed and `Words`. Out: one `Sample` per seed, the same on every machine. Training and held-out samples use
seeds of different streams, so no held-out conversation is ever generated for training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.train.tasks import chat, code, copying, extraction, numbers, recall, sequences, text, tool_calls
from tools.train.tasks.sample import Message, Sample, pick
from tools.train.tasks.words import Words

# Relative frequency of each family. Copying and extraction teach the same circuit and make the longest answers.
WEIGHTS: tuple[tuple[str, int], ...] = (
    ("text", 12), ("sequences", 14), ("numbers", 13), ("extraction", 20), ("tool_calls", 12), ("copying", 15),
    ("recall", 10), ("chat", 7), ("code", 6),
)  # fmt: skip
_MODULES = {
    "text": text.GENERATORS, "sequences": sequences.GENERATORS, "numbers": numbers.GENERATORS,
    "extraction": extraction.GENERATORS, "tool_calls": tool_calls.GENERATORS, "copying": copying.GENERATORS,
    "recall": recall.GENERATORS, "chat": chat.GENERATORS, "code": code.GENERATORS,
}  # fmt: skip
_DECK = tuple(name for name, weight in WEIGHTS for _ in range(weight))
_FILLERS = tuple(name for name in _DECK if name not in ("tool_calls", "recall", "code"))
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are first-light, a helpful assistant.",
    "Answer briefly.", "You are a careful assistant that answers exactly.", "You are an assistant. Be short and exact.",
    "You are a helpful AI assistant.", "Follow the instructions of the user.", "You are a function calling AI model.",
    "Respond only with what is asked.", "You are a Python expert.", "You extract data and answer in JSON when asked.",
)  # fmt: skip


def plain(rng: random.Random, words: Words) -> Sample:
    """A sample of any family, without a system prompt."""
    name = pick(rng, _DECK)
    if name == "recall" and rng.random() < 0.6:
        return pick(rng, recall.WITH_FILLER)(rng, words, filler)
    return pick(rng, _MODULES[name])(rng, words)


def filler(rng: random.Random, words: Words) -> Sample:
    """A turn that may stand between others: no tools, no recall."""
    return pick(rng, _MODULES[pick(rng, _FILLERS)])(rng, words)


def draw(rng: random.Random, words: Words) -> Sample:
    """A sample as a user would meet it: sometimes after other turns, sometimes under a system prompt."""
    sample = plain(rng, words)
    messages: list[Message] = list(sample.messages)
    if sample.check != "open" and rng.random() < 0.18:
        for _ in range(pick(rng, (1, 1, 2))):
            before = filler(rng, words)
            if len(str(before.messages)) < 1200:
                messages = before.messages + messages
    if rng.random() < 0.4:
        messages = [{"role": "system", "content": pick(rng, _SYSTEM)}, *messages]
    return Sample(kind=sample.kind, messages=messages, tools=sample.tools, check=sample.check)


def samples(words: Words, *, stream: str, shard: int, count: int) -> Iterator[Sample]:
    """`count` samples of one shard of a stream ("train" or "held-out"); each has a seed of its own."""
    for index in range(count):
        yield draw(random.Random(f"{stream}/{shard}/{index}"), words)
