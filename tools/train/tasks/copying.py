"""Copying out of the context: verbatim repetition, look-up by key or line, quotation, continuation.

In: a random generator and `Words`. Out: a `Sample` whose answer stands in its question. Lengths range from two
tokens to several hundred, because exact copying is what extraction, tool calls and retrieval rest on.
"""

from __future__ import annotations

import random

from tools.train.tasks.sample import Sample, ask, dumps, pick
from tools.train.tasks.words import Words, invented

_HEX = "0123456789abcdef"
_SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _random_string(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return "".join(pick(rng, _HEX) for _ in range(rng.randint(4, 32)))
    if draw < 0.6:
        return "".join(pick(rng, _SYMBOLS) for _ in range(rng.randint(3, 16)))
    if draw < 0.8:
        return "".join(pick(rng, "0123456789") for _ in range(rng.randint(3, 16)))
    return "-".join(
        "".join(pick(rng, _SYMBOLS[26:]) for _ in range(rng.randint(2, 5))) for _ in range(rng.randint(2, 4))
    )


def _word_list(rng: random.Random, words: Words) -> str:
    size = rng.randint(2, 80) if rng.random() < 0.3 else rng.randint(2, 24)
    real = rng.random() < 0.5
    chosen = [words.word(rng) if real else invented(rng) for _ in range(size)]
    return pick(rng, (" ", " ", ", ", "\n")).join(chosen)


def _passage(rng: random.Random, words: Words) -> str:
    draw = rng.random()
    if draw < 0.45:
        text = pick(rng, words.passages)
        return text if rng.random() < 0.7 else f"{text} {pick(rng, words.passages)}"
    return " ".join(words.sentence(rng) for _ in range(rng.randint(1, 8)))


def repeat(rng: random.Random, words: Words) -> Sample:
    draw = rng.random()
    if draw < 0.3:
        text = _word_list(rng, words)
    elif draw < 0.6:
        text = _passage(rng, words)
    elif draw < 0.8:
        return repeat_code(rng, words)
    else:
        text = "\n".join(_random_string(rng) for _ in range(pick(rng, (1, 1, 1, 2, 4))))
    options = (
        "Repeat the following text exactly:\n{t}", "Copy this: {t}", "Repeat after me: {t}", "Write this again: {t}",
        "Copy the text below word for word.\n\n{t}", "Echo: {t}", "{t}\n\nRepeat the text above exactly.", "Repeat: {t}",
        "Say exactly this: {t}", "Output the following unchanged:\n\n{t}", "Please repeat this text: {t}",
        "Copy the following passage exactly.\n\n{t}", "{t}\n\nCopy that.", "Return this text without any change: {t}",
    )  # fmt: skip
    return ask("copy", pick(rng, options).format(t=text), text)


def repeat_code(rng: random.Random, words: Words) -> Sample:
    code = pick(rng, words.code)
    options = (
        "Copy this code exactly:\n\n{c}", "Repeat the code:\n```python\n{c}\n```", "{c}\n\nRepeat the code above.",
        "Write this code again, unchanged:\n{c}", "Reproduce the following snippet:\n\n```\n{c}\n```",
    )  # fmt: skip
    return ask("copy_code", pick(rng, options).replace("{c}", code), code)


def look_up(rng: random.Random, words: Words) -> Sample:
    """A table of keys and values of any kind, and the value of one key."""
    size = rng.randint(2, 30) if rng.random() < 0.4 else rng.randint(2, 10)
    invented_keys = rng.random() < 0.35
    style = rng.random()
    pairs: dict[str, str] = {}
    for _ in range(size):
        key = invented(rng) if invented_keys else pick(rng, (words.word(rng), words.name(rng)))
        pairs[key] = (
            words.word(rng) if style < 0.4 else _random_string(rng) if style < 0.7 else str(rng.randint(0, 99999))
        )
    wanted = pick(rng, list(pairs))
    if rng.random() < 0.35:
        shown = dumps(pairs)
    else:
        shown = "\n".join(
            f"{key}{pick(rng, (': ',) if style < 0.5 else (' = ',))}{value}" for key, value in pairs.items()
        )
    options = (
        "{s}\n\nWhat is the value of {k}?", "Look up {k}.\n\n{s}", "Here is a table:\n{s}\n\nWhat is {k}?",
        "Given {s}, what is the value for the key {k}?", "{s}\n\nGive me the value of {k}.", "What does {k} map to?\n{s}",
    )  # fmt: skip
    return ask("look_up", pick(rng, options).replace("{s}", shown).replace("{k}", wanted), pairs[wanted])


def line(rng: random.Random, words: Words) -> Sample:
    """One line of several, by its number or by a word in it."""
    lines = [words.sentence(rng) for _ in range(rng.randint(2, 9))]
    index = rng.randrange(len(lines))
    shown = "\n".join(lines)
    draw = rng.random()
    if draw < 0.4:
        options = ("Copy line {n} of this text:\n{s}", "{s}\n\nWhat is line {n}?", "Write out line number {n}.\n\n{s}")
        return ask("copy_line", pick(rng, options).format(n=index + 1, s=shown), lines[index])
    if draw < 0.6:
        name, index = pick(rng, (("first", 0), ("last", -1)))
        options = ("Copy the {n} line.\n{s}", "{s}\n\nRepeat the {n} line.", "What is the {n} sentence?\n\n{s}")
        return ask("copy_line", pick(rng, options).format(n=name, s=shown), lines[index])
    unique = [w for w in lines[index].rstrip(".").split() if shown.count(w) == 1 and len(w) > 3]
    if not unique:
        return repeat(rng, words)
    options = (
        "Which line mentions {w}?\n{s}",
        '{s}\n\nQuote the sentence with the word "{w}".',
        "Find the line with {w}:\n{s}",
    )
    return ask("copy_line", pick(rng, options).format(w=pick(rng, unique), s=shown), lines[index])


def keep_in_mind(rng: random.Random, words: Words) -> Sample:
    """A code word given early in a long text, asked for at the end."""
    secret = pick(rng, (_random_string(rng), invented(rng), words.word(rng)))
    name = pick(rng, ("password", "code word", "secret number", "access code", "key", "magic word", "PIN"))
    before = [words.sentence(rng) for _ in range(rng.randint(0, 25))]
    after = [words.sentence(rng) for _ in range(rng.randint(0, 25))]
    text = " ".join([*before, f"The {name} is {secret}.", *after])
    options = (
        "{t}\n\nWhat is the {n}?",
        "Read this and tell me the {n}.\n\n{t}",
        "What is the {n} in this text?\n\n{t}",
    )
    return ask("needle", pick(rng, options).format(t=text, n=name), secret)


def quoted(rng: random.Random, words: Words) -> Sample:
    """The part of a text between quotes, brackets or tags."""
    inner = pick(rng, (_random_string(rng), words.title(rng), words.sentence(rng)))
    left, right, name = pick(
        rng, (("[", "]", "square brackets"), ("<b>", "</b>", "the b tags"), ('"', '"', "double quotes"), ("(", ")", "parentheses"))
    )  # fmt: skip
    text = f"{words.sentence(rng)} {left}{inner}{right} {words.sentence(rng)}"
    options = (
        "What is between {n} in this text: {t}",
        "Copy the part inside {n}.\n\n{t}",
        "{t}\n\nWhat stands in {n}?",
    )
    return ask("copy_part", pick(rng, options).format(n=name, t=text), inner)


GENERATORS = (repeat, repeat, repeat, repeat, repeat_code, look_up, look_up, line, keep_in_mind, quoted)
