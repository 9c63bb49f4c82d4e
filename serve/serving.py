"""What every request needs, made once per worker: `app.state.quantserve`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path

from serve import keys
from serve.adapters.catalog import By, Catalog
from serve.adapters.pool import AdapterPool, Engine
from serve.adapters.reconciler import Reconciler
from serve.adapters.registry import Registry, sqlite_url
from serve.adapters.slots import Slots
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of
from serve.errors import Conflict, ServeError
from serve.metrics import Metrics
from serve.settings import Settings
from serve.voices import Templates

logger = logging.getLogger(__name__)


class Serving:
    """The keys, the adapters and whether requests are admitted."""

    def __init__(self, chosen: Settings, engine: Engine, metrics: Metrics, base_name: str) -> None:
        state_dir = chosen.state_dir or Path("/nonexistent")  # the supervisor always sets one
        self.settings, self.metrics, self.base_name = chosen, metrics, base_name
        self.keys = keys.load(chosen.api_key_file)
        self.pool = AdapterPool(engine, Slots(slots_of(chosen), chosen.adapter_wait))
        registry = Registry(
            chosen.database_url or sqlite_url(state_dir),
            chosen.replica or f"{socket.gethostname()}:{chosen.port}",
            keep=chosen.keep_versions,
        )
        store = Store(
            chosen.store_dir or state_dir / "store",
            base_of(chosen.artifact, chosen.max_lora_rank),
            sources_of(chosen),
        )
        cache = state_dir / "registry-cache.json"
        self.reconciler = Reconciler(registry, store, self.pool, metrics, cache)
        self.catalog = Catalog(registry, store, self.pool, self.reconciler)
        self.registry, self.templates = registry, Templates()
        self.ready_fd: int | None = None
        self.draining = False
        self.started = int(time.time())
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what the registry wants and the operator gave, then follow the registry."""
        every_s = self.settings.reconcile_interval
        await self.reconciler.start(every_s)
        for alias, source in self.settings.adapters.items():
            await self._seed(alias, source)
        self._watching = asyncio.create_task(self.reconciler.watch(every_s))
        self.metrics.adapters_loaded.set_function(self.pool.__len__)
        self.metrics.slots_pinned.set_function(lambda: self.pool.slots.pinned)
        self.metrics.slot_waiting.set_function(lambda: self.pool.slots.waiting)
        self.metrics.ready.set(1)

    async def stop(self) -> None:
        """End what runs beside requests, and let go of the registry."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self.pool.close()
        self.registry.close()
        self.templates.close()

    def announce(self) -> None:
        """Tell the supervisor, where there is one, that the app has started; drain on SIGUSR1."""
        if self.ready_fd is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.drain)
            os.write(self.ready_fd, b"ready\n")

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True
        self.metrics.ready.set(0)

    async def _seed(self, alias: str, source: str) -> None:
        """An alias given at start, unless the registry knows better: it has been changed since."""
        if alias in self.reconciler.rows:
            return
        try:
            await self.catalog.put(alias, source, By("start"), new=True)
        except Conflict:
            logger.info("%s: another replica was first", alias)
        except ServeError as fault:
            logger.error("adapter %s is not served: %s", alias, fault)  # noqa: TRY400


def slots_of(chosen: Settings) -> int:
    """Places of vLLM's in a batch: one is free for a swap. None where LoRA is off."""
    return chosen.max_adapters + 1 if chosen.max_adapters else 0


def sources_of(chosen: Settings) -> Sources:
    return Sources(
        chosen.adapter_root, chosen.source_schemes, chosen.allow_hub, chosen.max_adapter_bytes
    )
