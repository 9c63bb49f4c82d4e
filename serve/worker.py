"""The child: vLLM's own OpenAI app on the inherited socket, extended by our plugins.

Started by the supervisor as `python -m serve.worker SOCKET_FD LINE_FD PARENT_PID`, with everything
else in QUANTSERVE_* variables. A signal while it loads ends it, at once: there is nothing to lose.
Import-light on purpose: vLLM imports this module again as
`__main__` in every process it spawns.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import serve.isa  # noqa: F401 - acts on import, before anything asks torch
from serve import engine_args, forkserver, lifeline, settings, vllm_flags, vllm_release
from serve.errors import SettingsError


def main() -> None:
    socket_fd, line_fd, parent = map(int, sys.argv[1:4])
    lifeline.die_with(parent)
    chosen = settings.load()
    facts = engine_args.inspect(chosen)
    if facts.on_cpu:
        forkserver.start()
    vllm_release.check()
    import uvloop

    from serve import http_limits, vllm_compat

    vllm_compat.start_engines_warm()
    vllm_compat.keep_vocabulary()
    args = vllm_compat.parse(engine_args.flags(chosen, facts))
    vllm_flags.check(args, chosen)
    args.quantserve_line_fd = line_fd
    listener = socket.socket(fileno=socket_fd)
    http_limits.raise_descriptors()
    http = http_limits.protocol(http_limits.limits_of(chosen))
    address = f"http://{chosen.host}:{chosen.port}"
    uvloop.run(vllm_compat.run_server_worker(address, listener, args, http=http))


def run(work: Callable[[], None]) -> None:
    """An operator's mistake, or a vLLM that is not as we know it, ends in one line."""
    try:
        work()
    except SettingsError as fault:
        sys.stderr.write(f"SettingsError: {fault}\n")
        sys.exit(2)


if __name__ == "__main__":
    run(main)
