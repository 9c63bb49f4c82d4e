"""`intake.door`: whoever wrote the weights, the same faults are refused in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.errors import SourceError
from quant.intake import source
from quant.intake.source import Source
from quant.tokens import load_tokenizer
from tests import tiny
from tests.test_fsdp import saved
from tests.test_pipeline import calibration_file, quantize

State = dict[str, Tensor]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj"
FILE = "model.safetensors"


def safetensors(folder: Path, state: State) -> None:
    save_file({name: t.clone() for name, t in state.items()}, folder / FILE, {"format": "pt"})


def pickled(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def sharded(folder: Path, state: State) -> None:
    saved(folder / "pytorch_model_fsdp_0", state)


WRITERS = [safetensors, pickled]
Writer = Callable[[Path, State], None]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def any_plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plain")
    return tiny.model_folder(home / "model", tied=bool(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("tied") / "model", tied=True)


def written(plain: Path, folder: Path, write: Writer, state: State, **config: Any) -> Path:
    """The plain model's folder with other weights, and changes to its config.json."""
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns(FILE))
    write(folder, state)
    tiny.edit_json(folder / "config.json", **config)
    return folder


def opened(folder: Path, said: list[str] | None = None) -> Source:
    say = (said if said is not None else []).append
    return source.open(str(folder), cache=folder.parent / "cache", say=say)


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        opened(folder)
    told = str(caught.value)
    assert "\n" not in told and len(told) < 1000
    return told


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if name not in names}


def adding(**more: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): t for name, t in more.items()}


