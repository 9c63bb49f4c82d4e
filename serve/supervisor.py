"""The parent: owns the listening socket, starts the worker on it, watches it, restarts it.

Imports neither torch nor vLLM: it answers within a second of being started and whenever no worker
accepts, on the same socket and in OpenAI's error shape, until it ends itself. Nothing that a worker
does ends it, and nothing it starts outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from serve import engine_args, keys, lifeline, listening, vllm_release, watch
from serve.errors import Draining, EngineDied, EngineStalled, Forbidden, NotReady
from serve.metrics import Lifetimes
from serve.progress import Progress
from serve.settings import Settings
from serve.waiting_room import WaitingRoom
from serve.watch import Limits, Watch
from serve.worker_process import WorkerProcess

# -P: a folder called serve or quant where the command is typed is not taken for ours.
WORKER = (sys.executable, "-P", "-m", "serve.worker")
STOP_GRACE_S = 10.0  # after the drain, for the worker to let go of its sockets


@dataclass(frozen=True, slots=True)
class Pace:
    """The parent's own times, in seconds."""

    tick_s: float = 0.1
    late_s: float = 0.6  # a beat later than this: the parent answers, so that a second is kept
    farewell_s: float = 2.0  # for clients to be told that their answer ends here
    stop_grace_s: float = STOP_GRACE_S
    pauses_s: tuple[float, ...] = (0.5, 1, 2, 5, 10, 30)
    steady_s: float = 60.0  # a worker that served this long has earned a fresh row of pauses
    recent_s: float = 5.0  # what was logged before that has nothing to do with an end
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class End:
    """Of a worker: a word of metrics.ENDS, and what to tell people."""

    reason: str
    told: str


