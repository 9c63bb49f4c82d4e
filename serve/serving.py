"""What every request needs, made once per worker: `app.state.quantserve`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from serve import json_limits, keys
from serve.adapters import last_seen
from serve.adapters.catalog import By, Catalog
from serve.adapters.intake import Intake
from serve.adapters.pool import AdapterPool, Engine, Route
from serve.adapters.reconciler import START_WAIT_S, Reconciler
from serve.adapters.registry import Registry, sqlite_url
from serve.adapters.rows import Alias
from serve.adapters.slots import Slots
from serve.adapters.sources import Sources
from serve.adapters.store import Store, Stored, base_of
from serve.errors import Conflict, RegistryDown, ServeError, StoreFailed
from serve.grammars import GrammarTrial
from serve.metrics import Metrics
from serve.settings import Settings
from serve.voices import Templates

logger = logging.getLogger(__name__)


class Serving:
    """The keys, the adapters and whether requests are admitted."""

    def __init__(
        self, chosen: Settings, engine: Engine, metrics: Metrics, base_name: str, *others: str
    ) -> None:
        """`others` are further names of the base."""
        state_dir = chosen.state_dir or Path("/nonexistent")  # the supervisor always sets one
        self.settings, self.metrics, self.base_name = chosen, metrics, base_name
        self.keys = keys.load(chosen.api_key_file)
        self.json_limits = json_limits.limits_of(chosen)
        slots = Slots(slots_of(chosen), chosen.adapter_wait)
        self.pool = AdapterPool(engine, slots, (base_name, *others))
        registry = Registry(
            chosen.database_url or sqlite_url(state_dir),
            chosen.replica or f"{socket.gethostname()}:{chosen.port}",
            keep=chosen.keep_versions,
        )
        self._store = Store(
            chosen.store_dir or state_dir / "store",
            base_of(chosen.artifact, chosen.max_lora_rank),
            sources_of(chosen),
        )
        intake = Intake(self._store)
        cache = state_dir / last_seen.NAME
        self.reconciler = Reconciler(registry, intake, self.pool, metrics, cache)
        self.catalog = Catalog(registry, intake, self.pool, self.reconciler)
        self.registry, self.templates = registry, Templates()
        self.trial: GrammarTrial | None = None
        self.item: json_limits.Item | None = None
        self.ready_fd: int | None = None
        self.layers: list[dict[str, int]] = []  # of every rank: layers by the kernel they have
        self.draining = False
        self.started = int(time.time())
        self._following: list[asyncio.Task[None]] = []
        self._untold: dict[str, str] = {}
        self._spare: tempfile.TemporaryDirectory[str] | None = None
        self.engine_dead: Callable[[], bool] = lambda: False
        metrics.served = lambda name: name == base_name or self.pool.get(name) is not None
        metrics.open_books(base_name)

    async def start(self) -> None:
        """Load what the registry wants and the operator gave, then follow the registry."""
        every_s = self.settings.reconcile_interval
        await self.reconciler.start(every_s)
        giving = [asyncio.create_task(self._give(*each)) for each in self.settings.adapters.items()]
        if giving:
            await asyncio.wait(giving, timeout=START_WAIT_S)
        following = (
            self.reconciler.watch(every_s), self._tell_registry(every_s), self.keys.follow(),
        )  # fmt: skip
        self._following = [*giving, *map(asyncio.create_task, following)]
        self.metrics.adapters_loaded.set_function(self.pool.__len__)
        self.metrics.slots_pinned.set_function(lambda: self.pool.slots.pinned)
        self.metrics.slot_waiting.set_function(lambda: self.pool.slots.waiting)
        self.metrics.ready.set(1)

    async def stop(self) -> None:
        """End what runs beside requests, and let go of the registry."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self.reconciler.close()
        if self.trial is not None:
            await self.trial.close()
        await self.pool.close()
        self.registry.close()
        self.templates.close()
        if self._spare is not None:
            self._spare.cleanup()

    def announce(self) -> None:
        """Tell the supervisor, where there is one, that the app has started; drain on SIGUSR1."""
        if self.ready_fd is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.drain)
            os.write(self.ready_fd, b"ready\n")

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True
        self.metrics.ready.set(0)

    async def _give(self, alias: str, source: str) -> None:
        """An alias given at start, whether the registry can be told of it or not."""
        telling = asyncio.gather(self._tell(alias, source), return_exceptions=True)
        told = (await telling)[0]
        if isinstance(told, BaseException):
            logger.error("adapter %s is not served", alias, exc_info=told)
        elif not told:
            self._untold[alias] = source
            await self._serve_untold(alias, source)

    async def _tell(self, alias: str, source: str) -> bool:
        """Put it, unless the registry knows better: it has been changed since. False: no answer."""
        try:
            await self.catalog.put(alias, source, By("start"), new=True)
        except Conflict:
            logger.info("%s: the registry has it, and knows better", alias)
        except RegistryDown:
            return False
        except ServeError as fault:
            logger.error("adapter %s is not served: %s", alias, fault)  # noqa: TRY400
        return True

    async def _serve_untold(self, alias: str, source: str) -> None:
        """The disk may be what keeps the registry from working: then the files are kept elsewhere,
        for this run."""
        if alias in self.reconciler.rows:
            return  # as it was last seen
        self.reconciler.given.add(alias)
        try:
            stored = await asyncio.to_thread(self._take_in_anywhere, source)
            version = await self.pool.load(alias, stored)
            self.reconciler.rows[alias] = Alias(alias, stored.digest)
            await self.pool.publish(alias, Route(version))
            self.pool.release(version)
        except ServeError as fault:
            logger.error("adapter %s is not served: %s", alias, fault)  # noqa: TRY400

    def _take_in_anywhere(self, source: str) -> Stored:
        try:
            return self._store.take_in(source)
        except StoreFailed as fault:
            logger.error("%s; its files are kept for this run only", fault)  # noqa: TRY400
            self._spare = self._spare or tempfile.TemporaryDirectory(prefix="quantserve-store-")
            return replace(self._store, root=Path(self._spare.name)).take_in(source)

    async def _tell_registry(self, every_s: float) -> None:
        """Of what it could not be told at start, when it answers."""
        while True:
            await asyncio.sleep(every_s)
            answers = self.registry.identity is not None
            for alias, source in list(self._untold.items()) if answers else ():
                if await self._tell(alias, source):
                    del self._untold[alias]


def slots_of(chosen: Settings) -> int:
    """Places of vLLM's in a batch: one is free for a swap. None where LoRA is off."""
    return chosen.max_adapters + 1 if chosen.max_adapters else 0


def sources_of(chosen: Settings) -> Sources:
    return Sources(
        chosen.adapter_root, chosen.source_schemes, chosen.allow_hub, chosen.max_adapter_bytes
    )
