"""Checks weight files against a list of their SHA-256, for what a file's own format cannot see: a flipped bit.

In: a model directory. Out: what differs, by file. The list is SHA256SUMS as sha256sum writes it; a directory without
one is taken as it is. Knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]([^/\0]+)")


def problems(directory: Path) -> list[str]:
    """One line for each file that is not what the list says."""
    path = directory / NAME
    if not path.is_file():
        return []
    found = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [f"{NAME}: cannot be read ({error})"]
    for number, line in enumerate(lines, 1):
        parts = _LINE.fullmatch(line.strip())
        if parts is None:
            found.append(f"{NAME}: line {number} is not a sum and a file name")
            continue
        try:
            with (directory / parts[2]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != parts[1].lower():
                    found.append(f"{parts[2]}: its bytes are not those of {NAME} (damaged, or the list is of another)")
        except OSError as error:
            found.append(f"{parts[2]}: in {NAME}, but cannot be read ({error.strerror or error})")
    return found
