"""Stand-ins for what a unit test cannot afford to start.

`MemoryEngine` is the adapter pool's engine without vLLM: it keeps the versions it was told of, can
be held mid-load, and can refuse. The real engine runs the same flows in tests/e2e.
"""

from __future__ import annotations

import asyncio

from serve.adapters import Version
from serve.errors import ServeError


class EngineRefused(ServeError):
    code = "adapter_load_failed"


class MemoryEngine:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.history: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuses = False

    async def load(self, version: Version) -> None:
        await self.gate.wait()
        if self.refuses:
            raise EngineRefused(f"{version.name} does not load")
        self.loaded.append(version.name)
        self.history.append(version.name)

    async def unload(self, version: Version) -> None:
        self.loaded.remove(version.name)
