"""The engine process of tests: jaxllm.engine.process.main around the engine of byte_model."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from helpers.byte_model import build_engine  # noqa: E402

from jaxllm.engine.process.main import run  # noqa: E402

if __name__ == "__main__":
    code = run(lambda settings: build_engine(**settings["engine"]))
    sys.stderr.flush()
    os._exit(code)
