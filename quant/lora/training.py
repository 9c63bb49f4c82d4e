"""How adapters were trained: what they saw of the base, and what they started from.

Refuses adapters whose start cannot be undone, and the same one twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from quant import paths
from quant.artifact import TrainingBase
from quant.errors import AdapterError, RecipeError
from quant.lora import adapter as lora
from quant.lora import nf4, starts
from quant.lora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Training:
    """`base` is what training saw of the model: its weights as stored; as QLoRA rounds them to NF4,
    without or with double quantization; or the model is what a start left of another.

    `initial` is the adapter that training started from, where it does not lie beside.
    """

    base: TrainingBase = "stored"
    initial: Path | None = None

    def __post_init__(self) -> None:
        if self.base == "residual" and self.initial is not None:
            raise RecipeError(
                "--training-base residual is what the start left, so that --initial has nothing to"
                " undo; give one of them"
            )

    @property
    def rounds(self) -> bool:
        """Whether it saw other weights than are stored."""
        return self.base.startswith("nf4")

    def seen(self, stored: Tensor, *, turned: bool) -> Tensor:
        """A linear layer's weight as training saw it, where it rounds: float32, shaped as stored.

        `turned` where that is [in, out].
        """
        upright = stored.T if turned else stored
        found = nf4.round_trip(upright, double=self.base == "nf4-double")
        return found.T.contiguous() if turned else found

    def adapters(self, folders: Sequence[Path]) -> tuple[Adapter, ...]:
        """Those in the folders, ready to be merged into what they saw."""
        if self.initial is not None and len(folders) > 1:
            raise RecipeError(
                f"--initial {self.initial} is the start of one adapter, and {len(folders)} are"
                " given; lay each one's beside it, as START_init"
            )
        opened = tuple(self._begun(lora.read_trained(folder)) for folder in folders)
        for place, adapter in enumerate(opened):
            if adapter.digest in {other.digest for other in opened[:place]}:
                raise AdapterError(f"adapter {adapter.folder} is given twice", field="adapter")
            starts.check(adapter)
            starts.begun(adapter)  # refuses another's start before anything long begins
        return opened

    def _begun(self, adapter: Adapter) -> Adapter:
        if self.base == "residual":
            # The base that training left is given: nothing has to be taken out of it again.
            plain = adapter.config.model_copy(update={"init_lora_weights": True})
            return replace(adapter, config=plain)
        return adapter if self.initial is None else started(adapter, self.initial)


AS_STORED = Training()


def started(adapter: Adapter, initial: Path) -> Adapter:
    """The adapter, `initial` the folder of what it started from; AdapterError where it has none."""
    if adapter.config.start is None:
        raise AdapterError(
            f"--initial {initial}: adapter {adapter.folder} started from nothing that would have to"
            " be undone; leave it out",
            field="init_lora_weights",
        )
    return replace(adapter, initial=paths.full(initial).resolve())
