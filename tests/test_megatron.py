"""`quant.intake.megatron`: every layout of Megatron-LM comes back under Hugging Face's names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from quant.errors import SourceError
from quant.intake import architecture, megatron
from quant.intake.architecture import Outline
from tests import tiny, trainers

FILE = "model_optim_rng.pt"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def tensors(*, tied: bool = False) -> dict[str, Tensor]:
    state = dict(tiny.model(tied=tied).state_dict())
    if tied:
        del state["lm_head.weight"]
    return state


@pytest.fixture(scope="module")
def outline(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Outline:  # noqa: FBT001
    folder = trainers.companions(tmp_path_factory.mktemp("config"), tied=tied)
    return architecture.outline(AutoConfig.from_pretrained(folder))


def same(folder: Path, outline: Outline, state: Mapping[str, Tensor]) -> bool:
    found = megatron.find(folder)
    assert found is not None
    read = megatron.read(found)
    named = megatron.named(read.weights, outline, found)
    assert named.keys() == state.keys()
    assert all(named[name].shape == tuple(tensor.shape) for name, tensor in state.items())
    return all(torch.equal(named[name].read(), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_torch_dist_comes_back(
    tied: bool,  # noqa: FBT001
    outline: Outline,
    tmp_path: Path,
    tensor: int,
    pipeline: int,
    stacked: bool,  # noqa: FBT001
) -> None:
    state = tensors(tied=tied)
    trainers.megatron_dist(tmp_path, state, tensor=tensor, pipeline=pipeline, stacked=stacked)
    assert same(tmp_path, outline, state)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_classic_ranks_come_back(
    tied: bool,  # noqa: FBT001
    outline: Outline,
    tmp_path: Path,
    tensor: int,
    pipeline: int,
) -> None:
    state = tensors(tied=tied)
    home = trainers.megatron_ranks(tmp_path, state, tensor=tensor, pipeline=pipeline)
    assert megatron.find(tmp_path) == home
    assert same(tmp_path, outline, state) and same(home, outline, state)


@pytest.fixture
def plain(tmp_path: Path) -> Outline:
    folder = trainers.companions(tmp_path / "config")
    return architecture.outline(AutoConfig.from_pretrained(folder))


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    return trainers.megatron_ranks(tmp_path / "m", tensors(), tensor=2, pipeline=2)


def edited(path: Path, **changes: Any) -> None:
    torch.save(torch.load(path, weights_only=False) | changes, path)


def test_names_from_before_megatron_core_come_back(plain: Outline, tmp_path: Path) -> None:
    state = tensors()
    home = trainers.megatron_ranks(tmp_path / "m", state, tensor=1, pipeline=1)
    path = home / "mp_rank_00" / FILE
    encoder: dict[str, Tensor] = {}
    old = (
        ("decoder.", ""),
        ("self_attention.linear_qkv.layer_norm_weight", "input_norm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_norm.weight"),
        ("final_layernorm", "final_norm"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    )
    model = torch.load(path, weights_only=False)["model"]
    for name, tensor in model.items():
        if name.startswith("decoder.") and tensor is not None:
            for new, before in old:
                name = name.replace(new, before)
            encoder[name] = tensor
    embedding = {"word_embeddings": {"weight": model["embedding.word_embeddings.weight"]}}
    language = {
        "embedding": embedding,
        "encoder": encoder,
        "output_layer": {"weight": model["output_layer.weight"]},
    }
    edited(path, model={"language_model": language})
    assert same(tmp_path / "m", plain, state)


def test_virtual_stages_are_in_the_order_of_the_layers(plain: Outline, tmp_path: Path) -> None:
    """Two chunks on one rank: model0 has the first layer, model1 the second."""
    state = tensors()
    home = trainers.megatron_ranks(tmp_path / "m", state, tensor=1, pipeline=1)
    path = home / "mp_rank_00" / FILE
    content = torch.load(path, weights_only=False)
    model = content.pop("model")
    late = {n: t for n, t in model.items() if ".layers.1." in n or n.startswith("output")}
    early = {n: t for n, t in model.items() if n not in late}
    renumbered = {n.replace(".layers.1.", ".layers.0."): t for n, t in late.items()}
    torch.save(content | {"model0": early, "model1": renumbered}, path)
    assert same(tmp_path / "m", plain, state)


def test_first_chunks_of_all_stages_come_before_second_ones(plain: Outline, tmp_path: Path) -> None:
    """Layer 0 in the second stage's first chunk, layer 1 in the first stage's second."""
    state = tensors()
    home = trainers.megatron_ranks(tmp_path / "m", state, tensor=1, pipeline=2)
    first, second = (home / place / FILE for place in ("mp_rank_00_000", "mp_rank_00_001"))
    early, late = (torch.load(path, weights_only=False) for path in (first, second))
    models = [content.pop("model") for content in (early, late)]
    layers, tops = (
        [
            {n: t for n, t in model.items() if n.startswith("decoder.layers") == inner}
            for model in models
        ]
        for inner in (True, False)
    )
    torch.save(early | {"model0": tops[0], "model1": layers[1]}, first)
    torch.save(late | {"model0": layers[0], "model1": tops[1]}, second)
    assert same(tmp_path / "m", plain, state)


def test_separate_gates_and_wrapped_names_come_back(plain: Outline, tmp_path: Path) -> None:
    state = tensors()
    made: dict[str, trainers.Parts] = {}
    for name, tensor in trainers.megatron(state).items():
        if name.endswith("linear_fc1.weight"):
            gate, up = tensor.chunk(2)
            made |= {f"module.{name}_w": [((0, 0), gate)], f"module.{name}_v": [((0, 0), up)]}
        else:
            made[f"module.{name}"] = [((0,) * tensor.dim(), tensor)]
        made[f"optimizer.state.exp_avg.{name}"] = [((0,) * tensor.dim(), tensor * 0)]
    trainers.dcp(tmp_path / "m", made)
    torch.save({}, tmp_path / "m" / "common.pt")
    assert same(tmp_path / "m", plain, state)


def refused(folder: Path, outline: Outline) -> str:
    with pytest.raises(SourceError) as caught:
        found = megatron.find(folder)
        assert found is not None
        megatron.named(megatron.read(found).weights, outline, found)
    return str(caught.value)


@pytest.mark.parametrize("place", ["mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"])
def test_a_missing_rank_is_named(ranks: Path, plain: Outline, place: str) -> None:
    (ranks / place / FILE).unlink()
    t, p = int(place[8:10]), int(place[11:])
    assert f"tensor rank {t}, pipeline rank {p}: copy it too" in refused(ranks, plain)


def test_ranks_fewer_than_the_run_had_are_counted(ranks: Path, plain: Outline) -> None:
    for place in ("mp_rank_00_001", "mp_rank_01_001"):
        (ranks / place / FILE).unlink()
        (ranks / place).rmdir()
    assert "1 ranks of pipeline_model_parallel_size 2" in refused(ranks, plain)


def test_layers_that_are_numbered_over_each_other_are_refused(ranks: Path, plain: Outline) -> None:
    """The next stage's would have taken their places."""
    for place in ("mp_rank_00_000", "mp_rank_01_000"):
        model = torch.load(ranks / place / FILE, weights_only=False)["model"]
        moved = {name.replace(".layers.0.", ".layers.1."): t for name, t in model.items()}
        edited(ranks / place / FILE, model=moved)
    assert "numbers its layers [1], not from 0 on" in refused(ranks, plain)


