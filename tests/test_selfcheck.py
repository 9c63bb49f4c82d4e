"""`solver.selfcheck`: models whose blocks, one at a time, are the model, and those refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quant import tokens
from quant.errors import SourceError
from quant.intake import source
from quant.intake.source import Source
from quant.proof import replica
from quant.solver import blocks, grid, selfcheck
from quant.solver.blocks import Call, Decoder
from quant.solver.experts import Expert
from tests import tiny
from tests.test_gptq import plainly_rounded
from tests.test_pipeline import Crash, Told, calibration_file, letters, quantize

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
LEVELS = grid.full_range(4, torch.bfloat16)
HEADS: Mapping[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
PLAIN: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
OLD: Mapping[str, Any] = {"n_embd": 32, "n_layer": 5, "n_head": 2, "rotary_dim": 8}
GEMMA4: Mapping[str, Any] = {
    **PLAIN,
    **HEADS,
    "hidden_size": 128,  # whose root no 16-bit number is
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": tiny.VOCAB,
}
# Beside those of tests.tiny: blocks that put out tuples, which the model takes the first of; eager
# attention alone; embeddings of a token for every block; a router that is a layer and more.
FURTHER: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 5, "n_head": 2},
    "codegen": {**OLD, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2},
    "gemma4_text": GEMMA4,
    "gptj": OLD,
    "mpt": {"d_model": 32, "n_layers": 5, "n_heads": 2},
    "phimoe": {**PLAIN, **HEADS, "num_local_experts": 4},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2},
}


def folder(home: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    if kind not in FURTHER and not settings:
        return tiny.model_folder(home, kind, dtype=dtype)
    asked = {"vocab_size": tiny.VOCAB, **FURTHER.get(kind, {}), **settings}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**asked))
    tiny.tokenizer(home)
    made.to(dtype).save_pretrained(home)
    return home


def opened(home: Path, kind: str, **settings: Any) -> Source:
    return source.open(str(folder(home, kind, **settings)), cache=home / "cache")


def check(model: Source, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = blocks.skeleton(model, CPU, dtype)
    selfcheck.run(decoder, model)
    return decoder


@pytest.mark.parametrize("kind", [*tiny.FAMILIES, *tiny.MIXTURES, *tiny.SEEING, *FURTHER])
def test_blocks_walked_one_at_a_time_are_the_model(kind: str, tmp_path: Path) -> None:
    decoder = check(opened(tmp_path, kind))
    assert {weight.device.type for weight in decoder.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": -1e30}, {"attention_multiplier": 1e39}], ids=["norm", "attention"]
)
def test_a_number_that_the_forward_breaks_at_is_told(change: Any, tmp_path: Path) -> None:
    kind = "granite" if "attention_multiplier" in change else "llama"
    folder(tmp_path, kind)
    tiny.edit_json(tmp_path / "config.json", **change)
    model = source.open(str(tmp_path), cache=tmp_path / "cache")
    with pytest.raises(
        SourceError, match=r"not finite in model\.layers\.0: a number in config\.json"
    ):
        check(model)


@pytest.mark.parametrize("kind", ["gemma3_text", "mixtral", "gemma4_text"])
def test_in_16_bits_too(kind: str, tmp_path: Path) -> None:
    assert check(opened(tmp_path, kind), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", *FURTHER])
def test_the_plain_forward_is_transformers_own(kind: str, tmp_path: Path) -> None:
    model = opened(tmp_path, kind, dtype=torch.float32)
    ids = selfcheck._drawn(model)
    passed = selfcheck._plain(blocks.skeleton(model, CPU), model, ids)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(passed) == len(states) - 1
    for place, found in enumerate(passed):
        torch.testing.assert_close(found.before, states[place], rtol=1e-4, atol=1e-5)


def refused(model: Source) -> str:
    """In what words; whatever else flies is a failure."""
    with pytest.raises(SourceError) as caught:
        check(model)
    said = str(caught.value)
    assert "\n" not in said and f"{model.architecture} is not supported" in said
    return said


def test_blocks_that_hand_on_more_than_states_are_refused(tmp_path: Path) -> None:
    """Two of Gemma-4's blocks attend to the keys and values of earlier ones."""
    said = refused(opened(tmp_path, "gemma4_text", num_kv_shared_layers=2))
    assert "cannot be run one at a time (KeyError" in said


def test_states_that_are_no_vector_a_token_are_refused(tmp_path: Path) -> None:
    settings = {"head_dim": 16, "laurel_rank": 8, "num_kv_shared_layers": 0}
    ple = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": tiny.VOCAB}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    sparse = {"activation_sparsity_pattern": [0.0, 0.0]}
    made = opened(tmp_path, "gemma3n_text", **PLAIN, **HEADS, **settings, **ple, **kinds, **sparse)
    assert "not a vector a token" in refused(made)


