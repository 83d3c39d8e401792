"""A whole server process over the engine of byte_model, on a loopback port; prints its address when it is ready."""

import argparse
import json
import logging
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from helpers.byte_model import byte_tokenizer  # noqa: E402

from jaxllm.config import ConfigError  # noqa: E402
from jaxllm.engine.process.links import ProcessLink  # noqa: E402
from serve.client import EngineClient, Supervision  # noqa: E402
from serve.front import Front  # noqa: E402
from serve.metrics import FrontMetrics  # noqa: E402
from serve.run import bind, serve  # noqa: E402
from serve.settings import FrontSettings  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--drain", type=float, default=10.0)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--engine-error", action="store_true")
    parser.add_argument("--engine", default='{"step_s": 0.01}')
    given = parser.parse_args()
    logging.basicConfig(level="ERROR", stream=sys.stderr)
    settings = FrontSettings(port=given.port, drain_timeout_s=given.drain)
    try:
        bound = bind(settings)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    engine = {"start_error": "the weights do not fit"} if given.engine_error else json.loads(given.engine)
    command = [sys.executable, str(Path(__file__).with_name("engine_main.py"))]
    client = EngineClient(
        ProcessLink(command, json.dumps({"engine": engine}).encode()),
        byte_tokenizer(),
        Supervision(max_restarts=given.restarts),
    )
    front = Front(settings, client, FrontMetrics(), byte_tokenizer())
    sys.exit(serve(front, bound, lambda url: print("ready at", url, flush=True)))
