"""Looks at each worker once a second: is it ready, and do its tokens move? In: a Gateway's workers. Out: their health.

A server without /ready is asked /health; metrics are read under our names or vLLM's. A worker that does not answer is
lost with all it has after `stall_s`, or at once when nobody listens there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

import orjson

from serve.gateway.settings import GatewaySettings
from serve.gateway.upstream import Pool, fetch
from serve.gateway.worker import Vitals, Worker

log = logging.getLogger(__name__)
FIELDS = {
    "generated_tokens": (b"jaxllm_engine_generated_tokens_total", b"vllm:generation_tokens_total"),
    "running": (b"jaxllm_engine_running", b"vllm:num_requests_running"),
    "waiting": (b"jaxllm_engine_waiting", b"vllm:num_requests_waiting"),
    "restarts": (b"jaxllm_engine_restarts_total",),
}


class Probed(Protocol):
    settings: GatewaySettings
    pools: dict[str, Pool]

    def changed(self) -> None: ...


def read_metrics(text: bytes) -> dict[str, float]:
    """Those of FIELDS that are there."""
    values: dict[bytes, float] = {}
    for line in text.splitlines():
        if line and not line.startswith(b"#"):
            name, _, value = line.rpartition(b" ")
            try:
                values[name.partition(b"{")[0]] = float(value)
            except ValueError:
                continue
    found = {}
    for field, names in FIELDS.items():
        known = [values[name] for name in names if name in values]
        if known:
            found[field] = known[0]
    return found


async def look(pool: Pool, timeout_s: float) -> Vitals:
    """OSError or TimeoutError when it does not answer."""
    status, body = await fetch(pool, "/ready", timeout_s)
    if status == 404:
        status, body = await fetch(pool, "/health", timeout_s)
    if status != 200:
        try:
            why = str(orjson.loads(body)["status"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            why = f"/ready says {status}"
        return Vitals(False, why)
    status, body = await fetch(pool, "/metrics", timeout_s)
    found = read_metrics(body) if status == 200 else {}
    return Vitals(
        True,
        generated_tokens=found.get("generated_tokens"),
        running=found.get("running", 0.0),
        waiting=found.get("waiting", 0.0),
        restarts=found.get("restarts", 0.0),
    )


async def watch(gateway: Probed, worker: Worker) -> None:
    """As long as there is this worker."""
    silent_since: float | None = None
    while not worker.retired:
        before = worker.ready
        try:
            vitals = await look(gateway.pools[worker.name], gateway.settings.probe_timeout_s)
        except (OSError, TimeoutError) as error:
            now = time.monotonic()
            silent_since = silent_since or now
            refused = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            lost = refused or now - silent_since > gateway.settings.stall_s
            worker.unready("nobody listens there" if refused else "it does not answer", lost=lost)
        else:
            silent_since = None
            worker.looked_at(vitals, time.monotonic())
        if worker.ready != before:
            log.warning("%s is %s", worker.name, "ready" if worker.ready else f"not ready: {worker.why}")
            gateway.changed()
        await asyncio.sleep(gateway.settings.probe_s)
