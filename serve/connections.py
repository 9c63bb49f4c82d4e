"""The connections of a worker's HTTP server: whether it takes new ones, and who still waits.

A worker that is about to be ended takes no more connections, which its parent does on the same
socket from then on, and is not ended before each that it has taken has its answer: closing a
connection with an unread request resets it.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

from serve.http_limits import Watch

SPARE_DESCRIPTORS = 100  # for the engine's sockets, files and libraries


class Connections:
    """Of a uvicorn.Server whose protocol is `http_limits.protocol`'s.

    `server` returns it, once it is there.
    """

    def __init__(self, server: Callable[[], Any]) -> None:
        self._server = server

    def accepts(self) -> bool:
        """Whether it takes connections: uvicorn closes its socket long before it ends, and can take
        none where no descriptor is left.
        """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS
        server = self._server()
        return (
            server.started
            and not server.should_exit
            and len(server.server_state.connections) < most
            and all(listening.is_serving() for listening in server.servers)
        )

    def stop(self) -> None:
        """Take no more, and close those that wait for nothing."""
        for listening in self._server().servers:
            listening.close()
        self._watch.close_idle()

    def waiting(self) -> int:
        """How many have asked, or may be asking, and have no whole answer yet."""
        return self._watch.busy()

    @property
    def _watch(self) -> Watch:
        watch: Watch = self._server().config.http.watch
        return watch
