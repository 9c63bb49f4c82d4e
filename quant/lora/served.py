"""Which layers of a model a server adds an adapter's changes to: the one list of them.

vLLM wraps the layers that it is told at start, and ignores without a word what an adapter has for
any other. Everything here was measured against the merged model (tests/e2e/test_targets.py).
Refuses the rest, by name. Standard library and pydantic only.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from quant import artifact, foreign_json
from quant.errors import AdapterError

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
          "qkv_proj", "gate_up_proj")  # fmt: skip
HEAD, ROUTER = "lm_head", "gate"
# By architecture, beside those. Where vLLM has no adapted head (Qwen2's, Mistral's) it refuses one,
# and a shared expert's own gate it wraps under a name that nothing calls.
_MORE = {
    "LlamaForCausalLM": (HEAD,),
    "MixtralForCausalLM": (HEAD, ROUTER),
    "Phi3ForCausalLM": (HEAD,),
    "Qwen2MoeForCausalLM": (ROUTER,),
    "Qwen3ForCausalLM": (HEAD,),
    "Qwen3MoeForCausalLM": (HEAD, ROUTER),
}
# vLLM's code of these takes no adapters, and it ends at start where they are switched on.
_NONE = ("FalconForCausalLM", "StableLmForCausalLM")
ANYWHERE = (*LAYERS, HEAD, ROUTER)
_LARGEST_HEAD = 258048  # tokens: with more, vLLM ends at start
# Of the language model (not of a tower for images), and not one of many experts.
_LAYER = re.compile(r"^(model\.|language_model\.)*layers\.\d+\.(?!(.+\.)?experts\.)")


def targets(folder: Path) -> tuple[str, ...]:
    """What `--lora-target-modules` has to name for the model in `folder`; empty where vLLM's code
    of it takes no adapters."""
    config = foreign_json.read(folder / "config.json")
    named = config.get("architectures") or [""]
    if named[0] in _NONE:
        return ()
    more = _MORE.get(named[0], ())
    return (*LAYERS, *(name for name in more if name != HEAD or _plain_head(config)))


def layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Module -> (out_features, in_features) of all that an adapter may change beside this base."""
    adapted = targets(folder)
    shapes = artifact.linear_shapes(folder)
    return {module: shape for module, shape in shapes.items() if is_served(module, adapted)}


def check(folder: Path, modules: Iterable[str], adapted: Collection[str]) -> None:
    """AdapterError naming the modules of the adapter in `folder` that no server would change.

    `adapted` is what `targets` says of its base; ANYWHERE before one is known.
    """
    lost = sorted(module for module in modules if not is_served(module, adapted))
    if not lost:
        return
    more = f" and {len(lost) - 2} more" if len(lost) > 2 else ""
    raise AdapterError(
        f"{folder} cannot be served beside its base: the server would leave out what it changes in"
        f" {', '.join(lost[:2])}{more}; `quantserve adapter merge` and `quantserve quantize"
        " --adapter` put all of it into the model",
        field=lost[0],
        expected=", ".join(adapted),
        found=lost[0],
    )


def is_served(module: str, adapted: Collection[str]) -> bool:
    """Whether a server adds an adapter's change to it."""
    leaf = module.rpartition(".")[2]
    return leaf in adapted and (module == HEAD or bool(_LAYER.match(module)))


def _plain_head(config: dict[str, Any]) -> bool:
    """Whether the head is a matrix of its own, stored as such, that vLLM can wrap."""
    section = config.get("quantization_config") or {}
    if section.get("quant_method") == "compressed-tensors":
        stored = HEAD in (section.get("ignore") or ())
    else:
        stored = not section.get("lm_head")
    tied = bool(config.get("tie_word_embeddings"))
    return stored and not tied and config.get("vocab_size", 0) <= _LARGEST_HEAD
