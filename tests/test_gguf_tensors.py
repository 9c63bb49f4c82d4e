"""Tensors of a GGUF file are read a few rows at a time, and whole all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quantize

from quant.errors import SourceError
from quant.intake import gguf, gguf_tensors, source
from quant.intake.gguf_header import Place
from tests import tiny, tiny_gguf


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    tiny.tokenizer(tmp_path)
    path = tmp_path / "model.gguf"
    return tiny_gguf.write(path, tiny.model("qwen2_moe"), tmp_path, kind=GGMLQuantizationType.Q8_0)


def test_where_reading_pauses_changes_nothing(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, weights = gguf.model(mixture)
    whole = {name: weight.read() for name, weight in weights.items()}
    monkeypatch.setattr(gguf_tensors, "CHUNK", 200)
    for name, weight in weights.items():
        assert torch.equal(weight.read(), whole[name]), name


def test_no_more_is_dequantized_at_once_than_a_chunk(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    rows = gguf_tensors.rows

    def watched(path: Path, place: Place, first: int, count: int) -> object:
        asked.append(count * place.shape[-1])
        return rows(path, place, first, count)

    monkeypatch.setattr(gguf_tensors, "CHUNK", 1000)
    monkeypatch.setattr(gguf_tensors, "rows", watched)
    _, _, weights = gguf.model(mixture)
    total = sum(weight.read().numel() for weight in weights.values())
    assert max(asked) <= 1000 and sum(asked) == total


def test_every_type_that_the_package_decodes_is_read(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 4 * 256, dtype=np.float32).reshape(4, 256)
    for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        stored = quantize(values, GGMLQuantizationType[kind])
        path = tmp_path / kind
        path.write_bytes(b"head" + stored.tobytes())
        place = Place((4, 256), GGMLQuantizationType[kind], 4, stored.nbytes)
        part = gguf_tensors.rows(path, place, 1, 2)
        assert np.abs(part - values[1:3]).max() < 0.1, kind


def test_a_type_that_nothing_decodes_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(292))
    place = Place((1, 256), GGMLQuantizationType.Q8_K, 0, 292)
    with pytest.raises(SourceError, match="Q8_K cannot be dequantized"):
        gguf_tensors.rows(tmp_path / "file", place, 0, 1)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    path = tiny_gguf.write(tmp_path / "model.gguf", model, tmp_path)
    with pytest.raises(SourceError, match=r"model\.norm\.weight holds numbers that are not finite"):
        gguf.folder(path, tmp_path / "cache", source.quiet)
