"""Reading a config.json field by field: checked types, named errors, and a list of what nobody read.

In: the parsed JSON object and the file it came from. Out: plain Python values, or a ConfigError naming file, key,
value and what is allowed. Knows nothing of model families: they declare which fields they read.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Mapping

from jaxllm.config import ConfigError
from jaxllm.core import shown

logger = logging.getLogger(__name__)

MISSING = object()


def refuse(key: str, value: object, allowed: str, file: str | None = None) -> ConfigError:
    """The error for a model description that is wrong or not supported."""
    found = "(missing)" if value is MISSING else shown(value)
    return ConfigError(f"{file + ': ' if file else ''}{key} = {found}: {allowed}")


class Fields:
    """One JSON object, read by key. A null counts as absent, as it does in Hugging Face's own configs."""

    def __init__(self, raw: Mapping[str, object], file: str, prefix: str = "") -> None:
        self.raw, self.file, self.prefix = raw, file, prefix
        self._read: set[str] = set()

    def error(self, key: str, value: object, allowed: str) -> ConfigError:
        return refuse(self.prefix + key, value, allowed, self.file)

    def get(self, key: str) -> object:
        """The raw value, MISSING when absent or null."""
        self._read.add(key)
        value = self.raw.get(key)
        return MISSING if value is None else value

    def has(self, key: str) -> bool:
        return self.get(key) is not MISSING

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.get(key)
        if value is MISSING and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(key, value, f"must be an integer >= {low}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number, or also 0 where `zero` says so."""
        value = self.get(key)
        if value is MISSING and default is not None:
            return default
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
            number = float(value)
        if math.isnan(number) or (number == 0 and not zero):
            raise self.error(key, value, f"must be a number {'>=' if zero else '>'} 0")
        return number

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is MISSING:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: str | None = None) -> str:
        value = self.get(key)
        if value is MISSING and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, value, f"must be one of {', '.join(sorted(allowed))}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.get(key)
        entries: list[object] = [] if value is MISSING else value if isinstance(value, list) else [value]
        ids = tuple(token for token in entries if isinstance(token, int) and not isinstance(token, bool) and token >= 0)
        if len(ids) != len(entries):
            raise self.error(key, value, "must be a token id (an integer >= 0) or a list of them")
        return ids

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of numbers >= 0, or nothing."""
        value = self.get(key)
        entries: list[object] = value if isinstance(value, list) else []
        numbers = tuple(n for n in entries if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
        if value is not MISSING and (not isinstance(value, list) or len(numbers) != len(entries)):
            raise self.error(key, value, "must be a list of integers >= 0")
        return numbers

    def strings(self, key: str) -> tuple[str, ...] | None:
        value = self.get(key)
        if value is MISSING:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, value, "must be a list of strings")
        return tuple(str(item) for item in value)

    def mapping(self, key: str) -> Fields | None:
        value = self.get(key)
        if value is MISSING:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, value, "must be an object")
        return Fields({str(name): item for name, item in value.items()}, self.file, f"{self.prefix}{key}.")

    def note_unread(self) -> None:
        unread = sorted(set(self.raw) - self._read)
        if unread:
            logger.debug("%s: keys without a meaning here, ignored: %s", self.file, ", ".join(unread))
