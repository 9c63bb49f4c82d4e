"""The child: vLLM's own OpenAI app on the inherited socket, extended by our plugins.

Started by the supervisor as `python -m serve.worker SOCKET_FD READY_FD PARENT_PID`, with everything
else in QUANTSERVE_* variables. Import-light on purpose: vLLM imports this module again as
`__main__` in every process it spawns.
"""

from __future__ import annotations

import signal
import socket
import sys

import serve.isa  # noqa: F401 - acts on import, before anything asks torch
from serve import engine_args, forkserver, lifeline, settings, vllm_release
from serve.errors import SettingsError


def main() -> None:
    socket_fd, ready_fd, parent = map(int, sys.argv[1:4])
    lifeline.die_with(parent)
    chosen = settings.load()
    facts = engine_args.inspect(chosen)
    if facts.on_cpu:
        forkserver.start()
    _know_vllm()
    import uvloop

    from serve import http_limits, vllm_compat

    vllm_compat.start_engines_warm()
    vllm_compat.keep_vocabulary()
    args = vllm_compat.parse(engine_args.flags(chosen, facts))
    args.quantserve_ready_fd = ready_fd
    listener = socket.socket(fileno=socket_fd)
    signal.signal(signal.SIGTERM, _interrupt)
    http_limits.raise_descriptors()
    http = http_limits.protocol(http_limits.limits_of(chosen))
    address = f"http://{chosen.host}:{chosen.port}"
    uvloop.run(vllm_compat.run_server_worker(address, listener, args, http=http))


def _know_vllm() -> None:
    """End with one line where vLLM is not as we know it, before any of it is imported here."""
    try:
        vllm_release.check()
    except SettingsError as fault:
        sys.exit(f"SettingsError: {fault}")


def _interrupt(*_: object) -> None:
    """SIGTERM while loading; uvicorn installs its own handler once it runs."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
