"""Two levels of 4 bits in a byte, the first in its low half. NumPy arrays give NumPy arrays.

Shapes: K levels, P bytes of them.
"""

from typing import Any


def packed(levels: Any) -> Any:
    """[..., K] levels -8 to 7 as [..., P] uint8; behind an odd K stands a zero."""
    xp = levels.__array_namespace__()
    nibbles = levels.astype(xp.int8).astype(xp.uint8) & 15
    nibbles = xp.pad(nibbles, [(0, 0)] * (levels.ndim - 1) + [(0, levels.shape[-1] % 2)])
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpacked(w: Any, K: int) -> Any:
    """[..., K] int8 of `packed`."""
    both = w.__array_namespace__().stack(halves(w), axis=-1)
    return both.reshape(*w.shape[:-1], -1)[..., :K]


def halves(w: Any) -> tuple[Any, Any]:
    """[..., P] int8 each: the first levels of all bytes, and the second ones."""
    int8 = w.__array_namespace__().int8
    return (w << 4).astype(int8) >> 4, w.astype(int8) >> 4
