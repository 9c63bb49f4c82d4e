"""What a parent may believe of its worker, and from when on."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

from serve.heartbeat import Beat, Pulse
from serve.progress import Progress
from serve.worker_process import WorkerProcess


async def heard(worker: WorkerProcess, line: socket.socket, open_answers: int) -> float:
    """Send a beat from the other end; when it arrived."""
    before = worker.pulse.heard
    beat = Beat(accepts=True, engine_dead=False, drained=False, open=open_answers, steps=1)
    line.send(beat.packed())
    async with asyncio.timeout(60):
        while worker.pulse.heard == before:  # noqa: ASYNC110 - what is heard is no event
            await asyncio.sleep(0.01)
    return worker.pulse.heard


async def test_a_worker_is_quiet_by_a_beat_that_it_sent_after_the_order() -> None:
    """One from before tells of nobody who has come since."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output, end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # noqa: ASYNC220 - starts in a moment
    worker = WorkerProcess(process, Pulse(ours), Progress(lambda _: None, verbose=False), output)
    try:
        at = await heard(worker, theirs, open_answers=0)
        assert not worker.quiet_since(at) and worker.quiet_since(at - 1)
        at = await heard(worker, theirs, open_answers=1)
        assert not worker.quiet_since(at - 1)
        process.kill()
        process.wait()
        assert worker.quiet_since(at)
    finally:
        process.kill()
        os.close(end)
        theirs.close()
        await worker.ended()
        assert process.stdin
        process.stdin.close()
