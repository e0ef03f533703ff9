"""How GGUF stores numbers: plain floats, or small integers in blocks that share their scales.

A block's bytes are as the ggml library lays them out. Shapes: N blocks of a piece of a tensor.
A function here takes the bytes uint8 [N, bytes of a block] and fills the float32 values
[N, values of a block], with the same operations in the same order as ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Fill = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Kind:
    """One way to store the values of a tensor."""

    name: str
    values: int  # of a block, which lie in one row of the tensor
    size: int  # bytes of a block
    dtype: np.dtype  # of the values once read
    fill: Fill | None = None  # None: the bytes are the values


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Bytes [..., b] to values [..., 2, b]: first the low halves of all bytes, then the high."""
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])


def _bits(packed: np.ndarray) -> np.ndarray:
    """Bytes [N, b] to their bits [N, 8 b], the lowest of each byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 2:], out.reshape(-1, 2, 16))
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 4:], out.reshape(-1, 2, 16))
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 6:], out.reshape(-1, 2, 16))
    out += _bits(blocks[:, 2:6]) << 4
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 8:], out.reshape(-1, 2, 16))
    out += _bits(blocks[:, 4:8]) << 4
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


# The kinds below have blocks of 256 values, in groups of 16 or 32 with a scale each.


def _pairs(packed: np.ndarray, out: np.ndarray) -> None:
    """Bytes [N, 64] to values of two bits [N, 256]: four passes over each half of the bytes."""
    halves = packed.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    np.bitwise_and(halves >> shifts, 3, out=out.reshape(-1, 2, 4, 32))


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits each, from 12 bytes [N, 12], as uint8 [N, 8].

    Bytes 0 to 3 hold scales 0 to 3, bytes 4 to 7 minima 0 to 3, each below two bits that are the
    top of scale or minimum 4 to 7, whose lower halves are in bytes 8 to 11.
    """
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (last >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _pairs(blocks[:, 16:80], out)
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 80) * (blocks[:, :16] & 15))[:, :, None]
    groups -= (_half(blocks, 82) * (blocks[:, :16] >> 4))[:, :, None]


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _pairs(blocks[:, 32:96], out)
    # Bit g of mask byte l belongs to value 32 g + l, and means: do not subtract four.
    shifts = np.arange(8, dtype=np.uint8).reshape(8, 1)
    out.reshape(-1, 8, 32)[...] -= ((~blocks[:, None, :32] >> shifts) & 1) << 2
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=1)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | high << 4).astype(np.int8) - np.int8(32)
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 108) * scales)[:, :, None]


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    _scale_k(blocks, out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    shifts = np.arange(8, dtype=np.uint8).reshape(8, 1)
    out.reshape(-1, 8, 32)[...] += ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    _scale_k(blocks, out)


def _scale_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Scales and minima of Q4_K and Q5_K, whose blocks begin alike."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    groups = out.reshape(-1, 8, 32)
    groups *= (_half(blocks, 0) * scales)[:, :, None]
    groups -= (_half(blocks, 2) * minima)[:, :, None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    halves = out.reshape(-1, 2, 2, 64)  # of each half of the block, low halves of 64 bytes, high
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), halves)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    out.reshape(-1, 2, 4, 32)[...] += high
    out -= 32
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]


FLOAT32 = np.dtype("<f4")

# By their numbers in a file.
KINDS = {
    0: Kind("F32", 1, 4, FLOAT32),
    1: Kind("F16", 1, 2, np.dtype("<f2")),
    2: Kind("Q4_0", 32, 18, FLOAT32, _q4_0),
    3: Kind("Q4_1", 32, 20, FLOAT32, _q4_1),
    6: Kind("Q5_0", 32, 22, FLOAT32, _q5_0),
    7: Kind("Q5_1", 32, 24, FLOAT32, _q5_1),
    8: Kind("Q8_0", 32, 34, FLOAT32, _q8_0),
    10: Kind("Q2_K", 256, 84, FLOAT32, _q2_k),
    11: Kind("Q3_K", 256, 110, FLOAT32, _q3_k),
    12: Kind("Q4_K", 256, 144, FLOAT32, _q4_k),
    13: Kind("Q5_K", 256, 176, FLOAT32, _q5_k),
    14: Kind("Q6_K", 256, 210, FLOAT32, _q6_k),
    30: Kind("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
# Kinds that ggml has and this reader has not, for the message.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
