"""`bench.yardstick`: a parent that is asked the same windows again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import yardstick
from quant.intake import source
from quant.proof import replica
from quant.proof.fidelity import Sample
from tests import tiny


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_remembering_model_answers_as_it_did_and_runs_once(family: str, tmp_path: Path) -> None:
    opened = source.open(str(tiny.model_folder(tmp_path / "parent", family)), cache=tmp_path / "c")
    plain = replica.of_parent(opened, yardstick.HOST)
    model = yardstick.remembering(replica.of_parent(opened, yardstick.HOST))
    runs: list[int] = []
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    windows = [torch.arange(4, 40)[None], torch.arange(5, 41)[None]]
    with torch.inference_mode():
        for ids in windows * 2:
            expected = plain(input_ids=ids, use_cache=False).logits
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert len(runs) == len(windows)


def test_windows_that_share_a_passage_with_calibration_are_left_out() -> None:
    windows = tuple(torch.randint(0, 1000, (64,)) for _ in range(3))
    rows = torch.randint(0, 1000, (2, 64))
    rows[1, 40:56] = windows[1][3:19]  # a passage, at another place
    rows[0, :15] = windows[2][:15]  # one token short of one
    kept = yardstick.apart(Sample("text", "", windows), rows)
    assert [window is kept_one for window, kept_one in zip(
        (windows[0], windows[2]), kept.windows, strict=True)] == [True, True]  # fmt: skip


def test_windows_are_drawn_by_seed_and_never_fewer_than_asked() -> None:
    sample = Sample("text", "", tuple(torch.arange(n, n + 8) for n in range(9)))
    one, same, other = (yardstick.drawn(sample, 4, seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert [int(w[0]) for w in one.windows] == sorted(int(w[0]) for w in one.windows)
    with pytest.raises(SystemExit, match="10 windows asked for, 9"):
        yardstick.drawn(sample, 10, 0)
