"""What several engines say, as one engine would say it: counts summed, of a ratio the worst, of a state any.

In: messages of one kind, one a replica. Out: one message. Knows nothing of processes or of who is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from jaxllm.engine.messages import Beat, Ready, Reply

# Not to be added up: compilations of a defect are the same everywhere, the others are ratios and what is expected.
WORST = ("compiles_after_ready", "expert_imbalance", "imbalance", "expected")
GAUGES = ("running", "waiting", "free_pages", "cached_pages", "held_pages", "total_pages", "expert_imbalance")
ADDED = ("evicted_pages", "layers")  # of an operation's answer; what is alike everywhere is said once


def sums(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for counts in each:
        for name, value in counts.items():
            if name not in total:
                total[name] = value
            else:
                total[name] = max(total[name], value) if name in WORST else total[name] + value
    return total


def counters(stats: Mapping[str, float]) -> dict[str, float]:
    """Those that only grow."""
    return {name: value for name, value in stats.items() if name not in GAUGES}


def ready(each: list[Ready], facts: Mapping[str, Any]) -> Ready:
    """`facts`: of the whole; others are those of one replica, as bytes and peaks are of one device's step."""
    one = each[0]
    own = {"replicas": len(each), "replica_capacity_tokens": min(found.capacity_tokens for found in each)}
    return msgspec.structs.replace(
        one,
        max_num_seqs=sum(found.max_num_seqs for found in each),
        capacity_tokens=sum(found.capacity_tokens for found in each),
        facts={**one.facts, **_slowest(each), **own, **facts},
    )


def _slowest(each: list[Ready]) -> dict[str, Any]:
    """Where start-up went, of the replica that took longest."""
    last = max(each, key=lambda found: found.facts.get("total_s", 0.0))
    return {name: last.facts[name] for name in ("seconds", "total_s") if name in last.facts}


def beat(each: list[Beat], more: Mapping[str, float], silent_s: float) -> Beat:
    """`more`: counted elsewhere; `silent_s`: for how long the quietest has not been heard of."""
    return Beat(
        stalled_s=max([silent_s, *(one.stalled_s for one in each)]),
        paused=any(one.paused for one in each),
        sick=any(one.sick for one in each),
        stats=sums([*(one.stats for one in each), more]),
        asleep=any(one.asleep for one in each),
    )


def reply(number: int, operation: str, each: list[Reply], more: Mapping[str, float]) -> Reply:
    """One answer; any replica's error is the error of all. `more`: as for a beat."""
    wrong = next((one for one in each if one.error is not None), None)
    if wrong is not None:
        return Reply(number, error=wrong.error)
    values = [one.value for one in each]
    if operation == "check":
        return Reply(number, sums([*values, more]))
    if all(isinstance(value, dict) for value in values):
        return Reply(number, _said(values))
    return Reply(number, values[0])


def _said(each: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in each[0]:
        values = [value[name] for value in each]
        if name in ADDED:
            found[name] = sum(values)
        elif all(value == values[0] for value in values):
            found[name] = values[0]
        elif all(isinstance(value, str) for value in values):
            found[name] = ", ".join(values)
        else:
            found[name] = max(values)
    return found
