"""Kinds of things that sentences describe: fields, how a value is drawn, and how a clause says it.

In: a random generator and `Words`. Out: a `Record` (json values by field) and prose that states it. Extraction,
recall, question answering and summaries are all made from these records; they know nothing of questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.train.tasks import pools
from tools.train.tasks.sample import pick
from tools.train.tasks.words import Words, invented

type Draw = Callable[[random.Random, Words], Any]


@dataclass(frozen=True)
class Field:
    """`keys`: names it may have in JSON, the usual one first. `clauses` say a value `{v}` about the subject."""

    keys: tuple[str, ...]
    draw: Draw
    clauses: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The first field names the thing; `noun` and `pronoun` speak of it."""

    noun: str
    pronoun: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Record:
    family: Family
    values: tuple[tuple[Field, Any], ...]

    @property
    def subject(self) -> str:
        return str(self.values[0][1])


def _field(keys: str, draw: Draw, *clauses: str) -> Field:
    return Field(tuple(keys.split()), draw, clauses)


def spoken(value: object) -> str:
    """A JSON value as prose writes it."""
    if isinstance(value, list):
        return ", ".join(map(str, value[:-1])) + " and " + str(value[-1]) if len(value) > 1 else str(value[0])
    return str(value)


def number(low: int, high: int) -> Draw:
    return lambda rng, words: rng.randint(low, high)


def price(rng: random.Random, words: Words) -> float | int:
    whole = rng.randint(1, 999)
    return whole if rng.random() < 0.3 else whole + pick(rng, (0.5, 0.99, 0.95, 0.25, 0.49, 0.75))


def date(rng: random.Random, words: Words) -> str:
    month, day, year = rng.randrange(12), rng.randint(1, 28), rng.randint(1950, 2035)
    draw = rng.random()
    if draw < 0.4:
        return f"{pools.MONTHS[month]} {day}, {year}"
    if draw < 0.6:
        return f"{day} {pools.MONTHS[month]} {year}"
    return f"{year}-{month + 1:02d}-{day:02d}" if draw < 0.85 else f"{pools.MONTHS[month]} {day}"


def clock(rng: random.Random, words: Words) -> str:
    hour, minute = rng.randint(0, 23), pick(rng, (0, 15, 30, 45, rng.randrange(60)))
    if rng.random() < 0.6:
        return f"{hour:02d}:{minute:02d}"
    return f"{hour % 12 or 12}:{minute:02d} {'AM' if hour < 12 else 'PM'}"


def email(rng: random.Random, words: Words) -> str:
    user = pick(rng, (words.name(rng), f"{words.name(rng)}.{pick(rng, words.last_names)}", words.word(rng))).lower()
    user += str(rng.randint(1, 99)) if rng.random() < 0.2 else ""
    return f"{user}@{pick(rng, (words.word(rng), invented(rng), 'example', 'mail'))}.{pick(rng, ('com', 'org', 'net', 'io'))}"


def phone(rng: random.Random, words: Words) -> str:
    draw = rng.random()
    if draw < 0.5:
        return f"{rng.randint(200, 999)}-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
    if draw < 0.75:
        return f"555-{rng.randint(1000, 9999)}"
    return f"+{rng.randint(1, 99)} {rng.randint(100, 999)} {rng.randint(100, 999)} {rng.randint(100, 999)}"


