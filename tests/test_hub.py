"""Adapters by hub id, read by huggingface_hub from a fake hub (see tests/hub.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from quant.lora import adapter
from serve.adapters.sources import Sources
from serve.errors import AdapterMissing, AdapterRefused, SourceUnavailable
from tests import hub as fake
from tests.fakes import BY, SHAPES, replica
from tests.hub import Hub
from tests.lora import held, write_lora

ALLOWED = Sources(hub=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake.running() as hub:
        # What HF_ENDPOINT sets, which huggingface_hub reads when it is imported.
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.mark.parametrize("source", ["owner/legal", "hf://owner/legal", "owner/legal@v1"])
def test_an_id_is_fetched_at_the_commit_it_names_now(
    hub: Hub, legal: Path, into: Path, source: str
) -> None:
    commit = hub.push("owner/legal", legal, "v1" if source.endswith("@v1") else "main")
    assert ALLOWED.fetch(source, into) == f"hf://owner/legal@{commit}"
    assert held(into) == held(legal)
    read = [path for path in hub.asked if "/resolve/" in path]
    assert read
    assert all(f"/resolve/{commit}/" in path for path in read)


def test_a_template_for_tools_comes_along(hub: Hub, legal: Path, into: Path) -> None:
    beside = "additional_chat_templates/tool_use.jinja"
    (legal / beside).parent.mkdir()
    (legal / beside).write_text("{{ tools }}")
    hub.push("owner/legal", legal)
    ALLOWED.fetch("owner/legal", into)
    assert (into / beside).read_text() == "{{ tools }}"


def test_a_commit_stays_what_it_was_and_a_branch_does_not(
    hub: Hub, legal: Path, into: Path
) -> None:
    hub.push("owner/legal", legal)
    before = ALLOWED.fetch("owner/legal", into)
    old = held(into)
    hub.push("owner/legal", write_lora(legal, SHAPES, seed=1, rank=2))
    assert ALLOWED.fetch("owner/legal", into) != before
    assert held(into) == held(legal) != old
    assert ALLOWED.fetch(before, into) == before
    assert held(into) == old


async def test_another_replica_fetches_what_the_first_one_took(
    hub: Hub, legal: Path, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    first = replica(tmp_path / "one", database, sources=ALLOWED)
    commit = hub.push("owner/legal", legal)
    await first.reconciler.turn()
    await first.catalog.put("legal", "owner/legal", BY)
    hub.push("owner/legal", write_lora(legal, SHAPES, seed=1))
    second = replica(tmp_path / "two", database, name="two", sources=ALLOWED)
    await second.reconciler.turn()
    assert second.published() == first.published() != {}
    snapshot = await second.registry.snapshot()
    assert {record.source for record in snapshot.records.values()} == {f"hf://owner/legal@{commit}"}


def test_too_many_bytes_are_refused_before_they_are_asked_for(
    hub: Hub, legal: Path, into: Path
) -> None:
    hub.push("owner/legal", legal)
    most = (legal / adapter.CONFIG).stat().st_size + 100
    with pytest.raises(AdapterRefused, match=f"larger than {most} bytes"):
        Sources(hub=True, max_bytes=most).fetch("owner/legal", into)
    assert not [path for path in hub.asked if "safetensors" in path or "/large/" in path]


def test_nothing_is_asked_where_the_hub_is_not_allowed(hub: Hub, legal: Path, into: Path) -> None:
    hub.push("owner/legal", legal)
    with pytest.raises(AdapterRefused, match="QUANTSERVE_ALLOW_HUB"):
        Sources().fetch("hf://owner/legal", into)
    assert hub.asked == []


def test_a_private_or_gated_one_says_what_to_do(
    hub: Hub, legal: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("owner/private", legal)
    hub.push("owner/gated", legal)
    hub.private.add("owner/private")
    hub.gated.add("owner/gated")
    for source in ("owner/private", "owner/gated", "owner/nothing"):
        with pytest.raises(AdapterMissing, match=r"check the name, or start .* HF_TOKEN"):
            ALLOWED.fetch(source, into)
    monkeypatch.setenv("HF_TOKEN", fake.TOKEN)
    for source in ("owner/private", "owner/gated"):
        ALLOWED.fetch(source, into)
        assert held(into) == held(legal)


def test_a_revision_that_is_not_there_is_told(hub: Hub, legal: Path, into: Path) -> None:
    hub.push("owner/legal", legal)
    with pytest.raises(AdapterMissing, match="no such revision"):
        ALLOWED.fetch("owner/legal@v9", into)


def test_a_pickle_is_named(hub: Hub, legal: Path, into: Path) -> None:
    (legal / adapter.WEIGHTS).rename(legal / "adapter_model.bin")
    hub.push("owner/legal", legal)
    with pytest.raises(AdapterRefused, match=r"adapter_model.bin is a pickle"):
        ALLOWED.fetch("owner/legal", into)


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_adapter(
    hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match="could not be read"):
        ALLOWED.fetch("owner/legal", into)
    assert hub.asked == []
