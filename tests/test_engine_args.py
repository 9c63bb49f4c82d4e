"""What vLLM is started with, and what is refused before it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve import engine_args
from serve.engine_args import Facts
from serve.errors import SettingsError
from serve.settings import Settings

AVX2 = Facts(on_cpu=True, cpu_flags=frozenset({"avx2", "fma"}), quantization="gptq")
AMX = Facts(on_cpu=True, cpu_flags=frozenset({"avx2", "amx_bf16"}), quantization=None)
CUDA = Facts(on_cpu=False, cpu_flags=frozenset({"avx2"}), quantization=None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def value(flags: list[str], name: str) -> str:
    """What the last `name` is set to, as argparse reads it."""
    last = len(flags) - 1 - flags[::-1].index(name)
    return flags[last + 1]


def test_the_model_is_named_after_its_folder(model: Path) -> None:
    flags = engine_args.flags(Settings(artifact=model), AVX2)
    assert value(flags, "--served-model-name") == "my-model"


def test_the_operators_vllm_flags_come_last(model: Path) -> None:
    chosen = Settings(artifact=model, vllm_flags=("--dtype", "float16"))
    assert value(engine_args.flags(chosen, AVX2), "--dtype") == "float16"


def test_bfloat16_only_where_the_processor_has_it(model: Path) -> None:
    chosen = Settings(artifact=model)
    assert value(engine_args.flags(chosen, AVX2), "--dtype") == "float32"
    assert value(engine_args.flags(chosen, AMX), "--dtype") == "bfloat16"
    for level in ("avx2", "avx512"):
        limited = Settings(artifact=model, max_cpu_isa=level)
        assert value(engine_args.flags(limited, AMX), "--dtype") == "float32"


def test_no_adapters_means_no_lora(model: Path) -> None:
    off = engine_args.flags(Settings(artifact=model, max_adapters=0), AVX2)
    on = engine_args.flags(Settings(artifact=model, max_adapters=3, max_lora_rank=10), AVX2)
    assert "--enable-lora" not in off
    assert value(on, "--max-loras") == "4"  # one slot is free for a swap
    assert value(on, "--max-cpu-loras") == "12"
    assert value(on, "--max-lora-rank") == "16"


def test_host_memory_keeps_no_fewer_adapters_than_a_batch(model: Path) -> None:
    chosen = Settings(artifact=model, max_adapters=3, max_cached_adapters=2)
    assert value(engine_args.flags(chosen, AVX2), "--max-cpu-loras") == "4"


@pytest.mark.parametrize(("allowed", "offline"), [(False, "1"), (True, "0")])
def test_nothing_is_downloaded_unless_the_hub_is_allowed(
    model: Path, *, allowed: bool, offline: str
) -> None:
    env = engine_args.environment(Settings(artifact=model, allow_hub=allowed), AVX2)
    assert env["HF_HUB_OFFLINE"] == offline


def test_gpus_keep_vllms_own_defaults(model: Path) -> None:
    flags = engine_args.flags(Settings(artifact=model), CUDA)
    assert "--enforce-eager" not in flags and "--dtype" not in flags


@pytest.mark.parametrize(("chosen", "cpu", "gpu"), [
    (None, True, False), (True, True, True), (False, False, False),
])  # fmt: skip
def test_soft_prompts_are_expected_where_they_cost_nothing_or_where_told(
    model: Path, *, chosen: bool | None, cpu: bool, gpu: bool
) -> None:
    settings = Settings(artifact=model, prompt_tuning=chosen)
    found = ["--enable-prompt-embeds" in engine_args.flags(settings, f) for f in (AVX2, CUDA)]
    assert found == [cpu, gpu]
    other = engine_args.flags(settings, replace(AVX2, causal=False))
    assert ("--enable-prompt-embeds" in other) == bool(chosen)


@pytest.mark.parametrize(
    ("names", "causal"), [(["LlamaForCausalLM"], True), (["T5ForConditionalGeneration"], False)]
)
def test_what_is_no_plain_language_model_is_seen(
    model: Path, names: list[str], *, causal: bool
) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": names}))
    assert engine_args.inspect(Settings(artifact=model)).causal == causal


def test_an_instruction_limit_reaches_every_library(model: Path) -> None:
    env = engine_args.environment(Settings(artifact=model, max_cpu_isa="avx2"), AVX2)
    assert env["ATEN_CPU_CAPABILITY"] == "avx2" and env["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert env["QUANTSERVE_MAX_CPU_ISA"] == "avx2"


def test_activations_are_rounded_by_nobody_unless_the_artifact_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fidelity report is of 16-bit activations; vLLM's INT4 would take eight where it can."""
    assert engine_args.environment(Settings(artifact=model), AVX2)[engine_args.ROUNDS] == "0"
    monkeypatch.setenv(engine_args.ROUNDS, "0")
    engine_args.inspect(Settings(artifact=model))
    monkeypatch.setenv(engine_args.ROUNDS, "1")
    with pytest.raises(SettingsError, match=r"VLLM_CPU_INT4_W4A8=1 .* unset it"):
        engine_args.inspect(Settings(artifact=model))


def test_broken_answers_are_counted_unless_told(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "VLLM_COMPUTE_NANS_IN_LOGITS"
    assert engine_args.environment(Settings(artifact=model), AVX2)[name] == "1"
    monkeypatch.setenv(name, "0")
    assert engine_args.environment(Settings(artifact=model), AVX2)[name] == "0"


def test_every_core_is_used_unless_told(model: Path) -> None:
    env = engine_args.environment(Settings(artifact=model), AVX2)
    assert env["OMP_NUM_THREADS"] == str(engine_args.cores())
    assert (
        engine_args.environment(Settings(artifact=model, threads=1), AVX2)["OMP_NUM_THREADS"] == "1"
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no config\.json"):
        engine_args.inspect(Settings(artifact=tmp_path))


def test_a_quantization_without_a_kernel_is_refused(model: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="'awq' has no CPU kernel"):
        engine_args.inspect(Settings(artifact=model))


def test_a_broken_config_is_refused(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(SettingsError, match="not a model configuration"):
        engine_args.inspect(Settings(artifact=model))
