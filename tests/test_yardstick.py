"""`bench.yardstick`: a parent that is asked the same windows again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import yardstick
from quant.intake import source
from quant.proof import replica
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
