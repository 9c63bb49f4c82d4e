"""`quant.finite`, and what is held to it: every number of a parent before anything is solved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant import finite
from quant.errors import SourceError
from quant.intake import source
from tests import tiny

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@given(raw=st.binary(max_size=64), dtype=st.sampled_from(sorted(DTYPES)), huge=st.booleans())
def test_bits_are_finite_where_torch_says_so(raw: bytes, dtype: str, huge: bool) -> None:  # noqa: FBT001
    size = DTYPES[dtype].itemsize
    whole = raw[: len(raw) // size * size]
    if huge and whole:  # the largest exponents, which chance hardly draws
        whole = whole[:-2] + bytes([whole[-2] | 0xF0, whole[-1] | 0x7F])
    if not whole:
        assert finite.are_finite(whole, dtype)
        return
    numbers = torch.frombuffer(bytearray(whole), dtype=DTYPES[dtype])
    assert finite.are_finite(whole, dtype) == bool(numbers.isfinite().all())


def test_integers_are_not_looked_at() -> None:
    assert finite.are_finite(b"\xff" * 8, "I32") and finite.are_finite(b"\x7f\xff", "U8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_tensor_that_is_not_finite_is_named_when_a_model_is_opened(
    parents: dict[torch.dtype, Path], name: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    held = load_file(parents[dtype] / "model.safetensors")
    held[name].view(-1)[-1] = value  # of an embedding, in a row that no token reads
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in parents[dtype].glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SourceError) as refused:
        source.open(str(tmp_path), cache=tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / 'model.safetensors'}: {name} holds numbers that are not")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    home = tmp_path_factory.mktemp("parents")
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return {kind: tiny.model_folder(home / str(kind), dtype=kind) for kind in kinds}
