"""What a model's author suggests for sampling: generation_config.json.

In: a model directory. Out: SamplingParams with the suggested values, plain defaults where there are none, and the
end-of-sequence tokens named there. Keys and meanings are vLLM's: `do_sample` does not count, a request that wants
greedy says temperature 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.core import RequestError, SamplingParams
from jaxllm.graph.models.config import read_json
from jaxllm.graph.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()  # beside those of config.json


def read_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """Raises ConfigError where a value cannot be; no file means no suggestions."""
    file = Path(directory) / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    fields = Fields(read_json(file), str(file))
    plain = SamplingParams()
    suggested = {
        "temperature": fields.number("temperature", plain.temperature, zero=True),
        "top_p": fields.number("top_p", plain.top_p, zero=True),
        "top_k": fields.integer("top_k", plain.top_k, low=-1),
        "min_p": fields.number("min_p", plain.min_p, zero=True),
        "repetition_penalty": fields.number("repetition_penalty", plain.repetition_penalty),
    }
    try:
        params = plain.replace(**suggested)
    except RequestError as error:
        raise fields.error(error.field, error.value, error.allowed) from error
    return GenerationDefaults(params=params, eos_token_ids=fields.token_ids("eos_token_id"))
