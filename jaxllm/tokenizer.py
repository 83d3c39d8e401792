"""Text to token ids and back, from the tokenizer files of a Hugging Face directory.

In: text, messages or ids. Out: ids, text, or the bytes one token stands for (which makes streaming exact: text is
the UTF-8 of the tokens' bytes, however they are split). Built on `tokenizers` alone; knows nothing of JAX, requests or
sampling.

Special tokens: in a prompt given as text they are recognised, as everywhere. In a chat they are recognised only where
the template wrote them; the same characters inside a message, a tool or an argument are ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxllm import chat_template
from jaxllm.chat_template import GUARD_CLOSE, GUARD_OPEN, ChatError, Marks, Message
from jaxllm.core import JaxLLMError

Render = Callable[[str, Mapping[str, Any]], str]  # a template's source and its variables -> the text
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(JaxLLMError, ValueError):
    """The tokenizer files are missing or broken, or a text cannot be encoded; the message names what."""


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation: what the model will read, as text and as ids."""

    text: str
    token_ids: list[int]


# ---- files ----


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    """Special tokens are written as text or as {"content": text}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source. A chat_template.jinja file beats the entry in tokenizer_config.json."""
    templates: dict[str, str] = {}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        templates["default"] = entry
    elif isinstance(entry, list):
        templates |= {one["name"]: one["template"] for one in entry if isinstance(one, dict) and len(one) >= 2}
    files = [("default", directory / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))]
    for name, path in files:
        try:
            templates[name] = path.read_text("utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: not readable: {error}") from None
    return templates


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0]


