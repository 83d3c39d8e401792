"""One benchmark in several variants, in turn on one machine: cards differ by 12% in one step, so nothing else compares.

    python -m benchmarks.in_turn --variant with= --variant "without=--set kernels=apart" --out results/chain -- \\
        jaxllm bench latency MODEL --batch 64,128

In: variants, each a name and what it adds to the command (leading NAME=VALUE words go to its environment), and a
command that takes `--out FILE` and writes figures there as `jaxllm bench` does. Out: OUT.json and OUT.md: each figure's
median and spread by variant, and how many times better than the first variant's. A round runs all variants, every
other round backwards, so that what drifts with time or heat hits all alike. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.tools.figures import Figure, as_json, from_json, median_figure, number

Key = tuple[str, str, str]  # what, at, unit


@dataclass(frozen=True)
class Variant:
    name: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, text: str) -> Variant:
        """`NAME=WORDS`; ValueError if it is not."""
        name, equals, rest = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--variant {text!r}: must be NAME=WORDS, NAME of letters, digits and -._")
        words = shlex.split(rest)
        settings = 0
        while settings < len(words) and re.match(r"[A-Za-z_]\w*=", words[settings]):
            settings += 1
        pairs = (word.partition("=") for word in words[:settings])
        return cls(name, tuple(words[settings:]), tuple((key, value) for key, _, value in pairs))


def order(count: int, rounds: int) -> list[int]:
    """Variants by number: there, back, there."""
    return [i for turn in range(rounds) for i in (range(count) if turn % 2 == 0 else reversed(range(count)))]


def run(variant: Variant, command: Sequence[str], result: Path) -> list[Figure]:
    """RuntimeError if the command fails or writes no figures."""
    words = [*command, *variant.words, "--out", str(result)]
    ended = subprocess.run(words, env=os.environ | dict(variant.environment), check=False)
    if ended.returncode:
        raise RuntimeError(f"{variant.name}: {shlex.join(words)} ended with code {ended.returncode}")
    return [from_json(raw) for raw in json.loads(result.read_text())["figures"]]


def merged(runs: Sequence[Sequence[Figure]]) -> dict[Key, Figure]:
    """All repeats of each figure as one; a figure without repeats counts as one of its own."""
    found: dict[Key, list[float]] = {}
    for figure in (figure for own in runs for figure in own):
        found.setdefault((figure.what, figure.at, figure.unit), []).extend(figure.repeats or (figure.value,))
    return {key: median_figure(*key, values) for key, values in found.items()}


def table(names: Sequence[str], by_variant: Sequence[dict[Key, Figure]]) -> str:
    """The first variant is what the others are compared with."""
    first = by_variant[0]
    head = ["", "at", "unit", *names, *(f"{name} over {names[0]}" for name in names[1:])]
    lines = [head, ["---"] * len(head)]
    for key, base in first.items():
        own = [found.get(key) for found in by_variant]
        values = ["" if each is None else f"{number(each.value)} ({_spread(each)})" for each in own]
        ratios = ["" if each is None else f"{each.times_better_than(base):.3f}x" for each in own[1:]]
        lines.append([key[0], key[1], key[2], *values, *ratios])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(figure: Figure) -> str:
    return f"{number(min(figure.repeats))} to {number(max(figure.repeats))}"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", required=True, metavar="NAME=WORDS")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args(words)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        variants = [Variant.read(text) for text in options.variant]
    except ValueError as error:
        parser.error(str(error))
    names = [variant.name for variant in variants]
    if len(set(names)) < max(2, len(names)) or not command or options.rounds < 1:
        parser.error("two or more variants of different names, one round or more, and a command after --")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs: list[list[list[Figure]]] = [[] for _ in variants]
    for number_, which in enumerate(order(len(variants), options.rounds)):
        result = options.out.with_name(f"{options.out.name}-{number_}-{names[which]}.json")
        runs[which].append(run(variants[which], command, result))
        _write(options.out, command, variants, [merged(own) for own in runs])  # what there is, should the next one fail
    print(options.out.with_suffix(".md").read_text(), end="")
    return 0


def _write(out: Path, command: Sequence[str], variants: Sequence[Variant], found: Sequence[dict[Key, Figure]]) -> None:
    known = [(variant, own) for variant, own in zip(variants, found, strict=True) if own]
    document: dict[str, Any] = {"command": shlex.join(command)}
    document["variants"] = [
        {
            "name": variant.name,
            "words": list(variant.words),
            "environment": dict(variant.environment),
            "figures": [as_json(figure) for figure in own.values()],
        }
        for variant, own in known
    ]
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(table([variant.name for variant, _ in known], [own for _, own in known]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
