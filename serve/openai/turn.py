"""One turn of a conversation: messages, tools and sampling become a request and the way to read its answer.

In: what chat completions, responses and Anthropic's messages have in common, once each has put it in OpenAI's words.
Out: a Turn, or ApiError. Runs in a worker thread: template, tokens, limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.core import Request, SamplingParams
from serve.front import Front
from serve.openai.messages import render
from serve.openai.params import check_length, truncate
from serve.openai.parsers.blocks import Block, Blocks, Change
from serve.openai.parsers.events import Text
from serve.openai.parsers.output import OutputParser
from serve.openai.tools import ToolPlan, merge_grammars
from serve.streams import Piece


class BlockReader:
    """An answer's pieces as blocks."""

    def __init__(self, parser: OutputParser | None) -> None:
        self._parser, self.blocks = parser, Blocks()

    def changes(self, piece: Piece) -> Iterator[Change]:
        if self._parser is not None:
            yield from self.blocks.feed(self._parser.feed(piece.text))
            if piece.finish_reason is not None:
                yield from self.blocks.feed(self._parser.finish())
        elif piece.text:
            yield from self.blocks.feed([Text(piece.text)])

    def whole(self, piece: Piece) -> list[Block]:
        """The blocks of an answer that came at once."""
        for _ in (*self.changes(piece), *self.blocks.finish()):
            pass
        return self.blocks.made


@dataclass(frozen=True)
class Turn:
    request: Request
    plan: ToolPlan
    prompt: str
    tokenizer: Any

    @property
    def parses(self) -> bool:
        return self.plan.parses

    def parser(self) -> OutputParser:
        return self.plan.parser(self.prompt)

    def reader(self) -> BlockReader:
        return BlockReader(self.parser() if self.parses else None)

    def reasoning_tokens(self, token_ids: Sequence[int], blocks: Sequence[Block]) -> int:
        """How many of an answer's tokens are reasoning, without its marks; by its text where marks are no tokens."""
        texts = [block.text for block in blocks if block.kind == "reasoning"]
        if not texts:
            return 0
        marks = [self.tokenizer.rust.token_to_id(mark) for mark in self.plan.reasoning_marks]
        if None in marks:
            return sum(len(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        ids = list(token_ids)
        end = ids.index(marks[1]) if marks[1] in ids else len(ids)
        return end - ids[:end].count(marks[0])


def take_turn(
    front: Front,
    messages: Sequence[dict[str, Any]],
    plan: ToolPlan,
    params: SamplingParams,
    *,
    request_id: str,
    cache_salt: str,
    limit_name: str = "max_tokens",
    variables: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    truncate_to: int | None = None,
    priority: int = 0,
) -> Turn:
    """`limit_name`: what the protocol calls the most tokens of an answer."""
    params = params.replace(
        grammar=merge_grammars(params.grammar, plan),
        skip_special_tokens=params.skip_special_tokens and not plan.keeps_special_tokens,
    )
    prompt = render(
        front.tokenizer,
        messages,
        tools=plan.offered,
        add_generation_prompt=add_generation_prompt,
        continue_final=continue_final,
        variables=variables,
    )
    params = params.replace(grammar=plan.past_thinking(params.grammar, prompt.text))
    ids = truncate(prompt.token_ids, truncate_to, front.intake.max_model_len)
    check_length(len(ids), params.max_tokens, front.intake.max_model_len, limit_name)
    request = front.make_request(ids, params=params, request_id=request_id, priority=priority, cache_salt=cache_salt)
    return Turn(request, plan, prompt.text, front.tokenizer)
