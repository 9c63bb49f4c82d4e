"""`proof.card`: a README that says what the manifest knows, and spares one it did not write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.artifact import LayerReport, Manifest, MergedAdapter
from quant.proof import card
from tests.test_artifact import FACTS
from tests.test_evidence import fidelity, quiz, text

LORA = MergedAdapter(name="legal", digest="9" * 64, rank=8, modules=14)
LAYER = LayerReport(name="model.layers.0.up_proj", loss=0.001, rounding_loss=0.004, damping=0.01)


def facts(**changes: Any) -> Manifest:
    sized = {"bytes_before": 269_000_000, "bytes_after": 114_500_000, "layers": (LAYER,)}
    return FACTS.model_copy(update={**sized, **changes})


def test_it_says_what_the_artifact_is_and_how_to_serve_it() -> None:
    page = card.text(facts(adapters=(LORA,)), "mine-w4a16")
    assert "\n# mine-w4a16\n" in page
    assert "269.0 MB became 114.5 MB (2.35 times smaller)" in page
    for fact in (FACTS.source, FACTS.architecture, FACTS.parent.weights, FACTS.calibration.digest,
                 f"legal, rank 8, `{'9' * 64}`", "losing 0.250 of", LAYER.name):  # fmt: skip
        assert fact in page
    assert "\nquantserve serve ./mine-w4a16 " in page and "\nvllm serve ./mine-w4a16 " in page
    assert "Not measured yet: `quantserve compare" in page


def test_one_format_is_told_in_a_word_and_many_are_counted() -> None:
    assert card.scheme(facts()) == "w4a16, groups of 64"
    wide = LAYER.model_copy(update={"name": "b", "bits": 8, "group": 128})
    whole = LAYER.model_copy(update={"name": "c", "bits": 16})
    mixed = facts(layers=(LAYER, LAYER, wide, whole), bits_per_weight=4.512)
    assert card.scheme(mixed) == (
        "w4a16, 4.51 bits per weight: 2 layers 4-bit groups of 64, 1 layer 8-bit groups of 128,"
        " 1 layer full precision"
    )
    assert f"| scheme | {card.scheme(mixed)} |" in card.text(mixed, "mine")


def test_the_table_holds_every_figure_and_its_interval() -> None:
    page = card.text(facts(fidelity=fidelity(text(), quiz())), "mine")
    assert "| mean KL(parent \\|\\| artifact), nats | 0.05 | 0.04 .. 0.06 |" in page
    assert "| right to wrong | 4.0% | 3.0% .. 5.0% |" in page
    assert "book.txt: 16,352 predictions" in page and "exam.jsonl: 1,200 questions" in page
    assert "Not measured yet" not in page


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    named = facts(fidelity=fidelity(text("odd|na\nme.txt")), adapters=(LORA,), source="a|b")
    for block in card.text(named, "mine").split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


@pytest.mark.parametrize(
    ("source", "base"), [("org/model-1B", "org/model-1B"), ("./model", None), ("demo", None)]
)
def test_the_front_matter_is_yaml_a_hub_reads(source: str, base: str | None) -> None:
    _, front, _ = card.text(facts(source=source), "mine").split("---\n", 2)
    parsed = yaml.safe_load(front)
    assert parsed.get("base_model") == base
    assert {"quantserve", "vllm", FACTS.scheme} <= set(parsed["tags"])


def test_its_own_card_is_written_again_and_anothers_is_left(tmp_path: Path) -> None:
    assert card.write(tmp_path, facts(), "mine")
    assert card.write(tmp_path, facts(fidelity=fidelity(text())), "mine")
    page = (tmp_path / card.NAME).read_text()
    assert page == card.text(facts(fidelity=fidelity(text())), "mine")
    (tmp_path / card.NAME).write_text("# What I wrote\n")
    assert not card.write(tmp_path, facts(), "mine")
    assert (tmp_path / card.NAME).read_text() == "# What I wrote\n"
    assert [path.name for path in tmp_path.iterdir()] == [card.NAME]
