"""`quant.proof.first_answers`: how an artifact begins its answers, as both whole models would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant import pipeline, recipe, scribe, tokens
from quant.artifact import Manifest
from quant.intake import source
from quant.pipeline import Order
from quant.proof import first_answers, replica
from quant.proof.evidence import FirstAnswers
from tests import tiny
from tests.test_pipeline import Told

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
SMALL = {"samples": 4, "length": 32}


def quantized(tmp_path: Path, family: str, scheme: str) -> tuple[Manifest, Told]:
    told, parent = Told(), tiny.model_folder(tmp_path / "parent", family)
    order = Order(str(parent), tmp_path / "out", cache=tmp_path / "cache")
    made = pipeline.run(recipe.build({"scheme": scheme, **SMALL}), order, told)
    return made, told


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "w4a16"), ("mixtral", "w4a16"), ("gemma3_text", "w8a8")]
)
def test_what_is_found_is_what_both_whole_models_say(
    family: str, scheme: str, tmp_path: Path
) -> None:
    made, told = quantized(tmp_path, family, scheme)
    opened = source.open(str(tmp_path / "parent"), cache=tmp_path / "cache")
    parent = replica.of_parent(opened, CPU)
    artifact = replica.of_artifact(opened, tmp_path / "out", made, CPU)
    differ, distances = 0, []
    with torch.inference_mode():
        for ids in scribe.questions(tokens.load_tokenizer(opened.folder)):
            before, after = (
                model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                for model in (parent, artifact)
            )
            differ += int(before.argmax() != after.argmax())
            distances.append(float((before.exp() * (before - after)).sum()))
    found = made.first_answers
    assert found is not None
    assert found.questions == len(distances)
    assert found.mean_kl == pytest.approx(sum(distances) / len(distances), rel=1e-3, abs=1e-7)
    assert abs(found.differ - differ) <= 1  # a near tie
    assert any(str(found) in line for line in told.lines)


def test_a_model_that_takes_no_question_is_not_asked(tmp_path: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent", "llama")
    (parent / "chat_template.jinja").write_text("{{ raise_exception('I am asked nothing') }}")
    (tmp_path / "text.jsonl").write_text('{"text": "the quick brown fox jumps"}\n' * 20)
    order = Order(
        str(parent), tmp_path / "out", calibration_file=tmp_path / "text.jsonl", cache=tmp_path
    )
    assert pipeline.run(recipe.build(SMALL), order, Told()).first_answers is None


def test_a_near_artifact_is_told_in_one_line() -> None:
    found = FirstAnswers(questions=96, differ=4, mean_kl=0.01)
    line = first_answers.told(found, manifest("w4a16", 64), {576})
    assert line == "4 of 96 answers begin otherwise than the parent's (mean KL 0.01 nats)"


@pytest.mark.parametrize(("differ", "kl"), [(5, 0.01), (0, 0.06)])
def test_a_far_artifact_is_a_warning_that_says_what_is_closer(differ: int, kl: float) -> None:
    found = FirstAnswers(questions=96, differ=differ, mean_kl=kl)
    line = first_answers.told(found, manifest("w4a16", 64), {576, 1536})
    assert line.startswith(f"warning: {found}: that is far")
    assert line.endswith("--group-size 32, --bits-per-weight 5, --scheme w8a16")


@pytest.mark.parametrize(
    ("scheme", "group", "bits", "ways"),
    [
        ("w4a16", 32, None, "--bits-per-weight 5, --scheme w8a16"),
        ("w4a16", 64, 5.02, "--bits-per-weight 6, --scheme w8a16"),
        ("w4a16", 64, 15.5, "--scheme w8a16"),
        ("w8a8", -1, None, "--bits-per-weight 9, --scheme w8a16"),
        ("w8a8", -1, 11.9, "--bits-per-weight 12, --scheme w8a16"),
        ("w8a16", 128, None, "--group-size 32"),
        ("w8a16", 32, None, "--refine 8"),
    ],
)
def test_what_is_closer_is_never_what_was_asked_for(
    scheme: str, group: int, bits: float | None, ways: str
) -> None:
    far = FirstAnswers(questions=96, differ=50, mean_kl=1.0)
    assert first_answers.told(far, manifest(scheme, group, bits), {64}).endswith(f"closer: {ways}")


def manifest(scheme: str, group: int, bits: float | None = None) -> Manifest:
    """As much of one as is asked for."""
    known: dict[str, Any] = {
        "scheme": scheme, "bits": 4 if scheme == "w4a16" else 8, "group_size": group,
        "bits_per_weight": bits,
        "recipe": {"bits_per_weight": bits},
    }  # fmt: skip
    return Manifest.model_construct(None, **known)