def test_a_tensor_under_an_old_and_a_new_name_is_refused(tmp_path: Path, plain: Outline) -> None:
    home = trainers.megatron_ranks(tmp_path / "m", tensors(), tensor=1, pipeline=1)
    path = home / "mp_rank_00" / FILE
    model = torch.load(path, weights_only=False)["model"]
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    edited(path, model=model | {name.replace("linear_proj", "dense"): model[name]})
    assert f"holds {name} twice" in refused(tmp_path / "m", plain)


def test_a_stack_of_no_layers_is_refused(tmp_path: Path, plain: Outline) -> None:
    made = trainers.megatron(tensors()) | {"decoder.layers.odd.weight": torch.empty(0, 64)}
    parts = {name: [((0,) * tensor.dim(), tensor)] for name, tensor in made.items()}
    trainers.dcp(tmp_path / "m", parts)
    torch.save({}, tmp_path / "m" / "common.pt")
    assert "decoder.layers.odd.weight [0, 64] is no stack of layers" in refused(
        tmp_path / "m", plain
    )


def test_ranks_of_two_steps_are_refused(ranks: Path, plain: Outline) -> None:
    path = ranks / "mp_rank_01_001" / FILE
    edited(path, iteration=6)
    assert f"{path} is of iteration 6, its siblings of 5" in refused(ranks, plain)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint_version": 1.0}, "checkpoint_version 1.0; 2 is needed"),
        ({"args": argparse.Namespace(apply_layernorm_1p=True)}, "apply_layernorm_1p"),
        ({"args": argparse.Namespace(rotary_interleaved=True)}, "rotary_interleaved"),
        ({"model": {}}, "not all of them have"),
        ({"model": None}, "has no model, which its siblings have"),
    ],
)
def test_what_a_rank_may_not_say(
    ranks: Path, plain: Outline, changes: dict[str, Any], told: str
) -> None:
    edited(ranks / "mp_rank_00_000" / FILE, **changes)
    assert told in refused(ranks, plain)


