"""`quant.solver.blocks`: the decoder blocks of every family, found, filled and emptied again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quant.errors import SourceError
from quant.intake import source
from quant.intake.source import Source
from quant.solver import blocks
from quant.solver.blocks import Stream
from tests import families, test_selfcheck, tiny

CPU = torch.device("cpu")


def opened(folder: Path, family: str = "llama") -> Source:
    return source.open(str(tiny.model_folder(folder, family, dtype=torch.float32)), cache=folder)


def test_every_linear_layer_is_listed_with_its_shape(tmp_path: Path) -> None:
    decoder = blocks.skeleton(opened(tmp_path), CPU)
    shapes = decoder.shapes()
    assert len(shapes) == 14
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_layers_that_the_model_does_not_run_are_found(tmp_path: Path) -> None:
    decoder = blocks.skeleton(opened(tmp_path), CPU)
    own = list(decoder.stored)
    assert not decoder.drafts([*own, "model.layers.1.self_attn.rotary_emb.inv_freq"])
    further = ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight",
               "mtp.fc.weight", "model.mtp_layers.0.mlp.up_proj.weight"]  # fmt: skip
    assert decoder.drafts([*own, *further]) == ["model.layers.2", "model.mtp_layers", "mtp"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embedding_gives_what_the_first_block_is_given(family: str, tmp_path: Path) -> None:
    model = opened(tmp_path, family)
    decoder = blocks.skeleton(model, CPU)
    ids = torch.randint(4, tiny.VOCAB, (3, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    (one, two), probe = blocks.embed(decoder, model, [(ids[:2], mask[:2]), (ids[2:], mask[2:])])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        first = whole(ids, output_hidden_states=True, use_cache=False).hidden_states[0]
    assert torch.equal(torch.cat([one.hidden, two.hidden]), first)
    assert all(torch.equal(s.parent, s.hidden) for s in (one, two, probe))
    assert all(len(stream.calls) == 2 for stream in (one, two, probe))
    assert torch.equal(probe.hidden, first[:1])


def test_a_stream_gives_its_real_tokens_in_order() -> None:
    inputs = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert Stream(inputs, mask).real(inputs).tolist() == [[0, 1], [2, 3], [6, 7]]
    flat = inputs.flatten(0, 1)  # as Qwen2-MoE's code gives them to its shared expert
    assert torch.equal(Stream(inputs, mask).real(flat), Stream(inputs, mask).real(inputs))
    assert torch.equal(Stream(inputs, mask | True).real(inputs), inputs.view(6, 2))


def test_a_block_holds_its_weights_only_while_it_is_filled(tmp_path: Path) -> None:
    model = opened(tmp_path)
    decoder = blocks.skeleton(model, CPU)
    block = decoder.blocks[1]
    names = {name: f"model.layers.1.{name}" for name in block.state_dict()}
    with pytest.raises(KeyboardInterrupt), blocks.filled(block, names, model, CPU):
        for own, name in names.items():
            assert torch.equal(block.get_parameter(own), model.tensors.get(name))
        raise KeyboardInterrupt
    assert {parameter.device.type for parameter in decoder.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "holds no nn.Linear"),
        (
            "jetmoe",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "has 3 dimensions",
        ),
    ],
)
def test_blocks_that_cannot_be_solved_are_refused(
    kind: str, settings: dict[str, int], reason: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[kind](vocab_size=tiny.VOCAB, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=reason):
        blocks.skeleton(source.open(str(tmp_path), cache=tmp_path), CPU)


@pytest.mark.parametrize("kind", ["gemma4_text", "falcon", "bloom", "llama", "gemma2"])
def test_what_blocks_get_beside_the_states_is_counted_without_weights(
    tmp_path: Path, kind: str
) -> None:
    """Positions, masks, and of Gemma-4 an embedding of every token for every block."""
    if kind in test_selfcheck.FURTHER:
        folder = test_selfcheck.folder(tmp_path / "model", kind)
    else:
        folder = families.folder(tmp_path / "model", kind)
    read = source.open(str(folder), cache=tmp_path)
    decoder = blocks.skeleton(read, CPU)
    ids = torch.zeros(3, 40, dtype=torch.int64)
    (stream,), _ = blocks.embed(decoder, read, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    values = [v for args, kwargs in stream.calls for v in (*args, *kwargs.values())]
    flat = [t for value in values for t in (value if isinstance(value, tuple) else [value])]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in flat
        if isinstance(t, torch.Tensor)
    }
    assert blocks.given_beside(decoder, read, 3, 40) == sum(held.values()) > 0
