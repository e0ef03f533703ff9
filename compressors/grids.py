"""Grids: the values that a weight's levels stand for, and how they are found for each group.

The level l of a group stands for (l - zero) * scale; without zeros, for l * scale.

Shapes: O outputs, I inputs, G groups of inputs that share a scale, S inputs of a group.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from checkpoint.quantized import FP8, ZEROS, spread
from model.precision import Passes, Precision

TOP = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # the largest level
BOTTOM = {"int8": -127.0, "int4": -8.0, "fp8": -448.0}  # the least
SHRINK = np.linspace(1.0, 0.64, 10, dtype=np.float32)  # of the absmax, that a search tries
NARROWER = (1.0, 0.9, 0.8)  # of the span between a group's ends, that a search begins with
FITS = 4  # of scale and zero to the levels, from each beginning
FAR = 1024.0  # levels that a zero is away at most: float16 holds these
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Scheme:
    """How a model's Linears are stored, and in what they compute."""

    kind: str  # of checkpoint.quantized.KINDS
    group: int = 0  # inputs that share a scale; 0: all of an output's
    zeros: bool = False  # a group's levels lie anywhere, not about 0
    inputs: str = "bf16"  # the format of the Linears' inputs, as model.precision calls it

    @property
    def precision(self) -> Precision:
        """In what the model then computes."""
        passes = Passes(forward=self.inputs)
        return Precision(attention=passes, mlp=passes)


