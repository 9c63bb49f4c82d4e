"""Aliases of a running server: put, canary, promoted, rolled back, removed, over its admin API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.client.connection import Connection, ServerError
from serve.errors import SettingsError
from serve.settings import check_alias

Facts = dict[str, Any]  # of an alias, as the admin API tells them
Say = Callable[[str], None]

ADAPTERS = "/admin/adapters"
CHANGE_S = 3600.0  # a source may be slow, and an adapter large
SETTLE_S = 600.0
HUNDRED = 100
LOOK_EVERY_S = 0.5
LEFT = "the server may do it all the same: `quantserve adapter list` says"


async def listed(connection: Connection) -> list[Facts]:
    """Every alias."""
    rows = (await connection.get(ADAPTERS)).get("data")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


async def put(connection: Connection, alias: str, source: str, say: Say) -> Facts:
    """Serve the adapter at `source` as `alias`; returns when it is served.

    ServerError in the server's own words where it is not.
    """
    path, source = _path(alias), given(source)
    say(f"{alias}: asked for {source}")
    facts = await _sent(connection, "PUT", path, {"source": source}, source)
    return await settled(connection, facts, say)


async def canary(
    connection: Connection, alias: str, source: str | None, percent: float, say: Say
) -> Facts:
    """Give a share of an alias's users another version: that of a source, a version ALIAS@DIGEST,
    or, without one, the canary that is there."""
    if not 0 <= percent <= HUNDRED:
        raise SettingsError(f"--percent {percent:g}: expected a number from 0 to 100")
    body: Facts = {"weight": percent / HUNDRED}
    if source is not None and source.startswith(f"{alias}@"):
        body["version"] = source
    elif source is not None:
        body["source"] = source = given(source)
    path = f"{_path(alias)}/canary"
    say(f"{alias}: asked for a canary{f' of {source}' if source else ''}")
    facts = await _sent(connection, "PUT", path, body, source or "")
    return await settled(connection, facts, say)


async def drop_canary(connection: Connection, alias: str) -> Facts:
    """Give everybody the stable version again."""
    return await _sent(connection, "DELETE", f"{_path(alias)}/canary")


async def promote(connection: Connection, alias: str, say: Say) -> Facts:
    """Give everybody the canary."""
    facts = await _sent(connection, "POST", f"{_path(alias)}/promote")
    return await settled(connection, facts, say)


async def roll_back(connection: Connection, alias: str, version: str | None, say: Say) -> Facts:
    """Serve the version before, or a named one."""
    body = {"version": version} if version else {}
    facts = await _sent(connection, "POST", f"{_path(alias)}/rollback", body)
    return await settled(connection, facts, say)


async def remove(connection: Connection, alias: str) -> Facts:
    """Serve the alias no more."""
    return await _sent(connection, "DELETE", _path(alias))


async def settled(
    connection: Connection, facts: Facts, say: Say, every_s: float = LOOK_EVERY_S
) -> Facts:
    """The facts once nothing of them is loading, each new state said. ServerError where a version
    is not served in the end."""
    before: list[str] = []
    try:
        async with asyncio.timeout(SETTLE_S):
            while True:
                parts = [part for part in (facts, facts.get("canary")) if part]
                states = [f"{part['wanted']}: {part['state']}" for part in parts]
                for state in states:
                    if state not in before:
                        say(state)
                before = states
                if all(part["state"] != "loading" for part in parts):
                    break
                await asyncio.sleep(every_s)
                facts = await connection.get(_path(facts["alias"]))
    except TimeoutError as fault:
        raise ServerError(f"{'; '.join(before)} for {SETTLE_S:g} s; it may come yet") from fault
    except (KeyError, TypeError) as fault:
        raise ServerError(
            f"the server tells no {fault} of an adapter; is it a quantserve?"
        ) from fault
    if failed := [part for part in parts if part["state"] == "failed"]:
        raise ServerError(
            "; ".join(f"{part['wanted']} is not served: {part['reason']}" for part in failed)
        )
    return facts


def given(source: str) -> str:
    """A source as the server understands it: a folder of this machine by its absolute path."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise SettingsError(f"{source} is a file; expected a PEFT adapter's folder or its address")
    if source.startswith((".", "~")):
        raise SettingsError(f"{source} does not exist here; expected a folder or an address")
    return source


async def _sent(
    connection: Connection, method: str, path: str, body: Facts | None = None, source: str = ""
) -> Facts:
    try:
        return await connection.send(method, path, body, CHANGE_S)
    except ServerError as fault:
        if fault.param == "folder" and _is_here(source):
            raise ServerError(f"{fault}; {_own_disk(connection)}", fault.answered) from fault
        raise


def _is_here(source: str) -> bool:
    return bool(source) and Path(source).is_dir()


def _own_disk(connection: Connection) -> str:
    """What to do about a folder that is here and that the server does not find."""
    whose = "another container" if connection.address.is_here else "another machine"
    return (
        f"the folder is here, and the server reads its own disk ({connection.address.url} is"
        f" {whose}?): copy it there under the same path, or give an address that the server can"
        " fetch, such as s3://BUCKET/FOLDER"
    )


def _path(alias: str) -> str:
    """Of an alias; SettingsError where none has such a name."""
    try:
        check_alias(alias)
    except ValueError as fault:
        raise SettingsError(str(fault)) from fault
    return f"{ADAPTERS}/{quote(alias)}"
