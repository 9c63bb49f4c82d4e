"""Adapters out of object stores: the same for S3, Google Cloud Storage and Azure, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from quant.lora import adapter
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of
from serve.errors import AdapterMissing, AdapterRefused, SourceUnavailable
from tests import variants
from tests.fakes import SHAPES
from tests.lora import held, write_lora
from tests.object_stores import AZURITE_KEY, STORES

NAMES = (adapter.CONFIG, adapter.WEIGHTS)


@dataclass(frozen=True, slots=True)
class Bucket:
    url: str
    files: Any  # the driver, as another program would use it

    def upload(self, folder: Path, name: str) -> str:
        for file in folder.iterdir():
            self.files.pipe(f"adapters/{name}/{file.name}", file.read_bytes())
        return f"{self.url}/{name}"


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, Mapping[str, str]]]:
    with STORES[request.param]() as environment:
        yield request.param, environment


@pytest.fixture
def bucket(
    store: tuple[str, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    scheme, environment = store
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem(scheme, skip_instance_cache=True)
    files.mkdir("adapters")
    yield Bucket(f"{scheme}://adapters", files)
    files.rm("adapters", recursive=True)


def test_what_peft_saved_is_taken_in_and_keeps_its_digest(bucket: Bucket, tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base")
    folder, _ = variants.trained(tmp_path / "lora", base)
    url = bucket.upload(folder, "from-peft")
    taken = Store(tmp_path / "store", base_of(base, 16), Sources()).take_in(url)
    assert taken.digest == adapter.read(folder).digest
    assert held(taken.folder) == {name: (folder / name).read_bytes() for name in NAMES}


def test_what_is_not_there_is_missing(bucket: Bucket, into: Path) -> None:
    with pytest.raises(AdapterMissing, match=r"adapter_config.json is missing"):
        Sources().fetch(f"{bucket.url}/ghost", into)


def test_what_was_changed_since_is_seen(bucket: Bucket, legal: Path, into: Path) -> None:
    with pytest.raises(AdapterMissing):
        Sources().fetch(f"{bucket.url}/legal", into)
    for seed in (1, 2):
        write_lora(legal, SHAPES, seed=seed, rank=seed)
        Sources().fetch(bucket.upload(legal, "legal"), into)
        assert held(into) == held(legal)


def test_a_pickle_is_named(bucket: Bucket, legal: Path, into: Path) -> None:
    (legal / adapter.WEIGHTS).rename(legal / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match=r"adapter_model.bin is a pickle"):
        Sources().fetch(bucket.upload(legal, "legal"), into)


def test_too_many_bytes_are_refused_before_they_are_copied(
    bucket: Bucket, legal: Path, into: Path
) -> None:
    most = (legal / adapter.CONFIG).stat().st_size + 100
    with pytest.raises(AdapterRefused, match=f"larger than {most} bytes"):
        Sources(max_bytes=most).fetch(bucket.upload(legal, "legal"), into)
    assert held(into)[adapter.WEIGHTS] == b""


def test_a_folder_of_a_files_name_is_refused(bucket: Bucket, legal: Path, into: Path) -> None:
    url = bucket.upload(legal, f"odd/{adapter.CONFIG}")
    with pytest.raises(AdapterRefused, match=r"is not a file|is missing"):
        Sources().fetch(url.rpartition("/")[0], into)


def test_a_path_that_climbs_is_refused(bucket: Bucket, legal: Path, into: Path) -> None:
    url = bucket.upload(legal, "legal")
    for climbing in (f"{bucket.url}/team/../legal", url.replace("legal", "team/%2e%2e/legal")):
        with pytest.raises(AdapterRefused, match=r"may not contain '\.\.'"):
            Sources().fetch(climbing, into)


def test_a_bucket_that_is_not_there_is_told(bucket: Bucket, into: Path) -> None:
    with pytest.raises((AdapterMissing, SourceUnavailable)):
        Sources().fetch(f"{bucket.url}-of-nobody/legal", into)


@pytest.mark.parametrize("store", ["az"], indirect=True)  # the other two let everybody in
def test_a_wrong_key_is_told(
    bucket: Bucket, legal: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(legal, "legal")
    wrong = bucket.files.connection_string.replace(AZURITE_KEY, "eHh4" + AZURITE_KEY[4:])
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    type(bucket.files).clear_instance_cache()
    with pytest.raises(SourceUnavailable, match="could not be read"):
        Sources().fetch(url, into)
