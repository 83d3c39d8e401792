"""LLM: the model as a Python object. Prompts or conversations go in, RequestOutputs come out; whole or streamed.

    llm = LLM("path/to/model")                         # or LLM() for the bundled one
    llm.generate(["Once upon", "def f("], SamplingParams(max_tokens=32))[0].outputs[0].text
    for delta in llm.stream("Once upon"): print(delta.outputs[0].text, end="")

Bad input: one prompt given alone raises RequestError. Of a list of prompts the bad ones come back with `error` set and
finish_reason "error", in their places, and the others finish. One thread owns an LLM; several streams and generate
calls may be interleaved in it, each step serves them all. Knows nothing of batching, pages or devices.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.config import ConfigError, EngineConfig, load, model_directory
from jaxllm.core import (
    CompletionOutput,
    FinishReason,
    JaxLLMError,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenOutput,
)
from jaxllm.core import Sequence as TokenSequence
from jaxllm.engine.output import OutputProcessor
from jaxllm.engine.process.choice import in_processes
from jaxllm.tokenizer import ChatError, ChatPrompt, Tokenizer, TokenizerError

if TYPE_CHECKING:
    from jaxllm.engine.process.remote import RemoteReport
    from jaxllm.engine.startup import StartReport

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}
Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None
FROZEN_BY_PYTHON = 1_000  # objects, at most: 375 in 3.12


class GenerationError(JaxLLMError):
    """A request that was accepted failed on the way. `output` holds what it had."""

    def __init__(self, output: RequestOutput) -> None:
        self.output = output
        super().__init__(f"request {output.request_id}: {output.error}")


class EngineLike(Protocol):
    """What LLM needs of an engine; tests give it one without a device."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def default_params(self) -> SamplingParams: ...

    def make_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request: ...

    def add(self, request: Request) -> list[TokenSequence]: ...

    def abort(self, request_id: str) -> None: ...

    def finish(self, sequence: TokenSequence, reason: FinishReason, stop_reason: str | None = None) -> None: ...

    def step(self) -> list[TokenOutput]: ...

    @property
    def has_work(self) -> bool: ...


@dataclass(frozen=True)
class _Job:
    """One prompt on its way to being a request. `read` gives its text, if it has one, and what the engine takes."""

    read: Callable[[], tuple[str | None, str | Sequence[int]]]
    params: SamplingParams | None
    cache_salt: str = ""


def _read_prompt(prompt: Prompt) -> tuple[str | None, str | Sequence[int]]:
    if isinstance(prompt, Mapping):
        given = [key for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None]
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or not given:
            raise RequestError("prompt", dict(prompt), "a prompt object must hold `prompt` or `prompt_token_ids`")
        text, value = prompt.get("prompt"), prompt[given[0]]
    else:
        text, value = (prompt if isinstance(prompt, str) else None), prompt
    if isinstance(value, str):
        return value, value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RequestError("prompt", value, "must be a text or a list of token ids")
    return text, value


def _salt(prompt: Prompt, default: str) -> str:
    return str(prompt.get("cache_salt", default)) if isinstance(prompt, Mapping) else default


