"""Rotary positions of a GGUF file as transformers' `rope_parameters`: linear, YaRN, Llama 3's and
long RoPE.

llama.cpp keeps Llama 3's as a tensor of factors, one a frequency. What made them is found again,
and believed only where it makes the same factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quant.intake import gguf_tensors
from quant.intake.gguf_keys import Keys

Numbers = npt.NDArray[np.float64]
_FREQS, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (_FREQS, _SHORT, _LONG)
_PARTIAL = ("nemotron",)  # whose configuration means a part where it says nothing
_THETA = 10_000.0  # where the file says none
_CLOSE = 1e-4  # relative: the file holds float32
_FACTORS, _CONTEXTS = (8, 32, 4, 16, 2, 64), range(5, 21)
_LOW, _HIGHS = 1.0, (4.0, 2.0, 3.0, 8.0, 16.0)


class _Llama3(NamedTuple):
    """Wavelengths up to `context / high` stay, those beyond `context` are `factor` times as long.

    Both ends of what lies between are a ratio to the context: the lower one is always 1 here."""

    factor: float
    context: float
    high: float

    def factors(self, wavelengths: Numbers) -> Numbers:
        smooth = (self.context / wavelengths - _LOW) / (self.high - _LOW)
        found: Numbers = 1 / ((1 - smooth.clip(0, 1)) / self.factor + smooth.clip(0, 1))
        return found

    def __str__(self) -> str:
        return f"factor {self.factor:g} beyond {self.context:g} positions"


def parameters(keys: Keys, head: int) -> dict[str, Any]:
    """What the keys and tensors of a file say of heads of so many numbers. SourceError."""
    theta = keys.number(".rope.freq_base", _THETA)
    rotated = keys.whole(".rope.dimension_count", head, least=2)
    found: dict[str, Any] = {"rope_theta": theta, **_scaling(keys, theta, rotated)}
    if rotated != head or keys.architecture in _PARTIAL:
        found["partial_rotary_factor"] = rotated / head
    return found


def _scaling(keys: Keys, theta: float, rotated: int) -> dict[str, Any]:
    tensors = keys.header.tensors
    factor = keys.number(".rope.scaling.factor", keys.number(".rope.scale_linear", 0.0))
    # llama.cpp takes a factor without a type for a linear one.
    kind = keys.text(".rope.scaling.type", "linear" if factor else "none")
    # The trained context is YaRN's and long RoPE's alone, who ask for it.
    keys.pass_over(".rope.scaling.finetuned", ".rope.scaling.original_context_length")
    if theta <= 0 or factor < 0 or (kind == "yarn" and not factor):
        raise keys.header.refused(
            f"its rope.freq_base is {theta}, its rope.scaling.factor {factor}"
        )
    long = _SHORT in tensors or _LONG in tensors
    if _FREQS in tensors:
        if long or kind != "none":
            raise keys.header.refused(f"it has {_FREQS}, and rope.scaling.type is {kind}")
        return _llama3(keys, theta, rotated)
    if long or kind == "longrope":
        return _longrope(keys, rotated)
    if kind == "yarn":
        return _yarn(keys, factor)
    if kind not in ("none", "linear"):
        raise keys.header.refused(f"rope.scaling.type {kind} is not known")
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    if keys.number(".rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.header.refused("rope.scaling.yarn_ext_factor is not 1")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.whole(
            ".rope.scaling.original_context_length", least=1
        ),
    }
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"),
                      ("yarn_attn_factor", "attention_factor"),
                      ("attn_factor", "attention_factor")):  # fmt: skip
        if f".rope.scaling.{key}" in keys:
            found[name] = keys.number(f".rope.scaling.{key}")
    return found


def _longrope(keys: Keys, rotated: int) -> dict[str, Any]:
    trained = keys.whole(".rope.scaling.original_context_length", least=1)
    stretch = keys.whole(".context_length", least=1) / trained
    usual = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 < trained else 1.0
    attention = keys.number(".rope.scaling.attn_factor", usual)
    found = {
        "rope_type": "longrope",
        "short_factor": _factors(keys, _SHORT, rotated).tolist(),
        "long_factor": _factors(keys, _LONG, rotated).tolist(),
        "original_max_position_embeddings": trained,
    }
    if math.isclose(attention, usual, rel_tol=_CLOSE):
        return found
    return found | {"attention_factor": attention}


def _llama3(keys: Keys, theta: float, rotated: int) -> dict[str, Any]:
    factors = _factors(keys, _FREQS, rotated)
    if (factors == 1).all():
        return {"rope_type": "default"}
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)

    def apart(guess: _Llama3) -> float:
        return float(np.abs(guess.factors(wavelengths) / factors - 1).max())

    best = min(_guesses(factors, wavelengths), key=apart)
    if apart(best) > _CLOSE:
        raise keys.header.refused(
            f"the factors of {_FREQS} are not Llama 3's: {best} comes nearest; give the model's"
            " Hugging Face folder"
        )
    return {
        "rope_type": "llama3",
        "factor": best.factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": best.high,
        "original_max_position_embeddings": round(best.context),
    }


def _guesses(factors: Numbers, wavelengths: Numbers) -> Iterator[_Llama3]:
    """The published models' first; then what the frequencies between both ends solve to."""
    for factor in dict.fromkeys((float(factors.max()), *map(float, _FACTORS))):
        for power in _CONTEXTS:
            yield _Llama3(factor, float(1 << power), _HIGHS[0])
        between = (factors > 1) & (factors < factor * (1 - _CLOSE))
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        longer = 1 / wavelengths[between]
        for high in _HIGHS if len(smooth) == 1 else ():
            context = (smooth[0] * (high - _LOW) + _LOW) / longer[0]
            yield _Llama3(factor, round(float(context)), high)
        if len(smooth) > 1:
            slope, offset = np.polyfit(longer, smooth, 1)
            if slope > 0 > offset:
                yield _Llama3(
                    factor, round(float(-slope / offset)), round(float(1 - 1 / offset), 3)
                )


def _factors(keys: Keys, name: str, rotated: int) -> Numbers:
    place = keys.header.tensors.get(name)
    if place is None or place.shape != (rotated // 2,):
        raise keys.header.refused(
            f"it needs {name} with a factor for each of {rotated // 2} frequencies"
        )
    found = gguf_tensors.rows(keys.header.path, place, 0, 1).astype(np.float64).reshape(-1)
    if not (np.isfinite(found) & (found > 0)).all():
        raise keys.header.refused(f"{name} holds factors that are not positive numbers")
    return np.array([float(str(np.float32(factor))) for factor in found])
