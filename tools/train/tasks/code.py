"""Chat about Python source: what a function does, write one, complete one, and what a small one returns.

In: a random generator and `Words` with the standard library's functions. Out: a `Sample`; those whose answer is
only one of many good ones are marked `open`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.train.tasks.sample import Sample, ask, pick
from tools.train.tasks.words import Words

type _Template = tuple[tuple[str, ...], str]

_SMALL: tuple[_Template, ...] = (
    (("adds two numbers", "returns the sum of two numbers"), "def {f}({a}, {b}):\n    return {a} + {b}"),
    (("multiplies two numbers", "returns the product of two numbers"), "def {f}({a}, {b}):\n    return {a} * {b}"),
    (("subtracts two numbers", "returns the difference of two numbers"), "def {f}({a}, {b}):\n    return {a} - {b}"),
    (("squares a number", "returns the square of a number"), "def {f}({a}):\n    return {a} * {a}"),
    (("doubles a number", "returns twice its argument"), "def {f}({a}):\n    return 2 * {a}"),
    (("returns the larger of two numbers", "returns the maximum of two values"),
     "def {f}({a}, {b}):\n    return {a} if {a} > {b} else {b}"),
    (("checks whether a number is even", "returns True if a number is even"), "def {f}({a}):\n    return {a} % 2 == 0"),
    (("checks whether a number is odd", "returns True if a number is odd"), "def {f}({a}):\n    return {a} % 2 == 1"),
    (("checks whether a string is a palindrome", "tests if a text is a palindrome"), "def {f}({a}):\n    return {a} == {a}[::-1]"),
    (("reverses a string", "returns its text backwards"), "def {f}({a}):\n    return {a}[::-1]"),
    (("converts a string to uppercase",), "def {f}({a}):\n    return {a}.upper()"),
    (("counts the words of a text", "returns the number of words"), "def {f}({a}):\n    return len({a}.split())"),
    (("computes the factorial of a number", "returns n factorial"),
     "def {f}({a}):\n    result = 1\n    for i in range(2, {a} + 1):\n        result *= i\n    return result"),
    (("computes the factorial recursively",), "def {f}({a}):\n    if {a} <= 1:\n        return 1\n    return {a} * {f}({a} - 1)"),
    (("returns the nth Fibonacci number", "computes Fibonacci numbers"),
     "def {f}({a}):\n    x, y = 0, 1\n    for _ in range({a}):\n        x, y = y, x + y\n    return x"),
    (("sums a list", "adds up all numbers of a list"),
     "def {f}({a}):\n    total = 0\n    for item in {a}:\n        total += item\n    return total"),
    (("returns the average of a list", "computes the mean of numbers"), "def {f}({a}):\n    return sum({a}) / len({a})"),
    (("returns the first element of a list",), "def {f}({a}):\n    return {a}[0]"),
    (("returns the last element of a list",), "def {f}({a}):\n    return {a}[-1]"),
    (("keeps only the even numbers of a list", "filters even numbers"),
     "def {f}({a}):\n    return [item for item in {a} if item % 2 == 0]"),
    (("removes duplicates from a list",), "def {f}({a}):\n    return list(dict.fromkeys({a}))"),
    (("counts how often each item occurs", "counts the items of a list"),
     "def {f}({a}):\n    counts = {{}}\n    for item in {a}:\n        counts[item] = counts.get(item, 0) + 1\n    return counts"),
    (("reads a file and returns its text", "reads a file"),
     "def {f}({a}):\n    with open({a}) as file:\n        return file.read()"),
    (("checks whether a number is prime", "returns True for prime numbers"),
     "def {f}({a}):\n    if {a} < 2:\n        return False\n    for i in range(2, int({a} ** 0.5) + 1):\n"
     "        if {a} % i == 0:\n            return False\n    return True"),
    (("prints the numbers from 1 to n",), "def {f}({a}):\n    for i in range(1, {a} + 1):\n        print(i)"),
    (("swaps the keys and values of a dictionary",), "def {f}({a}):\n    return {{value: key for key, value in {a}.items()}}"),
    (("sorts a list in descending order",), "def {f}({a}):\n    return sorted({a}, reverse=True)"),
    (("joins words with a hyphen",), "def {f}({a}):\n    return '-'.join({a})"),
    (("greets a person by name",), "def {f}({a}):\n    return f'Hello, {{{a}}}!'"),
)  # fmt: skip


def write_small(rng: random.Random, words: Words) -> Sample:
    """Short functions in a few shapes, with names of the user's choice."""
    purposes, template = pick(rng, _SMALL)
    purpose = pick(rng, purposes)
    name = pick(
        rng, (f"{pick(rng, words.verbs)}_{pick(rng, words.nouns)}", words.word(rng), "f", pick(rng, words.verbs))
    )
    first, second = rng.sample(
        ("a", "b", "n", "x", "y", "value", "text", "items", "number", "data", "left", "right"), 2
    )
    source = template.format(f=name, a=first, b=second)
    named = f"called {name} " if rng.random() < 0.5 else f"named {name} "
    arguments = f"with the argument{'s' * ('{b}' in template)} {first}{f' and {second}' if '{b}' in template else ''} "
    options = (
        f"Write a Python function {named}{arguments}that {purpose}.", f"Write a function {named}{arguments}that {purpose}.",
        f"In Python, define a function {named}{arguments}that {purpose}.", f"Code: function {named}{arguments}that {purpose}",
    )  # fmt: skip
    return ask("write_function", pick(rng, options), source)


