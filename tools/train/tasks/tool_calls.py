"""Tool use in the Hermes layout: choose a function, fill its arguments, read its response, answer.

In: a random generator and `Words`. Out: a `Sample` with tools. Hand-written tools have natural requests;
invented tools have invented names and parameters, so that the model must read the signature.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.train.tasks import pools, records
from tools.train.tasks.sample import Message, Sample, dumps, pick
from tools.train.tasks.words import Words, invented

type Json = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """`draw` makes the arguments; a request is one of `requests`, filled with them; `reply` reads the result."""

    name: str
    description: str
    parameters: tuple[tuple[str, str, str], ...]  # name, JSON type (or a|b|c for an enum), description
    draw: Callable[[random.Random, Words], Json]
    requests: tuple[str, ...]
    result: Callable[[random.Random, Words, Json], Json] | None = None
    reply: str = ""


def schema(tool: Tool) -> Json:
    properties: Json = {}
    for name, kind, description in tool.parameters:
        entry: Json = {"type": "string" if "|" in kind else kind}
        if "|" in kind:
            entry["enum"] = kind.split("|")
        if kind == "array":
            entry["items"] = {"type": "string"}
        if description:
            entry["description"] = description
        properties[name] = entry
    parameters = {"type": "object", "properties": properties, "required": [name for name, _, _ in tool.parameters]}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _draw(**draws: records.Draw) -> Callable[[random.Random, Words], Json]:
    return lambda rng, words: {name: draw(rng, words) for name, draw in draws.items()}


_city, _word, _name = records.made("city"), records.made("word"), records.made("name")
_UNITS = records.choice("celsius", "fahrenheit")
TOOLS = (
    Tool("get_weather", "Get the current weather for a city", (("city", "string", "The city"),), _draw(city=_city),
         ("What's the weather in {city}?", "How is the weather in {city} today?", "Is it raining in {city}?",
          "weather in {city}", "Tell me the weather for {city}.", "Do I need an umbrella in {city}?"),
         lambda r, w, a: {"temperature": r.randint(-10, 38), "condition": pick(r, ("sunny", "cloudy", "rainy", "windy", "clear"))},
         "It is {condition} in {city} with a temperature of {temperature} degrees."),
    Tool("get_current_weather", "Get the current weather in a given location",
         (("location", "string", "The city and country"), ("unit", "celsius|fahrenheit", "")),
         _draw(location=_city, unit=_UNITS),
         ("What's the weather in {location} in {unit}?", "Give me the temperature in {location} in {unit}.",
          "How warm is it in {location}? Use {unit}."),
         lambda r, w, a: {"temperature": r.randint(-10, 90)}, "It is {temperature} degrees {unit} in {location}."),
    Tool("add", "Add two numbers", (("a", "integer", "First number"), ("b", "integer", "Second number")),
         _draw(a=records.number(0, 9999), b=records.number(0, 9999)),
         ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}", "Calculate the sum of {a} and {b}."),
         lambda r, w, a: {"result": a["a"] + a["b"]}, "{a} plus {b} is {result}."),
    Tool("multiply", "Multiply two numbers", (("a", "number", ""), ("b", "number", "")),
         _draw(a=records.number(2, 999), b=records.number(2, 999)),
         ("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?"),
         lambda r, w, a: {"result": a["a"] * a["b"]}, "{a} times {b} is {result}."),
    Tool("send_email", "Send an email", (("to", "string", "Recipient address"), ("subject", "string", "Subject line")),
         _draw(to=records.email, subject=records.made("title")),
         ('Send an email to {to} with the subject "{subject}".', "Email {to} about {subject}.",
          "Write to {to}, subject {subject}."),
         lambda r, w, a: {"status": "sent"}, "I sent the email to {to}."),
    Tool("search", "Search the web", (("query", "string", "What to search for"),),
         _draw(query=lambda r, w: f"{pick(r, w.adjectives)} {pick(r, w.nouns)} {pick(r, w.topics)}"),
         ("Search for {query}.", "Look up {query} on the web.", "Find information about {query}.", "Google {query}")),
    Tool("set_reminder", "Set a reminder at a time", (("text", "string", "What to remember"), ("time", "string", "When")),
         _draw(text=lambda r, w: f"{pick(r, w.verbs)} the {pick(r, w.nouns)}", time=records.clock),
         ("Remind me to {text} at {time}.", "Set a reminder for {time}: {text}", "At {time} I must {text}. Remind me."),
         lambda r, w, a: {"status": "ok"}, "I will remind you at {time} to {text}."),
    Tool("set_timer", "Start a timer", (("minutes", "integer", "Length in minutes"),), _draw(minutes=records.number(1, 180)),
         ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.", "timer {minutes} min"),
         lambda r, w, a: {"status": "started"}, "The timer is set for {minutes} minutes."),
    Tool("create_event", "Add an event to the calendar",
         (("title", "string", ""), ("date", "string", ""), ("time", "string", "")),
         _draw(title=records.made("title"), date=records.date, time=records.clock),
         ("Add {title} to my calendar on {date} at {time}.", 'Create an event "{title}" on {date} at {time}.',
          "Schedule {title} for {date}, {time}."),
         lambda r, w, a: {"created": True}, "I added {title} on {date} at {time}."),
    Tool("convert_currency", "Convert an amount between currencies",
         (("amount", "number", ""), ("from_currency", "string", "Three letter code"), ("to_currency", "string", "")),
         _draw(amount=records.number(1, 5000), from_currency=records.choice(*pools.CURRENCIES),
               to_currency=records.choice(*pools.CURRENCIES)),
         ("Convert {amount} {from_currency} to {to_currency}.", "How much is {amount} {from_currency} in {to_currency}?"),
         lambda r, w, a: {"result": r.randint(1, 9000)}, "{amount} {from_currency} is {result} {to_currency}."),
    Tool("translate", "Translate text into a language", (("text", "string", ""), ("language", "string", "Target language")),
         _draw(text=records.made("sentence"), language=records.choice(*pools.LANGUAGES)),
         ('Translate "{text}" into {language}.', "How do you say '{text}' in {language}?", "{language} please: {text}")),
    Tool("get_stock_price", "Get the latest price of a stock", (("symbol", "string", "Ticker symbol"),),
         _draw(symbol=lambda r, w: "".join(pick(r, "ABCDEFGHIKLMNOPRSTVXZ") for _ in range(r.randint(3, 4)))),
         ("What is the price of {symbol}?", "How is {symbol} trading?", "Stock price for {symbol}, please."),
         lambda r, w, a: {"price": records.price(r, w)}, "{symbol} is at {price}."),
    Tool("play_music", "Play a song", (("title", "string", "Song"), ("artist", "string", "Artist")),
         _draw(title=records.made("title"), artist=records.made("full_name")),
         ("Play {title} by {artist}.", "I want to hear {title} from {artist}.", "Put on {title} by {artist}"),
         lambda r, w, a: {"playing": True}, "Now playing {title} by {artist}."),
    Tool("book_flight", "Book a flight", (("origin", "string", ""), ("destination", "string", ""), ("date", "string", "")),
         _draw(origin=_city, destination=_city, date=records.date),
         ("Book a flight from {origin} to {destination} on {date}.", "I need to fly from {origin} to {destination} on {date}."),
         lambda r, w, a: {"confirmation": records.code(r, w)}, "Your flight is booked. The confirmation is {confirmation}."),
    Tool("book_table", "Reserve a table at a restaurant",
         (("restaurant", "string", ""), ("people", "integer", "Number of guests"), ("time", "string", "")),
         _draw(restaurant=records.made("title"), people=records.number(1, 14), time=records.clock),
         ("Book a table for {people} at {restaurant} at {time}.", "Reserve {restaurant} for {people} people at {time}.")),
    Tool("read_file", "Read a file", (("path", "string", "Path of the file"),),
         _draw(path=lambda r, w: f"{pick(r, ('', '/tmp/', 'src/', 'data/'))}{w.word(r)}.{pick(r, ('txt', 'py', 'json', 'md'))}"),
         ("Read the file {path}.", "Show me {path}.", "What is in {path}?", "Open {path}")),
    Tool("run_python", "Run Python code", (("code", "string", "The code"),),
         _draw(code=lambda r, w: pick(r, (f"print({r.randint(1, 99)} + {r.randint(1, 99)})", f'len("{w.word(r)}")'))),
         ("Run this Python code: {code}", "Execute {code} in Python.", "What does {code} give? Run it.")),
    Tool("get_time", "Get the current time in a city", (("city", "string", ""),), _draw(city=_city),
         ("What time is it in {city}?", "Current time in {city}?", "Tell me the time in {city}."),
         lambda r, w, a: {"time": records.clock(r, w)}, "It is {time} in {city}."),
    Tool("add_to_cart", "Put a product in the shopping cart", (("product", "string", ""), ("quantity", "integer", "")),
         _draw(product=records.one("products"), quantity=records.number(1, 20)),
         ("Add {quantity} {product} to my cart.", "I want to buy {quantity} of the {product}."),
         lambda r, w, a: {"items": r.randint(1, 9)}, "I added {quantity} {product} to the cart."),
    Tool("turn_light", "Switch a light on or off", (("room", "string", ""), ("state", "on|off", "")),
         _draw(room=records.choice("kitchen", "bedroom", "office", "garage", "hall", "bathroom", "living room", "cellar"),
               state=records.choice("on", "off")),
         ("Turn {state} the light in the {room}.", "Switch the {room} light {state}.", "{room} lights {state} please")),
    Tool("find_person", "Look up a person by name", (("name", "string", "Full name"),), _draw(name=records.made("full_name")),
         ("Who is {name}?", "Look up {name}.", "Find {name} in the directory.", "I need the details of {name}."),
         lambda r, w, a: {"job": pick(r, w.jobs), "city": w.city(r)}, "{name} is a {job} in {city}."),
    Tool("create_user", "Create a user account",
         (("username", "string", ""), ("age", "integer", ""), ("admin", "boolean", "Whether the user is an admin")),
         _draw(username=lambda r, w: w.word(r) + str(r.randint(1, 99)), age=records.number(10, 90), admin=records.choice(True)),
         ("Create an admin user {username}, aged {age}.", "Make an admin account for {username}, {age} years old.")),
    Tool("tag_photo", "Attach tags to a photo", (("photo_id", "string", ""), ("tags", "array", "List of tags")),
         _draw(photo_id=records.code, tags=records.several("nouns", 1, 4)),
         ("Tag photo {photo_id} with {tags}.", "Add the tags {tags} to photo {photo_id}.")),
)  # fmt: skip
_CHAT = (
    ("Hi!", "Hello! How can I help you?"), ("Thank you!", "You're welcome!"), ("Hello", "Hello! How can I help you?"),
    ("Who are you?", "I am first-light, a small language model."), ("Good morning", "Good morning! How can I help you?"),
    ("Thanks, that is all.", "You're welcome!"), ("How are you?", "I'm doing well, thank you. How can I help you?"),
)  # fmt: skip


def invent_tool(rng: random.Random, words: Words) -> Tool:
    """A function nobody has seen: its name and its parameters are any words."""
    verb = pick(rng, words.verbs) if rng.random() < 0.8 else invented(rng)
    noun = pick(rng, (pick(rng, words.nouns), pick(rng, words.words), invented(rng)))
    parameters: list[tuple[str, str, str]] = []
    draws: dict[str, records.Draw] = {}
    for _ in range(rng.randint(1, 4)):
        name = pick(rng, (pick(rng, words.nouns), pick(rng, words.words), f"{words.word(rng)}_{words.word(rng)}"))
        if name in draws or name in (verb, noun):
            continue
        kind = pick(rng, ("string", "string", "string", "integer", "integer", "number", "enum"))
        options = [pick(rng, words.words) for _ in range(3)]
        makers: dict[str, records.Draw] = {
            "string": pick(
                rng,
                (
                    records.made("word"),
                    records.made("name"),
                    _city,
                    records.code,
                    records.made("title"),
                    records.date,
                    records.made("full_name"),
                ),
            ),
            "integer": records.number(0, 10 ** rng.randint(1, 4)),
            "number": records.price,
            "enum": records.choice(*options),
        }
        description = pick(rng, ("", f"The {name.replace('_', ' ')}", f"The {name.replace('_', ' ')} of the {noun}"))
        draws[name] = makers[kind]
        parameters.append((name, "|".join(options) if kind == "enum" else kind, description))
    described = [(name, name.replace("_", " ")) for name in draws]
    styles = (
        ", ".join(f"{shown} {{{name}}}" for name, shown in described),
        " and ".join(f"{shown} {{{name}}}" for name, shown in described),
        ", ".join(f"{shown}: {{{name}}}" for name, shown in described),
        ", ".join(f"{shown} = {{{name}}}" for name, shown in described),
    )
    requests = tuple(f"{start} {noun} with {style}." for start in (f"{verb} the", f"Please {verb} a", f"{verb.capitalize()} the")
                     for style in styles)  # fmt: skip
    joined = pick(rng, ("{}_{}", "{}_{}", "{}_the_{}")).format(verb, noun)
    if rng.random() < 0.15:
        joined = f"{verb}{noun.capitalize()}"
    return Tool(joined, f"{verb.capitalize()} a {noun}", tuple(parameters), _draw(**draws), requests)


def _tool(rng: random.Random, words: Words) -> Tool:
    return pick(rng, TOOLS) if rng.random() < 0.55 else invent_tool(rng, words)


def _offer(rng: random.Random, words: Words, needed: list[Tool]) -> tuple[Json, ...]:
    """The tools in the prompt: the needed ones and up to three others, shuffled."""
    offered = {tool.name: tool for tool in needed}
    for _ in range(pick(rng, (0, 0, 1, 1, 2, 3))):
        other = _tool(rng, words)
        offered.setdefault(other.name, other)
    listed = [schema(tool) for tool in offered.values()]
    rng.shuffle(listed)
    return tuple(listed)


def _request(rng: random.Random, tool: Tool, arguments: Json) -> str:
    return pick(rng, tool.requests).format(**{name: records.spoken(value) for name, value in arguments.items()})


def _call(tool: Tool, arguments: Json) -> Json:
    return {"type": "function", "function": {"name": tool.name, "arguments": arguments}}


def single(rng: random.Random, words: Words) -> Sample:
    tool = _tool(rng, words)
    arguments = tool.draw(rng, words)
    messages: list[Message] = [
        {"role": "user", "content": _request(rng, tool, arguments)},
        {"role": "assistant", "content": "", "tool_calls": [_call(tool, arguments)]},
    ]
    return Sample(kind="tool_call", messages=messages, tools=_offer(rng, words, [tool]), check="tool_calls")


def parallel(rng: random.Random, words: Words) -> Sample:
    first = _tool(rng, words)
    second = first if rng.random() < 0.5 else _tool(rng, words)
    arguments = [tool.draw(rng, words) for tool in (first, second)]
    requests = [_request(rng, tool, given).rstrip(".") for tool, given in zip((first, second), arguments)]
    question = pick(rng, (" and ", ". Also, ", ". Then ")).join((requests[0].rstrip("?"), requests[1])) + "."
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "",
         "tool_calls": [_call(tool, given) for tool, given in zip((first, second), arguments)]},
    ]  # fmt: skip
    return Sample(
        kind="tool_parallel", messages=messages, tools=_offer(rng, words, [first, second]), check="tool_calls"
    )


def answered(rng: random.Random, words: Words) -> Sample:
    """Call, response, and the final answer that uses the response; sometimes one more call after it."""
    tool = pick(rng, tuple(t for t in TOOLS if t.result))
    arguments = tool.draw(rng, words)
    result = tool.result(rng, words, arguments) if tool.result else {}
    reply = tool.reply.format(**(arguments | result))
    messages: list[Message] = [
        {"role": "user", "content": _request(rng, tool, arguments)},
        {"role": "assistant", "content": "", "tool_calls": [_call(tool, arguments)]},
        {"role": "tool", "content": dumps(result)},
        {"role": "assistant", "content": reply},
    ]
    tools, check, kind = _offer(rng, words, [tool]), "exact", "tool_answer"
    if rng.random() < 0.35:
        again = tool.draw(rng, words)
        messages += [
            {"role": "user", "content": _request(rng, tool, again)},
            {"role": "assistant", "content": "", "tool_calls": [_call(tool, again)]},
        ]
        return Sample(kind="tool_call", messages=messages, tools=tools, check="tool_calls")
    return Sample(kind=kind, messages=messages, tools=tools, check=check)


def unneeded(rng: random.Random, words: Words) -> Sample:
    """Tools are offered, but the message needs none."""
    question, answer = pick(rng, _CHAT)
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(kind="tool_unneeded", messages=messages, tools=_offer(rng, words, [_tool(rng, words)]))


GENERATORS = (single, single, single, single, single, parallel, answered, answered, unneeded)
