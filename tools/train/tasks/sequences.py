"""Instructions about lists: slicing, sorting, filtering, joining, removing duplicates, formatting.

In: a random generator and `Words`. Out: a `Sample` whose answer is computed from the list it shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.train.tasks.sample import Sample, ask, dumps, pick
from tools.train.tasks.words import Words

_COUNT = ("", "one", "two", "three", "four", "five", "six")


def items_of(rng: random.Random, words: Words, low: int = 3, high: int = 10) -> list[str]:
    """A list of one kind of thing, without duplicates."""
    pool = pick(rng, (words.nouns, words.words, words.first_names, words.cities, words.foods, words.colours, None))
    size = rng.randint(low, high)
    if pool is None:
        return list(dict.fromkeys(words.word(rng) for _ in range(size)))
    return list(dict.fromkeys(pick(rng, pool) for _ in range(size)))


def show(rng: random.Random, items: list[str]) -> tuple[str, Callable[[list[str]], str]]:
    """The list as text, and the way to write an answer in the same style."""
    style = rng.random()
    if style < 0.5:
        return ", ".join(items), ", ".join
    if style < 0.68:
        return "\n".join(items), "\n".join
    if style < 0.84:
        return "\n".join(f"- {item}" for item in items), lambda answer: "\n".join(f"- {item}" for item in answer)
    return dumps(items), dumps


def _instruct(rng: random.Random, instruction: str, shown: str) -> str:
    if "\n" in shown:
        return f"{instruction}:\n{shown}" if rng.random() < 0.6 else f"{shown}\n\n{instruction}."
    draw = rng.random()
    if draw < 0.65:
        return f"{instruction}: {shown}"
    return f"{instruction}.\n\n{shown}" if draw < 0.8 else f"Here is a list: {shown}\n{instruction}."


def take(rng: random.Random, words: Words) -> Sample:
    items = items_of(rng, words, 4, 10)
    amount = rng.randint(2, min(6, len(items) - 1)) if len(items) > 3 else 1
    from_end = rng.random() < 0.45
    where, answer = ("last", items[-amount:]) if from_end else ("first", items[:amount])
    number = pick(rng, (_COUNT[amount], str(amount)))
    noun = pick(rng, ("items", "elements", "entries", "things")) if amount > 1 else "item"
    instruction = pick(
        rng,
        (
            f"Give me the {where} {number} {noun} of this list", f"List the {where} {number} {noun}",
            f"Return only the {where} {number} {noun}", f"What are the {where} {number} {noun} of the list",
            f"Keep the {where} {number} {noun} and drop the rest", f"Take the {where} {number} {noun}",
        ),
    )  # fmt: skip
    shown, write = show(rng, items)
    return ask("take", _instruct(rng, instruction, shown), write(answer))


def dedupe(rng: random.Random, words: Words) -> Sample:
    base = items_of(rng, words, 3, 7)
    items = base + [pick(rng, base) for _ in range(rng.randint(1, 4))]
    rng.shuffle(items)
    instruction = pick(
        rng,
        (
            "Remove the duplicates from this list", "Remove duplicate items, keep the first of each",
            "Deduplicate the list", "Write this list without repetitions", "List each item only once",
        ),
    )  # fmt: skip
    shown, write = show(rng, items)
    return ask("dedupe", _instruct(rng, instruction, shown), write(list(dict.fromkeys(items))))


def filter_items(rng: random.Random, words: Words) -> Sample:
    items = items_of(rng, words, 4, 10)
    letter = pick(rng, items)[0]
    length = rng.randint(4, 6)
    ending = pick(rng, items)[-1]
    rules: tuple[tuple[str, Callable[[str], bool]], ...] = (
        (f"that start with {letter.upper()}", lambda item: item[0].lower() == letter.lower()),
        (f"beginning with the letter {letter.lower()}", lambda item: item[0].lower() == letter.lower()),
        (f"that end with {ending}", lambda item: item[-1] == ending),
        (f"with more than {length} letters", lambda item: len(item.replace(" ", "")) > length),
    )
    rule, keep = pick(rng, rules)
    chosen = [item for item in items if keep(item)]
    if not chosen:
        return take(rng, words)
    instruction = (
        f"{pick(rng, ('Keep only the items', 'List the entries', 'Select the words', 'Show the items'))} {rule}"
    )
    shown, write = show(rng, items)
    return ask("filter", _instruct(rng, instruction, shown), write(chosen))


def sort_words(rng: random.Random, words: Words) -> Sample:
    items = [item for item in items_of(rng, words, 3, 8) if " " not in item]
    if len(items) < 2:
        return dedupe(rng, words)
    backwards = rng.random() < 0.2
    order = "reverse alphabetical order" if backwards else "alphabetical order"
    instruction = pick(
        rng,
        (
            f"Sort these words in {order}", f"Put this list in {order}", f"Arrange the words in {order}",
            "Sort alphabetically" if not backwards else "Sort from Z to A", f"Write the list in {order}",
            "Sort this list of words" if not backwards else "Sort this list of words from Z to A",
        ),
    )  # fmt: skip
    shown, write = show(rng, items)
    answer = sorted(items, key=str.lower, reverse=backwards)
    return ask("sort_words", _instruct(rng, instruction, shown), write(answer))


def sort_numbers(rng: random.Random, words: Words) -> Sample:
    digits = rng.randint(1, 3)
    low = -99 if rng.random() < 0.1 else 0
    numbers = [rng.randint(low, 10**digits - 1) for _ in range(rng.randint(3, 10))]
    backwards = rng.random() < 0.35
    order = "descending order" if backwards else "ascending order"
    plain = "from largest to smallest" if backwards else "from smallest to largest"
    instruction = pick(
        rng,
        (
            f"Sort these numbers in {order}", f"Sort the numbers {plain}", f"Arrange in {order}", f"Order {plain}",
            f"Put these numbers in {order}", f"Sort this list of numbers {plain}",
        ) + (() if backwards else ("Sort these numbers", "Sort this list", "Sort the following numbers")),
    )  # fmt: skip
    answer = sorted(numbers, reverse=backwards)
    if rng.random() < 0.25:
        return ask("sort_numbers", _instruct(rng, instruction, dumps(numbers)), dumps(answer))
    separator = pick(rng, (", ", ", ", " ", "\n"))
    shown = separator.join(map(str, numbers))
    return ask("sort_numbers", _instruct(rng, instruction, shown), separator.join(map(str, answer)))


def filter_numbers(rng: random.Random, words: Words) -> Sample:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(4, 10))]
    limit = rng.randint(20, 80)
    rules: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("the even numbers", lambda n: n % 2 == 0),
        ("the odd numbers", lambda n: n % 2 == 1),
        (f"the numbers greater than {limit}", lambda n: n > limit),
        (f"the numbers less than {limit}", lambda n: n < limit),
        (f"all numbers above {limit}", lambda n: n > limit),
        (f"all numbers below {limit}", lambda n: n < limit),
    )
    rule, keep = pick(rng, rules)
    chosen = [n for n in numbers if keep(n)]
    if not chosen:
        return sort_numbers(rng, words)
    instruction = f"{pick(rng, ('List', 'Keep only', 'Select', 'Give me', 'Show'))} {rule}"
    if rng.random() < 0.3:
        return ask("filter_numbers", _instruct(rng, instruction, dumps(numbers)), dumps(chosen))
    question = _instruct(rng, instruction, ", ".join(map(str, numbers)))
    return ask("filter_numbers", question, ", ".join(map(str, chosen)))


def rewrite(rng: random.Random, words: Words) -> Sample:
    """The same list in another notation."""
    items = items_of(rng, words, 2, 9)
    forms: tuple[tuple[tuple[str, ...], str], ...] = (
        (("as a numbered list", "as a list with numbers"), "\n".join(f"{i}. {x}" for i, x in enumerate(items, 1))),
        (("as a bulleted list", "as bullet points", "as a bullet list"), "\n".join(f"- {x}" for x in items)),
        (("as a JSON array", "as JSON"), dumps(items)),
        (("as a Python list",), repr(items)),
        (("separated by semicolons",), "; ".join(items)),
        (("separated by commas", "on one line with commas"), ", ".join(items)),
        (("one per line", "each on its own line"), "\n".join(items)),
        (("joined with hyphens",), "-".join(items)),
        (("in reverse order", "backwards"), ", ".join(items[::-1])),
        (("in uppercase", "in capital letters"), ", ".join(items).upper()),
    )
    names, answer = pick(rng, forms)
    instruction = (
        f"{pick(rng, ('Write these', 'Write the list', 'Format this list', 'Give me the list'))} {pick(rng, names)}"
    )
    return ask("rewrite_list", _instruct(rng, instruction, ", ".join(items)), answer)


def position(rng: random.Random, words: Words) -> Sample:
    items = items_of(rng, words, 3, 9)
    index = rng.randrange(len(items))
    ordinal = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")[index]
    shown, _ = show(rng, items)
    draw = rng.random()
    if draw < 0.4:
        instruction = pick(rng, (f"What is the {ordinal} item", f"Give me the {ordinal} element of the list"))
        return ask("nth", _instruct(rng, instruction, shown), items[index])
    if draw < 0.7 and index + 1 < len(items):
        instruction = pick(rng, (f"Which item comes right after {items[index]}", f"What follows {items[index]}"))
        return ask("nth", _instruct(rng, instruction, shown), items[index + 1])
    instruction = pick(rng, ("How many items are in this list", "Count the items", "What is the length of this list"))
    return ask("count", _instruct(rng, instruction, shown), str(len(items)))


def add_or_remove(rng: random.Random, words: Words) -> Sample:
    items = items_of(rng, words, 3, 8)
    shown, write = show(rng, items)
    if rng.random() < 0.5:
        new = words.word(rng)
        if rng.random() < 0.5:
            return ask("edit", _instruct(rng, f"Add {new} to the end of the list", shown), write([*items, new]))
        return ask("edit", _instruct(rng, f"Put {new} at the start of the list", shown), write([new, *items]))
    gone = pick(rng, items)
    instruction = pick(rng, (f"Remove {gone} from the list", f"Delete {gone}", f"Write the list without {gone}"))
    return ask("edit", _instruct(rng, instruction, shown), write([item for item in items if item != gone]))


GENERATORS = (
    take, dedupe, filter_items, sort_words, sort_words, sort_numbers, sort_numbers, filter_numbers, rewrite, position,
    add_or_remove,
)  # fmt: skip
