"""`intake.fsdp`, `intake.dcp` and `intake.naming`: sharded and whole state dicts come back."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoConfig

from quant.errors import SourceError
from quant.intake import architecture, dcp, fsdp, naming
from quant.intake.architecture import Outline
from quant.intake.stored import Checkpoint
from tests import tiny, trainers

State = dict[str, Tensor]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def state(tied: bool) -> State:  # noqa: FBT001
    """With the tied head too, as torch's own state dict has it."""
    return dict(tiny.model(tied=tied).state_dict())


@pytest.fixture(scope="module")
def outline(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Outline:  # noqa: FBT001
    folder = trainers.companions(tmp_path_factory.mktemp("config"), tied=tied)
    return architecture.outline(AutoConfig.from_pretrained(folder))


@contextmanager
def alone() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it saves without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(folder: Path, content: Mapping[str, Any]) -> Path:
    with alone():
        save(dict(content), checkpoint_id=folder, no_dist=True)
    return folder


def same(read: Checkpoint, outline: Outline, state: State) -> bool:
    found = naming.named(read.weights, outline, Path("there"))
    assert found.keys() == outline.shapes.keys()
    return all(torch.equal(weight.read(), state[name]) for name, weight in found.items())


@pytest.mark.parametrize(
    "under",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"app": {"model": state, "optim": {"exp_avg": state}}, "step": 3},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": state, "optimizer": {"state": state}, "train_state": b"x"},
        lambda state: state | {"optimizer": {"state": state}, "train_state": {"step": 3}},
    ],
    ids=["bare", "accelerate", "stateful", "compiled", "optimizer", "titan"],
)
def test_a_sharded_folder_comes_back(
    state: State, outline: Outline, tmp_path: Path, under: Callable[[State], Mapping[str, Any]]
) -> None:
    saved(tmp_path / "pytorch_model_fsdp_0", under(state))
    found = fsdp.find_sharded(tmp_path)
    assert found == tmp_path / "pytorch_model_fsdp_0"
    assert fsdp.find_sharded(found) == found
    assert same(fsdp.read_sharded(found), outline, state)


def test_parts_of_several_ranks_come_together(
    state: State, outline: Outline, tmp_path: Path
) -> None:
    def rows(tensor: Tensor) -> trainers.Parts:
        parts = tensor.chunk(3)
        tails = (0,) * (tensor.dim() - 1)
        return [((sum(len(p) for p in parts[:n]), *tails), p) for n, p in enumerate(parts)]

    trainers.dcp(tmp_path, {f"model.{n}": rows(t) for n, t in state.items()}, files=3)
    read = fsdp.read_sharded(tmp_path)
    assert len(read.files) == 4
    assert same(read, outline, state)


def test_a_layer_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    stack = torch.randn(4, 6, 5)
    parts: trainers.Parts = [
        ((first, row, 0), stack[first : first + 2, row : row + 3])
        for first in (0, 2)
        for row in (0, 3)
    ]
    trainers.dcp(tmp_path, {"x": parts})
    read = dcp.read(tmp_path)["x"]
    assert torch.equal(read.weight().read(), stack)
    for place in range(4):
        assert torch.equal(read.row(place).read(), stack[place])


def test_torchtitan_keeps_metas_names_and_rotary_pairs(
    state: State, outline: Outline, tmp_path: Path
) -> None:
    def pairs(weight: Tensor, heads: int) -> Tensor:
        rows, columns = weight.shape
        return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, -1)

    titan = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "freqs_cis": torch.ones(2),
    }
    titan |= {"norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"]}
    for place in range(trainers.LAYERS):
        old, new = f"model.layers.{place}", f"layers.{place}"
        q, k, v, o = (state[f"{old}.self_attn.{n}_proj.weight"] for n in "qkvo")
        gate, up, down = (state[f"{old}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        titan |= {
            f"{new}.attention.wq.weight": pairs(q, trainers.HEADS),
            f"{new}.attention.wk.weight": pairs(k, trainers.GROUPS),
            f"{new}.attention.wv.weight": v,
            f"{new}.attention.wo.weight": o,
            f"{new}.feed_forward.w1.weight": gate,
            f"{new}.feed_forward.w2.weight": down,
            f"{new}.feed_forward.w3.weight": up,
            f"{new}.attention_norm.weight": state[f"{old}.input_layernorm.weight"],
            f"{new}.ffn_norm.weight": state[f"{old}.post_attention_layernorm.weight"],
        }
    saved(tmp_path, titan)
    assert same(fsdp.read_sharded(tmp_path), outline, state)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model.pt"]
)
def test_a_whole_file_comes_back(state: State, outline: Outline, tmp_path: Path, name: str) -> None:
    torch.save({"model": state, "optimizer": {"state": {0: torch.ones(3)}}}, tmp_path / name)
    assert fsdp.find_whole(tmp_path) == tmp_path
    assert same(fsdp.read_whole(tmp_path), outline, state)


