"""Quantized: how a checkpoint of ours holds a weight in 8 or 4 bits, and what values that means.

The array `NAME` lies there as `NAME.values`, its levels, and `NAME.scales`, float32; where levels
need not lie about 0 also as `NAME.zeros`, float16: the level, seldom a whole number, that stands
for 0. A number is (value - zero) * scale. A weight's contracted dims are one dim here, cut into
groups with a scale and a zero each; a last group may be short.

Shapes: O everything before the contracted dims, I these, G groups of I, P bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from model.kernels.nibbles import packed, unpacked

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
KINDS = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8), "fp8": FP8}  # as they lie on disk
ZEROS = np.dtype(np.float16)


@dataclass(frozen=True)
class Form:
    """How the values of one weight are stored."""

    kind: str  # of KINDS; "int4" lies two in a byte, the first in its low half
    group: int  # values of I that share a scale; 0: all of them
    inputs: int  # how many of the weight's last dims are contracted
    zeros: bool = False  # each group has a zero of its own

    def __post_init__(self):
        if self.kind not in KINDS or self.group < 0 or self.inputs < 1:
            raise ValueError(f"{self} is no form of a quantized array")

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays in the place of the weight's."""
        return ("values", "scales", "zeros") if self.zeros else ("values", "scales")

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """O, I and G of a weight of this shape, or of one layer of a stack."""
        outer, inner = shape[: len(shape) - self.inputs], shape[len(shape) - self.inputs :]
        width = math.prod(inner)
        return math.prod(outer), width, math.ceil(width / (self.group or width))

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each of `parts`, for a weight of this shape."""
        outer, (_, width, groups) = shape[: len(shape) - self.inputs], self.sizes(shape)
        values = (*outer, -(-width // 2)) if self.kind == "int4" else shape
        sizes = {
            "values": (values, KINDS[self.kind]),
            "scales": ((*outer, groups), np.dtype(np.float32)),
            "zeros": ((*outer, groups), ZEROS),
        }
        return {part: sizes[part] for part in self.parts}

    def write(
        self,
        levels_OI: np.ndarray,
        scales_OG: np.ndarray,
        zeros_OG: np.ndarray,
        shape: tuple[int, ...],
    ) -> dict[str, np.ndarray]:
        """The `parts` of a weight of this shape, as they are stored."""
        values = packed(levels_OI) if self.kind == "int4" else levels_OI
        parts = {"values": values, "scales": scales_OG, "zeros": zeros_OG}
        return {
            part: parts[part].astype(dtype, copy=False).reshape(own)
            for part, (own, dtype) in self.shapes(shape).items()
        }

    def read(self, parts: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The weight of this shape, float32, out of its `parts`."""
        rows, width, groups = self.sizes(shape)
        flat = parts["values"].reshape(rows, -1)
        levels_OI = unpacked(flat, width) if self.kind == "int4" else flat
        scales_OI, zeros_OI = (
            spread(parts[part].astype(np.float32).reshape(rows, groups), self.group, width)
            if part in self.parts
            else np.float32(0)
            for part in ("scales", "zeros")
        )
        return ((levels_OI.astype(np.float32) - zeros_OI) * scales_OI).reshape(shape)


def spread(scales_OG: np.ndarray, group: int, width: int) -> np.ndarray:
    """What each group has for each of its values: [O, I], or [O, 1] of a lone group."""
    if scales_OG.shape[1] == 1:
        return scales_OG
    return np.repeat(scales_OG, group, axis=1)[:, :width]
