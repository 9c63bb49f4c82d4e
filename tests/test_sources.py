"""Where adapters may come from: folders, file URLs, hub ids; and what is kept out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry as fsspec_registry

from serve.adapters.sources import Sources
from serve.errors import AdapterRefused
from tests.fakes import SHAPES
from tests.lora import write_lora

FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    write_lora(folder / "team" / "legal", SHAPES)
    return folder


def fetched(sources: Sources, source: str, into: Path) -> set[str]:
    sources.fetch(source, into)
    return {path.name for path in into.iterdir()}


@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost"])
def test_an_absolute_path_with_and_without_a_root(root: Path, into: Path, prefix: str) -> None:
    source = f"{prefix}{root}/team/legal"
    assert fetched(Sources(), source, into) == fetched(Sources(root), source, into) == FILES


def test_a_relative_path_is_under_the_root(root: Path, into: Path) -> None:
    assert fetched(Sources(root), "team/legal", into) == FILES
    with pytest.raises(AdapterRefused, match="not absolute"):
        Sources().fetch("team/legal", into)


def test_a_percent_encoded_file_url(root: Path, into: Path) -> None:
    (root / "team").rename(root / "a team")
    assert fetched(Sources(root), f"file://{root}/a%20team/legal", into) == FILES


def outside(root: Path) -> str:
    return str(write_lora(root.parent / "other", SHAPES))


def beside(root: Path) -> str:
    return str(write_lora(root.parent / "root2", SHAPES))


def dots(root: Path) -> str:
    return f"{root}/team/../../other"


def encoded_dots(root: Path) -> str:
    return f"file://{root}/%2e%2e/other"


def linked_folder(root: Path) -> str:
    write_lora(root.parent / "other", SHAPES)
    (root / "link").symlink_to(root.parent / "other")
    return str(root / "link")


@pytest.mark.parametrize("lead", [outside, beside, dots, encoded_dots, linked_folder])
def test_nothing_outside_the_root_is_read(root: Path, into: Path, lead: object) -> None:
    assert callable(lead)
    with pytest.raises(AdapterRefused, match=r"not under|\.\."):
        Sources(root).fetch(lead(root), into)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_linked_file_is_refused(root: Path, into: Path, name: str) -> None:
    file = root / "team" / "legal" / name
    file.rename(root.parent / "secret")
    file.symlink_to(root.parent / "secret")
    with pytest.raises(AdapterRefused, match="symbolic link") as refusal:
        Sources(root).fetch("team/legal", into)
    assert refusal.value.param == name


def test_templates_beside_the_default_come_along_and_not_by_a_link(root: Path, into: Path) -> None:
    name = "additional_chat_templates/tool_use.jinja"
    file = root / "team" / "legal" / name
    file.parent.mkdir()
    file.write_text("{{ tools }}")
    Sources(root).fetch("team/legal", into)
    assert (into / name).read_text() == "{{ tools }}"
    file.parent.rename(root.parent / "secret")
    file.parent.symlink_to(root.parent / "secret")
    with pytest.raises(AdapterRefused, match="additional_chat_templates") as refusal:
        Sources(root).fetch("team/legal", into)
    assert refusal.value.param == name


def test_a_pipe_is_refused_and_not_waited_for(root: Path, into: Path) -> None:
    weights = root / "team" / "legal" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(AdapterRefused, match="not a plain file"):
        Sources(root).fetch("team/legal", into)


def test_more_bytes_than_allowed_are_refused_before_they_are_copied(root: Path, into: Path) -> None:
    weights = root / "team" / "legal" / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(50 << 30)  # sparse
    with pytest.raises(AdapterRefused, match="QUANTSERVE_MAX_ADAPTER_BYTES"):
        Sources(root).fetch("team/legal", into)
    assert (into / weights.name).stat().st_size == 0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("ftp://host/a", "'ftp' is not allowed"),
        ("http://host/a", "'http' is not allowed"),
        ("simplecache::s3://b/a", "not allowed"),
        ("file://otherhost/a", "another host"),
        ("hf://owner/name", "QUANTSERVE_ALLOW_HUB"),
        ("owner/name", "QUANTSERVE_ADAPTER_ROOT"),
        ("a\0b", r"may not contain"),
    ],
)
def test_what_is_not_allowed_is_named(into: Path, source: str, reason: str) -> None:
    with pytest.raises(AdapterRefused, match=reason):
        Sources().fetch(source, into)


def test_a_scheme_can_be_taken_from_the_list(root: Path, into: Path) -> None:
    with pytest.raises(AdapterRefused, match="allowed: s3"):
        Sources(root, schemes=("s3",)).fetch("team/legal", into)


def test_a_store_whose_driver_is_missing_says_what_to_install(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(fsspec_registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as Python notes what cannot be imported
    with pytest.raises(AdapterRefused, match=r"quantserve\[gcs\]"):
        Sources().fetch("gs://bucket/legal", into)


def test_a_folder_under_the_root_is_meant_before_a_hub_id(root: Path, into: Path) -> None:
    assert fetched(Sources(root, hub=True), "team/legal", into) == FILES


@pytest.mark.parametrize("source", ["hf://owner", "hf://owner/a b", "hf://o/n/deeper"])
def test_what_is_no_hub_id_is_refused(into: Path, source: str) -> None:
    with pytest.raises(AdapterRefused, match="not a hub id"):
        Sources(hub=True).fetch(source, into)
