"""README's table of adapter variants as data: every row with the cases that show it to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.artifact import TrainingBase
from quant.lora import nf4
from quant.lora.adapter import CONFIG, WEIGHTS
from tests import tiny, variants

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LANGUAGE = r".*language_model.*\.(q_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Case:
    """An adapter on a tiny base of `family`: `settings` as `variants.trained` takes them, `change`
    what another trainer leaves of PEFT's folder, `served` what becomes of it beside its base."""

    family: str = "llama"
    tied: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Path], None] | None = None
    training: TrainingBase = "stored"
    served: Literal["as it is", "after export", "no"] = "as it is"


@dataclass(frozen=True)
class Row:
    """A line of the table; one without cases is no LoRA."""

    variant: str
    merged: str
    served: str
    cases: Mapping[str, Case]


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    """An adapter whose tensors have other names."""

    def rewrite(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        save_file({change(key): tensor for key, tensor in held.items()}, folder / WEIGHTS)

    return rewrite


def _edited(**config: Any) -> Callable[[Path], None]:
    return lambda folder: tiny.edit_json(folder / CONFIG, **config)


def _one_by_one(folder: Path) -> None:
    """Mixtral's experts as transformers 4 had them: a pair for each layer of each."""
    held, plain = load_file(folder / WEIGHTS), {}
    for key, tensor in held.items():
        if ".experts." not in key:
            plain[key] = tensor
        elif ".lora_A." in key:
            home = key.partition(".base_layer")[0].partition(".lora_A")[0]
            b = held[key.replace("lora_A", "lora_B")]
            plain |= _experts(home.replace(".mlp.", ".block_sparse_moe."), tensor, b)
    save_file(plain, folder / WEIGHTS)
    tiny.edit_json(
        folder / CONFIG,
        target_modules=["q_proj", "w1", "w2", "w3"],
        target_parameters=None,
        rank_pattern={"w1": 8, "w3": 8},
        alpha_pattern={"w1": 16, "w3": 16},
    )


def _experts(home: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Pairs by name of a stack of four experts: A [4 * rank, in], B [out, rank * 4]."""
    rank = len(a) // 4
    leaves = {"w1": slice(0, 128), "w3": slice(128, 256)} if len(b) == 256 else {"w2": slice(None)}
    found = {}
    for expert in range(4):
        for leaf, rows in leaves.items():
            name = f"{home}.{expert}.{leaf}"
            found[f"{name}.lora_A.weight"] = a[expert * rank : (expert + 1) * rank].clone()
            found[f"{name}.lora_B.weight"] = b[rows, expert::4].clone()
    return found


def _plain(*names: str, **more: Any) -> dict[str, Case]:
    known = {**variants.PLAIN, **variants.BEYOND, **variants.STARTS, **variants.BIASED}
    return {name: Case(settings=known[name], **more) for name in names}


TABLE = (
    Row(
        "plain, rsLoRA, `rank_pattern`, `alpha_pattern`, on attention and dense or shared MLPs",
        "yes",
        "yes",
        _plain(*(name for name in variants.PLAIN if name != "head"))
        | {"shared-expert": Case("qwen2_moe", settings={"targets": ("shared_expert.up_proj",)})},
    ),
    Row(
        "the same on an untied `lm_head`",
        "yes",
        "with the code of Llama, Phi-3, Qwen3, Qwen3-MoE, Mixtral",
        {"head": Case(settings=variants.PLAIN["head"], served="after export")},
    ),
    Row(
        "the same on a mixture's router (`gate`)",
        "yes",
        "with Qwen2-MoE, Qwen3-MoE, Mixtral; after `adapter export` where PEFT made it a target"
        " parameter",
        {
            f"router-{family}": Case(
                family, settings={"targets": ("gate", "q_proj")}, served="after export"
            )
            for family in ("mixtral", "qwen3_moe")
        },
    ),
    Row(
        "the same on a mixture's experts: as `target_parameters`, or one by one",
        "yes",
        "no",
        {
            f"experts-{family}": Case(
                family, settings={"targets": ("gate_proj", "up_proj", "down_proj")}, served="no"
            )
            for family in ("qwen3_moe", "olmoe")
        }
        | {
            "experts-mixtral": Case(
                "mixtral",
                settings={"targets": ("w1", "w2", "w3", "q_proj"), "use_rslora": True},
                served="no",
            ),
            "experts-qwen2": Case(
                "qwen2_moe",
                settings={
                    "targets": ("q_proj", "down_proj"),
                    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                },
                served="no",
            ),
            "experts-down": Case(
                "qwen3_moe", settings={"targets": ("down_proj", "gate", "v_proj")}, served="no"
            ),
            "experts-named": Case(
                "qwen3_moe",
                settings={
                    "targets": ("o_proj",),
                    "target_parameters": ["mlp.experts.gate_up_proj"],
                    "rank_pattern": {"gate_up_proj": 3},
                },
                served="no",
            ),
            "experts-one-by-one": Case(
                "mixtral",
                settings={"targets": ("w1", "w2", "w3", "q_proj")},
                change=_one_by_one,
                served="no",
            ),
        },
    ),
    Row(
        "the same on any other layer, `fan_in_fan_out`",
        "yes",
        "no",
        {
            "gpt-neox": Case("gpt_neox", settings={"targets": ("query_key_value",)}, served="no"),
            "gpt-neox-head": Case(
                "gpt_neox", settings={"targets": ("lm_head", "dense")}, served="no"
            ),
            "shared-gate": Case(
                "qwen2_moe", settings={"targets": ("shared_expert_gate",)}, served="no"
            ),
            "gpt2": Case(
                "gpt2", settings={"targets": ("c_attn",), "fan_in_fan_out": True}, served="no"
            ),
        },
    ),
    Row(
        "the same on the language part of a vision-language model",
        "yes",
        "as vLLM does it (not measured); after `adapter export` where the base's files have other"
        " names for its layers",
        {
            f"language-{family}": Case(
                family, settings={"targets": _LANGUAGE}, served="after export"
            )
            for family in tiny.SEEING
        }
        | {"language-qwen3_vl": Case("qwen3_vl", settings={"targets": _LANGUAGE})}
        | {
            "language-named-by-4": Case(
                "gemma3",
                settings={"targets": _LANGUAGE},
                change=renamed(
                    lambda key: key.replace("model.language_model.", "language_model.model.", 1)
                ),
            ),
            "language-tokens": Case(
                "gemma3",
                tied=True,
                settings={"targets": _LANGUAGE, "trainable_token_indices": [7, 9]},
                served="no",
            ),
        },
    ),
    Row(
        "the same on its vision tower",
        "yes",
        "no",
        {
            "projector-saved": Case(
                "gemma3",
                settings={"targets": _LANGUAGE, "modules_to_save": ["multi_modal_projector"]},
                served="no",
            ),
            "tower": Case(
                "llava",
                settings={"targets": r".*(vision_tower|multi_modal).*(q_proj|linear_1)"},
                served="no",
            ),
        },
    ),
    Row(
        "QLoRA",
        "yes; into the base it saw with `--training-base nf4` (`nf4-double`)",
        "yes",
        _plain("attention", training="nf4"),
    ),
    Row(
        "PiSSA, OLoRA",
        "yes",
        "after `adapter export`",
        _plain("pissa", "olora", served="after export"),
    ),
    Row(
        "CorDA, LoRA-GA, PiSSA by random SVD",
        "with the initial adapter (`--initial`), or `--training-base residual`",
        "after `adapter export`, with the initial adapter",
        {
            "pissa-random": Case(
                settings={"init_lora_weights": "pissa_niter_2"}, served="after export"
            ),
            "corda": Case(
                change=_edited(init_lora_weights="corda"), training="residual", served="no"
            ),
        },
    ),
    Row(
        "LoftQ",
        "into the base it saved, with `--training-base residual`",
        "no",
        {
            "loftq": Case(
                change=_edited(init_lora_weights="loftq"), training="residual", served="no"
            )
        },
    ),
    Row(
        "DoRA, `modules_to_save`, adapted embeddings, retrained tokens, biases",
        "yes",
        "no",
        _plain(*variants.BEYOND, served="no")
        | {
            name: Case("qwen2", settings=settings, served="no")
            for name, settings in variants.BIASED.items()
        },
    ),
    Row(
        "grown vocabulary; one side of a tied embedding, which unties it",
        "yes",
        "no",
        {
            "one-side": Case(tied=True, settings=variants.BEYOND["embedding"], served="no"),
            "grown-saved": Case(
                settings={"vocabulary": 330, "modules_to_save": ["lm_head", "embed_tokens"]},
                served="no",
            ),
        }
        | {
            f"grown-tokens-{'tied' if tied else 'untied'}": Case(
                tied=tied,
                settings={"vocabulary": 323, "trainable_token_indices": [320, 321, 322]},
                served="no",
            )
            for tied in (True, False)
        },
    ),
    Row("prompt tuning, p-tuning", "no", "yes", {}),
    Row("prefix tuning", "no", "no", {}),
    Row(
        "PEFT's copy of the head or embedding in the file",
        "yes",
        "after `adapter export`",
        {"copied": Case(settings=variants.PLAIN["head"], served="after export")},
    ),
    Row(
        "keys as a wrapper left them (`_orig_mod.`, `module.`, FSDP's, `.default.`), or a model"
        " without its head",
        "yes",
        "after `adapter export`",
        {
            "without-head": Case(
                change=renamed(lambda key: key.replace(".model.model.", ".model.", 1)),
                served="after export",
            ),
            "compiled": Case(change=renamed(lambda key: f"_orig_mod.{key}"), served="after export"),
            "wrapped": Case(
                change=renamed(
                    lambda key: "module." + key.replace(".layers.", "._fsdp_wrapped_module.layers.")
                ),
                served="after export",
            ),
            "named-default": Case(
                settings={"use_dora": True},
                change=renamed(
                    lambda key: key.replace("_vector", "_vector.default").replace(
                        ".weight", ".default.weight"
                    )
                ),
                served="no",
            ),
        },
    ),
)
CASES = {name: case for row in TABLE for name, case in row.cases.items()}


def base_of(case: Case, folder: Path) -> Path:
    """Its base in float32, without a quantization that could hide the adapter."""
    return variants.base_folder(folder, case.family, tied=case.tied)


def trained(case: Case, base: Path, folder: Path) -> tuple[Path, Tensor]:
    """The adapter's folder and PEFT's logits of base and adapter, unmerged."""
    made, theirs = variants.trained(folder, base, **case.settings)
    if case.training == "nf4":
        model = variants.parent(base)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = nf4.round_trip(module.weight.data, double=False)
        theirs = variants.logits(PeftModel.from_pretrained(model, made))
    if case.change is not None:
        case.change(made)
    return made, theirs
