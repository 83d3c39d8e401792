"""Instructions about text: casing, counting, reversing, replacing, spelling.

In: a random generator and `Words`. Out: a `Sample` whose answer is computed, never written by hand.
"""

from __future__ import annotations

import random

from tools.train.tasks.sample import Sample, ask, dumps, pick
from tools.train.tasks.words import Words, invented

_QUOTES = ('"{}"', "'{}'", "{}", '"{}"', "`{}`")


def _short_text(rng: random.Random, words: Words) -> str:
    draw = rng.random()
    if draw < 0.4:
        return words.sentence(rng)
    return " ".join(words.word(rng) for _ in range(rng.randint(2, 9)))


def _say(rng: random.Random, options: tuple[str, ...], **values: object) -> str:
    """One phrasing of an instruction, filled in; now and then without its capital or its full stop."""
    text = pick(rng, options).format(**values)
    if rng.random() < 0.08:
        text = text[0].lower() + text[1:]
    return text


def change_case(rng: random.Random, words: Words) -> Sample:
    text = _short_text(rng, words)
    name, change = pick(rng, (("uppercase", str.upper), ("lowercase", str.lower), ("title case", str.title)))
    if name == "lowercase":
        text = pick(rng, (text.upper(), text.title(), text))
    options = (
        "Convert the following text to {name}: {text}", "Write this in {name}: {text}", "Put this text in {name}: {text}",
        "Change the text to {name}.\n\n{text}", "{text}\n\nRewrite the text above in {name}.", "{name}: {text}",
        "Please convert {quoted} to {name}.", "What is {quoted} in {name}?", "Make this {name}: {text}",
    )  # fmt: skip
    if name == "uppercase":
        options += ("Write {quoted} in capital letters.", "Write this in all caps: {text}", "Uppercase this: {text}")
    if name == "lowercase":
        options += ("Write {quoted} in small letters.", "Lowercase this: {text}")
    quoted = pick(rng, _QUOTES).format(text)
    return ask("case", _say(rng, options, name=name, text=text, quoted=quoted), change(text))


def count(rng: random.Random, words: Words) -> Sample:
    text = " ".join(words.word(rng) for _ in range(rng.randint(1, 12)))
    if rng.random() < 0.6:
        options = (
            "How many words are in this text: {text}", "Count the words: {text}", 'How many words are there in "{text}"?',
            "Count the number of words in the following sentence.\n{text}", "What is the word count of '{text}'?",
            "{text}\n\nHow many words is that?", "Give me the number of words in: {text}",
        )  # fmt: skip
        return ask("count", _say(rng, options, text=text), str(len(text.split())))
    word = words.word(rng)
    options = (
        'How many letters are in the word "{word}"?', "Count the letters in {word}.", "How many letters does {word} have?",
        "What is the length of the word '{word}'?", "How many characters are in {word}?",
    )  # fmt: skip
    return ask("count", _say(rng, options, word=word), str(len(word)))


def reverse(rng: random.Random, words: Words) -> Sample:
    if rng.random() < 0.5:
        items = [words.word(rng) for _ in range(rng.randint(2, 9))]
        options = (
            "Reverse the order of the words: {text}", "Write these words in reverse order: {text}",
            "Reverse the word order of this sentence: {text}", 'Put the words of "{text}" in reverse order.',
            "{text}\n\nWrite the words above backwards, last word first.",
        )  # fmt: skip
        return ask("reverse_words", _say(rng, options, text=" ".join(items)), " ".join(items[::-1]))
    word = words.word(rng)
    options = (
        'Reverse the word "{word}".', "Write {word} backwards.", "Spell '{word}' in reverse.", "Reverse the string: {word}",
        "What is {word} spelled backwards?", "Reverse the letters of {word}.", "reverse this word: {word}",
    )  # fmt: skip
    return ask("reverse_letters", _say(rng, options, word=word), word[::-1])


def spell(rng: random.Random, words: Words) -> Sample:
    word = words.word(rng)
    draw = rng.random()
    if draw < 0.4:
        separator = pick(rng, ("-", " ", ", "))
        how = {"-": "hyphens", " ": "spaces", ", ": "commas"}[separator]
        options = ('Spell "{word}" with {how} between the letters.', "Spell out {word}, letters separated by {how}.")
        return ask("spell", _say(rng, options, word=word, how=how), separator.join(word))
    end = rng.random() < 0.5
    amount = rng.randint(1, 3)
    where, answer = ("last", word[-amount:]) if end else ("first", word[:amount])
    what = "letter" if amount == 1 else f"{('', 'two', 'three')[amount - 1]} letters"
    options = ('What is the {where} {what} of "{word}"?', "Give me the {where} {what} of {word}.")
    if amount > 1:
        options = ('What are the {where} {what} of "{word}"?', "Give me the {where} {what} of {word}.")
    return ask("spell", _say(rng, options, where=where, what=what, word=word), answer)


