"""A worker's log, whatever its bytes, becomes stages, lines to show and a cause of failure."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.progress import LINE_BYTES, Progress


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


def test_who_computes_a_model_that_vllm_has_no_code_for_is_told_once(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    for _ in range(2):
        progress.line("(EngineCore) INFO [base.py:123] Using Transformers modeling backend.")
    (line,) = said
    assert "Transformers backend" in line and "INFO" not in line


def test_the_first_cause_is_kept_and_its_effects_are_not(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("(EngineCore pid=1) ERROR 11-24 [core.py:1] ValueError: group 48 has no kernel")
    progress.line("RuntimeError: Engine core initialization failed. See root cause above.")
    assert progress.cause(since=0) == "ValueError: group 48 has no kernel"


def test_an_effect_alone_is_no_cause(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("RuntimeError: Engine core initialization failed.")
    assert progress.cause(since=0) == ""


def test_an_error_of_long_ago_is_no_cause_of_what_happens_now(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("ValueError: an empty conversation")
    now = time.monotonic()
    assert progress.cause(since=now) == ""
    progress.line("vllm.v1.OSError: no space left")
    assert progress.cause(since=now) == "OSError: no space left"


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_lines_are_the_same_wherever_the_bytes_are_cut(lines: list[bytes], size: int) -> None:
    log, told = b"\n".join(lines) + b"\n", [list[str](), list[str]()]
    whole, pieces = (Progress(to.append, verbose=True) for to in told)
    whole.feed(log)
    for start in range(0, len(log), size):
        pieces.feed(log[start : start + size])
    assert told[0] == told[1] and len(told[0]) == log.count(b"\n")


def test_a_long_line_is_cut_and_the_next_is_whole(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    for _ in range(100):
        progress.feed(b"x" * LINE_BYTES)
    progress.feed(b"\nERROR next\n")
    assert said[0].startswith("xxx") and f"{99 * LINE_BYTES} more bytes" in said[0]
    assert said[1] == "ERROR next" and len(said[0]) < LINE_BYTES + 40


def test_verbose_passes_everything_on(said: list[str]) -> None:
    Progress(said.append, verbose=True).line("(APIServer) INFO chatter")
    assert said == ["(APIServer) INFO chatter"]


def test_what_our_worker_refuses_is_told_once_at_the_end(said: list[str]) -> None:
    progress = Progress(said.append, verbose=False)
    progress.line("SettingsError: vLLM's flags: unrecognized arguments: --no-such-flag")
    assert said == []
    assert progress.cause(0.0) == "vLLM's flags: unrecognized arguments: --no-such-flag"
