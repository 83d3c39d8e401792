"""Measures a server of OpenAI's API under load: requests at random times or as fast as they are answered.

In: a Load (what to send, when) and a Target. Out: a report; metrics are vLLM's: TTFT from sending to the first event
with a choice, also one whose text is empty (a chat's opening event, of a role alone, is none); ITL the gaps between
such events, e2e up to the last of them, TPOT (e2e - TTFT) / (output tokens - 1), output tokens as the server counts
them, throughputs over the whole run, percentiles as numpy's. Goodput counts the requests that met every limit. Each
request has a connection of its own, which is part of its TTFT. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.http_client import ClientError, Target, events, fetch, message_of, open_stream, parsed, whole

WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
)
# ShareGPT's lengths: medians and spreads of a log-normal, cut as vLLM cuts its sample.
SHAREGPT_INPUT, SHAREGPT_OUTPUT = (90.0, 1.3, 4, 1024), (130.0, 1.1, 4, 1024)


@dataclass(frozen=True, kw_only=True)
class Load:
    num_prompts: int = 100
    request_rate: float = math.inf  # a second; inf = all at once, or as max_concurrency lets them
    burstiness: float = 1.0  # 1 = Poisson; below, arrivals come in bursts; above, they are more even
    max_concurrency: int | None = None  # closed loop: so many are under way at a time
    dataset: str = "random"  # or sharegpt: lengths like ShareGPT's
    input_len: int = 256
    output_len: int = 128
    range_ratio: float = 0.0  # random: lengths vary by so much of themselves
    chat: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 6 * 3600  # of one request
    seed: int = 0


@dataclass
class Outcome:
    """One request."""

    prompt_tokens: int
    sent_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - (self.ttft_s or 0.0)) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def lengths(load: Load, rng: random.Random) -> tuple[int, int]:
    """(input, output) tokens of one request."""
    if load.dataset == "sharegpt":
        sizes = (SHAREGPT_INPUT, SHAREGPT_OUTPUT)
        one, other = (
            int(min(max(rng.lognormvariate(math.log(median), spread), low), high))
            for median, spread, low, high in sizes
        )
        return one, other
    one, other = (
        max(1, round(size * rng.uniform(1 - load.range_ratio, 1 + load.range_ratio)))
        for size in (load.input_len, load.output_len)
    )
    return one, other


def bodies(load: Load, model: str) -> list[tuple[int, dict[str, Any]]]:
    """(tokens asked for, body) of each request; a word is about a token, and the server counts them itself."""
    rng, made = random.Random(load.seed), []
    for _ in range(load.num_prompts):
        size, output = lengths(load, rng)
        text = " ".join(rng.choices(WORDS, k=size))
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if load.chat else {"prompt": text}
        asked |= {"model": model, "max_tokens": output, "temperature": load.temperature, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        if load.ignore_eos:
            asked["ignore_eos"] = True
        made.append((size, asked))
    return made


async def arrivals(load: Load) -> AsyncGenerator[int]:
    """The number of each request, at its time."""
    rng, began, at = random.Random(load.seed + 1), time.perf_counter(), 0.0
    for number in range(load.num_prompts):
        yield number
        if math.isfinite(load.request_rate):
            at += rng.gammavariate(load.burstiness, 1 / (load.request_rate * load.burstiness))
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))


async def send(target: Target, path: str, prompt_tokens: int, body: dict[str, Any], timeout_s: float) -> Outcome:
    """Never raises for what a server does: that is the outcome's error."""
    found = Outcome(prompt_tokens, sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            status, parts = await open_stream(target, path, body)
            if status != 200:
                found.error = f"{status}: {message_of(parsed(await whole(parts)))}"
            else:
                await _listen(found, parts)
    except TimeoutError:
        found.error = f"no end within {timeout_s:g} s"
    except ClientError as error:
        found.error = str(error)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found.error = f"no event of OpenAI's API: {type(error).__name__}: {error}"[:200]
    return found


def _is_role(choice: dict[str, Any]) -> bool:
    """The event that opens a chat's answer, before any token."""
    said = {name for name, value in (choice.get("delta") or {}).items() if value}
    return said == {"role"} and not choice.get("finish_reason")


async def _listen(found: Outcome, parts: AsyncGenerator[bytes]) -> None:
    last, heard, counted, ended = found.sent_s, 0, None, False
    async with contextlib.aclosing(events(parts)) as stream:
        async for data in stream:
            if data == "[DONE]":
                ended = True
                break
            event = json.loads(data)
            if "error" in event:
                found.error = message_of(event)
                return
            now = time.perf_counter()
            counted = event.get("usage") or counted
            choices = event.get("choices") or ()
            if not choices or _is_role(choices[0]):
                continue
            heard += 1
            ended = ended or choices[0].get("finish_reason") is not None
            if found.ttft_s is None:
                found.ttft_s = now - found.sent_s
            else:
                found.gaps_s.append(now - last)
            last = now
    found.e2e_s = last - found.sent_s
    found.output_tokens = int(counted["completion_tokens"]) if counted else heard
    found.prompt_tokens = int(counted["prompt_tokens"]) if counted else found.prompt_tokens
    if found.ttft_s is None or not ended:
        found.error = "no token came" if found.ttft_s is None else "the stream ended before its end was said"


async def run(load: Load, target: Target, model: str, tell: Callable[[int], None]) -> tuple[list[Outcome], float]:
    """(outcomes, seconds). `tell` hears how many are done."""
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    todo, done = bodies(load, model), 0
    places = asyncio.Semaphore(load.max_concurrency or load.num_prompts)

    async def one(number: int) -> Outcome:
        nonlocal done
        async with places:
            outcome = await send(target, path, *todo[number], load.timeout_s)
        done += 1
        tell(done)
        return outcome

    began = time.perf_counter()
    tasks = [asyncio.create_task(one(number)) async for number in arrivals(load)]
    outcomes = await asyncio.gather(*tasks)
    return outcomes, time.perf_counter() - began


async def first_model(target: Target) -> str:
    """What the server calls its model."""
    status, answer = await fetch(target, "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ClientError(f"{target.url}/v1/models: {status} {message_of(answer)}") from None


def goodput_limits(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:500` and the like, in milliseconds, as vLLM writes them."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not limits[name] > 0:
            raise ClientError(f"goodput {pair!r}: must be ttft:MS, tpot:MS or e2el:MS")
    return limits


def report(
    load: Load, outcomes: Sequence[Outcome], seconds: float, limits: dict[str, float], percentiles: Sequence[float]
) -> dict[str, Any]:
    """vLLM's names for vLLM's numbers."""
    good = [one for one in outcomes if one.error is None]
    outputs = sum(one.output_tokens for one in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": sum(one.prompt_tokens for one in good),
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": sum(one.prompt_tokens + one.output_tokens for one in good) / seconds,
        "request_rate": load.request_rate if math.isfinite(load.request_rate) else "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "errors": sorted({one.error for one in outcomes if one.error is not None})[:10],
    }
    series = {
        "ttft": [(one.ttft_s or 0.0) * 1e3 for one in good],
        "tpot": [one.tpot_s * 1e3 for one in good if one.output_tokens > 1],
        "itl": [gap * 1e3 for one in good for gap in one.gaps_s],
        "e2el": [one.e2e_s * 1e3 for one in good],
    }
    for name, values in series.items():
        data = np.asarray(values or [0.0])
        found |= {f"mean_{name}_ms": float(data.mean()), f"median_{name}_ms": float(np.median(data))}
        found[f"std_{name}_ms"] = float(data.std())
        found |= {f"p{p:g}_{name}_ms": float(np.percentile(data, p)) for p in percentiles}
    if limits:
        felt = [{"ttft": one.ttft_s or 0.0, "tpot": one.tpot_s, "e2el": one.e2e_s} for one in good]
        met = sum(all(one[name] * 1e3 <= most for name, most in limits.items()) for one in felt)
        found |= {"request_goodput": met / seconds, "goodput_limits_ms": limits}
    return found
