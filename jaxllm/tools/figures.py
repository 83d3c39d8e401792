"""Measured figures and how they are shown: one JSON document, one Markdown table, each figure beside its floor.

In: Figures, of one engine or of several. Out: text. Knows nothing of how a figure was measured.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.tools.env import version

RATE = "tok/s"  # of a rate more is better and the floor is a ceiling; everything else is a time


@dataclass(frozen=True)
class Figure:
    """One measured number: the median of `repeats`."""

    what: str
    at: str
    value: float
    unit: str
    repeats: tuple[float, ...] = ()
    floor: float | None = None  # what physics allows, in the same unit
    notes: Mapping[str, float] = field(default_factory=dict)  # measured beside it

    @property
    def share_of_floor(self) -> float | None:
        """1 = nothing could be faster."""
        if self.floor is None or not self.value:
            return None
        return self.value / self.floor if self.unit == RATE else self.floor / self.value

    def times_better_than(self, other: Figure) -> float:
        """How many times faster this is; below 1 it is slower."""
        return self.value / other.value if self.unit == RATE else other.value / self.value


def median_figure(what: str, at: str, unit: str, repeats: Sequence[float], **rest: Any) -> Figure:
    return Figure(what, at, statistics.median(repeats), unit, tuple(repeats), **rest)


def as_json(figure: Figure) -> dict[str, Any]:
    found = {name: value for name, value in dataclasses.asdict(figure).items() if value not in (None, (), {})}
    share = figure.share_of_floor
    return found if share is None else {**found, "share_of_floor": round(share, 4)}


def from_json(raw: Mapping[str, Any]) -> Figure:
    return Figure(
        raw["what"],
        raw["at"],
        raw["value"],
        raw["unit"],
        tuple(raw.get("repeats", ())),
        raw.get("floor"),
        dict(raw.get("notes", {})),
    )


def machine(device: str = "") -> dict[str, str]:
    """What the figures were measured on; the caller names the device, as only it may start JAX."""
    return {
        "device": device,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxllm": version(),
    }


def number(value: float) -> str:
    """Three or four digits that matter."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(figures: Sequence[Figure]) -> str:
    """One engine's figures in Markdown; columns that nothing would fill are left out."""
    notes = list(dict.fromkeys(name for figure in figures for name in figure.notes))
    floors = any(figure.floor is not None for figure in figures)
    head = ["", "at", "median", "least to most", *(["floor", "share of floor"] if floors else []), *notes]
    rows = []
    for figure in figures:
        share = figure.share_of_floor
        spread = f"{number(min(figure.repeats))} to {number(max(figure.repeats))}" if len(figure.repeats) > 1 else ""
        row = [figure.what, figure.at, f"{number(figure.value)} {figure.unit}", spread]
        if floors:
            row += ["" if figure.floor is None else number(figure.floor), "" if share is None else f"{share:.0%}"]
        rows.append(row + [number(figure.notes[name]) if name in figure.notes else "" for name in notes])
    return _table(head, rows)


def comparison(engines: Mapping[str, Sequence[Figure]]) -> str:
    """Several engines' figures in Markdown, the first one's ratio to each other: above 1, the first is ahead."""
    first, *others = engines
    by_place = {name: {(figure.what, figure.at): figure for figure in figures} for name, figures in engines.items()}
    places = list(dict.fromkeys((figure.what, figure.at) for figures in engines.values() for figure in figures))
    head = ["", "at", "unit", *engines, *(f"ahead of {name}" for name in others), "floor", "share of floor"]
    rows = []
    for place in places:
        found = {name: by_place[name].get(place) for name in engines}
        known = next(figure for figure in found.values() if figure is not None)
        ours = found[first]
        row = [*place, known.unit, *("" if figure is None else number(figure.value) for figure in found.values())]
        for name in others:
            theirs = found[name]
            row.append("" if ours is None or theirs is None else f"{ours.times_better_than(theirs):.2f}x")
        share = None if ours is None else ours.share_of_floor
        floor = next((figure.floor for figure in found.values() if figure is not None and figure.floor), None)
        row += ["" if floor is None else number(floor), "" if share is None else f"{share:.0%}"]
        rows.append(row)
    return _table(head, rows)
