"""What /v1/responses keeps: the newest responses, each for the tenant that made it. No JAX, no HTTP."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ApiError


@dataclass
class Stored:
    tenant: str
    answer: dict[str, Any]
    messages: list[dict[str, Any]]
    request_id: str


@dataclass
class Store:
    """The newest responses, oldest forgotten first."""

    limit: int
    items: OrderedDict[str, Stored] = field(default_factory=OrderedDict)

    def put(self, stored: Stored) -> None:
        self.items[stored.answer["id"]] = stored
        while len(self.items) > self.limit:
            self.items.popitem(last=False)

    def get(self, response_id: str, tenant: str) -> Stored:
        found = self.items.get(response_id)
        if found is None or found.tenant != tenant:
            raise ApiError(404, f"no response {response_id[:80]!r}", param="response_id", code="response_not_found")
        return found