def what_returns(rng: random.Random, words: Words) -> Sample:
    """A tiny expression and its value, as Python prints it."""
    a, b = rng.randint(0, 30), rng.randint(1, 12)
    word, items = words.word(rng), [rng.randint(0, 20) for _ in range(rng.randint(2, 6))]
    cases: tuple[tuple[str, Callable[[], object]], ...] = (
        (f"{a} + {b}", lambda: a + b), (f"{a} > {b}", lambda: a > b), (f"{a} == {b}", lambda: a == b),
        (f"len({items})", lambda: len(items)), (f"max({items})", lambda: max(items)), (f"min({items})", lambda: min(items)),
        (f"sorted({items})", lambda: sorted(items)), (f"{items}[0]", lambda: items[0]), (f"{items}[-1]", lambda: items[-1]),
        (f"'{word}'.upper()", lambda: word.upper()), (f"len('{word}')", lambda: len(word)), (f"'{word}'[0]", lambda: word[0]),
        (f"list(range({b}))", lambda: list(range(b))), (f"{a} % 2", lambda: a % 2), (f"'{word}' + '{word}'", lambda: word * 2),
        (f"{items}[1:]", lambda: items[1:]), (f"{items} + [{a}]", lambda: [*items, a]), (f"{a} * {b}", lambda: a * b),
    )  # fmt: skip
    source, value = pick(rng, cases)
    options = (
        "What does {s} return in Python?",
        "What is the value of {s}?",
        "Evaluate {s}",
        "In Python, what is {s}?",
    )
    return ask("evaluate", pick(rng, options).format(s=source), repr(value()))


def describe(rng: random.Random, words: Words) -> Sample:
    function = pick(rng, words.functions)
    options = (
        "What does this function do?\n\n{s}",
        "{s}\nExplain the function above in one sentence.",
        "Describe this code:\n{s}",
    )
    source = "\n".join(function.source.split("\n")[:30])
    return ask("describe_code", pick(rng, options).replace("{s}", source), function.summary, check="open")


def purpose(rng: random.Random, words: Words) -> Sample:
    """What a public function of the standard library is for, by name alone."""
    public = [f for f in (pick(rng, words.functions) for _ in range(8)) if f.public]
    if not public:
        return what_returns(rng, words)
    name = f"{public[0].module}.{public[0].name}"
    options = (
        "What does {n} do?",
        "What is {n} for?",
        "Explain {n}.",
        "What does the function {n} do?",
        "Document {n}.",
    )
    return ask("docstring", pick(rng, options).format(n=name), public[0].summary, check="open")


def write(rng: random.Random, words: Words) -> Sample:
    """A function of the standard library from its docstring."""
    function = pick(rng, words.functions)
    if len(function.source) > 900:
        return describe(rng, words)
    options = (
        "Write a Python function `{n}`: {d}",
        "Implement {n} in Python. {d}",
        "Write the function {n}. Docstring: {d}",
    )
    question = pick(rng, options).replace("{n}", function.name.split(".")[-1]).replace("{d}", function.summary)
    return ask("implement", question, function.source.rstrip("\n"), check="open")


GENERATORS = (write_small, write_small, what_returns, what_returns, describe, purpose, write)
