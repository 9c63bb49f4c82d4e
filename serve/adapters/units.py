"""An adapter rewritten for the engine: in what the layers of a smoothed artifact read and put out.

The engine adds B A x to a layer's output, and an artifact's x and output are the parent's divided
by scales that lie beside it. Writes what `quant adapter export` would have; refuses what the
adapter's own dtype cannot hold then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import AdapterError
from quant.lora import adapter
from quant.lora.adapter import INPUT_DIVISOR, OUTPUT_DIVISOR, Adapter


def write(found: Adapter, scales: Path, folder: Path) -> None:
    """Into `folder` the adapter, A's columns multiplied and B's rows divided by `scales`' numbers.

    AdapterError names what the base does not tell, or the tensor that is not finite any more.
    """
    try:
        with safe_open(scales, framework="pt") as divisors:
            known = {name: divisors.get_tensor(name) for name in divisors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise AdapterError(f"{scales} cannot be read: {fault}", field="base") from fault
    tensors: dict[str, Tensor] = {}
    with safe_open(found.weights, framework="pt") as theirs:
        for module, pair in found.pairs.items():
            a, b = (theirs.get_tensor(key) for key in (pair.a_key, pair.b_key))  # [r, in], [out, r]
            read = known.get(f"{module}.{INPUT_DIVISOR}", torch.ones(a.shape[1]))
            put = known.get(f"{module}.{OUTPUT_DIVISOR}", torch.ones(len(b)))
            tensors[pair.a_key] = (a.float() * read).to(a.dtype)
            tensors[pair.b_key] = (b.float() / put[:, None]).to(b.dtype)
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"{found.folder}: {key} is not finite in {tensor.dtype} in the units of this base;"
                " save the adapter as bfloat16 or float32",
                field=key,
            )
    shutil.copyfile(found.folder / adapter.CONFIG, folder / adapter.CONFIG)
    save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})
