"""What llama.cpp's converter makes of rotary settings is found again, or nobody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quant.errors import SourceError
from quant.intake import gguf_header, gguf_rope
from quant.intake.gguf_keys import Keys
from tests import tiny_gguf


def keys(path: Path, edit: tiny_gguf.Edit) -> Keys:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(131_072)
    edit(writer)
    writer.add_tensor("a", np.ones(1, np.float32))
    return Keys(gguf_header.read(tiny_gguf.finish(writer)))


def frequencies(head: int, rope: dict[str, Any]) -> torch.Tensor:
    config = LlamaConfig(head_dim=head, rope_parameters=dict(rope), max_position_embeddings=131_072)
    made: torch.Tensor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]
    return made


@pytest.mark.parametrize("head", [16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("factor", "low", "high", "context"),
    [
        (8.0, 1.0, 4.0, 8192),
        (32.0, 1.0, 4.0, 8192),
        (16.0, 1.0, 4.0, 64),
        (8.0, 1.0, 4.0, 6000),
        (3.0, 2.0, 6.0, 4096),
        (8.0, 1.0, 16.0, 2048),
    ],
)
def test_llama_3s_positions_are_found_in_their_factors(
    head: int, theta: float, factor: float, low: float, high: float, context: int, tmp_path: Path
) -> None:
    """Whatever made them: the frequencies are the same ones."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    factors = tiny_gguf.llama3_factors(rope, head)

    def edit(writer: GGUFWriter) -> None:
        writer.add_rope_freq_base(theta)
        writer.add_tensor("rope_freqs.weight", factors)

    found = gguf_rope.parameters(keys(tmp_path / "model.gguf", edit), head)
    if found["rope_type"] == "default":
        assert (factors == 1).all()
        return
    assert torch.allclose(frequencies(head, found), frequencies(head, rope), rtol=3e-4)
    if (head, low) == (128, 1.0) and context == 8192:
        assert found == rope


def test_a_factor_without_a_type_is_linear_as_llama_cpp_has_it(tmp_path: Path) -> None:
    found = gguf_rope.parameters(
        keys(tmp_path / "model.gguf", lambda writer: writer.add_rope_scaling_factor(4.0)), 64
    )
    assert found == {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}


def test_a_factor_of_a_type_none_is_no_scaling(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.add_rope_scaling_factor(4.0)

    found = gguf_rope.parameters(keys(tmp_path / "model.gguf", edit), 64)
    assert found == {"rope_theta": 10_000.0, "rope_type": "default"}


def test_part_of_a_head_is_told_as_a_share(tmp_path: Path) -> None:
    found = gguf_rope.parameters(
        keys(tmp_path / "model.gguf", lambda writer: writer.add_rope_dimension_count(24)), 96
    )
    assert found["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("values", [(1, 0, 2, 2), (1, float("nan"), 2, 2), (4, 3, 2, 1)])
def test_factors_that_cannot_be_are_refused(values: tuple[float, ...], tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    with pytest.raises(SourceError, match=r"rope_freqs\.weight"):
        gguf_rope.parameters(keys(tmp_path / "model.gguf", edit), 8)
