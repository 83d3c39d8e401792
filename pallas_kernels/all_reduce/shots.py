"""How many exchanges an all_reduce takes, from its size: arithmetic shared by the implementations and their tests."""

from __future__ import annotations

RANKS = (2, 4, 8)
# One exchange sends (n - 1) times the array from each device; two send about 2 (n - 1) / n of it but wait twice.
ONE_SHOT_MOST_BYTES = {2: 1 << 20, 4: 128 << 10, 8: 64 << 10}


def takes_two_shots(size_bytes: int, ranks: int) -> bool:
    """Shares of two shots are whole 8-byte units, one alike for each rank."""
    return size_bytes > ONE_SHOT_MOST_BYTES[ranks] and size_bytes % (8 * ranks) == 0
