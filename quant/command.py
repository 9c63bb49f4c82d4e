"""What makes two commands the same: everything that decides the bytes of the artifact they make.

Facts are kept with a run's progress; a later command goes on with it only when all of them agree.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from quant.intake.source import Source
from quant.lora import starts
from quant.recipe import Recipe
from quant.solver import devices

Facts = Mapping[str, str]

_LIBRARIES = ("accelerate", "llvmlite", "numba", "numpy", "safetensors", "tokenizers", "torch",
              "transformers", "triton")  # fmt: skip


def facts(recipe: Recipe, opened: Source, texts: Path | None, *, gated: bool) -> dict[str, str]:
    """By the names a reader is told them under; `gated` when some of the texts are held out.

    Threads, instruction set and the kind of each GPU are among them: matrix products differ in
    their last bits, and where one processor computes in 16 bits, another does not.
    """
    on = devices.named(recipe.device)
    device = on[0]
    found = {
        "weights": opened.fingerprint.weights,
        "tokenizer": opened.fingerprint.tokenizer,
        "config.json": _digest(opened.folder / "config.json"),
        "adapters": " ".join(adapter.digest for adapter in opened.adapters) or "none",
        "training base": opened.training.base,
        "initial adapters": " ".join(filter(None, map(starts.identity, opened.adapters))) or "none",
        "calibration": _digest(texts) if texts else "self-written",
        "max-kl": "held out" if gated else "none",
        "quantserve": f"{version('quantserve')} {_code()}",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blocks in": str(devices.forward_dtype(device, exact=recipe.exact)).removeprefix("torch."),
        "machine": platform.machine(),
        "GPUs": " ".join(map(_kind, on)) if device.type == "cuda" else "none",
    }
    found |= {name: _version(name) for name in _LIBRARIES}
    return found | {name: str(value) for name, value in recipe.model_dump(mode="json").items()}


def difference(before: Facts, now: Facts) -> str | None:
    """How two commands differ, in a few words; None where they are the same."""
    return ", ".join(_told(before, now)) or None


def _told(before: Facts, now: Facts) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name, "unknown"), now.get(name, "unknown")
        if was == is_now:
            continue
        long = max(len(was), len(is_now)) > 24  # digests, which say nothing to a reader
        yield f"{name} changed" if long else f"{name} was {was}, is {is_now}"


def _kind(device: torch.device) -> str:
    """What a GPU is, and how much of one: another has other kernels, and other sums."""
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}/{about.major}.{about.minor}/{about.multi_processor_count}"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


def _code() -> str:
    """Of every module of ours: another solver makes other codes."""
    home, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home)}\n{_digest(path)}\n".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
