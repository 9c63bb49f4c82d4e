"""`solver.devices`: names become devices that are there, or a refusal that says what is not."""

from __future__ import annotations

import pytest
import torch

from quant import room
from quant.errors import RecipeError
from quant.solver import devices, preflight

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")


def test_a_list_of_names_is_a_list_of_devices() -> None:
    assert devices.named("cpu") == [CPU]
    assert devices.named("cpu, cpu") == [CPU, CPU]
    assert devices.first("cpu,cpu") == CPU


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("gpu", "no device|not a device"),
        ("cpu,", "not a device"),
        ("meta", "cpu or cuda is needed"),
        ("cuda:63", "sees no CUDA device|this machine has"),
    ],
)
def test_what_is_not_there_is_refused(names: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        devices.named(names)


def test_a_gpu_that_nobody_uses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.idle([CPU]) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert devices.idle([CPU, CPU]) == "H200"
    assert devices.idle([torch.device("cuda")]) is None


def test_a_gpu_without_the_language_of_its_loops_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match="pip install triton"):
        devices.named("cuda")


def test_every_gpu_may_take_what_the_fullest_can_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    free = dict(zip(gpus, (800, 400), strict=True))
    monkeypatch.setattr(devices, "left", free.__getitem__)
    monkeypatch.setattr(room, "of_host", lambda: 1000)
    assert devices.allowance(gpus[:1]) == (600, 500)
    assert devices.allowance(gpus) == (300, 500)
    assert devices.allowance([CPU]) == preflight.ON_CPU


def test_sixteen_bits_are_for_devices_made_for_them_and_runs_that_allow_it() -> None:
    cuda = torch.device("cuda")
    assert devices.forward_dtype(cuda, exact=False) == torch.bfloat16
    for device in (cuda, CPU):
        assert devices.forward_dtype(device, exact=True) == torch.float32


@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE_VNNI", "avx512_core", "AVX512_CORE_BF16"])
def test_they_are_left_where_onednn_may_not_use_them(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    wanted = torch.bfloat16 if level == "AVX512_CORE_BF16" else torch.float32
    assert devices.forward_dtype(CPU, exact=False) == wanted


@pytest.mark.parametrize("may", ["AVX2", "DEFAULT", "AVX512"])
@pytest.mark.parametrize("has", [set(), {"avx512_bf16"}, {"amx_bf16"}])
def test_a_cpu_is_made_for_them_if_it_has_instructions_that_torch_may_use(
    may: str, has: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: may)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    wanted = torch.bfloat16 if has and may == "AVX512" else torch.float32
    assert devices.forward_dtype(CPU, exact=False) == wanted
