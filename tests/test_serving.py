"""What a worker is put together from: adapters given at start, and where things are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serve.errors import Conflict, RegistryDown
from serve.metrics import Metrics
from serve.serving import Serving
from serve.settings import Settings
from tests.fakes import BY, MemoryEngine, write_model


async def started(tmp_path: Path, **chosen: object) -> Serving:
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
    settings = Settings.model_validate(
        {"artifact": model, "state_dir": tmp_path / "state", "reconcile_interval": 0.02, **chosen}
    )
    made = Serving(settings, MemoryEngine(), Metrics(CollectorRegistry()), "base")
    await made.start()
    return made


def served(serving: Serving) -> dict[str, str]:
    return {alias: route.stable.digest for alias, route in serving.pool.live().items()}


async def test_adapters_given_at_start_are_put_into_the_registry(
    tmp_path: Path, folders: list[Path]
) -> None:
    serving = await started(tmp_path, adapters={"legal": str(folders[0])})
    row = await serving.registry.alias("legal")
    assert row is not None and served(serving) == {"legal": row.stable}
    (told,) = await serving.registry.history("legal", 5)
    assert told["who"] == "start"
    await serving.stop()


async def test_the_registry_knows_better_than_the_command_line(
    tmp_path: Path, folders: list[Path]
) -> None:
    given = {"legal": str(folders[0])}
    first = await started(tmp_path, adapters=given)
    changed = await first.catalog.put("legal", str(folders[1]), BY)
    await first.stop()
    again = await started(tmp_path, adapters=given)
    assert served(again) == {"legal": changed.stable}
    await again.stop()


async def test_one_bad_adapter_does_not_keep_the_others_out(
    tmp_path: Path, folders: list[Path]
) -> None:
    given = {"bad": str(tmp_path / "nowhere"), "good": str(folders[0])}
    serving = await started(tmp_path, adapters=given)
    assert list(served(serving)) == ["good"]
    await serving.stop()


async def test_a_server_without_slots_says_so(tmp_path: Path, folders: list[Path]) -> None:
    serving = await started(tmp_path, max_adapters=0)
    with pytest.raises(Conflict, match="--max-adapters is 0"):
        await serving.catalog.put("legal", str(folders[0]), BY)
    await serving.stop()


async def test_replicas_with_a_store_of_their_own_and_one_database_converge_by_themselves(
    tmp_path: Path, folders: list[Path]
) -> None:
    database = f"sqlite:///{tmp_path}/shared.sqlite"
    one, two = [
        await started(
            tmp_path, database_url=database, replica=name, state_dir=tmp_path / name,
            store_dir=tmp_path / f"store-{name}",
        )
        for name in ("one", "two")
    ]  # fmt: skip
    await one.catalog.put("legal", str(folders[0]), BY)
    async with asyncio.timeout(10):
        while served(two) != served(one):  # noqa: ASYNC110 - what another process will do
            await asyncio.sleep(0.01)
    assert len(list((tmp_path / "store-two").iterdir())) == 1
    assert two.metrics.adapters_desired._value.get() == 1
    for serving in (one, two):
        await serving.stop()


async def test_a_fault_of_ours_is_logged_and_the_registry_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serving = await started(tmp_path)
    looked = 0

    async def broken() -> bool:
        nonlocal looked
        looked += 1
        raise ZeroDivisionError

    monkeypatch.setattr(serving.reconciler, "turn", broken)
    async with asyncio.timeout(10):
        while looked < 3:  # noqa: ASYNC110 - the loop has no event for it
            await asyncio.sleep(0.01)
    assert "could not be followed" in caplog.text
    await serving.stop()


async def test_the_bases_name_given_at_start_is_no_adapter(
    tmp_path: Path, folders: list[Path]
) -> None:
    serving = await started(tmp_path, adapters={"base": str(folders[0]), "good": str(folders[1])})
    assert list(served(serving)) == ["good"]
    assert await serving.registry.alias("base") is None
    await serving.stop()


async def test_a_full_disk_leaves_the_base_and_what_was_given_at_start(
    tmp_path: Path, folders: list[Path]
) -> None:
    """A file where the state dir should be: as nobody can write there, root neither."""
    (tmp_path / "state").write_bytes(b"")
    serving = await started(tmp_path, adapters={"legal": str(folders[0])})
    assert list(served(serving)) == ["legal"]
    assert serving.metrics.registry_up._value.get() == 0
    for alias in ("legal", "chat"):
        with pytest.raises(RegistryDown):
            await serving.catalog.put(alias, str(folders[1]), BY)
    version = serving.pool.lease("legal", "anybody")
    assert version is not None and version.stored.folder.is_dir()
    serving.pool.release(version)
    before = served(serving)
    (tmp_path / "state").unlink()  # there is room again
    async with asyncio.timeout(30):
        while not (await registered(serving, "legal")):
            await asyncio.sleep(0.02)
            assert served(serving) == before, "it was not served for a moment"
    await serving.stop()
    assert not version.stored.folder.is_relative_to(tmp_path) and not version.stored.folder.exists()


async def registered(serving: Serving, alias: str) -> bool:
    try:
        return await serving.registry.alias(alias) is not None
    except RegistryDown:
        return False


async def test_a_state_dir_that_lost_its_registry_serves_what_was_last_seen_and_what_is_given(
    tmp_path: Path, folders: list[Path]
) -> None:
    first = await started(tmp_path)
    await first.catalog.put("legal", str(folders[0]), BY)
    await first.reconciler.turn()
    await first.stop()
    first.registry._database._thread.shutdown()  # a look under way ends first
    (tmp_path / "state" / "registry.sqlite").write_bytes(b"no database")
    given = {"legal": str(folders[1]), "more": str(folders[2])}
    again = await started(tmp_path, adapters=given)
    assert served(again) == served(first) | {"more": served(again)["more"]}
    assert (tmp_path / "state" / "registry.sqlite").read_bytes() == b"no database"
    await again.stop()
