"""Runs a command as a process that gets SIGTERM when the thread that started it ends, however that comes.

In: a command. Out: the command that runs it so (`tied`); as a program: `tied.py PARENT COMMAND...` becomes COMMAND. The
wish is made (prctl(2), PR_SET_PDEATHSIG) after the exec and outlives the next: between a fork and its exec, a process
with JAX's threads may run nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit("the process that started this one has ended")
    os.execvp(command[0], command)
