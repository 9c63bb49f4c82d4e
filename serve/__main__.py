"""The console script: listens to signals before the seconds of imports, then runs `serve.cli`."""

from __future__ import annotations

import sys

try:
    from quant import interrupt
except KeyboardInterrupt:  # Python's own answer to Ctrl-C, until we listen
    sys.stderr.write("quantserve: interrupted; nothing was written\n")
    sys.exit(2)


def main() -> None:
    """`quantserve ARGUMENTS`."""
    interrupt.listen("quantserve")
    from serve import cli

    cli.main()


if __name__ == "__main__":
    main()