def test_experts_and_biases_are_refused(tmp_path: Path, plain: Outline) -> None:
    home = trainers.megatron_ranks(tmp_path / "m", tensors(), tensor=1, pipeline=1)
    path = home / "mp_rank_00" / FILE
    model = torch.load(path, weights_only=False)["model"]
    extra = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    edited(path, model=model | {extra: torch.ones(2, 2)})
    assert f"has {extra}, which a model of Llama's shape has not" in refused(home, plain)
    (home / "mp_rank_00").rename(home / "mp_rank_00_000")
    (home / "mp_rank_00_000_001").mkdir()
    assert "expert-parallel" in refused(home, plain)


def test_heads_that_are_not_the_configs_are_refused(tmp_path: Path, plain: Outline) -> None:
    trainers.megatron_dist(tmp_path / "m", tensors(), tensor=1, pipeline=1)
    plain.config.num_key_value_heads = 4
    assert "has 128 rows; config.json's 4 heads in 4 groups of 16 make 192" in refused(
        tmp_path / "m", plain
    )


def test_other_architectures_are_refused(tmp_path: Path, plain: Outline) -> None:
    trainers.megatron_dist(tmp_path / "m", tensors(), tensor=1, pipeline=1)
    plain.config.model_type = "gemma3_text"
    assert "config.json says gemma3_text" in refused(tmp_path / "m", plain)


def test_the_file_that_names_the_iteration_chooses(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for place in (3, 4):
        trainers.megatron_dist(folder / f"iter_{place:07}", tensors(), tensor=1, pipeline=1)
    with pytest.raises(SourceError, match="iter_0000003, iter_0000004 and no latest"):
        megatron.find(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert megatron.find(folder) == folder / "iter_0000003"
    for text, told in (("9", "iter_0000009, which holds no"), ("../x", "names no iteration")):
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(SourceError, match=told):
            megatron.find(folder)


def test_other_formats_of_megatron_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(SourceError, match="--ckpt-format torch_dist"):
        megatron.find(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(SourceError, match=r"has no \.metadata"):
        megatron.find(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    assert megatron.find(tmp_path) is None
