"""Structured extraction: prose, notes or lines in, JSON out, with the keys the user asks for.

In: a random generator and `Words`. Out: a `Sample` judged as JSON. Flat objects, nulls for what is missing,
arrays of objects, nested objects, schemas and templates in the prompt.
"""

from __future__ import annotations

import json
import random
from typing import Any

from tools.train.tasks import records
from tools.train.tasks.records import Field, Record
from tools.train.tasks.sample import Sample, ask, dumps, pick
from tools.train.tasks.words import Words, invented

_NOISE = (
    "Thanks for reading.", "Please let me know if anything is unclear.", "More details will follow.", "Have a nice day!",
    "This was confirmed yesterday.", "Everyone was pleased.", "There is nothing else to report.", "See you soon.",
)  # fmt: skip


def _key(rng: random.Random, field: Field, taken: dict[str, Any]) -> str:
    name = field.keys[0] if rng.random() < 0.55 else pick(rng, field.keys)
    draw = rng.random()
    if draw < 0.06:
        head, *rest = name.split("_")
        name = head + "".join(part.capitalize() for part in rest)
    elif draw < 0.09:
        name = name.replace("_", " ").title()
    elif draw < 0.12:
        name = (
            f"{name}_{invented(rng)}" if rng.random() < 0.5 else f"{pick(rng, ('user', 'main', 'my', 'item'))}_{name}"
        )
    return name if name not in taken else field.keys[0] + "_2"


def _request(rng: random.Random, record: Record, *, missing: bool) -> dict[str, Any]:
    """The object asked for: some of the record's fields, in any order; perhaps one the text does not state."""
    pairs = list(record.values)
    if rng.random() < 0.45:
        pairs = rng.sample(pairs, rng.randint(1, len(pairs)))
    if rng.random() < 0.4:
        rng.shuffle(pairs)
    if missing:
        stated = {field for field, _ in record.values}
        others = [field for field in record.family.fields if field not in stated]
        if others:
            pairs.insert(rng.randint(0, len(pairs)), (pick(rng, others), None))
    wanted: dict[str, Any] = {}
    for field, value in pairs:
        wanted[_key(rng, field, wanted)] = value
    return wanted


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "array" if isinstance(value, list) else "string"


