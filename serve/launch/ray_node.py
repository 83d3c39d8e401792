"""What a Ray actor holds on its node: one jaxllm process, started, watched and ended.

In: the command's arguments, the recipe's text, the group's token. Out: the node's address, the process's exit code.
Imports no Ray: the launcher makes an actor of it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from serve.launch.tied import tied

STOP_S = 10.0


class NodeProcess:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="jaxllm-")

    def address(self) -> tuple[str, int]:
        """An address of this node that others reach, and a port that is free there now."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: asks the kernel which address would be used
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def start(self, arguments: list[str], recipe: str | None, token: str) -> int:
        """Its process id."""
        folder = Path(self._folder.name)
        if recipe is not None:
            (folder / "recipe.toml").write_text(recipe)
            arguments = [arguments[0], "-c", str(folder / "recipe.toml"), *arguments[1:]]
        if arguments[0] == "launch":
            (folder / "token").touch(0o600)
            (folder / "token").write_text(token)
            arguments = [*arguments, "--mode", "multihost", "--token-file", str(folder / "token")]
        command = [sys.executable, "-m", "serve.cli", *arguments]
        self._process = subprocess.Popen(tied(command))
        return self._process.pid

    def code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._folder.cleanup()
