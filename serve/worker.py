"""The child: vLLM's own OpenAI app on the inherited socket, extended by our plugins.

Started by the supervisor as `python -m serve.worker SOCKET_FD READY_FD`, with everything else in
QUANTSERVE_* variables. Import-light on purpose: vLLM imports this module again as `__main__` in
every process it spawns.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Any

import serve.isa  # noqa: F401 - acts on import, before anything asks torch
from serve import engine_args, forkserver, settings


class Announce:
    """ASGI middleware that tells the supervisor when the app has started, and drains on SIGUSR1."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def announcing(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                _started(scope["app"].state)

        await self._app(scope, receive, announcing)


def main() -> None:
    socket_fd, ready_fd = (int(word) for word in sys.argv[1:3])
    forkserver.start()
    import uvloop

    from serve import vllm_compat

    vllm_compat.check_version()
    vllm_compat.start_engines_warm()
    chosen = settings.load()
    args = vllm_compat.parse(engine_args.flags(chosen, engine_args.inspect(chosen)))
    args.quantserve_ready_fd = ready_fd
    listener = socket.socket(fileno=socket_fd)
    signal.signal(signal.SIGTERM, _interrupt)
    uvloop.run(vllm_compat.run_server_worker(f"http://{chosen.host}:{chosen.port}", listener, args))


def _interrupt(*_: object) -> None:
    """SIGTERM while loading; uvicorn installs its own handler once it runs."""
    raise KeyboardInterrupt


def _started(state: Any) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: state.quantserve.drain())
    os.write(state.args.quantserve_ready_fd, b"ready\n")


if __name__ == "__main__":
    main()
