"""A follower's process: its place and the settings in on standard input, the leader's calls repeated until it ends.

Started by supervise.Supervisor, never by people. One byte a second on standard output says that it is not stopped.
Exit codes: 1 it cannot start, 72 its group is gone. It ends when standard input closes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec

from jaxllm.config import load
from jaxllm.engine.group import GroupPlace
from jaxllm.engine.process.main import CANNOT_START, follow_parent, read_config

SIGN_S = 1.0


def show_life() -> None:
    def body() -> None:
        while True:
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), b".")
            time.sleep(SIGN_S)

    threading.Thread(target=body, name="life", daemon=True).start()


def run(settings: dict[str, Any]) -> None:
    from jaxllm.engine.group_start import follow

    config = load(settings.get("config_file"), **settings.get("overrides", {}))
    follow(msgspec.convert(settings["group"], GroupPlace), config)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole group, they are the launcher's
        signal.signal(number, signal.SIG_IGN)
    settings = read_config()
    rank = settings["group"]["rank"]
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    follow_parent()
    show_life()
    try:
        run(settings)
    except Exception as error:
        logging.getLogger(__name__).error("it cannot go on: %s", " ".join(str(error).split()))
    sys.stderr.flush()
    os._exit(CANNOT_START)


if __name__ == "__main__":
    main()