def replace(rng: random.Random, words: Words) -> Sample:
    items = [words.word(rng) for _ in range(rng.randint(3, 10))]
    old, new = pick(rng, items), words.word(rng)
    text = " ".join(items)
    options = (
        'Replace "{old}" with "{new}" in this text: {text}', "In the text below, change {old} to {new}.\n\n{text}",
        "Replace every {old} by {new}: {text}", "{text}\n\nReplace the word '{old}' with '{new}'.",
        "Substitute {new} for {old} in: {text}",
    )  # fmt: skip
    answer = " ".join(new if item == old else item for item in items)
    return ask("replace", _say(rng, options, old=old, new=new, text=text), answer)


def remove(rng: random.Random, words: Words) -> Sample:
    items = [words.word(rng) for _ in range(rng.randint(3, 9))]
    position, name = pick(rng, ((0, "first"), (-1, "last"), (1, "second")))
    rest = [item for i, item in enumerate(items) if i != position % len(items)]
    options = (
        "Remove the {name} word: {text}", "Delete the {name} word from this text: {text}",
        'What is left of "{text}" without its {name} word?', "{text}\n\nWrite this without the {name} word.",
    )  # fmt: skip
    return ask("remove", _say(rng, options, name=name, text=" ".join(items)), " ".join(rest))


def nth_word(rng: random.Random, words: Words) -> Sample:
    items = [words.word(rng) for _ in range(rng.randint(3, 9))]
    ordinals = ("first", "second", "third", "fourth", "fifth")
    position = rng.randrange(min(5, len(items)))
    name = ordinals[position]
    if rng.random() < 0.25:
        position, name = len(items) - 1, "last"
    options = (
        "What is the {name} word of this text: {text}", 'What is the {name} word in "{text}"?', "{text}\n\n{name} word?",
        "Give me the {name} word: {text}", "Which word comes {name} in: {text}",
    )  # fmt: skip
    return ask("nth", _say(rng, options, name=name, text=" ".join(items)), items[position])


def join_or_wrap(rng: random.Random, words: Words) -> Sample:
    items = [words.word(rng) for _ in range(rng.randint(2, 6))]
    text = " ".join(items)
    forms = (
        ("snake_case", "_".join(items)),
        ("kebab-case", "-".join(items)),
        ("camelCase", items[0] + "".join(w.capitalize() for w in items[1:])),
        ("PascalCase", "".join(w.capitalize() for w in items)),
        ("a JSON array of words", dumps(items)),
        ("a Python list of words", repr(items)),
    )
    name, answer = pick(rng, forms)
    options = ("Write {text} in {name}.", "Convert to {name}: {text}", 'Turn "{text}" into {name}.', "{name}: {text}")
    if name.startswith("a "):
        options = ("Write {text} as {name}.", "Convert to {name}: {text}", 'Turn "{text}" into {name}.')
    return ask("rewrite", _say(rng, options, text=text, name=name), answer)


def contains(rng: random.Random, words: Words) -> Sample:
    items = [words.word(rng) for _ in range(rng.randint(3, 10))]
    wanted = pick(rng, items) if rng.random() < 0.5 else words.word(rng)
    options = (
        'Does the text "{text}" contain the word "{word}"? Answer yes or no.', "Is {word} among these words: {text}? yes/no",
        "{text}\n\nDoes the word '{word}' appear above? Answer Yes or No.", "Is the word {word} in this text? {text}",
    )  # fmt: skip
    answer = "Yes" if wanted in items else "No"
    return ask("contains", _say(rng, options, text=" ".join(items), word=wanted), answer)


def repeat_word(rng: random.Random, words: Words) -> Sample:
    word = pick(rng, (words.word(rng), invented(rng), words.name(rng)))
    times = rng.randint(2, 8)
    name = ("two", "three", "four", "five", "six", "seven", "eight")[times - 2]
    shown = pick(rng, (name, str(times)))
    options = ('Say "{word}" {n} times.', "Repeat the word {word} {n} times.", "Write {word} {n} times.")
    return ask("repeat", _say(rng, options, word=word, n=shown), " ".join([word] * times))


GENERATORS = (
    change_case, count, reverse, reverse, spell, replace, remove, nth_word, join_or_wrap, contains, repeat_word,
)  # fmt: skip
