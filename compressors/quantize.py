"""Quantize: the weight of one Linear as levels and scales, given what its inputs are like.

Pure functions over NumPy arrays. The error of a weight's rounding D in what the Linear gives is
trace(D H D'), with H the second moment of its inputs, so inputs are never kept.

Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from dataclasses import dataclass

import numpy as np

from compressors.grids import Grid, Levels, Scheme, absmax, moved, nearest, searched

DAMP = 0.1  # of H's mean diagonal, added to it
ROUNDS = 2  # of grid and levels after GPTQ
BLOCK = 32  # columns whose corrections GPTQ applies to the others at one time
SOLVED = 1 << 22  # numbers of the equations that are solved at one time
POWERS = np.linspace(0.0, 0.95, 20)  # of the inputs' mean, that AWQ tries

Sharing = tuple[int, int, int]  # I, cut into dims; over the middle one a factor is the same

SCHEMES = {
    "w8a8": Scheme("int8", inputs="int8"),
    "w8": Scheme("int8"),
    "w4g64": Scheme("int4", group=64, zeros=True),
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
    grid = searched(weight_OI, scheme, matters_I)
    levels = in_order(weight_OI, grid, order, factor_II.astype(np.float32))
    H = H.astype(np.float32)
    for _ in range(ROUNDS):
        levels = once_more(refitted(levels, weight_OI, H), weight_OI, H)
    return levels


def damped(second_II: np.ndarray) -> np.ndarray:
    """H, float64, as a text of few tokens can be trusted to tell it."""
    H = second_II.astype(np.float64)
    H[np.diag_indices_from(H)] += DAMP * (float(np.mean(np.diag(H))) or 1.0)
    return H


def in_order(weight_OI: np.ndarray, grid: Grid, order: np.ndarray, factor_II: np.ndarray) -> Levels:
    """Inputs in their order. `factor`: the upper U, U'U = H^-1, in that order."""
    width, kind = len(order), grid.scheme.kind
    work_IO = np.ascontiguousarray(weight_OI.T[order], np.float32)
    scales_IO, zeros_IO = (
        np.broadcast_to(part, weight_OI.shape).T[order] for part in grid.spread(width)
    )
    found_IO = np.empty_like(work_IO)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        error_BO = np.empty_like(work_IO[start:stop])
        for i in range(start, stop):
            found_IO[i] = nearest(work_IO[i] / scales_IO[i] + zeros_IO[i], kind)
            off_O = work_IO[i] - (found_IO[i] - zeros_IO[i]) * scales_IO[i]
            error_O = off_O / factor_II[i, i]
            work_IO[i + 1 : stop] -= np.outer(factor_II[i, i + 1 : stop], error_O)
            error_BO[i - start] = error_O
        work_IO[stop:] -= factor_II[start:stop, stop:].T @ error_BO
    values_IO = np.empty_like(found_IO)
    values_IO[order] = found_IO
    return Levels(np.ascontiguousarray(values_IO.T), grid)


def refitted(levels: Levels, weight_OI: np.ndarray, H: np.ndarray) -> Levels:
    """These levels on the grid with the least error in the outputs: least squares of each row.

    The unknowns are what to add to each group's scale, and then to its offset, -zero * scale.
    """
    grid, groups = levels.grid, levels.grid.scales_OG.shape[1]
    unknowns = groups * (1 + grid.scheme.zeros)
    count = max(SOLVED // unknowns**2, 1)
    some = [slice(i, i + count) for i in range(0, len(weight_OI), count)]
    change_OU = np.concatenate([_change(levels.some(rows), weight_OI[rows], H) for rows in some])
    scales_OG = grid.scales_OG + change_OU[:, :groups]
    offsets_OG = -grid.zeros_OG * grid.scales_OG
    if grid.scheme.zeros:
        offsets_OG = offsets_OG + change_OU[:, groups:]
    zeros_OG = -offsets_OG / np.where(scales_OG == 0, 1, scales_OG)
    return Levels(levels.values_OI, moved(grid, scales_OG.astype(np.float32), zeros_OG))


def _change(levels: Levels, weight_OI: np.ndarray, H: np.ndarray) -> np.ndarray:
    """[O, U], the unknowns of `refitted`, for some rows."""
    values_OI, scheme = levels.values_OI, levels.grid.scheme
    width, groups = len(H), levels.grid.scales_OG.shape[1]
    starts = np.arange(0, width, scheme.group or width)
    felt_OI = (weight_OI - levels.weight()) @ H
    right = [np.add.reduceat(felt_OI * values_OI, starts, axis=1)]
    unknowns = groups * (1 + scheme.zeros)
    left_OUU = np.empty((len(values_OI), unknowns, unknowns))
    for g, start in enumerate(starts):
        part = slice(start, start + (scheme.group or width))
        felt_OI_g = values_OI[:, part] @ H[part]
        left_OUU[:, g, :groups] = np.add.reduceat(felt_OI_g * values_OI, starts, axis=1)
        if scheme.zeros:
            both_OG = np.add.reduceat(felt_OI_g, starts, axis=1)
            left_OUU[:, g, groups:] = left_OUU[:, groups:, g] = both_OG
    if scheme.zeros:
        right.append(np.add.reduceat(felt_OI, starts, axis=1))
        each_GI = np.add.reduceat(H, starts, axis=0)
        left_OUU[:, groups:, groups:] = np.add.reduceat(each_GI, starts, axis=1)
    size_O = np.trace(left_OUU, axis1=1, axis2=2)
    left_OUU += (1e-6 * size_O + (size_O == 0))[:, None, None] * np.eye(unknowns)
    return np.linalg.solve(left_OUU, np.concatenate(right, axis=1)[..., None])[..., 0]


def once_more(levels: Levels, weight_OI: np.ndarray, H: np.ndarray) -> Levels:
    """Each level the best for all others, one after the other; none makes the error larger."""
    width, grid = len(H), levels.grid
    slope_IO = np.ascontiguousarray(((levels.weight() - weight_OI) @ H).T)
    scales_OI = np.broadcast_to(grid.spread(width)[0], weight_OI.shape)
    values_IO, scales_IO = levels.values_OI.T.copy(), np.ascontiguousarray(scales_OI.T)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        change_BO = np.empty_like(slope_IO[start:stop])
        for i in range(start, stop):
            best_O = values_IO[i] - slope_IO[i] / (H[i, i] * scales_IO[i])
            best_O = nearest(best_O, grid.scheme.kind)
            change_O = (best_O - values_IO[i]) * scales_IO[i]
            values_IO[i], change_BO[i - start] = best_O, change_O
            slope_IO[start:stop] += np.outer(H[start:stop, i], change_O)
        slope_IO[stop:] += H[stop:, start:stop] @ change_BO
    return Levels(np.ascontiguousarray(values_IO.T), grid)


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
