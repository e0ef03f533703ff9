"""Quantize: the weight of one Linear as levels and scales, given what its inputs are like.

Pure functions over NumPy arrays. The error of a weight's rounding D in what the Linear gives is
trace(D H D'), with H the second moment of its inputs, so inputs are never kept.

Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from dataclasses import dataclass

import numpy as np

from checkpoint.quantized import FP8, spread
from model.precision import Passes, Precision

TOP = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # the largest level
SHRINK = np.linspace(1.0, 0.64, 10)  # of the absmax, that a search for a scale tries
DAMP = 0.1  # of H's mean diagonal, added to it
BLOCK = 32  # columns whose corrections GPTQ applies to the others at one time
POWERS = np.linspace(0.0, 0.95, 20)  # of the inputs' mean, that AWQ tries

Sharing = tuple[int, int, int]  # I, cut into dims; over the middle one a factor is the same


@dataclass(frozen=True)
class Scheme:
    """How a model's Linears are stored, and in what they compute."""

    kind: str  # of checkpoint.quantized.KINDS
    group: int = 0  # inputs that share a scale; 0: all of an output's
    inputs: str = "bf16"  # the format of the Linears' inputs, as model.precision calls it

    @property
    def precision(self) -> Precision:
        """In what the model then computes."""
        passes = Passes(forward=self.inputs)
        return Precision(attention=passes, mlp=passes)


SCHEMES = {
    "w8a8": Scheme("int8", inputs="int8"),
    "w8": Scheme("int8"),
    "w4g64": Scheme("int4", group=64),
    "fp8": Scheme("fp8"),
}
METHODS = ("absmax", "smoothquant", "gptq", "awq")
USUAL = {"w8a8": "smoothquant", "w8": "absmax", "w4g64": "gptq", "fp8": "absmax"}


@dataclass(frozen=True)
class Inputs:
    """What came into a Linear over some text."""

    second_II: np.ndarray  # sum of x x'
    largest_I: np.ndarray  # max |x|
    total_I: np.ndarray  # sum of |x|
    tokens: int

    def divided(self, by_I: np.ndarray) -> "Inputs":
        """Of the same inputs, each divided by its own number."""
        second_II = self.second_II / by_I[:, None] / by_I
        return Inputs(second_II, self.largest_I / by_I, self.total_I / by_I, self.tokens)


@dataclass(frozen=True)
class Levels:
    """A weight after rounding."""

    values_OI: np.ndarray  # int8, or float8_e4m3fn
    scales_OG: np.ndarray  # float32
    group: int

    def weight(self) -> np.ndarray:
        """[O, I] float32."""
        values_OI = self.values_OI.astype(np.float32)
        return values_OI * spread(self.scales_OG, self.group, values_OI.shape[1])


def levels(ratio: np.ndarray, kind: str) -> np.ndarray:
    """The nearest levels, as float32. Beyond the last comes the last: fp8's own cast gives NaN."""
    if kind == "fp8":
        return np.clip(ratio, -TOP[kind], TOP[kind]).astype(FP8).astype(np.float32)
    lowest = -8.0 if kind == "int4" else -127.0
    return np.clip(np.rint(ratio), lowest, TOP[kind])


def rounded(weight_OI: np.ndarray, scales_OG: np.ndarray, scheme: Scheme) -> Levels:
    """Each value to its nearest level."""
    ratio = weight_OI / spread(scales_OG, scheme.group, weight_OI.shape[1])
    return kept(levels(ratio, scheme.kind), scales_OG, scheme)


def kept(values_OI: np.ndarray, scales_OG: np.ndarray, scheme: Scheme) -> Levels:
    stored = FP8 if scheme.kind == "fp8" else np.int8
    return Levels(values_OI.astype(stored), scales_OG.astype(np.float32), scheme.group)


def in_groups(weight_OI: np.ndarray, group: int) -> np.ndarray:
    """[O, G, values of a group], zeros behind a short last one."""
    rows, width = weight_OI.shape
    group = group or width
    padded = np.pad(weight_OI, ((0, 0), (0, -width % group)))
    return padded.reshape(rows, -1, group)


