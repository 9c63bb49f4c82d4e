"""adapter_config.json: what PEFT writes is understood, and what we cannot compute is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key

from quant.errors import AdapterError
from quant.lora.lora_config import LoraConfig, by_pattern, parse

PATH = Path("legal/adapter_config.json")
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def refused(raw: dict[str, Any]) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        parse(PATH, raw)
    assert str(caught.value).startswith(f"{PATH}: ")
    return caught.value


def saved_by_peft(folder: Path, **settings: Any) -> dict[str, Any]:
    peft.LoraConfig(task_type="CAUSAL_LM", **settings).save_pretrained(str(folder))
    raw: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return raw


def test_what_peft_writes_is_understood(tmp_path: Path) -> None:
    raw = saved_by_peft(
        tmp_path,
        r=16,
        lora_alpha=32,
        use_rslora=True,
        target_modules=["q_proj"],
        rank_pattern={"layers.1": 4},
        alpha_pattern={"q_proj": 12.5},
        base_model_name_or_path="org/base",
        lora_dropout=0.1,
        layers_to_transform=[0, 1],
        init_lora_weights="gaussian",
    )
    config = parse(PATH, raw)
    assert (config.r, config.lora_alpha, config.use_rslora) == (16, 32, True)
    assert config.rank_pattern == {"layers.1": 4} and config.alpha_pattern == {"q_proj": 12.5}
    assert config.target_modules == ("q_proj",)
    assert config.base_model_name_or_path == "org/base"
    assert not config.fan_in_fan_out


def test_a_config_of_few_words_has_pefts_defaults(tmp_path: Path) -> None:
    assert parse(PATH, {"peft_type": "LORA"}) == parse(PATH, saved_by_peft(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layer_replication", [[0, 2]], "repeats layers"),
        ("alora_invocation_tokens", [1], "inside a prompt"),
        ("use_qalora", True, "not known here"),
        ("use_bdlora", {"x": 1}, "not known here"),
        ("invented_in_2031", "yes", "not known here"),
    ],
)
def test_a_field_that_changes_the_answer_is_refused(key: str, value: Any, reason: str) -> None:
    fault = refused({**PLAIN, key: value})
    assert (fault.field, fault.expected, fault.found) == (key, "not set", json.dumps(value))
    assert f"{key} is not supported: " in str(fault) and reason in str(fault)


@pytest.mark.parametrize("off", [None, False, [], {}, "", 0])
def test_such_a_field_is_harmless_while_off(off: Any) -> None:
    assert parse(PATH, {**PLAIN, "use_qalora": off, "invented_in_2031": off}) == parse(PATH, PLAIN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("r", 0),
        ("r", "four"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("bias", "some"),
        ("use_dora", "perhaps"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", 7.5),
        ("use_rslora", "perhaps"),
        ("rank_pattern", [1]),
        ("target_modules", 7),
        ("r", "4"),  # what PEFT takes as it is, and computes with or not
        ("r", 4.0),
        ("r", None),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("use_rslora", "false"),
        ("lora_bias", 1),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_field(key: str, value: Any) -> None:
    fault = refused({**PLAIN, key: value})
    assert fault.field is not None and fault.field.startswith(key)
    assert fault.found is not None and fault.found in repr(value)
    assert fault.expected


def test_another_kind_of_adapter_says_what_was_expected() -> None:
    assert refused({**PLAIN, "peft_type": "LOHA"}).expected == "LORA"
    assert refused({"r": 4}).field == "peft_type"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_start_that_changed_the_base_is_told(start: str) -> None:
    assert parse(PATH, {**PLAIN, "init_lora_weights": start}).start == start.lower()


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_left_the_base_alone_is_taken(start: Any) -> None:
    config = parse(PATH, {**PLAIN, "init_lora_weights": start})
    assert config.init_lora_weights == start and config.start is None


@pytest.mark.parametrize(
    ("given", "module", "rows"),
    [
        ([5, 6], "model.embed_tokens", (5, 6)),
        ({"embed_tokens": [7]}, "model.embed_tokens", (7,)),
        ({"tokens": [7]}, "model.embed_tokens", ()),
        (None, "model.embed_tokens", ()),
    ],
)
def test_retrained_rows_are_those_of_their_module(
    given: Any, module: str, rows: tuple[int, ...]
) -> None:
    assert parse(PATH, {**PLAIN, "trainable_token_indices": given}).token_rows(module) == rows


def test_what_a_merge_can_do_is_kept(tmp_path: Path) -> None:
    raw = saved_by_peft(
        tmp_path, use_dora=True, bias="lora_only", modules_to_save=["lm_head", "norm"]
    )
    config = parse(PATH, raw)
    assert (config.use_dora, config.bias) == (True, "lora_only")
    assert config.modules_to_save == ("lm_head", "norm")


@pytest.mark.parametrize(
    "pattern",
    ["(x+)+!", "(a|a)*!", ".*.*.*.*.*.*!", "(.*)*" * 9 + "!", "a?" * 60 + "a" * 60, "(a|a)" * 40],
)
def test_no_pattern_searches_for_ever(pattern: str) -> None:
    """Each of these takes Python's own engine longer than anybody waits."""
    config = parse(PATH, {**PLAIN, "rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}})
    for name in ("a" * 39 + "b", "x" * 1000, "a." * 500):
        assert by_pattern(config.rank_pattern, name, 9) == 9


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(a|b){9}",
        "x{100}",
        "x{0,21}",
        "x{9}.y{1,9}.z{3}",
        "x{,5}",
        r"(a)\2",
        r"(?=a)a",
        r"(?<!b)a",
        "[a&&b]",
        "[[a]b]",
        "(?i)a",
    ],
)
def test_a_pattern_that_two_engines_read_otherwise_is_refused(field: str, pattern: str) -> None:
    fault = refused({**PLAIN, field: {pattern: 4}})
    assert (fault.field, fault.found) == (field, pattern)
    assert "write a simpler pattern" in str(fault)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_expression_is_refused(field: str) -> None:
    fault = refused({**PLAIN, field: {"layers.(": 4}})
    assert fault.field == field and "'layers.('" in str(fault)


