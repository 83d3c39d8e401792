"""GrammarSpecs as one Lark text in llguidance's dialect.

In: a checked GrammarSpec, and which texts are single special tokens. Out: the text to compile. Literals that hold a
special token's text become that token, as the model writes it so. Knows nothing of matchers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance

from jaxllm.core import GrammarKind, GrammarSpec

ANY_TEXT = r"/(.|\n)*/"
# Whitespace between JSON tokens as people write it: a space or two, or a new line and its indentation. What JSON allows
# beyond that lets a model spend its whole budget on blanks.
JSON_SPACE = r"(\x20{1,2}|\x0A[\x20\x09]{0,24})"


def to_grammar(spec: GrammarSpec, special: Mapping[str, int]) -> str:
    """What llguidance compiles: JSON text of one or several named Lark grammars."""
    writer = _Writer(special)
    if spec.kind is GrammarKind.LARK:
        return json.dumps({"grammars": [{"lark_grammar": spec.source}]})
    if spec.kind is GrammarKind.REGEX:
        start = writer.regex(spec.source)
    elif spec.kind is GrammarKind.JSON_SCHEMA:
        start = writer.schema(json.loads(spec.source), spec.lenient)
    else:
        start = writer.form(json.loads(spec.source))
    main = "\n".join([f"start: {start}", *writer.rules]) + "\n"
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": main}, *writer.others]})


class _Writer:
    """Collects rules; every method returns an expression that stands for its argument."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self.others: list[dict[str, str]] = []  # whole grammars, named by the main one
        self._special = special
        texts = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None

    def literal(self, text: str) -> str:
        pieces = self._split.split(text) if self._split else [text]
        named = [f"<[{self._special[p]}]>" if p in self._special else json.dumps(p) for p in pieces if p]
        return " ".join(named) or '""'

    def regex(self, pattern: str) -> str:
        return f"/{llguidance.regex_to_lark(pattern, use_ascii='')}/"

    def schema(self, schema: Any, lenient: bool = False) -> str:
        options = {"whitespace_pattern": JSON_SPACE, "lenient": lenient}
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return self._rule("%json " + json.dumps({**schema, "x-guidance": options}))

    def form(self, form: Mapping[str, Any]) -> str:
        kind = form["type"]
        if kind == "const_string":
            return self.literal(form["value"])
        if kind == "json_schema":
            return self.schema(form["json_schema"], bool(form.get("lenient")))
        if kind == "regex":
            return self.regex(form["pattern"])
        if kind == "grammar":
            name = f"inner_{len(self.others)}"
            self.others.append({"name": name, "lark_grammar": form["grammar"]})
            return f"@{name}"
        if kind == "any_text":
            return ANY_TEXT
        if kind == "sequence":
            return self._rule(" ".join(self.form(part) for part in form["elements"]))
        if kind == "or":
            return self._rule(" | ".join(self.form(part) for part in form["elements"]))
        if kind == "tag":
            return self._rule(f"{self.literal(form['begin'])} {self._inside(form)}")
        if kind == "triggered_tags":
            return self._triggered(form)
        return self._separated(form)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _text_until(self, end: str) -> str:
        """Free text and then `end`, where it first occurs."""
        if end in self._special:
            return f"{ANY_TEXT} {self.literal(end)}"
        return self._rule(f"{ANY_TEXT} {json.dumps(end)}", "[lazy]")

    def _inside(self, tag: Mapping[str, Any]) -> str:
        """A tag's content and end."""
        if tag["content"]["type"] == "any_text" and tag["end"]:
            return self._text_until(tag["end"])
        return f"{self.form(tag['content'])} {self.literal(tag['end'])}"

    def _triggered(self, form: Mapping[str, Any]) -> str:
        by_trigger: dict[str, list[str]] = {}
        for tag in form["tags"]:
            trigger = max((t for t in form["triggers"] if tag["begin"].startswith(t)), key=len)
            rest = self.literal(tag["begin"][len(trigger) :])
            by_trigger.setdefault(trigger, []).append(f"{rest} {self._inside(tag)}")
        calls = [f"{self._text_until(trigger)} ({' | '.join(tags)})" for trigger, tags in by_trigger.items()]
        one = self._rule(" | ".join(calls))
        text = self._rule(ANY_TEXT)
        if form.get("stop_after_first"):
            return one if form.get("at_least_one") else self._rule(f"{one} | {text}")
        return self._rule(f"{one}{'+' if form.get('at_least_one') else '*'} {text}")

    def _separated(self, form: Mapping[str, Any]) -> str:
        one = self._rule(" | ".join(self.form(tag) for tag in form["tags"]))
        more = "" if form.get("stop_after_first") else f" ({self.literal(form['separator'])} {one})*"
        body = f"{one}{more}"
        return self._rule(body if form.get("at_least_one") else f'{body} | ""')