def code(rng: random.Random, words: Words) -> str:
    letters = "".join(pick(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{pick(rng, ('-', '', '#')) if letters else ''}{rng.randint(10, 99999)}"


def version(rng: random.Random, words: Words) -> str:
    return ".".join(str(rng.randint(0, 20)) for _ in range(rng.randint(2, 3)))


def several(pool: str, low: int = 2, high: int = 4) -> Draw:
    def draw(rng: random.Random, words: Words) -> list[str]:
        return list(dict.fromkeys(pick(rng, getattr(words, pool)) for _ in range(rng.randint(low, high))))

    return draw


def one(pool: str) -> Draw:
    return lambda rng, words: pick(rng, getattr(words, pool))


def choice(*options: object) -> Draw:
    return lambda rng, words: pick(rng, options)


def made(method: str) -> Draw:
    """What a method of `Words` makes: a name, a city, a title."""
    return lambda rng, words: getattr(words, method)(rng)


def address(rng: random.Random, words: Words) -> str:
    street = pick(rng, (pick(rng, words.nouns).capitalize(), pick(rng, words.last_names)))
    return f"{rng.randint(1, 400)} {street} {pick(rng, ('Street', 'Road', 'Avenue', 'Lane'))}"


_CITY = made("city")
PERSON = Family("person", "They", (
    _field("name full_name person", lambda r, w: pick(r, (w.name(r), w.full_name(r)))),
    _field("age years", number(3, 98), "is {v} years old", "is {v}", "turned {v} this year"),
    _field("city location hometown town", _CITY, "lives in {v}", "is from {v}", "moved to {v}", "is based in {v}"),
    _field("job occupation profession role", one("jobs"), "works as a {v}", "is a {v}", "has a job as a {v}"),
    _field("company employer workplace", made("company"), "works at {v}", "is employed by {v}", "works for {v}"),
    _field("email email_address", email, "can be reached at {v}", "has the email address {v}", "uses the email {v}"),
    _field("phone phone_number telephone", phone, "has the phone number {v}", "can be called at {v}"),
    _field("hobbies interests", several("topics", 1, 4), "enjoys {v}", "is interested in {v}", "loves {v}"),
    _field("country nationality", one("countries"), "was born in {v}", "comes from {v}", "grew up in {v}"),
    _field("favorite_color color colour", one("colours"), "has {v} as a favorite color", "likes the color {v} best"),
    _field("languages", lambda r, w: r.sample(pools.LANGUAGES, r.randint(2, 3)), "speaks {v}"),
    _field("birthday date_of_birth born", date, "was born on {v}", "has a birthday on {v}"),
    _field("pet", one("animals"), "has a pet {v}", "owns a {v}"),
))  # fmt: skip
EVENT = Family("event", "It", (
    _field("event title name", lambda r, w: f"{w.title(r)} {pick(r, ('Conference', 'Festival', 'Workshop', 'Meeting'))}"),
    _field("date day when", date, "takes place on {v}", "is on {v}", "will be held on {v}", "is scheduled for {v}"),
    _field("time start_time start", clock, "starts at {v}", "begins at {v}", "opens at {v}"),
    _field("location city place venue", _CITY, "happens in {v}", "will be in {v}", "takes us to {v}"),
    _field("attendees participants guests", number(3, 900), "expects {v} guests", "has {v} participants"),
    _field("organizer host contact", made("full_name"), "is organized by {v}", "is hosted by {v}"),
    _field("price cost fee", price, "costs ${v}", "has an entry fee of ${v}", "is ${v} to attend"),
    _field("topic subject theme", one("topics"), "is about {v}", "has {v} as its theme"),
    _field("online virtual", choice(True, False), "is {v?held online:held on site}", "is {v?online:not online}"),
))  # fmt: skip
PRODUCT = Family("product", "It", (
    _field("product name item", lambda r, w: f"{w.title(r).removeprefix('The ')} {pick(r, w.products)}"),
    _field("price cost amount", price, "costs ${v}", "is priced at ${v}", "sells for ${v}"),
    _field("color colour", one("colours"), "comes in {v}", "is {v}", "has a {v} finish"),
    _field("brand manufacturer maker", made("company"), "is made by {v}", "comes from {v}"),
    _field("weight_kg weight", number(1, 80), "weighs {v} kg", "has a weight of {v} kg"),
    _field("rating stars score", choice(1, 2, 3, 4, 5, 3.5, 4.5, 4.2, 4.8), "is rated {v} stars", "scores {v} out of 5"),
    _field("in_stock available", choice(True, False), "is {v?in stock:out of stock}", "is {v?available:not available}"),
    _field("warranty_years warranty", number(1, 10), "has a warranty of {v} years"),
    _field("quantity stock count", number(1, 500), "has {v} units left", "is available in {v} pieces"),
    _field("sku code id", code, "has the code {v}", "is listed as {v}"),
))  # fmt: skip
BOOK = Family("book", "It", (
    _field("title book", made("title")),
    _field("author writer", made("full_name"), "was written by {v}", "is by {v}", "is a book by {v}"),
    _field("year published publication_year", number(1800, 2030), "was published in {v}", "came out in {v}"),
    _field("pages page_count", number(40, 1200), "has {v} pages", "runs to {v} pages"),
    _field("genre category", choice("fantasy", "history", "mystery", "poetry", "romance", "science", "thriller", "travel"),
           "is a {v} book", "belongs to the {v} section"),
    _field("publisher", made("company"), "was published by {v}"),
    _field("language", choice(*pools.LANGUAGES), "is written in {v}", "is available in {v}"),
    _field("isbn", code, "has the ISBN {v}"),
    _field("price cost", price, "costs ${v}"),
))  # fmt: skip
FLIGHT = Family("flight", "It", (
    _field("flight flight_number number", lambda r, w: f"Flight {pick(r, 'ABCDKLQSUX')}{pick(r, 'ABFLMSZ')}{r.randint(10, 9999)}"),
    _field("origin from departure_city", _CITY, "leaves from {v}", "departs from {v}"),
    _field("destination to arrival_city", _CITY, "goes to {v}", "flies to {v}", "lands in {v}"),
    _field("departure_time departure departs", clock, "takes off at {v}", "departs at {v}"),
    _field("gate", lambda r, w: f"{pick(r, 'ABCDEF')}{r.randint(1, 60)}", "boards at gate {v}", "uses gate {v}"),
    _field("passengers seats", number(20, 400), "carries {v} passengers", "has {v} seats"),
    _field("airline carrier", made("company"), "is operated by {v}"),
    _field("delayed", choice(True, False), "is {v?delayed:not delayed}", "is {v?late:on time}"),
    _field("duration_hours hours", number(1, 18), "takes {v} hours"),
))  # fmt: skip
COMPANY = Family("company", "It", (
    _field("company name organization", made("company")),
    _field("founded year founded_year", number(1850, 2030), "was founded in {v}", "started in {v}"),
    _field("headquarters city location", _CITY, "is based in {v}", "has its headquarters in {v}"),
    _field("employees staff size", number(3, 90000), "has {v} employees", "employs {v} people"),
    _field("ceo director founder", made("full_name"), "is led by {v}", "is run by {v}"),
    _field("industry sector field", one("topics"), "works in {v}", "is active in the field of {v}"),
    _field("revenue_millions revenue", number(1, 900), "earned {v} million dollars last year"),
    _field("products", several("products"), "sells {v}", "makes {v}"),
    _field("website url", lambda r, w: f"www.{w.word(r)}.{pick(r, ('com', 'org', 'io'))}", "has the website {v}"),
))  # fmt: skip
ORDER = Family("order", "It", (
    _field("order_id order id", lambda r, w: f"Order {code(r, w)}"),
    _field("customer customer_name buyer client", made("full_name"), "was placed by {v}", "is for {v}", "belongs to {v}"),
    _field("total amount total_price", price, "comes to ${v}", "has a total of ${v}"),
    _field("date order_date ordered_on", date, "was placed on {v}", "is dated {v}"),
    _field("status state", choice("shipped", "pending", "delivered", "cancelled", "paid"), "is {v}", "has the status {v}"),
    _field("items products", several("products"), "contains {v}", "includes {v}"),
    _field("quantity count", number(1, 60), "has {v} pieces", "counts {v} items"),
    _field("address shipping_address", address, "ships to {v}", "goes to {v}"),
    _field("paid", choice(True, False), "is {v?paid:not paid yet}", "has {v?been paid:not been paid}"),
))  # fmt: skip
WEATHER = Family("report", "It", (
    _field("city location place", _CITY),
    _field("temperature temp degrees", number(-20, 42), "has {v} degrees", "reports {v} degrees", "is at {v} degrees"),
    _field("condition weather sky", choice("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"),
           "is {v} today", "expects a {v} day"),
    _field("humidity", number(5, 100), "has a humidity of {v} percent"),
    _field("wind_speed wind", number(0, 120), "has wind at {v} km/h", "sees winds of {v} km/h"),
    _field("day weekday", choice(*pools.WEEKDAYS), "expects this on {v}"),
))  # fmt: skip
BUG = Family("issue", "It", (
    _field("issue bug id ticket", lambda r, w: f"Issue {code(r, w)}"),
    _field("reporter reported_by author", made("name"), "was reported by {v}", "was opened by {v}"),
    _field("component module area", made("word"), "is in the {v} module", "affects the {v} component"),
    _field("priority severity", choice("low", "medium", "high", "critical"), "has {v} priority", "is of {v} priority"),
    _field("version release", version, "occurs in version {v}", "was found in version {v}"),
    _field("fixed resolved closed", choice(True, False), "is {v?fixed:not fixed}", "is {v?closed:still open}"),
    _field("assignee owner", made("name"), "is assigned to {v}"),
    _field("line line_number", number(1, 3000), "points to line {v}", "was traced to line {v}"),
    _field("date opened created", date, "was opened on {v}"),
))  # fmt: skip
ANIMAL = Family("animal", "It", (
    _field("name animal_name", made("name")),
    _field("species animal kind", one("animals"), "is a {v}"),
    _field("age years", number(1, 30), "is {v} years old"),
    _field("color colour", one("colours"), "is {v}", "has {v} markings"),
    _field("owner", made("full_name"), "belongs to {v}", "is owned by {v}"),
    _field("weight_kg weight", number(1, 90), "weighs {v} kg"),
    _field("favorite_food food", one("foods"), "likes {v}", "loves to eat {v}"),
    _field("vaccinated", choice(True, False), "is {v?vaccinated:not vaccinated}"),
))  # fmt: skip
FAMILIES = (PERSON, PERSON, PERSON, EVENT, PRODUCT, BOOK, FLIGHT, COMPANY, ORDER, WEATHER, BUG, ANIMAL)


def draw(rng: random.Random, words: Words, family: Family | None = None, size: int | None = None) -> Record:
    """A record of the subject and `size` further fields in random order."""
    family = family or pick(rng, FAMILIES)
    count = min(size or rng.randint(1, 5), len(family.fields) - 1)
    chosen = [family.fields[0], *rng.sample(family.fields[1:], count)]
    return Record(family, tuple((field, field.draw(rng, words)) for field in chosen))


def clause(rng: random.Random, field: Field, value: object) -> str:
    """`lives in Oslo`: what one field says about the subject."""
    text = pick(rng, field.clauses)
    if "{v?" in text:
        head, options = text.split("{v?", 1)
        yes_no, tail = options.split("}", 1)
        yes, no = yes_no.split(":", 1)
        return f"{head}{yes if value else no}{tail}"
    shown = spoken(value)
    if " a {v}" in text and shown[:1].lower() in "aeiou":
        text = text.replace(" a {v}", " an {v}")
    return text.replace("{v}", shown)


def prose(rng: random.Random, record: Record) -> str:
    """Sentences that state every field of a record."""
    subject = record.subject
    clauses = [clause(rng, field, value) for field, value in record.values[1:]]
    pronoun = pick(rng, ("He", "She", subject)) if record.family.pronoun == "They" else record.family.pronoun
    sentences: list[str] = []
    while clauses:
        count = min(len(clauses), rng.randint(1, 3))
        part, clauses = clauses[:count], clauses[count:]
        joined = part[0] if count == 1 else ", ".join(part[:-1]) + pick(rng, (" and ", ", and ")) + part[-1]
        who = subject if not sentences or rng.random() < 0.3 else pronoun
        sentences.append(f"{who} {joined}.")
    return " ".join(sentences)