def _schema(wanted: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for key, value in wanted.items():
        kinds[key] = {"type": _kind(value)}
        if isinstance(value, list):
            kinds[key]["items"] = {"type": "string"}
    return {"type": "object", "properties": kinds, "required": list(wanted)}


def _instruction(rng: random.Random, wanted: dict[str, Any], noun: str) -> str:
    keys = list(wanted)
    listed = records.spoken(keys)
    quoted = ", ".join(f'"{key}"' for key in keys)
    draw = rng.random()
    if draw < 0.52:
        options = (
            f"Extract {listed} from the text as JSON", f"Return a JSON object with the keys {quoted}",
            f"Extract the {noun} as JSON with keys {quoted}", f"Extract these fields as JSON: {', '.join(keys)}",
            f"Extract the {listed} as JSON", f"Give me {listed} in JSON format", f"Output JSON with {listed}",
            f"Pull out {listed} and answer with JSON only", f"Convert the text to a JSON object with {quoted}",
            f"From the following text, extract {listed}. Answer in JSON", f"JSON with fields {', '.join(keys)}",
            f"Find {listed} in this text and write them as a JSON object", f"Extract to JSON ({', '.join(keys)})",
            f"Parse the text into JSON. Keys: {', '.join(keys)}", f"Extract {listed}. Respond with valid JSON",
        )  # fmt: skip
        return pick(rng, options)
    if draw < 0.68:
        template = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
        return pick(rng, (f"Fill in this JSON from the text: {template}", f"Answer in the form {template}"))
    if draw < 0.84:
        schema = dumps(_schema(wanted))
        return pick(
            rng, (f"Extract JSON that matches this schema: {schema}", f"Use this JSON schema to answer: {schema}")
        )
    typed = ", ".join(f"{key} ({_kind(value)})" for key, value in wanted.items())
    return pick(rng, (f"Extract as JSON: {typed}", f"Return JSON with these fields: {typed}"))


def _compose(rng: random.Random, instruction: str, text: str) -> str:
    draw = rng.random()
    label = pick(rng, ("Text: ", "", "Input: ", "Sentence: "))
    if draw < 0.45:
        return f"{instruction}.\n\n{label}{text}"
    if draw < 0.65:
        return f"{instruction}: {text}"
    if draw < 0.8:
        return f"{text}\n\n{instruction}."
    return f"{instruction}.\n{label}{text}"


def _text(rng: random.Random, record: Record) -> str:
    if rng.random() < 0.16:
        lines = [
            f"{pick(rng, field.keys).replace('_', ' ').capitalize()}: {_plain(value)}" for field, value in record.values
        ]
        return "\n".join(lines)
    text = records.prose(rng, record)
    if rng.random() < 0.2:
        text = f"{pick(rng, _NOISE)} {text}" if rng.random() < 0.4 else f"{text} {pick(rng, _NOISE)}"
    return text


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def flat(rng: random.Random, words: Words) -> Sample:
    record = records.draw(rng, words)
    wanted = _request(rng, record, missing=rng.random() < 0.12)
    instruction = _instruction(rng, wanted, record.family.noun)
    if None in wanted.values() and rng.random() < 0.5:
        instruction += ", null if missing"
    answer = dumps(wanted)
    if rng.random() < 0.05:
        instruction += ", indented by two spaces"
        answer = json.dumps(wanted, indent=2, ensure_ascii=False)
    return ask("extract", _compose(rng, instruction, _text(rng, record)), answer, check="json")


def array(rng: random.Random, words: Words) -> Sample:
    """Several things of one kind: an array of objects, or of one field's values."""
    family = pick(rng, records.FAMILIES)
    fields = rng.sample(family.fields[1:], rng.randint(1, 2))
    count = rng.randint(2, 4)
    found = [
        Record(family, tuple((f, f.draw(rng, words)) for f in (family.fields[0], *fields))) for _ in range(count)
    ]  # fmt: skip
    text = " ".join(records.prose(rng, record) for record in found)
    keys: dict[str, Any] = {}
    for field in (family.fields[0], *fields):
        keys[_key(rng, field, keys)] = field
    if rng.random() < 0.25:
        key, field = pick(rng, list(keys.items()))
        values = [value for record in found for f, value in record.values if f is field]
        named = key.replace("_", " ")
        options = (f"List every {named} as a JSON array", f"Extract each {named} into a JSON array")
        return ask("extract_array", _compose(rng, pick(rng, options), text), dumps(values), check="json")
    listed = records.spoken(list(keys))
    objects = [dict(zip(keys, (value for _, value in record.values))) for record in found]
    options = (
        f"Extract every {family.noun} as a JSON array of objects with {listed}",
        f"Return a JSON array; each element has the keys {listed}",
        f"List all of them as JSON objects with {listed}", f"Extract a JSON list of objects with keys {listed}",
    )  # fmt: skip
    answer: Any = objects
    instruction = pick(rng, options)
    if rng.random() < 0.3:
        name = pick(rng, (f"{family.noun}s", "items", "results", "entries"))
        instruction = f'Return JSON of the form {{"{name}": [...]}} where each entry has {listed}'
        answer = {name: objects}
    return ask("extract_array", _compose(rng, instruction, text), dumps(answer), check="json")


def nested(rng: random.Random, words: Words) -> Sample:
    """An object inside an object, or an order with its lines."""
    if rng.random() < 0.4:
        customer, total = words.full_name(rng), records.price(rng, words)
        lines = [(pick(rng, words.products), rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]
        bought = records.spoken([f"{n} x {item}" for item, n in lines])
        text = pick(
            rng, (f"{customer} ordered {bought} for ${total}.", f"Receipt for {customer}: {bought}. Total: ${total}.")
        )
        names = pick(
            rng, (("customer", "items", "product", "quantity", "total"), ("name", "lines", "item", "count", "sum"))
        )
        entries = [{names[2]: item, names[3]: n} for item, n in lines]
        answer: dict[str, Any] = {names[0]: customer, names[1]: entries, names[4]: total}
        form = f'{{"{names[0]}": ..., "{names[1]}": [{{"{names[2]}": ..., "{names[3]}": ...}}], "{names[4]}": ...}}'
    else:
        outer, inner = (
            records.draw(rng, words, size=rng.randint(1, 2)),
            records.draw(rng, words, size=rng.randint(1, 3)),
        )
        text = f"{records.prose(rng, outer)} {records.prose(rng, inner)}"
        answer = _request(rng, outer, missing=False)
        name = inner.family.noun
        answer[name] = _request(rng, inner, missing=False)
        shape = dict.fromkeys(answer, "...") | {name: dict.fromkeys(answer[name], "...")}
        form = dumps(shape).replace('"..."', "...")
    instruction = pick(
        rng, (f"Extract JSON of this form: {form}", f"Fill in this JSON: {form}", f"Return {form} from the text")
    )
    return ask("extract_nested", _compose(rng, instruction, text), dumps(answer), check="json")


def values_only(rng: random.Random, words: Words) -> Sample:
    """One value out of a text, with no JSON around it."""
    record = records.draw(rng, words, size=rng.randint(2, 5))
    field, value = pick(rng, record.values[1:])
    if isinstance(value, bool):
        return flat(rng, words)
    key = field.keys[0].replace("_", " ")
    text = _text(rng, record)
    options = (f"What is the {key}", f"Give only the {key}", f"Find the {key} in the text", f"Extract the {key}")
    return ask("extract_value", _compose(rng, pick(rng, options), text), _plain(value), check="exact")


def keys_and_values(rng: random.Random, words: Words) -> Sample:
    """Lines of `key: value` or `key = value` to JSON; the keys are any words at all."""
    size = rng.randint(2, 8)
    pairs = {words.word(rng): pick(rng, (words.word(rng), words.name(rng), rng.randint(0, 9999))) for _ in range(size)}
    separator = pick(rng, (": ", "=", " = ", " -> ", " is "))
    joined = "\n" if rng.random() < 0.7 else pick(rng, (", ", "; "))
    text = joined.join(f"{key}{separator}{value}" for key, value in pairs.items())
    options = (
        "Convert to JSON",
        "Write this as a JSON object",
        "Turn these lines into JSON",
        "Make a JSON object of this",
    )
    return ask("to_json", _compose(rng, pick(rng, options), text), dumps(pairs), check="json")


GENERATORS = (flat, flat, flat, flat, flat, array, nested, values_only, keys_and_values)