@pytest.mark.parametrize("indexed", [True, False])
def test_parts_of_a_whole_file_come_back(
    state: State,
    outline: Outline,
    tmp_path: Path,
    indexed: bool,  # noqa: FBT001
) -> None:
    names = sorted(state)
    files = [f"pytorch_model-{n:05}-of-00002.bin" for n in (1, 2)]
    for part, file in enumerate(files):
        torch.save({name: state[name].clone() for name in names[part::2]}, tmp_path / file)
    if indexed:
        index = {name: files[place % 2] for place, name in enumerate(names)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(fsdp.read_whole(tmp_path), outline, state)
    (tmp_path / files[1]).unlink()
    told = "part 2 of 2" if not indexed else f"{files[1]} is missing"
    with pytest.raises(SourceError, match=told):
        fsdp.read_whole(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model_1.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin, pytorch_model_1\.bin: leave one"):
        fsdp.read_whole(tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(SourceError, match="more than one model"):
        fsdp.read_whole(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], r"model\.bin holds a list: a state dict is expected"),
        (torch.ones(1), r"model\.bin holds one tensor: a state dict is expected"),
        ({"a": 1}, "holds no tensors"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=told):
        fsdp.read_whole(tmp_path)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ([], 'is not an index of tensors: expected {"weight_map": {tensor: file}}'),
        ({"weight_map": {"x": None}}, "is not an index of tensors: expected"),
        ({"weight_map": {"x": "/x/pytorch_model-00001-of-00001.bin"}}, "points outside its folder"),
        (
            {"weight_map": dict.fromkeys("xy", "pytorch_model-00001-of-00001.bin")},
            "pytorch_model-00001-of-00001.bin lacks y, which pytorch_model.bin.index.json promises",
        ),
    ],
    ids=["list", "null", "outside", "promise"],
)
def test_an_index_is_held_to_its_parts(tmp_path: Path, index: Any, told: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError) as caught:
        fsdp.read_whole(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"x": torch.ones(1)}
    endless["self"] = endless
    torch.save(endless, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="contains itself"):
        fsdp.read_whole(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = {"a": [((0, 0), torch.ones(2, 3)), ((2, 0), torch.ones(2, 3))]}
    return trainers.dcp(tmp_path / "pytorch_model_fsdp_0", tensors)


def shard_refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read = dcp.read(fsdp.find_sharded(folder) or folder)
        read["a"].weight().read()
    return str(caught.value)


def test_a_missing_or_short_shard_is_named(sharded: Path) -> None:
    path = sharded / "__1_0.distcp"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert shard_refused(sharded) == f"{path} is truncated: {len(raw) - 1} bytes of {len(raw)}"
    path.unlink()
    assert f"{path} is missing" in shard_refused(sharded)
    (sharded / ".metadata").unlink()
    assert "__0_0.distcp and no .metadata" in shard_refused(sharded)


def test_two_models_in_one_folder_are_refused(sharded: Path) -> None:
    trainers.dcp(sharded.parent / "pytorch_model_fsdp_1", {"a": [((0,), torch.ones(2))]})
    with pytest.raises(SourceError, match="pytorch_model_fsdp_0, pytorch_model_fsdp_1"):
        fsdp.find_sharded(sharded.parent)


def altered(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first(table: Mapping[Any, Any]) -> Any:
    return next(iter(table.values()))


def chunk(metadata: Any, place: int) -> Any:
    return metadata.state_dict_metadata["a"].chunks[place]


def moved(metadata: Any, place: int, offsets: tuple[Any, ...]) -> None:
    """A chunk said to be elsewhere in its tensor, wherever that is named."""
    before = tuple(chunk(metadata, place).offsets)
    chunk(metadata, place).offsets = offsets
    storage = {}
    for index, info in metadata.storage_data.items():
        at = offsets if tuple(index.offset) == before else index.offset
        storage[MetadataIndex(index.fqn, at)] = info
    metadata.storage_data = storage


def same_bytes(metadata: Any) -> None:
    one, other = metadata.storage_data.values()
    other.relative_path, other.offset, other.length = one.relative_path, one.offset, one.length


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: setattr(first(m.storage_data), "relative_path", "../x"), "outside its folder"),
        (lambda m: setattr(first(m.storage_data), "transform_descriptors", ["zstd"]), "compressed"),
        (lambda m: setattr(first(m.storage_data), "offset", None), "offset is None"),
        (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "does not say where a at"),
        (lambda m: m.state_dict_metadata["a"].chunks.pop(), "do not make up [4, 3]"),
        (lambda m: setattr(m, "storage_data", None), "storage_data is None"),
        (lambda m: moved(m, 0, (2, 0)), "the parts of a do not make up [4, 3]"),
        (lambda m: moved(m, 1, (1, 0)), "the parts of a do not make up [4, 3]"),
        (lambda m: moved(m, 1, (3, 0)), "the parts of a do not make up [4, 3]"),
        (lambda m: moved(m, 1, (-2, 0)), "offset of a tensor is (-2, 0)"),
        (lambda m: setattr(chunk(m, 0), "offsets", (0.5, 0)), "offsets of a tensor is (0.5, 0)"),
        (lambda m: moved(m, 1, (2,)), "the parts of a do not make up [4, 3]"),
        (lambda m: moved(m, 1, (2, *[0] * 9)), "is corrupt: offset of a tensor is (2, 0, 0, "),
        (lambda m: m.state_dict_metadata["a"].chunks.append(chunk(m, 0)), "do not make up [4, 3]"),
        (lambda m: setattr(chunk(m, 0), "sizes", (2, -3)), "sizes of a tensor is (2, -3)"),
        (lambda m: same_bytes(m), "two parts lie at byte 0 of __0_0.distcp"),
        (
            lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int64),
            "float32, .metadata says torch.int64",
        ),
    ],
)
def test_metadata_that_lies_is_refused(
    sharded: Path, change: Callable[[Any], None], told: str
) -> None:
    altered(sharded, change)
    assert told in shard_refused(sharded)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), max_size=4),
    spoil=st.sampled_from(["nothing", "drop", "twice", "shift", "grow"]),
)
def test_boxes_cover_a_tensor_once_where_counting_says_so(
    shape: tuple[int, ...], cuts: list[tuple[int, int]], spoil: str
) -> None:
    boxes = [((0,) * len(shape), shape)]
    for dim, at in cuts:  # every box in two, where it is long enough
        if dim < len(shape):
            boxes = [part for box in boxes for part in _halves(box, dim, at)]
    spoiled = {
        "nothing": boxes,
        "drop": boxes[1:],
        "twice": [*boxes, boxes[0]],
        "shift": [(tuple(n + 1 for n in boxes[0][0]), boxes[0][1]), *boxes[1:]],
        "grow": [(boxes[0][0], tuple(n + 1 for n in boxes[0][1])), *boxes[1:]],
    }[spoil]
    counted = torch.zeros([size + 8 for size in shape])
    for offsets, sizes in spoiled:
        counted[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    wanted = torch.zeros_like(counted)
    wanted[tuple(slice(0, size) for size in shape)] = 1
    assert dcp.covers_once(shape, spoiled) == torch.equal(counted, wanted)


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _halves(box: Box, dim: int, at: int) -> list[Box]:
    offsets, sizes = (list(part) for part in box)
    if sizes[dim] <= at:
        return [box]
    low, high = [*sizes], [*sizes]
    low[dim], high[dim] = at, sizes[dim] - at
    behind = [*offsets]
    behind[dim] += at
    return [(box[0], tuple(low)), (tuple(behind), tuple(high))]


def test_a_box_of_negative_size_makes_up_for_nothing() -> None:
    assert not dcp.covers_once((4,), [((0,), (4,)), ((1,), (2,)), ((3,), (-2,))])


def name_refused(state: Mapping[str, Tensor], outline: Outline, folder: Path) -> str:
    torch.save(dict(state), folder / "pytorch_model.bin")
    with pytest.raises(SourceError) as caught:
        naming.named(fsdp.read_whole(folder).weights, outline, folder)
    return str(caught.value)


def test_names_that_do_not_fit_the_architecture_are_told(
    state: State, outline: Outline, tmp_path: Path
) -> None:
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    without = {name: tensor for name, tensor in state.items() if name != norm}
    assert f"lacks {norm}, one of 1" in name_refused(without, outline, tmp_path)
    extra = state | {"v_head.weight": torch.ones(1)}
    assert "has v_head.weight, one of 1" in name_refused(extra, outline, tmp_path)
    wide = state | {norm: torch.ones(65)}
    assert f"{norm} is [65], config.json says [64]" in name_refused(wide, outline, tmp_path)
    other = {re.sub("embed_tokens", "wte", name): tensor for name, tensor in state.items()}
    told = "has model.wte.weight, one of 1" if outline.tied else f"has no {embedding}"
    assert told in name_refused(other, outline, tmp_path)
    lora = {f"base_model.model.{n}.lora_A.default.weight": t for n, t in state.items()}
    assert "holds a LoRA adapter" in name_refused(lora, outline, tmp_path)


def test_a_head_that_left_its_embedding_is_not_dropped(tmp_path: Path) -> None:
    folder = trainers.companions(tmp_path / "config", tied=True)
    outline = architecture.outline(AutoConfig.from_pretrained(folder))
    state = dict(tiny.model(tied=True).state_dict())
    for moved in (0, 1):
        state["lm_head.weight"] = state["lm_head.weight"] + moved
        torch.save(state, tmp_path / "pytorch_model.bin")
        found = naming.named(fsdp.read_whole(tmp_path).weights, outline, tmp_path)
        assert ("lm_head.weight" in found) == bool(moved)
