"""The store beside the event loop: what hangs far away holds up nothing here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from serve.adapters import intake as module
from serve.adapters.intake import Intake
from serve.adapters.sources import FETCHES, Sources
from serve.adapters.store import Store
from serve.errors import AdapterRefused, ServeError, SourcesBusy, StoreFailed
from tests.fakes import BASE


class Hanging(LocalFileSystem):  # type: ignore[misc]
    """A store that answers when the test lets it."""

    protocol = "slow"
    asked = threading.Semaphore(0)
    gate = threading.Event()

    def info(self, path: str, **_: Any) -> Any:
        self.asked.release()
        self.gate.wait(60)
        raise FileNotFoundError(path)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    Hanging.gate, Hanging.asked = threading.Event(), threading.Semaphore(0)
    fsspec.register_implementation("slow", Hanging, clobber=True)
    yield Hanging
    Hanging.gate.set()


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    made = Intake(Store(tmp_path / "store", BASE, Sources(schemes=("file", "slow"))))
    yield made
    made.close()


async def ask(intake: Intake, hanging: type[Hanging], sources: list[str]) -> list[Any]:
    """Fetches of these sources, each of which hangs when this returns."""
    tasks = [asyncio.create_task(intake.take_in(source)) for source in sources]
    for _ in sources:
        assert await asyncio.to_thread(hanging.asked.acquire, timeout=300)
    return tasks


async def ended(tasks: list[Any], hanging: type[Hanging]) -> None:
    hanging.gate.set()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ServeError)


async def test_sources_that_hang_do_not_hold_up_folders_or_the_store(
    intake: Intake, hanging: type[Hanging], legal: Path
) -> None:
    tasks = await ask(intake, hanging, [f"slow://host{n}/legal" for n in range(FETCHES)])
    async with asyncio.timeout(30):
        stored = await intake.take_in(str(legal))
        assert await intake.find(stored.digest) == stored
        assert await asyncio.to_thread(lambda: 1) == 1  # the loop's own threads are free
    await ended(tasks, hanging)


async def test_one_host_that_hangs_leaves_room_for_another(
    intake: Intake, hanging: type[Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = await ask(intake, hanging, ["slow://one/legal"] * module.PER_HOST)
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    with pytest.raises(SourcesBusy, match="slow://one") as refusal:
        await intake.take_in("slow://one/chat", patience_s=0.05)
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, 10)
    tasks += await ask(intake, hanging, ["slow://two/legal"])
    await ended(tasks, hanging)


async def test_there_is_a_bound_on_all_of_them_and_room_again_when_they_end(
    intake: Intake, hanging: type[Hanging]
) -> None:
    tasks = await ask(intake, hanging, [f"slow://host{n}/legal" for n in range(FETCHES)])
    with pytest.raises(SourcesBusy):
        await intake.take_in("slow://other/legal", patience_s=0.05)
    await ended(tasks, hanging)
    with pytest.raises(AdapterRefused, match="missing"):
        await intake.take_in("slow://other/legal", patience_s=30)


async def test_a_caller_that_leaves_does_not_free_the_thread(
    intake: Intake, hanging: type[Hanging]
) -> None:
    tasks = await ask(intake, hanging, ["slow://one/legal"] * module.PER_HOST)
    tasks[0].cancel()
    with suppress(asyncio.CancelledError):
        await tasks[0]
    with pytest.raises(SourcesBusy):
        await intake.take_in("slow://one/chat", patience_s=0.05)
    await ended(tasks[1:], hanging)


async def test_whoever_follows_the_registry_waits_for_room(
    intake: Intake, hanging: type[Hanging]
) -> None:
    tasks = await ask(intake, hanging, ["slow://one/legal"] * module.PER_HOST)
    waiting = asyncio.create_task(intake.take_in("slow://one/chat", patience_s=None))
    await ended(tasks, hanging)
    with pytest.raises(AdapterRefused, match="missing"):
        await waiting


async def test_a_folder_that_cannot_be_read_has_one_name(intake: Intake, legal: Path) -> None:
    stored = await intake.take_in(str(legal))
    config = stored.folder / "adapter_config.json"
    config.unlink()
    config.symlink_to("/proc/self/mem")  # a file that is there, and cannot be read
    with pytest.raises(StoreFailed, match=stored.digest[:12]):
        await intake.find(stored.digest)
