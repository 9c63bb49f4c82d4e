"""`quantserve chat`, `quantserve ps`, and `quantserve adapter put` and the like.

All of them ask a running server. Nothing of it is imported, nor torch.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quant import usage
from serve.errors import SettingsError

if TYPE_CHECKING:
    from serve.client.connection import Connection

T = TypeVar("T")
_Where = tuple[str | None, Path | None, Path | None]  # URL, key file, certificate

app = usage.App()
adapter_app = usage.App()

QUESTION_BYTES = 16 << 20

Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="the running server [QUANTSERVE_SERVER, 127.0.0.1:8000]"),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="holds the API key, alone [QUANTSERVE_API_KEY]"),
]
CaCert = Annotated[
    Path | None,
    typer.Option("--cacert", metavar="FILE", help="trust this certificate (PEM) for HTTPS"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, as the server tells it")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="a folder that the server sees, an s3://, gs:// or az:// URL, a hub id",
    ),
]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="the model id that clients ask for")]


def join(commands: typer.Typer) -> None:
    """Add the commands on a server's adapters to the group `adapter` of those on folders."""
    (group,) = [
        found.typer_instance
        for found in commands.registered_groups
        if found.typer_instance and found.typer_instance.info.name == "adapter"
    ]
    group.registered_commands += adapter_app.registered_commands


@app.command(epilog='quantserve chat\nquantserve chat legal --ask "May a tenant keep a dog?"')
def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="an alias or version [the base]")
    ] = None,
    ask: Annotated[
        str | None, typer.Option(metavar="TEXT", help="one question; its answer is all of stdout")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="system prompt [none]")] = "",
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
) -> None:
    """Talk to a model of a running server; after each answer stderr says how fast it came.

    Ctrl-C stops an answer, Ctrl-D ends, /help says more. A question may also come by --ask or on
    standard input.
    """
    from serve.client import chat as talking
    from serve.client import connection

    to = connection.address(server, key_file, cacert)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # whatever the locale, and the model
    if ask is None and sys.stdin.isatty():
        _edit_lines()
        talking.talk(to, model, system, _line)
        return
    question = sys.stdin.read(QUESTION_BYTES) if ask is None else ask
    if not question.strip():
        raise SettingsError(
            "there is no question: give --ask TEXT, or standard input that holds one"
        )
    work = talking.once(to, model, system, question)
    talking.say(connection.run(work, "the answer was stopped"))


@app.command(epilog="quantserve ps --server http://10.0.0.5:8000 --key-file admin.key")
def ps(
    server: Server = None, key_file: KeyFile = None, cacert: CaCert = None, as_json: Json = False
) -> None:
    """Say what a running server serves: base, adapters, load, and whether it is ready."""
    from serve.client import overview

    found = _asked((server, key_file, cacert), overview.gathered, "nothing was changed")
    _show(found, overview.lines, as_json)


@adapter_app.command("list", epilog="quantserve adapter list --json")
def list_adapters(
    server: Server = None, key_file: KeyFile = None, cacert: CaCert = None, as_json: Json = False
) -> None:
    """List the adapters of a running server: versions, states, canaries."""
    from serve.client import adapters, overview

    found = _asked((server, key_file, cacert), adapters.listed, "nothing was changed")
    _show(found, overview.table, as_json)


@adapter_app.command(epilog="quantserve adapter put legal ./legal-v2")
def put(
    alias: Alias,
    source: Source,
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """Serve the adapter at SOURCE as ALIAS, from a running server; what ran under it is kept.

    Returns when it is served. Exit status 2, with the server's reason, when it is refused.
    """
    from serve.client import adapters

    _change((server, key_file, cacert), lambda c: adapters.put(c, alias, source, _say), as_json)


@adapter_app.command(epilog="quantserve adapter canary legal ./legal-v3 --percent 10")
def canary(
    alias: Alias,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE", help="as of `put`, or ALIAS@DIGEST [the canary that is there]"
        ),
    ] = None,
    percent: Annotated[
        float | None, typer.Option(metavar="N", help="the share of users that get it")
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="end it; all get the other version")] = False,
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """Give some users of ALIAS another version."""
    from serve.client import adapters

    at = (server, key_file, cacert)
    if drop and source is None and percent is None:
        _change(at, lambda c: adapters.drop_canary(c, alias), as_json)
    elif drop or percent is None:
        raise SettingsError("expected --percent N, the share of users, or --drop alone")
    else:
        _change(at, lambda c: adapters.canary(c, alias, source, percent, _say), as_json)


@adapter_app.command(epilog="quantserve adapter promote legal")
def promote(
    alias: Alias,
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """Give every user of ALIAS its canary."""
    from serve.client import adapters

    _change((server, key_file, cacert), lambda c: adapters.promote(c, alias, _say), as_json)


@adapter_app.command(epilog="quantserve adapter rollback legal")
def rollback(
    alias: Alias,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="ALIAS@DIGEST [the one before]")
    ] = None,
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """Serve an earlier version of ALIAS again."""
    from serve.client import adapters

    at = (server, key_file, cacert)
    _change(at, lambda c: adapters.roll_back(c, alias, version, _say), as_json)


@adapter_app.command(epilog="quantserve adapter rm legal")
def rm(
    alias: Alias,
    server: Server = None,
    key_file: KeyFile = None,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """Serve ALIAS no more; requests that run end as they began."""
    from serve.client import adapters

    _change((server, key_file, cacert), lambda c: adapters.remove(c, alias), as_json)


def _change(
    at: _Where, work: Callable[[Connection], Awaitable[dict[str, Any]]], as_json: bool
) -> None:
    """Carry it out and say what is served then."""
    from serve.client import adapters, overview

    _show(_asked(at, work, adapters.LEFT), overview.served, as_json)


def _asked(at: _Where, work: Callable[[Connection], Awaitable[T]], left: str) -> T:
    """What the server at an address is asked; `left` is said where it is interrupted."""
    from serve.client import connection

    to = connection.address(*at)

    async def opened() -> T:
        async with connection.Connection(to) as made:
            return await work(made)

    return connection.run(opened(), left)


def _show(found: T, lines: Callable[[T], list[str]], as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _line(prompt: str) -> str:
    """A line that is typed; where stdout is a file, the answers alone go there."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _edit_lines() -> None:
    """Let `input` edit lines and remember them, where Python was built so."""
    with suppress(ImportError):
        importlib.import_module("readline")
