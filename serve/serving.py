"""What every request needs, made once per worker: `app.state.quantserve`; and what the parent asks
of it over their line (serve.heartbeat).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from serve import json_limits, keys, vllm_release
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
from serve.connections import Connections
from serve.errors import (
    Conflict,
    Draining,
    EngineDied,
    EngineStalled,
    NotReady,
    RegistryDown,
    ServeError,
    StoreFailed,
)
from serve.grammars import GrammarTrial
from serve.heartbeat import Beat, Heart, engine_steps
from serve.metrics import Metrics
from serve.open_answers import OpenAnswers
from serve.settings import Settings
from serve.voices import Templates

logger = logging.getLogger(__name__)

ASK_EVERY_S = 1.0  # an idle engine, so that one that stands still is found before it is needed
REFUSALS: dict[type[ServeError], str] = {
    Draining: "this server is shutting down; send the request to another",
    EngineDied: "the engine has ended; another is being started",
    EngineStalled: "the engine does not get on; try again shortly",
    NotReady: "the model is loading; try again shortly",
}
BY_CODE = {kind.code: kind for kind in REFUSALS}


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
        self._open_adapters(engine, state_dir, (base_name, *others))
        self.templates = Templates()
        self.trial: GrammarTrial | None = None
        self.item: json_limits.Item | None = None
        self.layers: list[dict[str, int]] = []  # of every rank: layers by the kernel they have
        self.line_fd: int | None = None  # to the parent, where there is one
        self.connections: Connections | None = None  # where it has a socket
        self.engine_dead: Callable[[], bool] = lambda: False
        self.ask_engine: Callable[[], Awaitable[object]] = _nothing
        self.answers = OpenAnswers()
        self.draining = self.stalled = False
        self.alone = True  # nobody else answers on the socket
        self._ending: type[ServeError] | None = None  # why all answers were told to end
        self.started = int(time.time())
        self._tasks: list[asyncio.Task[None]] = []
        self._untold: dict[str, str] = {}
        self._spare: tempfile.TemporaryDirectory[str] | None = None
        metrics.served = lambda name: name == base_name or self.pool.get(name) is not None
        metrics.open_books(base_name)

    def _open_adapters(self, engine: Engine, state_dir: Path, names: tuple[str, ...]) -> None:
        chosen, metrics = self.settings, self.metrics
        slots = Slots(slots_of(chosen), chosen.adapter_wait)
        self.pool = AdapterPool(engine, slots, names)
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
        self.registry = registry

    async def start(self) -> None:
        """Load what the registry wants and the operator gave, then follow the registry."""
        every_s = self.settings.reconcile_interval
        await self.reconciler.start(every_s)
        giving = [asyncio.create_task(self._give(*each)) for each in self.settings.adapters.items()]
        if giving:
            await asyncio.wait(giving, timeout=START_WAIT_S)
        following = (
            self.reconciler.watch(every_s), self._tell_registry(every_s), self.keys.follow(),
            engine_steps.ask(lambda: self.ask_engine(), ASK_EVERY_S),
        )  # fmt: skip
        self._tasks = [*giving, *map(asyncio.create_task, following)]
        self.metrics.adapters_loaded.set_function(self.pool.__len__)
        self.metrics.slots_pinned.set_function(lambda: self.pool.slots.pinned)
        self.metrics.slot_waiting.set_function(lambda: self.pool.slots.waiting)
        self.metrics.lifetimes.built(
            metadata.version("quantserve"), vllm_release.installed_version()[0]
        )
        self.metrics.ready.set_function(lambda: self.fault() is None)

    async def stop(self) -> None:
        """End what runs beside requests, and let go of the registry."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.reconciler.close()
        if self.trial is not None:
            await self.trial.close()
        await self.pool.close()
        self.registry.close()
        self.templates.close()
        if self._spare is not None:
            self._spare.cleanup()

    def announce(self) -> None:
        """Begin to tell the parent, where there is one, how it goes, and to do what it asks."""
        if self.line_fd is None:
            return
        self.alone = False
        orders: dict[str, Callable[..., object]] = {
            "yours": lambda: setattr(self, "alone", True),
            "drain": self.drain,
            "end": self.end,
            "reload": self.keys.reload,
            "stalled": lambda: setattr(self, "stalled", True),
            "moving": lambda: setattr(self, "stalled", False),
            "past": lambda count, why: self.metrics.lifetimes.note(int(count), why),
        }
        Heart(self.line_fd, self.beat, orders).start()

    def fault(self) -> ServeError | None:
        """Why a new request would not be served now, if it would not."""
        if self.engine_dead():
            return _refusal(EngineDied)
        if self._ending is not None:
            return _refusal(self._ending)
        if self.draining:
            return _refusal(Draining)
        if self.stalled:
            return _refusal(EngineStalled)
        return None if self.alone else _refusal(NotReady)

    def check_open(self) -> None:
        """Raises what `fault` says."""
        fault = self.fault()
        if fault is not None:
            raise fault

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True

    def end(self, why: str) -> None:
        """Tell every client that its answer ends here, by the code of the reason."""
        if self._ending is None:
            self._ending = BY_CODE[why]
            if self.connections is not None:
                self.connections.stop()
            self._tasks.append(asyncio.create_task(self.answers.end_all(_refusal(self._ending))))

    def beat(self) -> Beat:
        """How it goes, for the parent."""
        dead = self.engine_dead()
        if dead:
            self.end(EngineDied.code)
        accepts, waiting = True, len(self.answers)
        if self.connections is not None:
            accepts = self.connections.accepts()
            if self._ending is not None:  # until then an idle client is no reason to wait
                waiting = max(waiting, self.connections.waiting())
        return Beat(accepts, dead, self.draining, waiting, engine_steps.count)

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


def _refusal(kind: type[ServeError]) -> ServeError:
    return kind(REFUSALS[kind])


async def _nothing() -> None:
    """What is asked of no engine."""
