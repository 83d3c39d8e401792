"""Conversations of several turns: facts told earlier, questions about a passage, short summaries.

In: a random generator and `Words`; for the turns in between, any other generator's samples. Out: a `Sample`
whose last answer needs what stands before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.train.tasks import records
from tools.train.tasks.sample import Message, Sample, ask, pick
from tools.train.tasks.words import Words, invented

type Make = Callable[[random.Random, Words], Sample]

_FACTS: tuple[tuple[str, records.Draw, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("name", records.made("name"), ("My name is {v}.", "I'm {v}.", "Hi, I am {v}.", "Call me {v}.", "Hello, my name is {v}."),
     ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?"), "Your name is {v}."),
    ("city", records.made("city"), ("I live in {v}.", "I am from {v}.", "My home is in {v}."),
     ("Where do I live?", "Which city do I live in?", "Where is my home?"), "You live in {v}."),
    ("age", records.number(6, 99), ("I am {v} years old.", "I'm {v}.", "My age is {v}."),
     ("How old am I?", "What is my age?"), "You are {v} years old."),
    ("color", records.one("colours"), ("My favorite color is {v}.", "I like the color {v} most."),
     ("What is my favorite color?", "Which color do I like?"), "Your favorite color is {v}."),
    ("pet", lambda r, w: f"{pick(r, w.animals)} named {w.name(r)}", ("I have a {v}.", "My pet is a {v}."),
     ("What pet do I have?", "Which pet do I have?"), "You have a {v}."),
    ("job", records.one("jobs"), ("I work as a {v}.", "My job is {v}.", "I'm a {v}."),
     ("What is my job?", "What do I do for a living?"), "You work as a {v}."),
    ("food", records.one("foods"), ("My favorite food is {v}.", "I love {v}.", "I like to eat {v}."),
     ("What is my favorite food?", "What do I like to eat?"), "Your favorite food is {v}."),
    ("hobby", records.one("topics"), ("My hobby is {v}.", "I enjoy {v}.", "In my free time I do {v}."),
     ("What is my hobby?", "What do I enjoy?"), "Your hobby is {v}."),
    ("number", records.number(1, 99999), ("My lucky number is {v}.", "Remember the number {v}.", "The number is {v}."),
     ("What is the number?", "Which number did I tell you?", "What number did I give you?"), "The number is {v}."),
    ("word", lambda r, w: pick(r, (w.word(r), invented(r))), ("Remember this word: {v}.", "The secret word is {v}."),
     ("What was the word?", "What is the secret word?", "Which word did I tell you?"), "The word is {v}."),
    ("birthday", records.date, ("My birthday is {v}.", "I was born on {v}."),
     ("When is my birthday?", "When was I born?"), "Your birthday is {v}."),
    ("friend", records.made("full_name"), ("My best friend is {v}.", "My friend is called {v}."),
     ("Who is my best friend?", "What is my friend called?"), "Your friend is {v}."),
)  # fmt: skip
_NOTED = (
    "Thanks for telling me.", "Got it.", "Okay, I will remember that.", "Noted.", "Nice to know!", "I will remember.",
)  # fmt: skip


def facts(rng: random.Random, words: Words, filler: Make) -> Sample:
    """Facts about the user, perhaps other turns in between, then a question about one of them."""
    told = rng.sample(_FACTS, rng.randint(1, 4))
    values = [fact[1](rng, words) for fact in told]
    messages: list[Message] = []
    statements = [pick(rng, fact[2]).format(v=value) for fact, value in zip(told, values)]
    groups = [statements] if rng.random() < 0.4 else [[statement] for statement in statements]
    for group in groups:
        first = told[0][0] == "name" and not messages
        reply = f"Nice to meet you, {values[0]}!" if first else pick(rng, _NOTED)
        messages += [{"role": "user", "content": " ".join(group)}, {"role": "assistant", "content": reply}]
    for _ in range(pick(rng, (0, 0, 1, 1, 2, 3))):
        other = filler(rng, words)
        if not other.tools and other.messages[0]["role"] == "user":
            messages += other.messages
    index = rng.randrange(len(told))
    answer = told[index][4].format(v=values[index])
    question = pick(rng, told[index][3])
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(kind="recall", messages=messages)


def previous(rng: random.Random, words: Words, filler: Make) -> Sample:
    """What was said before: the user's first message, or the assistant's last answer again."""
    turns = [filler(rng, words) for _ in range(rng.randint(1, 3))]
    turns = [turn for turn in turns if not turn.tools and len(turn.messages) == 2 and len(str(turn.messages)) < 900]
    if not turns:
        return facts(rng, words, filler)
    messages = [message for turn in turns for message in turn.messages]
    if rng.random() < 0.5:
        question, answer = (
            pick(rng, ("Say that again.", "Repeat your last answer.", "Again, please.")),
            messages[-1]["content"],
        )
    else:
        question, answer = (
            pick(rng, ("What was my first message?", "Repeat my first question.")),
            messages[0]["content"],
        )
    messages = [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(kind="recall_turn", messages=messages)


def passage_question(rng: random.Random, words: Words) -> Sample:
    """A question about one of several people or things that a passage describes."""
    family = pick(rng, records.FAMILIES)
    size = rng.randint(1, 3)
    found = [records.draw(rng, words, family, size) for _ in range(rng.randint(1, 4))]
    record = pick(rng, found)
    field, value = pick(rng, record.values[1:])
    if isinstance(value, bool):
        return summary(rng, words)
    key = field.keys[0].replace("_", " ")
    text = " ".join(records.prose(rng, item) for item in found)
    questions = [f"What is the {key} of {record.subject}?", f"What is {record.subject}'s {key}?"]
    if family is records.PERSON:
        natural = {"age": "How old is {s}?", "city": "Where does {s} live?", "job": "What does {s} do for work?",
                   "company": "Where does {s} work?", "hobbies": "What does {s} enjoy?", "pet": "What pet does {s} have?",
                   "email": "How can {s} be reached by email?", "country": "Which country is {s} from?",
                   "birthday": "When was {s} born?"}  # fmt: skip
        if key in natural:
            questions = [*questions, natural[key].format(s=record.subject)] * 2
    question = pick(rng, questions)
    form = pick(rng, ("{t}\n\n{q}", "{q}\n\n{t}", "Read this: {t}\n\nQuestion: {q}", "Context: {t}\nQuestion: {q}"))
    return ask("passage", form.format(t=text, q=question), records.spoken(value))


def summary(rng: random.Random, words: Words) -> Sample:
    """A short report on one thing, summed up by its name and its first fact."""
    record = records.draw(rng, words, size=rng.randint(2, 4))
    first = records.clause(rng, *record.values[1])
    others = [records.clause(rng, field, value) for field, value in record.values[2:]]
    text = f"{record.subject} {first}. " + " ".join(f"{record.family.pronoun} {other}." for other in others)
    if record.family is records.PERSON:
        text = f"{record.subject} {first}. " + " ".join(f"{record.subject} {other}." for other in others)
    text += "".join(f" {words.sentence(rng)}" for _ in range(rng.randint(0, 4)))
    options = (
        "Summarize this in one sentence: {t}", "Sum up the text in one sentence.\n\n{t}", "{t}\n\nWhat is this about? One sentence.",
        "Give me a one sentence summary.\n\n{t}", "tl;dr: {t}", "Summarise: {t}",
    )  # fmt: skip
    return ask("summary", pick(rng, options).format(t=text), f"{record.subject} {first}.")


def title_of(rng: random.Random, words: Words) -> Sample:
    """The first or last sentence, or who is mentioned, in a made-up text."""
    name = words.full_name(rng)
    sentences = [words.sentence(rng) for _ in range(rng.randint(2, 6))]
    where = rng.randrange(len(sentences) + 1)
    sentences.insert(where, f"{name} {pick(rng, ('arrived', 'was there', 'came along', 'took notes', 'left early'))}.")
    options = ("{t}\n\nWhich person is mentioned by full name?", "Who is named with first and last name here? {t}")
    return ask("passage", pick(rng, options).format(t=" ".join(sentences)), name)


GENERATORS = (passage_question, passage_question, summary, title_of)
WITH_FILLER = (facts, facts, facts, previous)