class Supervisor:
    """Keeps one worker alive on one socket until told to stop.

    `command` is what a worker is started with, before its arguments.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        *,
        verbose: bool,
        command: Sequence[str] = WORKER,
        pace: Pace | None = None,
    ) -> None:
        self._settings, self._say, self._verbose = settings, say, verbose
        limits = Limits(step_s=settings.step_timeout)
        self._command, self._pace = command, pace or Pace(limits=limits)
        self._facts = engine_args.inspect(settings)
        if not self._facts.adapted and settings.max_adapters:
            say("LoRA is off: vLLM's code of this architecture takes no adapters")
            self._settings = settings.model_copy(update={"max_adapters": 0})
        self._keys = keys.load(settings.api_key_file)
        self._encryption = listening.encryption(settings)
        self._stop, self._forced = asyncio.Event(), asyncio.Event()
        self._worker: WorkerProcess | None = None
        self._lifetimes = Lifetimes()
        self._lifetimes.built(metadata.version("quantserve"), vllm_release.installed_version()[0])
        self._restarts, self._last = 0, "none"
        self._drained = self._deaf = False  # by an administrator; for want of descriptors
        self._served_once, self._served_s = False, 0.0  # ever; the last worker
        self._terminal = os.isatty(0)

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code: 2 when the first start failed."""
        listener = listening.bind(self._settings.host, self._settings.port)
        for line in self._facts.parsers.told():
            self._say(line)
        port = listener.getsockname()[1]
        self._settings = self._settings.model_copy(update={"port": port})
        self._url = listening.address(listener, self._settings)
        self._room = WaitingRoom(
            listener,
            self._metrics,
            encryption=self._encryption,
            root_path=self._settings.root_path,
        )
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        await self._answer_alone()
        self._say(f"listening on {self._url}")
        try:
            return await self._keep_one(listener)
        finally:
            await self._room.clear()
            listener.close()

    async def _keep_one(self, listener: socket.socket) -> int:
        failures = 0
        while not self._stop.is_set():
            end = await self._one_worker(listener)
            if self._stop.is_set():
                break
            if not self._served_once and end.reason != "spawn_failed":
                self._say(f"the engine did not start: {end.told}")
                return 2
            failures = 0 if self._served_s > self._pace.steady_s else failures + 1
            pause = self._pace.pauses_s[min(failures, len(self._pace.pauses_s) - 1)]
            self._restarts, self._last = self._restarts + 1, end.reason
            self._lifetimes.note(self._restarts, self._last)
            self._room.fault = NotReady("the model is being started again; try again shortly")
            self._say(f"the worker ended ({end.told}); starting another in {pause:g} s")
            await self._until(self._stop.is_set, pause)
        return 0

    async def _one_worker(self, listener: socket.socket) -> End:
        """From start to end of one worker, and why it ended."""
        self._room.fault = NotReady("the model is loading; try again shortly")
        kills = watch.memory_kills()
        try:
            worker = WorkerProcess.start(
                self._command,
                listener,
                engine_args.environment(self._settings, self._facts),
                Progress(self._say, verbose=self._verbose),
            )
        except OSError as fault:
            return End("spawn_failed", f"no process could be started: {fault.strerror}")
        self._worker = worker
        worker.pulse.order("past", str(self._restarts), self._last)
        if self._drained:  # an administrator's word outlives the worker that took it
            worker.pulse.order("drain")
        try:
            end = await self._attend(worker)
            if self._stop.is_set():
                await self._drain(worker)
        finally:
            await self._answer_alone()
            self._served_s = worker.served_s()
            worker.kill()
            await worker.ended()
            self._worker = None
        self._served_once = self._served_once or worker.ready_at is not None
        return end or self._died(worker, kills)

    async def _attend(self, worker: WorkerProcess) -> End | None:
        """Until it ends (None), is to be ended, or a signal says so (None)."""
        judge, announced = Watch(worker.pid, self._pace.limits), False
        while worker.alive and not self._stop.is_set():
            await self._tick()
            announced = announced or self._announced(worker)
            beat = worker.pulse.beat
            self._drained = self._drained or (beat is not None and beat.drained)
            if beat is not None and beat.engine_dead:
                await self._farewell(worker, EngineDied.code)
                return None
            if judge.due() and (end := await self._judged(worker, judge)):
                return end
        return None

    async def _judged(self, worker: WorkerProcess, judge: Watch) -> End | None:
        """What to end it for, if anything."""
        if worker.ready_at is None:
            verdict = judge.loading(worker.progress.logged)
            return End("start_hung", verdict.hung) if verdict.hung else None
        beat = worker.pulse.beat
        verdict = judge.serving(worker.pulse.heard, beat.steps if beat else 0)
        worker.tell_stalled(stalled=verdict.stalled)
        if not verdict.hung:
            return None
        self._say(f"{verdict.hung}; killing the worker")
        if not verdict.in_engine:
            return End("worker_hung", verdict.hung)
        await self._farewell(worker, EngineStalled.code)
        return End("engine_hung", verdict.hung)

    def _announced(self, worker: WorkerProcess) -> bool:
        """Whether it has become ready, which is said."""
        if worker.ready_at is None:
            return False
        took = worker.ready_at - worker.started
        self._say(f"ready after {took:.1f} s: {self._url}/v1 (metrics at {self._url}/metrics)")
        self._room.fault = NotReady("the server is too busy for new requests; try again shortly")
        return True

    def _died(self, worker: WorkerProcess, kills: int) -> End:
        """Why it ended by itself, out of its status and the last that it logged."""
        serving, beat = worker.ready_at is not None, worker.pulse.last
        engine = serving and beat is not None and beat.engine_dead
        since = time.monotonic() - self._pace.recent_s if serving else 0.0
        # Who is killed says nothing: what was logged last was about something else.
        cause = "" if worker.killed and not engine else worker.progress.cause(since)
        reason = "engine_died" if engine else "worker_died" if serving else "start_failed"
        if (worker.killed or engine) and watch.memory_kills() > kills:
            reason, cause = "out_of_memory", "the kernel killed it for want of memory"
        elif cause.startswith(("MemoryError", "OutOfMemoryError")):
            reason = "out_of_memory"
        whose = "the engine died" if engine else ""
        return End(reason, ": ".join(filter(None, (whose, cause))) or worker.status)

    async def _farewell(self, worker: WorkerProcess, why: str) -> None:
        """Have its clients told that their answers end, as far as it can still tell them."""
        self._room.fault = NotReady("the model is being started again; try again shortly")
        await self._answer_alone()
        await self._end_answers(worker, why)

    async def _end_answers(self, worker: WorkerProcess, why: str) -> None:
        """Until it has told them, by a beat that it sent after it was asked to."""
        worker.pulse.order("end", why)
        asked = time.monotonic()
        await self._until(lambda: worker.quiet_since(asked), self._pace.farewell_s)

    async def _drain(self, worker: WorkerProcess) -> None:
        """New requests are refused at once, running ones get `drain_timeout` seconds."""
        self._room.fault = Draining("this server is shutting down; send the request to another")
        if worker.ready_at is None:
            return
        drain_s, began = self._settings.drain_timeout, time.monotonic()
        self._say(f"draining: up to {drain_s:g} s for running requests")
        worker.pulse.order("drain")
        if not await self._until(lambda: worker.quiet_since(began), drain_s):
            await self._end_answers(worker, Draining.code)
        worker.terminate()
        left = began + drain_s + self._pace.stop_grace_s - time.monotonic()
        await self._until(lambda: not worker.alive, left)

    async def _until(self, true: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in that time; a second signal cuts the wait short."""
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end and not self._forced.is_set():
            await self._tick()
        return true()

    async def _tick(self) -> None:
        """Let time pass: somebody accepts, whatever the worker does, and orphans are buried."""
        await asyncio.sleep(self._pace.tick_s)
        worker = self._worker
        lifeline.bury_orphans(worker.pid if worker else 0)
        if worker is not None and worker.accepts and not worker.pulse.late(self._pace.late_s):
            self._room.close()
            worker.tell_alone()
            return
        if worker is not None and worker.serves and not (self._room.is_open or self._stop.is_set()):
            self._say("the worker takes no new connections; answering in its place")
        await self._answer_alone()

    async def _answer_alone(self) -> None:
        """Open the waiting room; where nothing is left to do that with, the next tick tries."""
        try:
            await self._room.open()
        except OSError as fault:
            if not self._deaf:
                self._say(f"cannot answer until a worker does: {fault.strerror}")
            self._deaf = True
        else:
            self._deaf = False

    def _metrics(self, authorization: str | None) -> bytes:
        """Our own, for who may see them by the key file as it is now."""
        if self._keys.changed():
            self._say(self._keys.reload())
        caller = self._keys.caller(authorization)
        if not caller.may("metrics"):
            raise Forbidden(f"key {caller.name!r} lacks the scope 'metrics'")
        return self._lifetimes.page()

    def _on_signal(self) -> None:
        """The first signal drains; the second kills what is left."""
        if self._stop.is_set():
            self._forced.set()
        self._stop.set()

    def _on_hangup(self) -> None:
        """Read the key file again. Where it was the terminal that went away: stop."""
        if self._terminal and not os.isatty(0):
            self._on_signal()
            return
        self._say(self._keys.reload())
        if self._worker is not None:
            self._worker.pulse.order("reload")
