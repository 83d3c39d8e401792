"""The vocabulary the generators draw from: hand-written lists, words of the standard library, invented words.

In: text lists of a `Corpus`. Out: a `Words` with pools. Training leaves out a reserved share of every large
pool; held-out samples draw from the whole pool, so that unseen names and words occur in them.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from tools.train.corpus import Corpus, Function
from tools.train.tasks import pools
from tools.train.tasks.sample import pick

RESERVED_PERCENT = 12
_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "sl",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
    "zh",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "io", "oa", "oo", "ou"]
_CODAS = ["", "", "", "", "l", "m", "n", "r", "s", "t", "x", "ck", "nd", "rk", "sh", "st", "th", "v", "z", "lm"]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Pools of text, all of one split."""

    words: list[str]
    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]
    first_names: list[str]
    last_names: list[str]
    cities: list[str]
    countries: list[str]
    jobs: list[str]
    products: list[str]
    foods: list[str]
    animals: list[str]
    colours: list[str]
    topics: list[str]
    passages: list[str]
    code: list[str]
    functions: list[Function]

    @staticmethod
    def build(corpus: Corpus, *, held_out: bool = False) -> Words:
        def split(pool: list[str]) -> list[str]:
            return [w for w in dict.fromkeys(pool) if held_out or not _reserved(w)]

        nouns = pools.NOUNS.split()
        return Words(
            words=split(corpus.words() + nouns + pools.ADJECTIVES.split() + pools.VERBS.split()),
            nouns=split(nouns),
            adjectives=split(pools.ADJECTIVES.split()),
            verbs=split(pools.VERBS.split()),
            first_names=split(pools.FIRST_NAMES.split()),
            last_names=split(pools.LAST_NAMES.split()),
            cities=split(pools.underscored(pools.CITIES)),
            countries=split(pools.underscored(pools.COUNTRIES)),
            jobs=split(pools.underscored(pools.JOBS)),
            products=split(pools.underscored(pools.PRODUCTS)),
            foods=split(pools.underscored(pools.FOODS)),
            animals=pools.ANIMALS.split(),
            colours=pools.COLOURS.split(),
            topics=split(pools.underscored(pools.TOPICS)),
            passages=corpus.passages(),
            code=corpus.code_lines(),
            functions=corpus.functions(),
        )

    def word(self, rng: random.Random) -> str:
        """A lower-case word: mostly real, now and then invented."""
        draw = rng.random()
        if draw < 0.45:
            return pick(rng, self.nouns)
        return pick(rng, self.words) if draw < 0.85 else invented(rng)

    def name(self, rng: random.Random) -> str:
        return pick(rng, self.first_names) if rng.random() < 0.85 else invented(rng).capitalize()

    def full_name(self, rng: random.Random) -> str:
        last = pick(rng, self.last_names) if rng.random() < 0.8 else invented(rng).capitalize()
        return f"{self.name(rng)} {last}"

    def city(self, rng: random.Random) -> str:
        return pick(rng, self.cities) if rng.random() < 0.88 else invented(rng, 3).capitalize()

    def company(self, rng: random.Random) -> str:
        head = pick(rng, self.last_names) if rng.random() < 0.4 else invented(rng).capitalize()
        return f"{head} {pick(rng, pools.COMPANY_TAILS)}"

    def title(self, rng: random.Random) -> str:
        words = [pick(rng, self.adjectives), pick(rng, self.nouns)]
        if rng.random() < 0.4:
            words = ["the", *words]
        elif rng.random() < 0.4:
            words += ["of", pick(rng, self.nouns)]
        return " ".join(w.capitalize() if w != "of" else w for w in words)

    def sentence(self, rng: random.Random) -> str:
        """A plain sentence that means little: subject, verb, object, place or time."""
        subject = self.name(rng) if rng.random() < 0.4 else f"The {pick(rng, self.adjectives)} {pick(rng, self.nouns)}"
        verb, noun = pick(rng, pools.PAST_VERBS), pick(rng, self.nouns)
        tail = pick(rng, pools.SENTENCE_TAILS)
        article = pick(rng, ("the", "a", "every", "another"))
        article = "an" if article == "a" and noun[0] in "aeiou" else article
        return f"{subject} {verb} {article} {noun}{tail}."


def invented(rng: random.Random, syllables: int | None = None) -> str:
    """A pronounceable word that is in no list."""
    count = syllables or 1 + int(rng.random() * 3)
    parts = [pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(count)]
    word = "".join(parts) + pick(rng, _CODAS)
    return word if len(word) > 2 else word + pick(rng, _VOWELS) + pick(rng, "lmnrst")


def _reserved(word: str) -> bool:
    digest = hashlib.sha256(b"word:" + word.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < RESERVED_PERCENT
