"""The state of the registry that was seen last, in a file beside the store.

For a start without the registry, and for `quantserve registry restore`. It also knows the
registry's identity, by which a new or another database is told from the one that was lost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.durable import settle
from serve.adapters.rows import ALIAS, RECORD, Snapshot

NAME = "registry-cache.json"


@dataclass(frozen=True, slots=True)
class Seen:
    """A snapshot, and whose; "": of a release that did not note it."""

    identity: str
    snapshot: Snapshot


def read(path: Path) -> Seen | None:
    """None where there is none, or it cannot be read or understood."""
    try:
        return _parsed(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def write(path: Path, seen: Seen) -> None:
    """In place of what was there, by one rename; what cannot be understood is kept. OSError."""
    if path.exists() and read(path) is None:
        path.rename(path.with_name(f"{path.name}.damaged-{int(time.time())}"))
    snapshot = seen.snapshot
    told = {
        "identity": seen.identity,
        "revision": snapshot.revision,
        "aliases": [asdict(row) for row in snapshot.aliases.values()],
        "records": [asdict(record) for record in snapshot.records.values()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps(told))
    settle(fresh)
    os.replace(fresh, path)
    settle(path.parent)


def _parsed(told: Mapping[str, Any]) -> Seen:
    aliases = [ALIAS.validate_python(row) for row in told["aliases"]]
    records = [RECORD.validate_python(row) for row in told["records"]]
    snapshot = Snapshot(
        int(told["revision"]),
        {row.alias: row for row in aliases},
        {(record.alias, record.digest): record for record in records},
    )
    return Seen(str(told.get("identity", "")), snapshot)
