"""Paths as a user types them. Standard library only."""

from pathlib import Path

from quant.errors import SourceError


def full(given: str | Path) -> Path:
    """The path with its `~` expanded, whether anything is there or not.

    SourceError where it cannot be looked at: an unknown home, a name too long, a locked folder.
    """
    if not str(given):
        raise SourceError("an empty path was given: a folder or a file is expected")
    try:
        path = Path(given).expanduser()
        path.exists()
    except RuntimeError as fault:
        raise SourceError(
            f"{given} is in a home that this system does not know: give the path in full"
        ) from fault
    except OSError as fault:
        raise SourceError(f"{given!s:.200} cannot be looked at: {fault.strerror}") from fault
    return path
