"""The models that a running server answers to, as /v1/models lists them."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from serve.client.connection import Connection, ServerError

MODELS = "/v1/models"


async def cards(connection: Connection) -> list[dict[str, Any]]:
    """One for each model, the base's first, with its `id`. ServerError where there is none."""
    told = (await connection.get(MODELS)).get("data")
    found = [card for card in told if isinstance(card, dict)] if isinstance(told, list) else []
    named = [card for card in found if isinstance(card.get("id"), str)]
    if not named:
        raise ServerError(f"{connection.address.url} lists no model at {MODELS}")
    return named


async def names(connection: Connection) -> list[str]:
    """Of all of them."""
    return [card["id"] for card in await cards(connection)]


async def chosen(connection: Connection, asked: str | None) -> str:
    """The model asked for, none: the base. ServerError where the server has no such model."""
    if asked is None:
        return (await names(connection))[0]
    await connection.get(f"{MODELS}/{quote(asked)}")
    return asked