def test_a_rank_below_one_is_refused_in_a_pattern_too() -> None:
    fault = refused({**PLAIN, "rank_pattern": {"q_proj": 0}})
    assert (fault.field, fault.expected, fault.found) == ("rank_pattern", "at least 1", "0")


def test_an_infinite_alpha_is_refused_in_a_pattern_too() -> None:
    assert refused({**PLAIN, "alpha_pattern": {"q_proj": float("inf")}}).found == "inf"


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2},
        {"proj": 2},
        {"self_attn.q_proj": 2, "q_proj": 3},
        {"layers.1.self_attn.q_proj": 2},
        {r"layers\.[02]\..*": 2, r".*q_proj": 3},
        {"v_proj|q_proj": 2},
        {"^model.layers.0.self_attn.q_proj": 2},
        {"model": 2},
        {},
        {r"model\.layers\.[0-9]+\..*\.(q|k)_proj.*": 2},
        {r".*\.layers\.([0-9]|1[0-9])\.(self_attn|mlp)\.(q|k|v)_proj": 2},
        {r"(model\.)+layers\.\d{1,2}\.\w+\.[^v]_proj": 2},
        {r"self_attn\..+?_proj": 2, r".*": 3},
        {"q_proj)|(v": 2},
        {r"layers.0.self_attn.q_proj$": 2},
    ],
)
@pytest.mark.parametrize(
    "module", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "q_proj"]
)
def test_patterns_match_as_pefts_do(patterns: dict[str, float], module: str) -> None:
    theirs = patterns.get(get_pattern_key(list(patterns), module), 9)
    assert by_pattern(patterns, module, 9) == theirs


def test_the_config_keeps_only_what_decides_the_answer() -> None:
    assert "lora_dropout" not in LoraConfig.model_fields
    assert parse(PATH, {**PLAIN, "lora_dropout": 0.5}) == parse(PATH, PLAIN)


@pytest.mark.parametrize(
    "patterns",
    [
        {f"m{number}": 8 for number in range(20_000)},
        {f"m{number}.*x": 8 for number in range(33)},
        {"m" * 301: 8},
    ],
    ids=["count", "repeats", "length"],
)
def test_patterns_are_few_and_short(tmp_path: Path, patterns: dict[str, int]) -> None:
    raw = {"peft_type": "LORA", "rank_pattern": patterns}
    with pytest.raises(AdapterError, match="at most") as refusal:
        parse(tmp_path / "adapter_config.json", raw)
    assert refusal.value.field == "rank_pattern" and len(str(refusal.value)) < 400


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_ranks_and_factors_are_bounded(tmp_path: Path, field: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        parse(tmp_path / "adapter_config.json", {"peft_type": "LORA", field: 10**19})
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"1.mlp.q_projector", "0.mlp.up_proj"}),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, None),
        ({"layers_to_transform": 0}, {"1.self_attn.q_proj", "1.mlp.q_projector"}),
        ({"layers_to_transform": [1]}, {"0.self_attn.q_proj", "0.mlp.up_proj"}),
        ({"layers_to_transform": []}, set()),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, set()),
        ({"exclude_modules": ["self_attn.q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": ".*anything.*"}, set()),  # expressions are PEFT's to match
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, set()),
        ({}, set()),
    ],
)
def test_a_module_that_the_fields_leave_out_is_told(
    fields: dict[str, Any], left_out: set[str] | None
) -> None:
    places = ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.q_projector")
    config = parse(PATH, {**PLAIN, **fields})
    found = {place for place in places if config.leaves_out(f"model.layers.{place}")}
    assert found == (set(places[1:]) if left_out is None else left_out)
