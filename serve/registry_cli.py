"""`quantserve registry check` and `restore`: an operator's hands on the adapter registry.

Both read the settings that `serve` reads, and say in one line what came of it. Nothing of the
server is needed, running or not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from quant import usage
from serve import settings as serve_settings
from serve import variables
from serve.adapters import last_seen
from serve.errors import ServeError, SettingsError

app = usage.App(help="Look at the adapter registry, and put it right.")

StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="the server's --state-dir")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="the server's --database-url [a file in the state dir]"),
]


@app.command(cls=variables.Command, epilog="quantserve registry check --state-dir state")
def check(state_dir: StateDir = None, database_url: DatabaseUrl = None) -> None:
    """Say what the registry holds, and whether it is the one that was served from here.

    Exit status 0: it is; 1: it is not, or cannot be used.
    """
    from serve.adapters import restoration

    cache, url = _places(state_dir, database_url)
    found, seen = asyncio.run(restoration.look(url)), last_seen.read(cache)
    typer.echo(f"registry {found.name}: {found.told()}")
    typer.echo(f"last seen {cache}: {_told(seen, cache)}")
    why = restoration.differs(found, seen)
    if why and seen is not None and seen.snapshot.aliases:
        typer.echo(
            "not whole: `quantserve registry restore` brings back what was last seen; without "
            f"{cache.name} a start makes a new registry"
        )
    elif why:
        typer.echo("not whole, and nothing was last seen that could be restored")
    else:
        typer.echo("whole")
    raise typer.Exit(1 if why else 0)


@app.command(
    cls=variables.Command,
    epilog="""quantserve registry restore --state-dir state
quantserve registry restore --state-dir state --yes""",
)
def restore(
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="do it")] = False,
) -> None:
    """Write what was served last into the registry's place; a damaged file is kept beside it.

    Without --yes says what would be done. Servers may run: they go on with it by themselves. Exit
    status 0: it is whole, or whole again; 1: it is not.
    """
    from serve.adapters import restoration

    cache, url = _places(state_dir, database_url)
    seen = last_seen.read(cache)
    found = asyncio.run(restoration.look(url))
    if seen is None:
        _fail(f"there is nothing to restore: {_told(seen, cache)}")
    if not (why := restoration.differs(found, seen)):
        typer.echo(f"nothing to restore: {found.told()}")
        return
    plan = f"{len(seen.snapshot.aliases)} aliases of revision {seen.snapshot.revision}"
    if not yes:
        _fail(f"{why}\nwould write {plan} to {found.name}; do it with --yes")
    try:
        kept = asyncio.run(restoration.restore(url, seen))
    except (ServeError, OSError) as fault:
        _fail(str(fault))
    aside = f"; what was there: {', '.join(map(str, kept))}" if kept else ""
    typer.echo(f"restored {plan} to {found.name}{aside}")


def _places(state_dir: Path | None, database_url: str | None) -> tuple[Path, str]:
    """The cache and the registry's URL."""
    from serve.adapters import database, registry

    given: dict[str, Any] = {"state_dir": state_dir, "database_url": database_url}
    chosen = serve_settings.load(**given)
    if chosen.state_dir is None:
        raise SettingsError("give the server's --state-dir: it holds what was last seen")
    url = chosen.database_url or registry.sqlite_url(chosen.state_dir.resolve())
    database.checked(url)
    return chosen.state_dir / last_seen.NAME, url


def _told(seen: last_seen.Seen | None, cache: Path) -> str:
    if seen is None:
        return f"{cache.name} is not there, or damaged"
    names = f"identity {seen.identity[:8]}, " if seen.identity else ""
    return f"{names}revision {seen.snapshot.revision}, {len(seen.snapshot.aliases)} aliases"


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(1)
