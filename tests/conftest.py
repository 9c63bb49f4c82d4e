"""What tests of the server share: a real PostgreSQL, both kinds of database, adapters, a server."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serve.metrics import Metrics
from serve.serving import Serving
from serve.settings import Settings
from tests.answering import Answering, answering
from tests.fakes import KEYS, SHAPES, MemoryEngine, write_model
from tests.lora import write_lora
from tests.postgres import Postgres, running


@pytest.fixture(autouse=True)
def _warnings_are_logged() -> Iterator[None]:
    """Whoever builds vLLM's app has the root logger turned down to errors."""
    logging.root.setLevel(logging.WARNING)
    yield
    logging.root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.fresh()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Adapters that fit tests.fakes.BASE."""
    return [write_lora(tmp_path / f"l{seed}", SHAPES, seed=seed) for seed in range(4)]


@pytest.fixture
def legal(tmp_path: Path) -> Path:
    """An adapter's folder, to be fetched from somewhere."""
    return write_lora(tmp_path / "legal", SHAPES)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """An empty folder to fetch it into."""
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    (tmp_path / "keys").write_text(KEYS)
    (tmp_path / "keys").chmod(0o600)
    chosen = Settings(
        artifact=write_model(tmp_path / "model"),
        api_key_file=tmp_path / "keys",
        state_dir=tmp_path / "state",
        adapter_wait=0.1,
    )
    made = Serving(chosen, MemoryEngine(), Metrics(CollectorRegistry()), "base")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def live(serving: Serving) -> AsyncIterator[Answering]:
    """It over real HTTP, with a stand-in for the model."""
    async with answering(serving) as made:
        yield made
