"""Ports for servers that are told theirs: nobody else is given them between the asking and the use."""

import itertools
import os
import random
import socket

# Below the range that the kernel gives to outgoing connections (32768 on), a part for each worker of pytest-xdist.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_PORTS = list(range(20_000 + 1_200 * _WORKER, 21_200 + 1_200 * _WORKER, 2))
_FROM = random.randrange(len(_PORTS))  # another run of the tests may go on beside this one
_NEXT = itertools.cycle(_PORTS[_FROM:] + _PORTS[:_FROM])


def free_port():
    """The first of two free neighbours: a group of processes listens on both."""
    for port in _NEXT:
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    return None
