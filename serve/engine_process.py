"""The server's engine process: any role, the decode side with its prefill workers included.

Started by links.ProcessLink, never by people; see jaxllm.engine.process.main.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.engine.process.main import AnyEngine, build_engine, life


def start(config: EngineConfig) -> tuple[AnyEngine, Any]:
    from jaxllm.engine.disagg.startup import start_role
    from serve.disagg.peers import start_decoding

    return start_decoding(config) if config.disaggregation.role == "decode" else start_role(config)


def build(settings: dict[str, Any]) -> tuple[AnyEngine, dict[str, Any]]:
    return build_engine(settings, start)


if __name__ == "__main__":
    life(build)