def setting(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {name: change(state[name])}


def under(module: str, **leaves: Tensor) -> Callable[[State], State]:
    """A layer by what a library stores instead of its weight."""
    inside = {f"{module}.{leaf.replace('__', '.')}": t for leaf, t in leaves.items()}
    return lambda state: without(f"{module}.weight")(state) | inside


def gathered_nowhere(state: State) -> State:
    return {n: torch.zeros(0) if n.endswith("proj.weight") else t for n, t in state.items()}


def unmerged(state: State) -> State:
    return {
        f"base_model.model.{n}".replace("q_proj.", "q_proj.base_layer."): t
        for n, t in state.items()
    } | {f"base_model.model.{QUERY}.lora_A.default.weight": torch.ones(4, 64)}


ROW, COLUMN = torch.ones(64), torch.ones(4, 64)
TENSORS: dict[str, tuple[Callable[[State], State], str]] = {
    "no head": (without(HEAD), f"lacks {HEAD}, one of 1 that config.json asks for, with tie"),
    "no norm": (without(NORM), f"lacks {NORM}, one of 1 that config.json asks for"),
    "no embedding": (without(EMBEDDING), f"has no {EMBEDDING}: config.json is of another model"),
    "no layer": (
        lambda state: {n: t for n, t in state.items() if ".layers.1." not in n},
        "lacks model.layers.1.input_layernorm.weight, one of 9 that",
    ),
    "nothing known": (lambda _state: {"a.b": ROW, "c.d": ROW}, f"has no {EMBEDDING}"),
    "not gathered": (gathered_nowhere, "proj.weight is empty, [0]: the model was saved under"),
    "flat": (setting(NORM, lambda t: t[:0].clone()), f"{NORM} is empty, [0]: the model was saved"),
    "wide": (setting(NORM, lambda t: t.repeat(2)), f"{NORM} is [128], config.json says [64]"),
    "turned": (
        setting("model.layers.0.mlp.up_proj.weight", lambda t: t.T.contiguous()),
        "up_proj.weight is [64, 128], config.json says [128, 64]",
    ),
    "a dimension more": (setting(NORM, lambda t: t[None].clone()), f"{NORM} is [1, 64], config"),
    "value head": (
        adding(v_head__summary__weight=ROW),
        "has v_head.summary.weight, one of 1 tensors that config.json does not ask for: remove it",
    ),
    "a bias": (adding(**{f"{QUERY}.bias": ROW}), f"has {QUERY}.bias, one of 1 tensors"),
    "LoRA beside": (
        adding(**{f"{QUERY}.lora_A.weight": COLUMN, f"{QUERY}.lora_B.weight": ROW}),
        f"holds a LoRA adapter ({QUERY}.lora_A.weight): merge it",
    ),
    "unmerged": (unmerged, "holds a LoRA adapter ("),
    "GPTQ": (
        under(QUERY, qweight=torch.ones(8, 64, dtype=torch.int32), scales=torch.ones(1, 64)),
        f"holds quantized weights ({QUERY}.qweight): give the checkpoint from before",
    ),
    "bitsandbytes": (
        adding(**{f"{QUERY}.weight.absmax": ROW}), f"holds quantized weights ({QUERY}.weight.abs"
    ),
    "a scale left": (
        adding(**{f"{QUERY}.weight_scale_inv": ROW}), f"holds quantized weights ({QUERY}.weight_s"
    ),
    "int8": (setting(f"{QUERY}.weight", lambda t: t.char()), f"{QUERY}.weight is int8: not full-p"),
    "twice": (
        lambda state: state | {f"_orig_mod.{NORM}": state[NORM]}, "which are one tensor: leave one"
    ),
    "an average beside": (
        lambda state: {f"{at}.{n}": t for at in ("ema", "net") for n, t in state.items()},
        "tensors that config.json does not ask for",
    ),
}  # fmt: skip
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "one head more": ({"num_key_value_heads": 4}, "k_proj.weight is [32, 64], config.json says [6"),
    "a layer more": ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight, one"),
    "a layer less": ({"num_hidden_layers": 1}, "does not ask for: num_hidden_layers is 1 there"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2': expected a whole nu"),
    "layers as a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5: expected a wh"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected at least 1"),
    "negative layers": ({"num_hidden_layers": -2}, "num_hidden_layers is -2: expected a whole num"),
    "a world of layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: expect"),
    "many layers": ({"num_hidden_layers": 4000}, "num_hidden_layers is 4000, and there are 21 te"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers is True: expected a whole"),
    "wide as text": ({"hidden_size": "wide"}, "hidden_size is 'wide': expected a whole number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0: expected a whole number"),
    "heads that do not divide": ({"num_attention_heads": 3}, "config.json is not valid: "),
    "no such function": ({"hidden_act": "none"}, "describes no Llama that can be built: there is"),
    "no width": ({"hidden_size": 0}, "hidden_size is 0: expected a whole number from 1 to"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: expected a finite number"),
    "endless": ({"rope_theta": float("inf")}, "rope_theta is inf: expected a finite number"),
    "text for a number": ({"rms_norm_eps": "tiny"}, "config.json is not valid: Valid"),
    "dtype auto": ({"dtype": "auto"}, "dtype is 'auto': expected one of \"bfloat16\", "),
    "dtype bf16": ({"dtype": "bf16"}, "dtype is 'bf16': expected one of"),
    "dtype of old": ({"dtype": None, "torch_dtype": "auto"}, "torch_dtype is 'auto': expected"),
    "dtype by parts": ({"dtype": {"text_config": "auto"}}, "dtype is {'text_config': 'auto'}: exp"),
    "dtype with torch": ({"dtype": "torch.bfloat16"}, "dtype is 'torch.bfloat16': expected one"),
    "section as text": ({"quantization_config": "int4"}, "'int4': expected an object"),
    "part as text": ({"text_config": [1]}, "text_config is [1]: expected an object"),
    "dtype a number": ({"dtype": 16}, "dtype is 16: expected one of"),
    "dtype int8": ({"dtype": "int8"}, "dtype is 'int8': expected one of"),
    "tied as text": ({"tie_word_embeddings": "false"}, "is 'false': expected true or false"),
    "another class": (
        {"architectures": ["Qwen2ForCausalLM"]},
        "Qwen2ForCausalLM is not a decoder-only language model of type llama: architectures is",
    ),
    "class as text": ({"architectures": "LlamaForCausalLM"}, "architectures is expected to name"),
    "an odd part": ({"id2label": 5}, "config.json is not valid: 'int' object has no attribute"),
    "a section left": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "has a quantization_config, and its tensors are full precision: remove the section",
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_are_not_the_models_are_refused(
    plain: Path, tmp_path: Path, write: Writer, fault: str
) -> None:
    change, told = TENSORS[fault]
    folder = written(plain, tmp_path / "model", write, change(load_file(plain / FILE)))
    assert told in refused(folder)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_that_is_not_the_models_is_refused(
    plain: Path, tmp_path: Path, write: Writer, fault: str
) -> None:
    change, told = CONFIGS[fault]
    folder = written(plain, tmp_path / "model", write, load_file(plain / FILE), **change)
    assert told in refused(folder)


@pytest.mark.parametrize("fault", ["no head", "not gathered", "unmerged", "value head", "turned"])
def test_a_trainers_shards_go_through_the_same_door(
    plain: Path, tmp_path: Path, fault: str
) -> None:
    change, told = TENSORS[fault]
    state = change(load_file(plain / FILE))
    assert told in refused(written(plain, tmp_path / "model", sharded, state))


def loads(folder: Path) -> State:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "in a trainer's module": lambda name: f"model.{name}",
    "blocks compiled": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "checkpointed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "without its head's model": lambda name: name.removeprefix("model."),
    "parallel and without": lambda name: f"module.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_that_wrappers_left_become_those_of_the_model(
    any_plain: Path, tmp_path: Path, write: Writer, wrapper: str
) -> None:
    state = load_file(any_plain / FILE)
    wrapped = {WRAPPED[wrapper](name): tensor for name, tensor in state.items()}
    folder = written(any_plain, tmp_path / "model", write, wrapped)
    read, wanted = opened(folder), opened(any_plain)
    assert read.tensors.names() == wanted.tensors.names()
    assert read.fingerprint == wanted.fingerprint
    with safe_open(read.folder / FILE, framework="pt") as file:
        assert set(file.keys()) == state.keys()
    assert opened(folder).folder == read.folder


@pytest.mark.parametrize("write", WRITERS)
def test_a_head_that_config_ties_and_that_differs_is_untied_and_said(
    tied: Path, tmp_path: Path, write: Writer
) -> None:
    state = load_file(tied / FILE)
    state[HEAD] = state[EMBEDDING].flip(0)
    folder, said = written(tied, tmp_path / "model", write, state), list[str]()
    read = opened(folder, said)
    assert f"{HEAD} differs from {EMBEDDING}, which config.json ties: both are kept" in said[-1]
    assert not read.config.tie_word_embeddings
    assert torch.equal(read.tensors.get(HEAD), state[HEAD])
    assert torch.equal(read.tensors.get(EMBEDDING), state[EMBEDDING])
    theirs, ours = loads(folder), loads(read.folder)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_head_behind_a_tower_is_untied_wherever_config_json_ties_it(
    tmp_path: Path, family: str
) -> None:
    folder = tiny.model_folder(tmp_path / "model", family, tied=True)
    state = load_file(folder / FILE)
    (embedding,) = (name for name in state if name.endswith("embed_tokens.weight"))
    head = "lm_head.weight" if family == "gemma3" else "language_model.lm_head.weight"
    safetensors(folder, state | {head: state[embedding] + 1})
    read = opened(folder)
    content = json.loads((read.folder / "config.json").read_text())
    assert content["tie_word_embeddings"] is content["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(read.tensors.get(head), state[embedding] + 1)


@pytest.mark.parametrize("write", WRITERS)
def test_a_copy_of_the_head_stays_tied(tied: Path, tmp_path: Path, write: Writer) -> None:
    state = load_file(tied / FILE)
    wide = state[EMBEDDING].float()  # the same numbers in another dtype
    said: list[str] = []
    read = opened(written(tied, tmp_path / "model", write, state | {HEAD: wide}), said)
    assert read.config.tie_word_embeddings and not [line for line in said if "differs" in line]
    assert torch.equal(read.tensors.get(EMBEDDING), state[EMBEDDING])


@pytest.mark.parametrize("write", WRITERS)
def test_a_tied_head_alone_is_the_embedding(tied: Path, tmp_path: Path, write: Writer) -> None:
    state = load_file(tied / FILE)
    state[HEAD] = state.pop(EMBEDDING)
    read = opened(written(tied, tmp_path / "model", write, state))
    assert read.fingerprint == opened(tied).fingerprint


def test_a_head_of_its_own_is_in_the_artifact(tied: Path, tmp_path: Path) -> None:
    state = load_file(tied / FILE)
    state[HEAD] = state[EMBEDDING].flip(0)
    folder = written(tied, tmp_path / "model", safetensors, state)
    made = quantize(folder, tmp_path / "out", texts=calibration_file(tmp_path), samples=2)
    assert torch.equal(made.tensors[HEAD], state[HEAD])
    content = json.loads((made.folder / "config.json").read_text())
    assert content["tie_word_embeddings"] is False


def test_gpt_neox_has_its_head_under_both_names(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model", "gpt_neox")
    state = load_file(folder / FILE)
    theirs, own = "embed_out.weight", "lm_head.weight"
    assert theirs in state
    for name in (theirs, own):
        renamed = {name if n == theirs else n: t for n, t in state.items()}
        read = opened(written(folder, tmp_path / name, safetensors, renamed))
        assert torch.equal(read.tensors.get(name), state[theirs])
        assert read.folder == tmp_path / name
    del state[theirs]
    assert f"lacks {theirs}" in refused(written(folder, tmp_path / "none", safetensors, state))


def test_masks_of_old_files_are_no_weights(tmp_path: Path) -> None:
    """Pythia's files hold them, as bytes."""
    folder = tiny.model_folder(tmp_path / "model", "gpt_neox")
    state, at = load_file(folder / FILE), "gpt_neox.layers.0.attention"
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    more = {f"{at}.bias": mask, f"{at}.rotary_emb.inv_freq": torch.ones(8)}
    safetensors(folder, state | more)
    names = set(opened(folder).tensors.names())
    assert names == state.keys() | {f"{at}.rotary_emb.inv_freq"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]),
        ({}, ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight"]),
        ({"num_nextn_predict_layers": 1}, ["model.layers.2.self_attn.q_proj.weight"]),
    ],
    ids=["mtp", "by what they hold", "by config.json"],
)
def test_layers_that_predict_further_tokens_are_kept(
    plain: Path, tmp_path: Path, write: Writer, config: dict[str, Any], names: list[str]
) -> None:
    state = load_file(plain / FILE) | {name: torch.ones(4, 4) for name in names}
    read = opened(written(plain, tmp_path / "model", write, state, **config))
    assert set(names) < set(read.tensors.names())


@pytest.mark.parametrize("write", WRITERS)
def test_a_config_without_architectures_is_completed(
    plain: Path, tmp_path: Path, write: Writer
) -> None:
    state, said = load_file(plain / FILE), list[str]()
    folder = written(plain, tmp_path / "model", write, state, architectures=None)
    read = opened(folder, said)
    assert "config.json names no architecture: LlamaForCausalLM is taken" in said
    assert read.architecture == "LlamaForCausalLM"
    content = json.loads((read.folder / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert read.fingerprint == opened(plain).fingerprint


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("lacking", [["tokenizer"], ["config"], ["tokenizer", "config"]])
def test_config_and_tokenizer_may_stand_in_the_parent(
    plain: Path, tmp_path: Path, write: Writer, lacking: list[str]
) -> None:
    home = Path(shutil.copytree(plain, tmp_path / "run", ignore=shutil.ignore_patterns(FILE)))
    folder = written(plain, home / "checkpoint-10", write, load_file(plain / FILE))
    for path in (path for path in folder.iterdir() if path.name.startswith(tuple(lacking))):
        path.unlink()
    read = source.open(str(folder), cache=tmp_path / "cache")
    assert read.fingerprint == opened(plain).fingerprint
    assert load_tokenizer(read.folder).get_vocab() == load_tokenizer(plain).get_vocab()


def adapter(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_an_adapter_given_as_a_source_is_recognized(plain: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "lora", base_model_name_or_path="some/base")
    told = f"{one} is an adapter, no model: give its base (some/base) as SOURCE, and this folder as"
    assert told in refused(one)
    shutil.copy(plain / "config.json", one)  # as some trainers leave it
    assert told in refused(one)
    named = adapter(tmp_path / "run" / "sft", base_model_name_or_path=["odd"])
    told = f"holds no model, but the adapter sft: give its base as SOURCE, and {named} as --adapter"
    assert told in refused(tmp_path / "run")


def test_a_run_given_as_a_source_is_recognized(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (9, 100, 20):
        shutil.copytree(plain, run / f"checkpoint-{step}")
    told = "holds no weights itself, but checkpoint-9, checkpoint-20, checkpoint-100: give one of"
    assert told in refused(run)
    for step in (1, 2, 3):
        shutil.copytree(plain, run / f"checkpoint-{step}")
    assert "6 of them, the last checkpoint-3, checkpoint-9, checkpoint-20, chec" in refused(run)


def test_a_folder_of_gguf_files_is_recognized(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).touch()
    assert "holds q4.gguf, q8.gguf: give one file" in refused(tmp_path)


def test_what_was_corrected_follows_the_folder(plain: Path, tmp_path: Path) -> None:
    """Saved anew, in shards: links into the cache lead to what is there now."""
    folder = written(plain, tmp_path / "model", safetensors, load_file(plain / FILE))
    tiny.edit_json(folder / "config.json", architectures=None)
    first = opened(folder)
    (folder / FILE).unlink()
    tiny.model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    tiny.edit_json(folder / "config.json", architectures=None)
    second = opened(folder)
    assert second.folder != first.folder and second.fingerprint == first.fingerprint


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("mixture") / "model", "mixtral")


LAST = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
DOWN = "model.layers.1.mlp.experts.down_proj"


def fused(mixture: Path) -> State:
    """As transformers 5 has it in memory."""
    return dict(AutoModelForCausalLM.from_pretrained(mixture).state_dict())


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(LAST), f"lacks {LAST}, one of 1 that"),
        (setting(LAST, lambda t: t[:3].clone()), f"{LAST} is [3, 128], config.json says [64, 128]"),
        (adding(**{LAST.replace(".3.", ".4."): COLUMN}), "experts.4.w2.weight, one of 1 tensors"),
        (adding(**{DOWN: torch.ones(4, 64, 128)}), f"has {LAST.replace('.3.', '.0.')} and {DOWN}"),
    ],
    ids=["lacking", "of another size", "one more", "in both ways"],
)
def test_every_expert_is_asked_for(
    mixture: Path, tmp_path: Path, write: Writer, change: Callable[[State], State], told: str
) -> None:
    state = change(load_file(mixture / FILE))
    assert told in refused(written(mixture, tmp_path / "model", write, state))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("wrapper", ["", "module._orig_mod."])
def test_experts_in_one_tensor_are_those_of_the_hub(
    mixture: Path, tmp_path: Path, write: Writer, wrapper: str
) -> None:
    state = fused(mixture)
    wrapped = {f"{wrapper}{name}": tensor for name, tensor in state.items()}
    read = opened(written(mixture, tmp_path / "model", write, wrapped))
    assert read.fingerprint == opened(mixture).fingerprint
    del wrapped[f"{wrapper}{DOWN}"]
    told = refused(written(mixture, tmp_path / "less", write, wrapped))
    assert f"lacks {LAST.replace('.3.', '.0.')}, one of 4 that" in told


@pytest.mark.parametrize("write", WRITERS)
def test_a_tower_is_asked_for_as_well(tmp_path: Path, write: Writer) -> None:
    folder = tiny.model_folder(tmp_path / "model", "llava")
    state = load_file(folder / FILE)
    tower = next(name for name in state if name.endswith("0.mlp.fc1.weight"))
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    read = opened(written(folder, tmp_path / "wrapped", write, wrapped))
    assert read.fingerprint == opened(folder).fingerprint
    less = {name: tensor for name, tensor in state.items() if name != tower}
    assert f"lacks {tower}, one of 1" in refused(written(folder, tmp_path / "less", write, less))
    text = {name: t for name, t in state.items() if name.startswith("language_model.")}
    assert "lacks multi_modal_projector" in refused(written(folder, tmp_path / "text", write, text))
