"""`command`: what makes two commands the same."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quant import command, recipe
from quant.intake import source
from quant.intake.source import Source
from quant.solver import devices
from tests import tiny


def test_a_processor_that_computes_in_other_bits_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that were kept in 16 bits are nothing to go on from in 32."""
    opened = source.open(str(tiny.model_folder(tmp_path)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    made = []
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        made.append(command.facts(recipe.build({}), opened, None, gated=False))
    assert command.difference(*made) == "blocks in was bfloat16, is float32"
    exact = command.facts(recipe.build({"exact": True}), opened, None, gated=False)
    assert command.difference(made[1], exact) == "exact was False, is True"


_GPU = {"name": "A", "major": 8, "minor": 5, "multi_processor_count": 108}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source.open(str(tiny.model_folder(tmp_path_factory.mktemp("model"))))


def told(opened: Source) -> dict[str, str]:
    return command.facts(recipe.build({}), opened, None, gated=False)


def test_a_run_on_other_threads_is_another(opened: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = told(opened)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    was = before["threads"]
    after = told(opened)
    assert command.difference(before, after) == f"threads was {was}, is 63"


def test_a_run_on_another_gpu_is_another(opened: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called by: cuda:0 of another machine."""
    facts = []
    monkeypatch.setattr(devices, "named", lambda _: [torch.device("cuda:0")])
    for kind in ({}, {"name": "B"}, {"minor": 6}, {"multi_processor_count": 66}):
        about = SimpleNamespace(**{**_GPU, **kind})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, it=about: it)
        facts.append(told(opened))
    differences = {command.difference(facts[0], other) for other in facts[1:]}
    kinds = ("B/8.5/108", "A/8.6/108", "A/8.5/66")
    assert differences == {f"GPUs was A/8.5/108, is {kind}" for kind in kinds}


@pytest.mark.parametrize(
    "library", ["accelerate", "llvmlite", "numba", "numpy", "safetensors", "tokenizers", "torch",
                "transformers", "triton", "quantserve"]
)  # fmt: skip
def test_a_run_with_another_library_is_another(
    library: str, opened: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_here(name: str) -> str:
        return "0.0.0" if name == library else version(name)

    before = told(opened)
    monkeypatch.setattr(command, "version", found_here)
    found = command.difference(before, told(opened))
    assert found is not None and found.startswith(f"{library} ")
    assert found.count(" was ") + found.count(" changed") == 1


def test_a_library_that_is_not_there_is_a_fact_too(
    opened: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_here(name: str) -> str:
        if name == "triton":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(command, "version", found_here)
    assert told(opened)["triton"] == "missing"
