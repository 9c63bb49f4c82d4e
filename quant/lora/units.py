"""What a smoothed artifact's layers read and put out, beside what their parent's do.

W8A8 divides a layer's inputs by a scale, for good: the layer in front puts out less. An adapter
of the parent means the parent's inputs and outputs, and is the same change of the artifact once A's
columns are multiplied, and B's rows divided, by those scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from quant.lora.adapter import INPUT_DIVISOR, OUTPUT_DIVISOR


@dataclass(frozen=True, slots=True)
class Units:
    """`divisors` are float32 by "MODULE.input_divisor" [in] and "MODULE.output_divisor" [out];
    what is not there is 1."""

    divisors: Mapping[str, Tensor] = field(default_factory=dict)

    def moved(self, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of the parent's layer in the artifact's units."""
        read = self.divisors.get(f"{module}.{INPUT_DIVISOR}")
        put = self.divisors.get(f"{module}.{OUTPUT_DIVISOR}")
        return a if read is None else a * read, b if put is None else b / put[:, None]


def read(path: Path | None) -> Units:
    """Those in an artifact's file; the parent's own without one."""
    return Units(load_file(path)) if path is not None else Units()
