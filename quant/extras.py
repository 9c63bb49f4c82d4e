"""What to install where a package of one of our extras is missing, in one line."""

from __future__ import annotations

from importlib.util import find_spec

from quant.errors import QuantError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ENGINES = (
    f"pip install 'quantserve[cpu]' --extra-index-url {CPU_INDEX} (pip install 'quantserve[gpu]' "
    "for CUDA)"
)
# By the name that is imported; every other package comes with quantserve itself.
_BROUGHT = ("accelerate", "gguf", "torch", "transformers", "vllm")


class MissingExtra(QuantError):
    """A package that an extra brings is not installed."""


def told(fault: Exception) -> str | None:
    """What is missing and how to get it; None where it is not that an extra of ours is."""
    if not isinstance(fault, ModuleNotFoundError):
        return None
    name = (fault.name or "").partition(".")[0]
    # A module that is missing inside a package that is there is another fault.
    if name not in _BROUGHT or find_spec(name) is not None:
        return None
    return f"the package {name} is not installed: {ENGINES}"


def need(*names: str) -> None:
    """MissingExtra for the first of these packages that is not installed; imports none."""
    for name in names:
        if why := told(ModuleNotFoundError(name=name)):
            raise MissingExtra(why)
