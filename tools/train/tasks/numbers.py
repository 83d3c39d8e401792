"""Arithmetic, comparison, sequences, and short word problems.

In: a random generator and `Words`. Out: a `Sample` whose answer is computed.
"""

from __future__ import annotations

import random

from tools.train.tasks.sample import Sample, ask, dumps, pick
from tools.train.tasks.words import Words

_SYMBOLS = {"+": ("+", "plus"), "-": ("-", "minus"), "*": ("*", "times", "x"), "/": ("/", "divided by")}


def _operands(rng: random.Random) -> tuple[int, str, int, int]:
    """Two numbers, the operation between them and its result; hard ones are rare."""
    operation = pick(rng, ("+", "+", "+", "-", "-", "*", "*", "/"))
    digits = pick(rng, (1, 2, 2, 2, 3, 3, 4))
    a, b = rng.randrange(10**digits), rng.randrange(10 ** pick(rng, (digits, rng.randint(1, digits))))
    if operation == "+":
        return a, operation, b, a + b
    if operation == "-":
        a, b = (b, a) if b > a and rng.random() < 0.85 else (a, b)
        return a, operation, b, a - b
    a, b = rng.randrange(2, 100 if rng.random() < 0.3 else 13), rng.randrange(2, 13)
    if operation == "*":
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return a, operation, b, a * b
    return a * b, operation, b, a


def arithmetic(rng: random.Random, words: Words) -> Sample:
    a, operation, b, result = _operands(rng)
    symbol = pick(rng, _SYMBOLS[operation]) if rng.random() < 0.4 else operation
    expression = f"{a} {symbol} {b}" if rng.random() < 0.85 or len(symbol) > 1 else f"{a}{symbol}{b}"
    options = (
        "What is {e}?", "Calculate {e}.", "Compute {e}", "{e} = ?", "{e}", "How much is {e}?", "What's {e}?",
        "Solve: {e}", "Please compute {e}.", "Work out {e}.", "{e} =",
    )  # fmt: skip
    return ask("arithmetic", pick(rng, options).format(e=expression), str(result))


def word_problem(rng: random.Random, words: Words) -> Sample:
    name, other, thing = words.name(rng), words.name(rng), pick(rng, words.nouns) + "s"
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    more, less = max(a, b) + 1, min(a, b)
    boxes, each = rng.randint(2, 12), rng.randint(2, 12)
    problems = (
        (f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", a + b),
        (f"{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have?", a + b),
        (f"{name} had {more} {thing} and gave {less} to {other}. How many {thing} are left?", more - less),
        (f"There are {more} {thing} on the table. {name} takes {less} of them. How many remain?", more - less),
        (f"{name} has {boxes} boxes with {each} {thing} in each. How many {thing} is that?", boxes * each),
        (f"One ticket costs {each} dollars. How much do {boxes} tickets cost?", boxes * each),
        (f"{boxes * each} {thing} are shared equally by {boxes} children. How many does each get?", each),
        (f"{name} is {less} years old and {other} is {more}. How many years older is {other}?", more - less),
    )
    question, answer = pick(rng, problems)
    return ask("word_problem", question, str(answer))


def compare(rng: random.Random, words: Words) -> Sample:
    a, b = rng.sample(range(10 ** rng.randint(1, 4) + 2), 2)
    larger = rng.random() < 0.6
    name = pick(rng, ("larger", "bigger", "greater")) if larger else pick(rng, ("smaller", "lower"))
    options = ("Which is {n}: {a} or {b}?", "Which number is {n}, {a} or {b}?", "What is {n}, {a} or {b}?")
    answer = max(a, b) if larger else min(a, b)
    return ask("compare", pick(rng, options).format(n=name, a=a, b=b), str(answer))


def extreme(rng: random.Random, words: Words) -> Sample:
    numbers = [rng.randrange(10 ** rng.randint(1, 3)) for _ in range(rng.randint(3, 8))]
    largest = rng.random() < 0.55
    name = pick(rng, ("largest", "biggest", "maximum", "highest")) if largest else pick(rng, ("smallest", "minimum"))
    shown = ", ".join(map(str, numbers)) if rng.random() < 0.7 else dumps(numbers)
    options = (
        "What is the {n} number in this list: {s}", "Find the {n} of {s}.", "{s}\n\nWhich number is the {n}?",
        "Which is the {n} number: {s}?", "Give me the {n} number from {s}",
    )  # fmt: skip
    answer = max(numbers) if largest else min(numbers)
    return ask("extreme", pick(rng, options).format(n=name, s=shown), str(answer))


def total(rng: random.Random, words: Words) -> Sample:
    numbers = [rng.randint(0, 20) for _ in range(rng.randint(3, 4))]
    shown = ", ".join(map(str, numbers))
    options = ("What is the sum of {s}?", "Add these numbers: {s}", "Sum: {s}", "Add up {s}.")
    return ask("sum", pick(rng, options).format(s=shown), str(sum(numbers)))


def series(rng: random.Random, words: Words) -> Sample:
    start, step = rng.randint(0, 40), rng.randint(1, 12)
    backwards = rng.random() < 0.25
    length = rng.randint(4, 6)
    numbers = [start + i * step for i in range(length + 1)]
    numbers = numbers[::-1] if backwards else numbers
    options = ("What number comes next: {s}, ...?", "Continue the sequence: {s}", "{s}, ? What is the next number?")
    question = pick(rng, options).format(s=", ".join(map(str, numbers[:-1])))
    return ask("series", question, str(numbers[-1]))


def count_up(rng: random.Random, words: Words) -> Sample:
    low = rng.randint(0, 40)
    high, step = low + rng.randint(3, 14), pick(rng, (1, 1, 1, 2))
    if rng.random() < 0.3:
        numbers = list(range(high, low - 1, -1))
        question = pick(rng, (f"Count down from {high} to {low}.", f"Count backwards from {high} to {low}."))
    elif step == 2:
        numbers = [n for n in range(low, high + 1) if n % 2 == 0]
        question = pick(
            rng, (f"List the even numbers from {low} to {high}.", f"Even numbers between {low} and {high}?")
        )
    else:
        numbers = list(range(low, high + 1))
        question = pick(rng, (f"Count from {low} to {high}.", f"List the numbers from {low} to {high}."))
    return ask("count_up", question, ", ".join(map(str, numbers)))


def parity(rng: random.Random, words: Words) -> Sample:
    number = rng.randrange(10 ** rng.randint(1, 4))
    answer = "even" if number % 2 == 0 else "odd"
    return ask("parity", pick(rng, (f"Is {number} even or odd?", f"Is the number {number} odd or even?")), answer)


GENERATORS = (
    arithmetic, arithmetic, arithmetic, arithmetic, word_problem, word_problem, compare, extreme, total, series,
    count_up, parity,
)  # fmt: skip