def test_what_transformers_cannot_run_either_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tmp_path, "llama")
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", lambda *_, **__: [])
    assert "transformers itself cannot run it on text (ValueError" in refused(model)


Break = Callable[[pytest.MonkeyPatch], None]


def _mixed_up(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Expert, hidden: Tensor, gating: Any) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._leaves)
        made: Tensor = down(gating._apply_gate(torch.cat([up(hidden), gate(hidden)], dim=-1)))
        return made

    patch.setattr(Expert, "forward", forward)


def _noting(patch: pytest.MonkeyPatch, change: Callable[[Tensor, list[Call]], Any]) -> None:
    """Blocks are walked on something else than the model would give them."""
    real = blocks._noted
    patch.setattr(blocks, "_noted", lambda *given: change(*real(*given)))


def _lost_mask(patch: pytest.MonkeyPatch) -> None:
    """Sliding windows are told to blocks by a mask."""
    _noting(patch, lambda hidden, calls: (hidden, [
        (args, {**kwargs, "attention_mask": None}) for args, kwargs in calls]))  # fmt: skip


def _scaled(patch: pytest.MonkeyPatch) -> None:
    _noting(patch, lambda hidden, calls: (hidden * 1.01, calls))


def _twice(patch: pytest.MonkeyPatch) -> None:
    """A looped model runs its blocks again."""
    real = selfcheck._run

    def run(forward: Any, filled: Any, noted: Any, hidden: Any, **kwargs: Any) -> Any:
        out: Any = real(forward, filled, noted, hidden, **kwargs)
        return real(forward, filled, noted, out, **kwargs)

    patch.setattr(selfcheck, "_run", run)


@pytest.mark.parametrize(
    ("kind", "broken", "says"),
    [
        ("mixtral", _mixed_up, r"what model\.layers\.0 makes is off by"),
        ("mistral", _lost_mask, r"what model\.layers\.0 makes is off by"),
        ("gemma3_text", _lost_mask, r"what model\.layers\.0 makes is off by"),
        ("llama", _scaled, "what the first block is given is off by 0.01 of itself"),
        ("llama", _twice, r"model\.layers\.0 runs as number 1, or more than once"),
    ],
)
def test_a_walk_that_is_not_the_model_is_refused(
    kind: str, broken: Break, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tmp_path, kind)
    broken(monkeypatch)
    with pytest.raises(SourceError, match=says):
        check(model)


def test_quantize_refuses_before_anything_is_solved_and_leaves_nothing(tmp_path: Path) -> None:
    parent, told = folder(tmp_path / "parent", "gemma4_text", num_kv_shared_layers=2), Told()
    with pytest.raises(SourceError, match="Gemma4ForCausalLM is not supported"):
        quantize(parent, tmp_path / "out", told, texts=calibration_file(tmp_path))
    assert told.layers == []
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_run_that_goes_on_has_been_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tiny.model_folder(tmp_path / "parent")
    asked: dict[str, Any] = {"texts": calibration_file(tmp_path), "samples": 8}
    with pytest.raises(Crash):
        quantize(parent, tmp_path / "out", Told(crash_after=8), **asked)
    monkeypatch.setattr(selfcheck, "run", lambda *_: pytest.fail("it was checked again"))
    assert len(quantize(parent, tmp_path / "out", Told(before=7), **asked).told.layers) == 7


@pytest.mark.parametrize("kind", ["gemma4_text", "phimoe", "falcon"])
def test_what_is_walked_rightly_is_quantized_well(kind: str, tmp_path: Path) -> None:
    parent = folder(tmp_path / "parent", kind)
    asked: dict[str, Any] = {"texts": calibration_file(tmp_path), "group_size": 32, "samples": 8}
    made = quantize(parent, tmp_path / "out", **asked)
    names = {f"{layer.name}.weight" for layer in made.manifest.layers}
    assert not [name for name in names if name.endswith((".gate.weight", ".router.weight"))]
    model = source.open(str(parent), cache=tmp_path / "cache")
    held = ((name, model.tensors.get(name)) for name in model.tensors.names())
    rounded = {n: plainly_rounded(t.float(), 32, LEVELS) if n in names else t for n, t in held}
    whole = replica.of_parent(model, CPU)
    plain = replica.of_tensors(model, rounded.items(), CPU, kind)
    text = "\n".join(letters(seed=1))  # of the kind that calibrated, and none of it
    ids = torch.tensor(tokens.of_text(text, tokens.load_tokenizer(parent))[:256]).view(4, 64)
    solved = distance(whole, replica.of_artifact(model, made.folder, made.manifest, CPU), ids)
    assert 0 < solved < distance(whole, plain, ids)


@torch.no_grad()
def distance(parent: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    """Mean KL in nats over `ids`."""
    before, after = (model(input_ids=ids).logits.log_softmax(-1) for model in (parent, other))
    return float((before.exp() * (before - after)).sum(-1).mean())