def largest(weight_OI: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[O, G] scales that put the largest value of each group at the last level."""
    top_OG = np.abs(in_groups(weight_OI, scheme.group)).max(axis=2)
    return np.where(top_OG > 0, top_OG / TOP[scheme.kind], 1.0).astype(np.float32)


def searched(weight_OI: np.ndarray, scheme: Scheme, matters_I: np.ndarray) -> np.ndarray:
    """[O, G] scales with the least sum of matters * error^2, of those in SHRINK.

    int4 has a level more below zero than above, so that each scale is tried with both signs.
    """
    parts_OGS = in_groups(weight_OI.astype(np.float32), scheme.group)
    matters_GS = in_groups(matters_I[None].astype(np.float32), scheme.group)[0]
    whole_OG = largest(weight_OI, scheme)
    best_OG, least_OG = whole_OG, np.full(whole_OG.shape, np.inf, np.float32)
    signs = (1.0, -1.0) if scheme.kind == "int4" else (1.0,)
    for factor in np.outer(signs, SHRINK).ravel():
        scales_OG = whole_OG * np.float32(factor)
        error_OGS = levels(parts_OGS / scales_OG[..., None], scheme.kind)
        error_OGS *= scales_OG[..., None]
        error_OGS -= parts_OGS
        error_OG = np.einsum("ogs,ogs,gs->og", error_OGS, error_OGS, matters_GS)
        best_OG = np.where(error_OG < least_OG, scales_OG, best_OG)
        least_OG = np.minimum(error_OG, least_OG)
    return best_OG


def absmax(weight_OI: np.ndarray, scheme: Scheme) -> Levels:
    """Round to nearest, on a scale that holds the largest value."""
    return rounded(weight_OI, largest(weight_OI, scheme), scheme)


def gptq(weight_OI: np.ndarray, scheme: Scheme, inputs: Inputs) -> Levels:
    """Round one input after the other; those to come make up for each one's error.

    Frantar et al. 2022, arXiv:2210.17323: in the order of falling H_ii ("act-order"), on scales
    that are chosen before. Then what no order allows: the scales that fit these levels best, and
    each level once more, with all others known.
    """
    H = damped(inputs.second_II)
    order = np.argsort(-np.diag(H), kind="stable")
    factor_II = np.linalg.cholesky(np.linalg.inv(H[order][:, order])).T
    matters_I = np.empty(len(order))
    matters_I[order] = np.diag(factor_II) ** -2.0  # what rounding costs after the others' help
    scales_OG = searched(weight_OI, scheme, matters_I)
    values_OI = in_order(weight_OI, scales_OG, scheme, order, factor_II.astype(np.float32))
    H = H.astype(np.float32)
    scales_OG = refitted(values_OI, scales_OG, scheme, weight_OI, H)
    return kept(once_more(values_OI, scales_OG, scheme, weight_OI, H), scales_OG, scheme)


def damped(second_II: np.ndarray) -> np.ndarray:
    """H, float64, as a text of few tokens can be trusted to tell it."""
    H = second_II.astype(np.float64)
    H[np.diag_indices_from(H)] += DAMP * (float(np.mean(np.diag(H))) or 1.0)
    return H


def in_order(
    weight_OI: np.ndarray,
    scales_OG: np.ndarray,
    scheme: Scheme,
    order: np.ndarray,
    factor_II: np.ndarray,
) -> np.ndarray:
    """[O, I] levels: inputs in their order. `factor`: the upper U, U'U = H^-1, in that order."""
    width = len(order)
    work_IO = np.ascontiguousarray(weight_OI.T[order], np.float32)
    scales_IO = np.broadcast_to(spread(scales_OG, scheme.group, width), weight_OI.shape).T[order]
    found_IO = np.empty_like(work_IO)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        error_BO = np.empty_like(work_IO[start:stop])
        for i in range(start, stop):
            found_IO[i] = levels(work_IO[i] / scales_IO[i], scheme.kind)
            error_O = (work_IO[i] - found_IO[i] * scales_IO[i]) / factor_II[i, i]
            work_IO[i + 1 : stop] -= np.outer(factor_II[i, i + 1 : stop], error_O)
            error_BO[i - start] = error_O
        work_IO[stop:] -= factor_II[start:stop, stop:].T @ error_BO
    values_IO = np.empty_like(found_IO)
    values_IO[order] = found_IO
    return np.ascontiguousarray(values_IO.T)


def refitted(
    values_OI: np.ndarray,
    scales_OG: np.ndarray,
    scheme: Scheme,
    weight_OI: np.ndarray,
    H: np.ndarray,
) -> np.ndarray:
    """[O, G] scales with the least error in the outputs, for these levels: least squares."""
    width, groups = values_OI.shape[1], scales_OG.shape[1]
    starts = np.arange(0, width, scheme.group or width)
    left_OGG = np.empty((len(values_OI), groups, groups), np.float64)
    for g, start in enumerate(starts):
        part = slice(start, start + (scheme.group or width))
        felt_OI = values_OI[:, part] @ H[part]
        left_OGG[:, g] = np.add.reduceat(felt_OI * values_OI, starts, axis=1)
    right_OG = np.add.reduceat((weight_OI @ H) * values_OI, starts, axis=1)
    size_O = np.trace(left_OGG, axis1=1, axis2=2)
    left_OGG += (1e-6 * size_O + (size_O == 0))[:, None, None] * np.eye(groups)
    found_OG = np.linalg.solve(left_OGG, right_OG[..., None])[..., 0]
    usable = np.abs(found_OG / scales_OG - 1) < 0.5  # else its levels are all but zero
    return np.where(usable, found_OG, scales_OG).astype(np.float32)


def once_more(
    values_OI: np.ndarray,
    scales_OG: np.ndarray,
    scheme: Scheme,
    weight_OI: np.ndarray,
    H: np.ndarray,
) -> np.ndarray:
    """[O, I] levels, each the best for all others; none makes the error larger."""
    width = len(H)
    scales_OI = np.broadcast_to(spread(scales_OG, scheme.group, width), values_OI.shape)
    slope_IO = np.ascontiguousarray(((values_OI * scales_OI - weight_OI) @ H).T)
    values_IO, scales_IO = values_OI.T.copy(), np.ascontiguousarray(scales_OI.T)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        change_BO = np.empty_like(slope_IO[start:stop])
        for i in range(start, stop):
            best_O = values_IO[i] - slope_IO[i] / (H[i, i] * scales_IO[i])
            best_O = levels(best_O, scheme.kind)
            change_O = (best_O - values_IO[i]) * scales_IO[i]
            values_IO[i], change_BO[i - start] = best_O, change_O
            slope_IO[start:stop] += np.outer(H[start:stop, i], change_O)
        slope_IO[stop:] += H[stop:, start:stop] @ change_BO
    return values_IO.T


def smooth(weight_OI: np.ndarray, inputs: Inputs, sharing: Sharing) -> np.ndarray:
    """[I]: dividing inputs by this, and multiplying the weight, leaves both as hard to round.

    Xiao et al. 2022, arXiv:2211.10438, at their alpha of a half: sqrt(max |x| / max |w|).
    """
    tops_I = np.abs(weight_OI).max(axis=0)
    ratio_I = inputs.largest_I.astype(np.float64) / np.maximum(tops_I, 1e-9)
    return tied(usable(np.sqrt(ratio_I)), sharing)


def aware(weight_OI: np.ndarray, scheme: Scheme, inputs: Inputs, sharing: Sharing) -> np.ndarray:
    """[I]: multiplying the weight by this keeps what large inputs meet exact.

    Lin et al. 2023, arXiv:2306.00978: mean |x|^power, with the power of POWERS whose rounded weight
    has the least error in the outputs.
    """
    mean_I = inputs.total_I / max(inputs.tokens, 1)
    tried = []
    for power in POWERS:
        factor_I = tied(usable(mean_I.astype(np.float64) ** power), sharing)
        rough_OI = absmax(weight_OI * factor_I, scheme).weight() / factor_I
        tried.append((loss(rough_OI - weight_OI, inputs), factor_I))
    return min(tried, key=lambda one: one[0])[1]


def tied(factor_I: np.ndarray, sharing: Sharing) -> np.ndarray:
    """The factors, made one (their geometric mean) over the middle dim of I as `sharing` cuts it:
    the query heads of a group all read the same values."""
    logs = np.log(factor_I).reshape(sharing)
    return np.exp(np.broadcast_to(logs.mean(axis=1, keepdims=True), sharing).reshape(-1))


def usable(factor_I: np.ndarray) -> np.ndarray:
    """Positive factors about one, float32; one for inputs that never came."""
    factor_I = np.where(np.isfinite(factor_I) & (factor_I > 0), factor_I, 1.0)
    factor_I = factor_I / np.exp(np.mean(np.log(factor_I)))
    return np.clip(factor_I, 1e-3, 1e3).astype(np.float32)


def loss(error_OI: np.ndarray, inputs: Inputs) -> float:
    """The summed square of what a weight's error does to the outputs: trace(D H D')."""
    felt_OI = error_OI @ inputs.second_II.astype(np.float32)
    return max(float(np.sum(felt_OI * error_OI, dtype=np.float64)), 0.0)


def relative(levels: Levels, weight_OI: np.ndarray, inputs: Inputs) -> float:
    """The root of the error's square over that of the outputs; 0 of outputs that are zero."""
    whole = loss(weight_OI, inputs)
    return (loss(levels.weight() - weight_OI, inputs) / whole) ** 0.5 if whole else 0.0
