"""`quant.intake.zero`: every stage, world and kind of parameter comes back as it went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quant.errors import SourceError
from quant.intake import unpickle, zero
from tests import tiny, trainers

FROZEN = ("model.layers.0.mlp.gate_proj.weight", "model.norm.weight")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    # 64 x 64 is no multiple of three ranks: their shares are padded.
    return tiny.model(tied=request.param)


def same(folder: Path, model: PreTrainedModel) -> bool:
    found = zero.find(folder)
    assert found is not None
    read = zero.read(found)
    state = model.state_dict()
    assert read.weights.keys() == state.keys()
    assert {path.parent for path in read.files} == {found}
    assert all(read.weights[n].shape == tuple(t.shape) for n, t in state.items())
    return all(torch.equal(read.weights[n].read(), t) for n, t in state.items())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_come_back(
    model: PreTrainedModel, tmp_path: Path, stage: int, world: int
) -> None:
    trainers.zero(tmp_path, model, stage=stage, world=world)
    assert same(tmp_path, model)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_come_back(tmp_path: Path, stage: int) -> None:
    model = tiny.model()
    trainers.zero(tmp_path, model, stage=stage, world=3, frozen=FROZEN)
    assert same(tmp_path, model)


def test_the_bf16_optimizer_names_no_stage(tmp_path: Path) -> None:
    model = tiny.model()
    home = trainers.zero(tmp_path, model, stage=1, world=2, prefix="bf16_")
    with trainers.foreign("deepspeed.runtime.zero.config", "ZeroStageEnum"):
        for path in home.glob("bf16_*_optim_states.pt"):
            content = torch.load(path, weights_only=False)
            del content["optimizer_state_dict"]["zero_stage"]
            torch.save(content, path)
    assert same(tmp_path, model)


def test_padding_after_each_parameter_is_skipped(tmp_path: Path) -> None:
    model = tiny.model()
    home = trainers.zero(tmp_path, model, stage=2, world=1)
    path = home / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shapes = unpickle.load(home / "mp_rank_00_model_states.pt")["param_shapes"]
    state = dict(model.named_parameters())
    gap = torch.full((4,), 9.0)
    with trainers.foreign("deepspeed.runtime.zero.config", "ZeroStageEnum"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [
            torch.cat([piece for n in group for piece in (state[n].detach().flatten(), gap)])
            for group in shapes
        ]
        content["optimizer_state_dict"]["param_alignment_paddings"] = [[4] * len(g) for g in shapes]
        torch.save(content, path)
    assert same(tmp_path, model)


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        zero.read(zero.find(folder) or folder)
    return str(caught.value)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return trainers.zero(tmp_path, tiny.model(), stage=3, world=3)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_rank_is_named(home: Path, rank: int) -> None:
    (home / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    told = refused(home.parent)
    assert "rank 1" in told if rank == 1 else "2 of 3 *_optim_states.pt" in told


def test_a_missing_model_file_is_counted(home: Path) -> None:
    (home / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    assert "2 of 3 *_model_states.pt" in refused(home.parent)


def test_files_of_two_steps_are_refused(home: Path, tmp_path: Path) -> None:
    other = trainers.zero(tmp_path / "other", tiny.model(), stage=3, world=3, step=8)
    for name in ("optim", "model"):
        mixed = f"zero_pp_rank_1_mp_rank_00_{name}_states.pt"
        kept = (home / mixed).read_bytes()
        (home / mixed).write_bytes((other / mixed).read_bytes())
        told = refused(home.parent)
        assert mixed in told and "is of step 8" in told and "of one step" in told
        (home / mixed).write_bytes(kept)


def test_files_of_two_worlds_are_refused(home: Path, tmp_path: Path) -> None:
    other = trainers.zero(tmp_path / "other", tiny.model(), stage=3, world=2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (home / name).write_bytes((other / name).read_bytes())
    assert f"{name} is of another run" in refused(home.parent)


def test_a_tensor_parallel_run_is_refused(home: Path) -> None:
    path = home / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    (home / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(path)
    assert f"{path} is of a tensor-parallel run" in refused(home.parent)


def test_latest_chooses_the_step(tmp_path: Path) -> None:
    trainers.zero(tmp_path, tiny.model(seed=1), stage=1, world=1, step=1)
    model = tiny.model(seed=2)
    later = trainers.zero(tmp_path, model, stage=1, world=1, step=2)
    assert zero.find(tmp_path) == later and same(tmp_path, model)
    (tmp_path / "latest").write_text("global_step1")
    assert zero.find(tmp_path) == tmp_path / "global_step1"
    assert zero.find(later) == later


def test_without_latest_the_only_step_is_taken(home: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").unlink()
    assert zero.find(tmp_path) == home
    trainers.zero(tmp_path, tiny.model(), stage=3, world=1, step=9)
    (tmp_path / "latest").unlink()
    with pytest.raises(SourceError, match="holds global_step7, global_step9 and no file `latest`"):
        zero.find(tmp_path)


@pytest.mark.parametrize("text", ["global_step9", "../elsewhere", ""])
def test_a_latest_that_leads_nowhere_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    assert home.is_dir()
    (tmp_path / "latest").write_text(text)
    with pytest.raises(SourceError, match=r"latest names"):
        zero.find(tmp_path)


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_truncated_file_is_named(home: Path, kind: str) -> None:
    path = home / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(home.parent)


def test_flat_groups_that_are_too_short_are_refused(tmp_path: Path) -> None:
    home = trainers.zero(tmp_path, tiny.model(), stage=2, world=1)
    trainers.zero(tmp_path / "small", tiny.model(layers=1), stage=2, world=1)
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (home / name).write_bytes((tmp_path / "small" / home.name / name).read_bytes())
    assert "hold less of" in refused(tmp_path) or "do not belong together" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("groups", "share numbers"),
        ("padding", "is cut twice, or padded by -4"),
        ("shape", "has the shape [-1, 64]"),
        ("name", "is cut twice"),
    ],
)
def test_pieces_that_lie_over_each_other_are_refused(
    tmp_path: Path, change: str, told: str
) -> None:
    home = trainers.zero(tmp_path, tiny.model(), stage=2, world=1)
    optimizer = home / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    model = home / "mp_rank_00_model_states.pt"
    with trainers.foreign("deepspeed.runtime.zero.config", "ZeroStageEnum"):
        content, states = (torch.load(path, weights_only=False) for path in (optimizer, model))
        inner, shapes = content["optimizer_state_dict"], states["param_shapes"]
        if change == "groups":
            groups = inner["single_partition_of_fp32_groups"]
            inner["single_partition_of_fp32_groups"] = [groups[0], *[groups[0][3:]] * len(groups)]
        if change == "padding":
            inner["param_alignment_paddings"] = [[-4] * len(group) for group in shapes]
        if change == "shape":
            shapes[0][next(iter(shapes[0]))] = (-1, 64)
        if change == "name":
            shapes[-1][next(iter(shapes[0]))] = shapes[0][next(iter(shapes[0]))]
        torch.save(content, optimizer)
        torch.save(states, model)
    assert told in refused(tmp_path)
