"""A package of an extra that is not installed: one line that says how to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quant import artifact, extras
from tests import tiny
from tests.lora import write_lora
from tests.test_artifact import FACTS

ROOT = Path(__file__).parent.parent
# As in an environment where only the wheel was installed: nothing finds these packages.
WITHOUT = """
import importlib.abc, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {names} else found(name, *rest)
from serve.__main__ import main
sys.argv = ["quantserve", *{arguments}]
main()
"""
COMMANDS = {
    "quantize": ("quantize", "demo", "--out", "made"),
    "compare": ("compare", "demo", "parent"),
    "adapter": ("adapter", "check", "lora", "--base", "parent"),
    "serve": ("serve", "."),
    "serve-adapters": ("serve", ".", "--adapter", "one=lora"),
}


def without(names: set[str], arguments: tuple[str, ...], folder: Path) -> tuple[int, str, str]:
    """Status, standard output and standard error of the command where `names` are missing."""
    code = WITHOUT.format(names=sorted(names), arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": ""},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_which_extra_is_missing(name: str, tmp_path: Path) -> None:
    """Where nothing else is wrong with what was typed."""
    artifact.seal(tiny.model_folder(tmp_path / "parent"), FACTS)
    write_lora(tmp_path / "lora", {"model.layers.0.mlp.up_proj": (128, 64)})
    before = sorted(tmp_path.rglob("*"))
    status, _, said = without({"torch", "transformers", "vllm"}, COMMANDS[name], tmp_path)
    assert said.startswith("quantserve: the package "), said
    assert "'quantserve[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu" in said
    assert (status, said.count("\n")) == (2, 1), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_server_needs_more_than_the_quantizer_does(tmp_path: Path) -> None:
    status, _, said = without({"vllm"}, ("serve", "."), tmp_path)
    assert (status, said.count("\n")) == (2, 1), said
    assert "the package vllm is not installed" in said


def test_another_fault_is_not_taken_for_a_missing_extra() -> None:
    assert extras.told(ModuleNotFoundError(name="torch.nowhere")) is None  # torch is there
    assert extras.told(ModuleNotFoundError(name="a_plugin_of_somebody")) is None
    assert extras.told(ValueError("torch")) is None
