"""What a model's author suggests for sampling: generation_config.json.

In: a model directory. Out: the values named there, None where it names none. Keys and meanings are vLLM's: `do_sample`
does not count, a request that wants greedy says temperature 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxllm.graph.models.config import read_json
from jaxllm.graph.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()  # beside those of config.json


def read_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """Raises ConfigError where a value is of the wrong type; no file means no suggestions."""
    file = Path(directory) / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    fields = Fields(read_json(file), str(file))

    def number(key: str, *, zero: bool = True) -> float | None:
        return fields.number(key, zero=zero) if fields.has(key) else None

    return GenerationDefaults(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=fields.integer("top_k", low=0) if fields.has("top_k") else None,
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty", zero=False),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
