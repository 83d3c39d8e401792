"""A model's tokenizer for the front, checked before anything slow starts; what is half broken is said and left out.

In: a model directory. Out: a Tokenizer, None when there is none, and warnings; ConfigError when it cannot be used. A
template that cannot render a greeting is left out: then the model takes prompts, and no chats. No JAX.
"""

from __future__ import annotations

from pathlib import Path

from jaxllm.config import ConfigError
from jaxllm.graph.models.config import ModelConfig
from jaxllm.template_process import TemplateProcesses
from jaxllm.tokenizer import ChatError, Tokenizer, TokenizerError

GREETING = [{"role": "user", "content": "Hello!"}]


def open_tokenizer(directory: Path) -> tuple[Tokenizer | None, list[str]]:
    if not (directory / "tokenizer.json").exists():
        return None, [f"{directory} has no tokenizer.json: token ids only, and no chats"]
    try:
        tokenizer = Tokenizer.from_directory(directory)
    except TokenizerError as error:
        raise ConfigError(str(error)) from None
    model = ModelConfig.from_directory(directory)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{directory / 'tokenizer.json'}: token ids up to {tokenizer.vocab_size - 1}, but config.json has "
            f"vocab_size = {model.vocab_size}: they must be below it"
        )
    warnings = []
    if not tokenizer.eos_token_ids and not model.eos_token_ids:
        warnings.append(f"{directory} names no end-of-sequence token: every answer goes on until max_tokens")
    return tokenizer, warnings + drop_broken_templates(tokenizer)


def drop_broken_templates(tokenizer: Tokenizer) -> list[str]:
    """Rendered in a process with limits, as requests will be."""
    processes, warnings = TemplateProcesses(processes=1), []
    tokenizer.render_elsewhere = processes
    try:
        for name in list(tokenizer.templates):
            try:
                tokenizer.apply_chat_template(GREETING, template=name)
            except ChatError as error:
                del tokenizer.templates[name]
                warnings.append(f"chat template {name!r} left out: {error}")
    finally:
        processes.close()
        tokenizer.render_elsewhere = None
    if not tokenizer.templates:
        warnings.append("no usable chat template: /v1/completions works, chats are refused")
    return warnings