@dataclass(frozen=True)
class Grid:
    """Where the levels of a weight's groups stand."""

    scheme: Scheme
    scales_OG: np.ndarray  # float32
    zeros_OG: np.ndarray  # float32, that float16 holds; all 0 where the scheme has none

    def spread(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero of each of the `width` inputs: what broadcasts to [O, I]."""
        group = self.scheme.group
        return spread(self.scales_OG, group, width), spread(self.zeros_OG, group, width)

    def levels(self, weight_OI: np.ndarray) -> np.ndarray:
        """The nearest to each number, as float32."""
        scales, zeros = self.spread(weight_OI.shape[1])
        return nearest(weight_OI / scales + zeros, self.scheme.kind)

    def rounded(self, weight_OI: np.ndarray) -> "Levels":
        """Each number to its nearest level."""
        return Levels(self.levels(weight_OI), self)


@dataclass(frozen=True)
class Levels:
    """A weight after rounding."""

    values_OI: np.ndarray  # float32: whole numbers, or what float8_e4m3fn holds
    grid: Grid

    def some(self, rows: slice) -> "Levels":
        """Those of some outputs."""
        scales, zeros = self.grid.scales_OG[rows], self.grid.zeros_OG[rows]
        return Levels(self.values_OI[rows], Grid(self.grid.scheme, scales, zeros))

    def weight(self) -> np.ndarray:
        """[O, I] float32."""
        scales, zeros = self.grid.spread(self.values_OI.shape[1])
        return (self.values_OI - zeros) * scales


def nearest(ratio: np.ndarray, kind: str) -> np.ndarray:
    """The nearest levels, as float32. Beyond the last comes the last: fp8's own cast gives NaN."""
    if kind == "fp8":
        return np.clip(ratio, BOTTOM[kind], TOP[kind]).astype(FP8).astype(np.float32)
    return np.clip(np.rint(ratio), BOTTOM[kind], TOP[kind])


def in_groups(weight_OI: np.ndarray, group: int, **fill: str) -> np.ndarray:
    """[O, G, S]; behind a short last group stands what `np.pad` puts there, zeros unless told."""
    rows, width = weight_OI.shape
    group = group or width
    padded = np.pad(weight_OI, ((0, 0), (0, -width % group)), **fill)
    return padded.reshape(rows, -1, group)


def stored_zeros(zeros: np.ndarray) -> np.ndarray:
    """Zeros as they come back from disk, float32."""
    return np.clip(zeros, -2 * FAR, 2 * FAR).astype(ZEROS).astype(np.float32)


def holding(weight_OI: np.ndarray, scheme: Scheme) -> Grid:
    """The finest grid that reaches all numbers of each group."""
    parts_OGS = in_groups(weight_OI.astype(np.float32), scheme.group, mode="edge")
    top_OG = np.abs(parts_OGS).max(axis=2)
    if not scheme.zeros:
        scales_OG = np.where(top_OG > 0, top_OG / np.float32(TOP[scheme.kind]), 1)
        return Grid(scheme, scales_OG.astype(np.float32), np.zeros_like(top_OG))
    low_OG, high_OG = parts_OGS.min(axis=2), parts_OGS.max(axis=2)
    steps = np.float32(TOP[scheme.kind] - BOTTOM[scheme.kind])
    scales_OG = np.maximum(np.maximum((high_OG - low_OG) / steps, top_OG / FAR), TINY)
    scales_OG = np.where(top_OG > 0, scales_OG, 1).astype(np.float32)
    return Grid(scheme, scales_OG, stored_zeros(BOTTOM[scheme.kind] - low_OG / scales_OG))


def absmax(weight_OI: np.ndarray, scheme: Scheme) -> Levels:
    """Round to nearest, on a grid that holds the largest number."""
    return holding(weight_OI, scheme).rounded(weight_OI)


def searched(weight_OI: np.ndarray, scheme: Scheme, matters_I: np.ndarray) -> Grid:
    """Of the grids tried for each group, that with the least sum of matters * error^2."""
    whole = holding(weight_OI, scheme)
    parts_OGS = in_groups(weight_OI.astype(np.float32), scheme.group, mode="edge")
    matters_GS = in_groups(matters_I[None].astype(np.float32), scheme.group)[0]
    best, least_OG = whole, np.full(whole.scales_OG.shape, np.inf, np.float32)
    for factor in NARROWER if scheme.zeros else SHRINK:
        grid = narrowed(whole, np.float32(factor))
        for again in range(FITS if scheme.zeros else 1):
            scales, zeros = grid.scales_OG[..., None], grid.zeros_OG[..., None]
            values_OGS = nearest(parts_OGS / scales + zeros, scheme.kind)
            error_OGS = (values_OGS - zeros) * scales - parts_OGS
            error_OG = np.einsum("ogs,ogs,gs->og", error_OGS, error_OGS, matters_GS)
            better_OG, least_OG = error_OG < least_OG, np.minimum(error_OG, least_OG)
            best = chosen(better_OG, grid, best)
            if again < FITS - 1 and scheme.zeros:
                grid = fitted(values_OGS, grid, parts_OGS, matters_GS)
    return best


def narrowed(grid: Grid, factor: np.float32) -> Grid:
    """Scales times the factor, about where the middle level stands."""
    if not grid.scheme.zeros:
        return dataclasses.replace(grid, scales_OG=grid.scales_OG * factor)
    middle = (TOP[grid.scheme.kind] + BOTTOM[grid.scheme.kind]) / 2
    zeros_OG = stored_zeros(middle - (middle - grid.zeros_OG) / factor)
    return Grid(grid.scheme, grid.scales_OG * factor, zeros_OG)


def chosen(where_OG: np.ndarray, new: Grid, old: Grid) -> Grid:
    """The new grid's groups there, the old one's elsewhere."""
    scales_OG = np.where(where_OG, new.scales_OG, old.scales_OG)
    return Grid(new.scheme, scales_OG, np.where(where_OG, new.zeros_OG, old.zeros_OG))


def fitted(
    values_OGS: np.ndarray, grid: Grid, parts_OGS: np.ndarray, matters_GS: np.ndarray
) -> Grid:
    """Scales and zeros with the least error for these levels: a line through each group."""
    count_G = np.maximum(matters_GS.sum(axis=1), TINY)

    def mean(array_OGS: np.ndarray) -> np.ndarray:
        return np.einsum("ogs,gs->og", array_OGS, matters_GS) / count_G

    level_OG, part_OG = mean(values_OGS), mean(parts_OGS)
    values_OGS = values_OGS - level_OG[..., None]
    spread_OG = mean(values_OGS * values_OGS)
    scales_OG = mean(values_OGS * parts_OGS) / np.maximum(spread_OG, TINY)
    return moved(grid, scales_OG, level_OG - part_OG / np.maximum(scales_OG, TINY))


def moved(grid: Grid, scales_OG: np.ndarray, zeros_OG: np.ndarray) -> Grid:
    """The grid with these, but for groups where they are wild: whose levels are all but alike."""
    near_OG = (np.abs(scales_OG / grid.scales_OG - 1) < 0.5) & (np.abs(zeros_OG) < 2 * FAR)
    return chosen(near_OG, Grid(grid.scheme, scales_OG, stored_zeros(zeros_OG)), grid)
