"""Routes for operators: health, readiness, metrics, facts, and the admin operations that the engine has."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

from serve.front import Front
from serve.middleware import Call
from serve.openai.protocol import Body, parse
from serve.responses import Answer, as_json


async def health(front: Front, call: Call) -> Answer:
    """Live: the process answers and the engine moves, or is starting."""
    trouble = front.client.health.trouble(front.settings.unhealthy_s)
    return as_json({"status": "ok" if trouble is None else trouble}, 200 if trouble is None else 503)


async def ready(front: Front, call: Call) -> Answer:
    why = front.client.health.unready(front.settings.unhealthy_s)
    return as_json({"status": "ready" if why is None else why}, 200 if why is None else 503)


async def metrics(front: Front, call: Call) -> Answer:
    return Answer(front.metrics.text(), content_type="text/plain; version=1.0.0; charset=utf-8")


def package_version() -> str:
    try:
        return importlib.metadata.version("jaxllm")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


async def version(front: Front, call: Call) -> Answer:
    return as_json({"version": package_version()})


async def server_info(front: Front, call: Call) -> Answer:
    known, settings = front.client.health, front.settings
    facts = {} if known.ready is None else known.ready.facts
    now = await front.client.control("check") if known.up else known.beat.stats
    stats = {name: value if math.isfinite(value) else None for name, value in now.items()}
    return as_json(
        {
            "version": package_version(),
            "models": list(settings.model_names),
            "max_model_len": front.intake.max_model_len,
            "max_num_seqs": 0 if known.ready is None else known.ready.max_num_seqs,
            "capacity_tokens": 0 if known.ready is None else known.ready.capacity_tokens,
            "engine": {"up": known.up, "restarts": known.restarts, "paused": known.beat.paused, "stats": stats},
            "start": facts,
            "limits": {
                "max_queue": settings.max_queue,
                "max_queue_tokens": settings.max_queue_tokens,
                "max_body_bytes": settings.max_body_bytes,
            },
            "in_flight": {"slots": front.admission.slots, "streams": len(front.client.streams)},
        }
    )


def operation(name: str, body: type[Body] = Body, timeout_s: float = 30.0) -> Any:
    """A route that is one of the engine's operations."""

    async def run(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
        arguments = parse(body, raw).model_dump()
        return as_json(await front.client.control(name, timeout_s, **arguments))

    return run
