"""`intake.config_json`: what may stand in a config.json, and how what may not is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.errors import SourceError
from quant.intake import config_json

DEEP = '{"a":' * 80 + "1" + "}" * 80


def refused(folder: Path, text: str) -> str:
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError) as caught:
        config_json.read(folder)
    assert str(folder / "config.json") in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "is not a JSON object"),
        (DEEP, "nested deeper than 64 levels"),
        ('{"vocab_size": 3, "vocab_size": 4}', "'vocab_size' is there twice"),
        (f'{{"vocab_size": {"9" * 5000}}}', "a number of 5000 digits"),
        (f'{{"a": "{"x" * (17 << 20)}"}}', "more than 16 MB"),
    ],
    ids=["cut short", "list", "deep", "twice", "digits", "large"],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"text_config": {"num_hidden_layers": "2"}}, "text_config.num_hidden_layers is '2': "),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth is 1000000000: expected a"),
        ({"num_local_experts": -1}, "num_local_experts is -1: expected a whole number from 0 to"),
        ({"n_head": 1.0}, "n_head is 1.0: expected a whole number"),
        ({"layers": [{"dropout": float("nan")}]}, "layers.0.dropout is nan: expected a finite"),
        ({"torch_dtype": "x" * 999}, "x...: expected one of"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: expected a whole number from 1"),
        ({"text_config": {"head_dim": 0}}, "text_config.head_dim is 0: expected a whole number fr"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0: expected a whole number"),
        ({"model_type": ["llama"]}, "model_type is ['llama']: expected a text"),
        ({"auto_map": 5}, "auto_map is 5: expected an object"),
        ({"rope_parameters": []}, "rope_parameters is []: expected an object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': expected an object"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4': expected a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is 0: expected a num"),
        ({"rope_scaling": {"factor": -8.0}}, "rope_scaling.factor is -8.0: expected a number abo"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_place(
    tmp_path: Path, content: dict[str, Any], told: str
) -> None:
    assert told in refused(tmp_path, json.dumps(content))


@pytest.mark.parametrize(
    "content",
    [
        {"num_key_value_heads": None, "num_experts": 0, "chunk_size": -1, "attention_window": -1},
        {"num_attention_heads": [4, 8], "patch_size": [2, 2], "image_size": {"height": 4}},
        {"time_step_limit": [0.0, float("inf")], "max_position_embeddings": 10_485_760},
        {"dtype": "half", "torch_dtype": "float32", "tie_word_embeddings": None},
        {"use_absolute_position_embeddings": True, "rope_scaling": {"factor": 8.0}},
        {"rope_theta": 500000, "rope_scaling": None, "auto_map": {"AutoConfig": "code.Config"}},
        {"rope_theta": [1e4, 5e6], "factor": 0, "num_global_key_value_heads": 0},
    ],
)
def test_what_configurations_of_the_hub_hold_is_read(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert config_json.read(tmp_path) == content
