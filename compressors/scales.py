"""Scales: factors moved from what makes a Linear's inputs into its weight; the model stays.

`y = W x = (W s)(x / s)`: x / s comes for nothing where a norm or another Linear makes x and nobody
else reads it. So it is for what follows a norm before its branch, for the attention's output after
its values, and for the last Linear of a gated feed-forward after its "up" half.
"""

from collections.abc import Callable

import numpy as np

from compressors.quantize import Inputs, Sharing
from model.config import GATED, ModelConfig

Weights = dict[str, np.ndarray]
Choose = Callable[[np.ndarray, Inputs, Sharing], np.ndarray]  # factors, for a weight [O, I]


def migrate(
    cfg: ModelConfig, sparse: bool, weights: Weights, inputs: dict[str, Inputs], choose: Choose
) -> list[str]:
    """Move the factors that `choose` gives, in the layer's `weights` and in `inputs`; of which."""
    moved = []
    for name, sharing in places(cfg, sparse).items():
        weight = weights[f"{name}.weight"]
        flat_OI = weight.reshape(-1, inputs[name].largest_I.size)
        factor_I = choose(flat_OI, inputs[name], sharing or (1, 1, flat_OI.shape[1]))
        weights[f"{name}.weight"] = (flat_OI * factor_I).reshape(weight.shape)
        MAKERS[name](cfg, weights, factor_I)
        inputs[name] = inputs[name].divided(factor_I)
        moved.append(name)
    return moved


def places(cfg: ModelConfig, sparse: bool) -> dict[str, Sharing | None]:
    """The Linears of a layer that factors can be moved into, and how their inputs share them."""
    before = cfg.arch.norm.placement in ("pre", "sandwich")
    gated = cfg.arch.activation in GATED
    groups = cfg.heads // cfg.kv_heads
    there = {
        "attention.qkv": (None, before),
        "attention.out": ((cfg.kv_heads, groups, cfg.head_dim), True),
        "mlp.gate_up": (None, before and gated and not sparse),
        "mlp.up": (None, before and not gated and not sparse),
        "mlp.down": (None, gated and not sparse),
    }
    return {name: sharing for name, (sharing, wanted) in there.items() if wanted}


def by_norm(number: int) -> Callable[[ModelConfig, Weights, np.ndarray], None]:
    """Divide what norm1 or norm2 gives."""

    def divide(cfg: ModelConfig, weights: Weights, factor_D: np.ndarray) -> None:
        scale, bias, offset = f"norm{number}.scale", f"norm{number}.bias", cfg.arch.norm.offset
        weights[scale] = (weights[scale] + offset) / factor_D - offset
        if bias in weights:
            weights[bias] = weights[bias] / factor_D

    return divide


def by_values(cfg: ModelConfig, weights: Weights, factor_I: np.ndarray) -> None:
    """Divide the attention's values, the last of J; sums of them over tokens follow."""
    factor_KH = factor_I.reshape(cfg.kv_heads, -1, cfg.head_dim)[:, 0]
    weight_KJHD = weights["attention.qkv.weight"].copy()
    weight_KJHD[:, -1] /= factor_KH[..., None]
    weights["attention.qkv.weight"] = weight_KJHD
    if "attention.qkv.bias" in weights:
        bias_KJH = weights["attention.qkv.bias"].copy()
        bias_KJH[:, -1] /= factor_KH
        weights["attention.qkv.bias"] = bias_KJH


def by_up(cfg: ModelConfig, weights: Weights, factor_F: np.ndarray) -> None:
    """Divide the half of a gated feed-forward that its curve does not bend."""
    weight_CFD = weights["mlp.gate_up.weight"].copy()
    weight_CFD[1] /= factor_F[:, None]
    weights["mlp.gate_up.weight"] = weight_CFD
    if "mlp.gate_up.bias" in weights:
        bias_CF = weights["mlp.gate_up.bias"].copy()
        bias_CF[1] /= factor_F
        weights["mlp.gate_up.bias"] = bias_CF


MAKERS = {
    "attention.qkv": by_norm(1),
    "attention.out": by_values,
    "mlp.gate_up": by_norm(2),
    "mlp.up": by_norm(2),
    "mlp.down": by_up,
}
