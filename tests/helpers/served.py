"""`jaxllm serve` as people start it, in processes of its own, with the bundled model unless told otherwise.

Needs nothing of pytest, so that the tools that drive a server from other environments (clients, schemathesis, soak) use
the same start. `python tests/helpers/served.py [--flag VALUE ...] -- COMMAND...` serves the bundled model while COMMAND
runs, with {url} replaced by the address, and ends with the command's code.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ADMIN = "admin-key"
SMALL = ("--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "512")


class Served:
    """`flags` beyond the port and the admin key; `environ` beyond this process's. Ends with the context."""

    def __init__(self, *flags, environ=None, stderr=None):
        command = [sys.executable, "-m", "serve.cli", "serve", "--port", "0", "--admin-key", ADMIN, *flags]
        own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, env={**os.environ, **own, **(environ or {})}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        self.lines = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("Serving"):
                break
        else:
            self.process.stdout.close()
            raise RuntimeError(f"the server ended with code {self.process.wait()} before it was ready")
        self.url = self.lines[-1].split()[3]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        return self.process.pid

    def engine_pid(self):
        """The engine's process: the only child."""
        listed = ["ps", "--ppid", str(self.pid), "-o", "pid="]
        return int(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0])

    def get(self, path, timeout=30):
        asked = urllib.request.Request(self.url + path, headers={"authorization": f"Bearer {ADMIN}"})
        with urllib.request.urlopen(asked, timeout=timeout) as answer:
            return answer.read()

    def info(self):
        return json.loads(self.get("/server_info"))

    def stop(self, number=signal.SIGTERM, wait_s=40):
        """The exit code; a server that does not end is killed."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            return self.process.wait(wait_s)
        finally:
            self.process.kill()
            if self.process.stdout is not None:
                self.process.stdout.close()


def resident_bytes(pid):
    fields = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS"))


if __name__ == "__main__":
    began = time.monotonic()
    split = sys.argv.index("--")
    with Served(*SMALL, *sys.argv[1:split]) as server:
        print(f"server: ready after {time.monotonic() - began:.1f} s at {server.url}", flush=True)
        environ = {**os.environ, "OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": "none", "SERVER": server.url}
        code = subprocess.run(
            [word.replace("{url}", server.url) for word in sys.argv[split + 1 :]], env=environ
        ).returncode
    sys.exit(code)
