"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from serve.front import Front
from serve.middleware import Call
from serve.responses import Answer, as_json


def _card(front: Front, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": front.created_s,
        "owned_by": "jaxllm",
        "root": front.model_name,
        "parent": None,
        "max_model_len": front.intake.max_model_len,
    }


async def listing(front: Front, call: Call) -> Answer:
    return as_json({"object": "list", "data": [_card(front, name) for name in front.settings.model_names]})


async def one(front: Front, call: Call) -> Answer:
    return as_json(_card(front, front.check_model((call.path_params or {}).get("model", ""))))
