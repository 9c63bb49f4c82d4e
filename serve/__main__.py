"""The console script: listens to signals before the seconds of imports, then runs `serve.cli`."""

from __future__ import annotations

from quant import interrupt


def main() -> None:
    """`quantserve ARGUMENTS`."""
    interrupt.listen("quantserve")
    from serve import cli

    cli.main()


if __name__ == "__main__":
    main()
