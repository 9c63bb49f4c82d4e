"""Whether numbers as they lie in a file are finite, told without a tensor library."""

from __future__ import annotations

# Bytes of a number, and the bits of its last two (little-endian) bytes that are all ones in an
# infinity or NaN and in no other number. Integers and 8-bit floats are not looked at.
_EXPONENT = {
    "BF16": (2, 0x80, 0x7F), "F16": (2, 0x00, 0x7C), "F32": (4, 0x80, 0x7F), "F64": (8, 0xF0, 0x7F),
}  # fmt: skip


def are_finite(raw: bytes, dtype: str) -> bool:
    """Whether all of these whole numbers of a safetensors `dtype` are."""
    if dtype not in _EXPONENT:
        return True
    size, low_mask, high_mask = _EXPONENT[dtype]
    high = raw[size - 1 :: size]
    # Sane weights have no such high byte at all: found (or not) at memory speed.
    if not any(bytes([sign | mask]) in high for sign in (0, 0x80) for mask in _ones(high_mask)):
        return True
    both = zip(high, raw[size - 2 :: size], strict=True)
    return not any(h & high_mask == high_mask and lo & low_mask == low_mask for h, lo in both)


def _ones(mask: int) -> range:
    """Every low seven bits that include the mask's: 7C..7F for 7C, 7F for 7F."""
    return range(mask, 0x80)