# ---- the bytes of one token ----


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: byte-level vocabularies write each byte as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class TokenBytes:
    """The bytes a token stands for, read off the decoder's description in tokenizer.json.

    Byte-level and SentencePiece-like decoders are exact; for any other kind a token's text is what it adds after an
    ordinary letter.
    """

    def __init__(self, rust: tokenizers.Tokenizer, decoder: dict[str, Any] | None) -> None:
        self._rust = rust
        steps: list[dict[str, Any]] = (decoder or {}).get("decoders") or ([decoder] if decoder else [])
        self._kinds = [step.get("type") for step in steps]
        self._byte_level = self._kinds in (["ByteLevel"], ["ByteLevel", "Fuse"])
        replaces = [step for step in steps if step.get("type") == "Replace"]
        strips = [step for step in steps if step.get("type") == "Strip"]
        plain = all(set(step.get("pattern", ())) == {"String"} for step in replaces)
        plain &= all((step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in strips)
        self._pieces = plain and bool(replaces) and set(self._kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}
        self._replacements = [(step["pattern"].get("String", ""), step["content"]) for step in replaces]
        self._strips_first_space = bool(strips)
        self._anchor: list[int] = rust.encode("a", add_special_tokens=False).ids[-1:]

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds inside a text; nothing for an id that has no token."""
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            known = all(character in BYTE_OF_CHARACTER for character in token)
            return bytes(BYTE_OF_CHARACTER[character] for character in token) if known else token.encode()
        if self._pieces:
            if "ByteFallback" in self._kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                return bytes([int(token[3:5], 16)])
            for pattern, content in self._replacements:
                token = token.replace(pattern, content)
            return token.encode()
        before = self._rust.decode(self._anchor, skip_special_tokens=False)
        after = self._rust.decode([*self._anchor, token_id], skip_special_tokens=False)
        return (after[len(before) :] if after.startswith(before) else self._first(token_id)).encode()

    def leading_bytes_of(self, token_id: int) -> bytes:
        """What the token adds at the very start of a text, where some decoders drop a space."""
        if self._byte_level:
            return self.bytes_of(token_id)
        if self._pieces:
            return self.bytes_of(token_id).removeprefix(b" " if self._strips_first_space else b"")
        return self._first(token_id).encode()

    def _first(self, token_id: int) -> str:
        return self._rust.decode([token_id], skip_special_tokens=False)


# ---- the tokenizer ----


class Tokenizer:
    """One model's tokenizer: tokenizer.json (`rust` and, as JSON, `spec`) and what the files beside it say."""

    def __init__(
        self,
        rust: tokenizers.Tokenizer,
        spec: dict[str, Any],
        *,
        special: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
    ) -> None:
        rust.no_truncation()
        rust.no_padding()
        self.rust, self.spec = rust, spec
        self.special = dict(special or {})  # "eos_token" -> "</s>"
        self.templates = dict(templates or {})  # name -> source
        self.eos_token_ids, self.bos_token_id = tuple(eos_token_ids), bos_token_id
        added = rust.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = TokenBytes(rust, spec.get("decoder"))
        self._inside: dict[int, bytes] = {}
        self._compiled: dict[str, Any] = {}
        self.render_elsewhere: Render | None = None  # a server's: with limits, see template_process

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the config files beside it. TokenizerError names the bad file."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; a model directory must hold a tokenizer.json")
        spec = _read_json(path)
        try:
            rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{path}: not a tokenizer that `tokenizers` {tokenizers.__version__} reads: {error}"
            ) from None
        config = _read_json(directory / "tokenizer_config.json")
        named = {**_read_json(directory / "special_tokens_map.json"), **config}
        special = {name: text for name in SPECIAL_NAMES if (text := _token_text(named.get(name))) is not None}
        model = _read_json(directory / "config.json")
        model = {**model.get("text_config", {}), **model} if isinstance(model.get("text_config"), dict) else model
        generation = _read_json(directory / "generation_config.json")

        def ids_of(name: str) -> list[int]:
            written = _ids(generation.get(f"{name}_id")) or _ids(model.get(f"{name}_id"))
            own = rust.token_to_id(special[name]) if name in special else None
            return list(dict.fromkeys([*written, *([] if own is None else [own])]))

        return cls(
            rust=rust,
            spec=spec,
            special=special,
            templates=_read_templates(directory, config),
            eos_token_ids=tuple(ids_of("eos_token")),
            bos_token_id=next(iter(ids_of("bos_token")), None),
        )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return max(self.rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    # text -> ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text in which special tokens are recognised; `add_special_tokens` puts BOS and the like around."""
        return self._encode(self.rust, text, add_special_tokens)

    @staticmethod
    def _encode(rust: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not Unicode: lone surrogate at character {error.start}") from None
        # A batch of one: `encode` keeps the interpreter's lock, so that a long prompt would stop every other thread.
        return rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    # ids -> text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds inside a text."""
        found = self._inside.get(token_id)
        if found is None:
            found = self._inside[token_id] = self._token_bytes.bytes_of(token_id)
        return found

    def leading_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds at the very start of a text."""
        return self._token_bytes.leading_bytes_of(token_id)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD."""
        pieces: list[bytes] = []
        started = False
        for token_id in token_ids:
            if skip_special_tokens and token_id in self.special_ids:
                continue
            pieces.append(self.token_bytes(token_id) if started else self.leading_bytes(token_id))
            started = started or bool(self.token_bytes(token_id))
        return b"".join(pieces).decode("utf-8", "replace")

    # messages -> text and ids

    def _template(self, name: str | None, tools: object) -> Callable[[Mapping[str, Any]], str]:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            have = f"it has {', '.join(sorted(self.templates))}" if self.templates else "it has none"
            raise ChatError(f"this model has no chat template named {name!r} ({have}); use generate with a text prompt")
        elsewhere, source = self.render_elsewhere, self.templates[name]
        if elsewhere is not None:
            return lambda variables: elsewhere(source, variables)
        if name not in self._compiled:
            self._compiled[name] = chat_template.compile_template(source)
        return lambda variables: chat_template.render(self._compiled[name], variables)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `template` picks one of the model's named templates; `template_args` are variables that
        the template itself knows, such as enable_thinking."""
        conversation = chat_template.shape_messages(messages), chat_template.shape_tools(tools), template_args
        return self._renderer(tools, add_generation_prompt, template)(*conversation)

    def _renderer(self, tools: object, add_generation_prompt: bool, template: str | None) -> Callable[..., str]:
        fill = self._template(template, tools)
        fixed = {**self.special, "add_generation_prompt": add_generation_prompt, "strftime_now": chat_template.clock()}

        def render(messages: object, tools: object, template_args: Mapping[str, Any] | None) -> str:
            taken = (chat_template.OWN_VARIABLES | self.special.keys()) & set(template_args or ())
            if taken:
                raise ChatError(f"template_args may not set {', '.join(sorted(taken))}")
            return fill({**(template_args or {}), **fixed, "messages": messages, "tools": tools})

        return render

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The conversation's text and ids; special tokens typed into it stay plain text.

        Rendering runs a second time, on marked strings, only when one of them could be (part of) a special token.
        """
        shaped, kit = chat_template.shape_messages(messages), chat_template.shape_tools(tools)
        render = self._renderer(tools, add_generation_prompt, template)
        text = render(shaped, kit, template_args)
        marks = Marks.for_inputs(self._special_texts, (shaped, kit, template_args, text))
        marked = [marks.message(message) for message in shaped], marks.apply(kit), marks.apply(template_args)
        if marks.count == 0:
            return ChatPrompt(text, self.encode(text, add_special_tokens=False))
        traced = render(*marked)
        if marks.remove(traced) != text:
            raise ChatError(
                "a message holds a special token's text, which the model's chat template rewrites; remove it"
            )
        if marks.owned_by_template(traced) == marks.owned_by_template(text):
            return ChatPrompt(text, self.encode(text, add_special_tokens=False))
        return ChatPrompt(text, self._encode_guarded(marks.guard(traced)))

    @cached_property
    def _special_texts(self) -> list[str]:
        added = self.rust.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)

    @cached_property
    def _guarded(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A twin that knows each special token only between guard characters, and its ids -> ours."""
        spec = json.loads(json.dumps(self.spec))
        spec["post_processor"] = None
        names = {}
        for token in spec["added_tokens"]:
            plain = token["content"]
            if token["special"]:
                token["content"] = GUARD_OPEN + plain + GUARD_CLOSE
            names[token["content"]] = token["id"]
        twin = tokenizers.Tokenizer.from_str(json.dumps(spec))
        twin.no_truncation()
        twin.no_padding()
        return twin, {twin_id: names[name] for name, twin_id in twin.get_vocab().items() if name in names}

    def _encode_guarded(self, text: str) -> list[int]:
        """Ids of a text in which only special tokens between guard characters are special."""
        twin, ours = self._guarded
        return [ours.get(token_id, token_id) for token_id in self._encode(twin, text, False)]
