"""A starting engine's log becomes stages, and its failure one reason."""

from __future__ import annotations

import pytest

from serve.progress import Progress


@pytest.fixture
def said() -> list[str]:
    return []


def test_stages_are_told_once_and_chatter_is_dropped(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    for line in ("(APIServer) INFO Resolved architecture: LlamaForCausalLM",
                 "(APIServer) INFO Resolved architecture: LlamaForCausalLM",
                 "(EngineCore) WARNING a flag we chose", "W1124 17:04:07 triton.py:53] none",
                 "(EngineCore) ERROR broken"):  # fmt: skip
        progress.line(line)
    assert len(said) == 2
    assert "configuring the engine" in said[0] and said[1].endswith("broken")


def test_the_first_cause_is_kept_and_its_effects_are_not(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("(EngineCore pid=1) ERROR 11-24 [core.py:1] ValueError: group 48 has no kernel")
    progress.line("RuntimeError: Engine core initialization failed. See root cause above.")
    assert progress.reason == "ValueError: group 48 has no kernel"


def test_an_effect_alone_is_no_reason(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("RuntimeError: Engine core initialization failed.")
    assert progress.reason == ""


def test_verbose_passes_everything_on(said: list[str]) -> None:
    Progress(said.append, verbose=True).line("(APIServer) INFO chatter")
    assert said == ["(APIServer) INFO chatter"]