def _alone(prompts: Prompt | Sequence[Prompt]) -> bool:
    """One prompt rather than a list of them: a text, an object, or token ids."""
    if not isinstance(prompts, str | Mapping | Sequence) or isinstance(prompts, bytes):
        raise RequestError("prompts", prompts, "must be a text, token ids, a prompt object, or a list of these")
    return isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _spread(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError("params", f"{len(params)} entries", f"must be one, or one for each of the {count} prompts")
    return list(params)


class LLM:
    """One loaded model. `overrides` are settings of jaxllm.config, under our names or vLLM's."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: EngineConfig | str | os.PathLike[str] | None = None,
        engine: EngineLike | None = None,
        progress: Callable[[str, float], None] | None = None,
        **overrides: Any,
    ) -> None:
        """`config` is a ready EngineConfig or the path of a TOML file; `engine` replaces starting one."""
        self.report: StartReport | RemoteReport | None = None
        if engine is None:
            engine = self._start(model, config, progress, overrides)
        elif model is not None or config is not None or overrides:
            raise ConfigError("an LLM takes either an engine or the settings to start one")
        self.engine: EngineLike = engine
        self._outputs = OutputProcessor(engine.tokenizer)
        self._boxes: dict[str, deque[RequestOutput]] = {}  # request id -> where its updates are awaited
        self._process = os.getpid()

    def _start(
        self,
        model: str | os.PathLike[str] | None,
        config: EngineConfig | str | os.PathLike[str] | None,
        progress: Callable[[str, float], None] | None,
        overrides: dict[str, Any],
    ) -> EngineLike:
        path = None if model is None else os.fspath(model)
        if isinstance(config, EngineConfig):
            if path is not None or overrides:
                raise ConfigError("a ready EngineConfig leaves no room for further settings")
            settings = config
        else:
            settings = load(config, model=path, **overrides)
        model_directory(settings.model.path)  # a wrong path is told at once, not after the seconds that JAX takes
        if in_processes(settings):
            from jaxllm.engine.process.replicas import remote_engine

            replicas = remote_engine(settings, progress)
            self.report = replicas.report
            return replicas
        from jaxllm.engine.disagg.startup import start_role

        engine, self.report = start_role(settings, progress)
        return engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets that brings no params: the model's own suggestions."""
        return self.engine.default_params

    # ---- whole results ----

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Complete one prompt or many, in the order given. `params`: one for all, or one each."""
        alone = _alone(prompts)
        many: Sequence[Prompt] = [prompts] if alone else prompts  # type: ignore[list-item, assignment]
        spread = _spread(params, len(many))
        jobs = [
            _Job(lambda prompt=prompt: _read_prompt(prompt), one, _salt(prompt, cache_salt))
            for prompt, one in zip(many, spread)
        ]
        return self._run(jobs, alone, use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answer one conversation or many. Special tokens typed into messages are plain text."""
        alone = len(messages) == 0 or isinstance(messages[0], Mapping)
        many: Sequence[Messages] = [messages] if alone else messages  # type: ignore[list-item, assignment]
        how = (tools, add_generation_prompt, template, template_args)
        spread = _spread(params, len(many))
        jobs = [_Job(lambda one=one: self._read_chat(one, *how), own, cache_salt) for one, own in zip(many, spread)]
        return self._run(jobs, alone, use_tqdm, priority)

    def _read_chat(self, messages: Messages, *how: Any) -> tuple[str, Sequence[int]]:
        if self.tokenizer is None:
            raise RequestError("messages", messages, "the model has no tokenizer; give token ids to generate")
        try:
            prompt: ChatPrompt = self.tokenizer.encode_chat(messages, *how)
        except (ChatError, TokenizerError) as error:
            raise RequestError("messages", messages, str(error)) from None
        return prompt.text, prompt.token_ids

    def _run(self, jobs: list[_Job], alone: bool, show_progress: bool, priority: int) -> list[RequestOutput]:
        box: deque[RequestOutput] = deque()
        results: dict[int, RequestOutput] = {}
        pending: dict[str, int] = {}
        try:
            for place, job in enumerate(jobs):
                try:
                    pending[self._submit(job, box, stream=False, priority=priority).id] = place
                except RequestError as error:
                    if alone:
                        raise
                    results[place] = _refused(place, error)
            with _progress(len(jobs), show_progress) as advance, _old_objects_at_rest():
                while pending:
                    if not box:
                        self._turn()
                    while box:
                        output = box.popleft()
                        results[pending.pop(output.request_id)] = output
                        advance(sum(len(one.token_ids) for one in output.outputs))
        finally:
            for request_id in pending:
                self.abort(request_id)
        if alone and results[0].error is not None:
            raise GenerationError(results[0])
        return [results[place] for place in range(len(jobs))]

    # ---- streams ----

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generator[RequestOutput]:
        """Deltas: each RequestOutput holds only what is new; the last one is `finished`, with `error` if it failed.

        A bad request raises here. The request runs from the first delta that is asked for; closing the generator
        aborts it.
        """
        job = _Job(lambda: _read_prompt(prompt), params, _salt(prompt, cache_salt))
        return self._stream(*self._request(job, request_id, priority))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generator[RequestOutput]:
        """The deltas of an answer; as `stream`."""
        how = (tools, add_generation_prompt, template, template_args)
        job = _Job(lambda: self._read_chat(messages, *how), params, cache_salt)
        return self._stream(*self._request(job, request_id, priority))

    def _stream(self, request: Request, text: str | None) -> Generator[RequestOutput]:
        box: deque[RequestOutput] = deque()
        self._add(request, text, box, stream=True)
        try:
            while True:
                while box:
                    update = box.popleft()
                    yield update
                    if update.finished:
                        return
                self._turn()
        finally:
            if self._boxes.get(request.id) is box:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Take a request back. Whoever awaits it gets its last update, with finish_reason "abort"."""
        self.engine.abort(request_id)
        update = self._outputs.abort(request_id)
        if update is not None:
            self._boxes.pop(request_id).append(update)

    # ---- the loop ----

    def _request(self, job: _Job, request_id: str | None, priority: int) -> tuple[Request, str | None]:
        if os.getpid() != self._process:
            raise JaxLLMError(
                f"this LLM belongs to process {self._process}, and a fork of it cannot use the device: "
                "make an LLM in the process that uses it (start it with multiprocessing's spawn)"
            )
        text, prompt = job.read()
        try:
            request = self.engine.make_request(
                prompt, job.params, request_id=request_id, priority=priority, cache_salt=job.cache_salt
            )
        except TokenizerError as error:
            raise RequestError("prompt", prompt, str(error)) from None
        return request, text

    def _submit(self, job: _Job, box: deque[RequestOutput], *, stream: bool, priority: int) -> Request:
        request, text = self._request(job, None, priority)
        self._add(request, text, box, stream=stream)
        return request

    def _add(self, request: Request, text: str | None, box: deque[RequestOutput], *, stream: bool) -> None:
        if request.id in self._boxes:
            raise RequestError("request_id", request.id, "already in use by a running request")
        self.engine.add(request)
        self._outputs.add(request, prompt=text, stream=stream)
        self._boxes[request.id] = box

    def _turn(self) -> None:
        """One step of the engine for everybody who waits; updates go to whoever awaits them."""
        if not self.engine.has_work:
            raise RuntimeError(f"the engine is idle but requests are unfinished: {', '.join(self._boxes)}")
        processed = self._outputs.process(self.engine.step())
        for ended in processed.ended:
            self.engine.finish(ended.sequence, ended.reason, ended.stop_reason)
        for update in processed.updates:
            box = self._boxes.pop(update.request_id) if update.finished else self._boxes[update.request_id]
            box.append(update)


def _refused(place: int, error: RequestError) -> RequestOutput:
    """A request that never became one, in its place among the results."""
    return RequestOutput(
        request_id=f"refused-{place}",
        prompt=None,
        prompt_token_ids=[],
        outputs=[CompletionOutput(index=0, finish_reason=FinishReason.ERROR)],
        finished=True,
        error=str(error),
    )


@contextmanager
def _old_objects_at_rest() -> Generator[None]:
    """Meanwhile the collector looks at new objects only: to look at all that a start leaves takes tenths of a
    second, in the middle of a step. What somebody else froze stays so."""
    if gc.get_freeze_count() > FROZEN_BY_PYTHON:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _progress(total: int, wanted: bool) -> Generator[Callable[[int], None]]:
    """A bar of finished requests and tokens per second; only on a terminal."""
    if not wanted or total == 0 or not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: Iterable[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("generating", total=total, rate="")
        tokens = 0

        def advance(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=1, rate=f"{tokens / elapsed:.0f} tok/s" if elapsed > 0 else "")

        yield advance
