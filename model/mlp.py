"""Feed-forward blocks.

Shapes: B rows, T tokens, D embed, F hidden.
"""

import functools

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.layers import Linear
from sharding.layout import Layout

GATES = {"swiglu": jax.nn.silu, "geglu": functools.partial(jax.nn.gelu, approximate=True)}
CURVES = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,  # So et al. 2021, arXiv:2109.08668
}


class GatedMlp(nnx.Module):
    """`down(curve(gate x) * up x)`. Shazeer 2020, arXiv:2002.05202. Gate and up are one matmul."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        linear = functools.partial(
            Linear,
            sizes={"D": cfg.embed, "F": cfg.mlp, "C": 2},
            axes={"D": "embed", "F": "mlp"},
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
            bias=cfg.arch.mlp_bias,
        )
        self.gate_up = linear("BTD,CFD->BTCF", batch="C")
        self.down = linear("BTF,DF->BTD", std=cfg.residual_std)
        self.curve = GATES[cfg.arch.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_up_BTCF = checkpoint_name(self.gate_up(x_BTD), "up")
        gate_BTCF, up_BTCF = lax.split(gate_up_BTCF, (1, 1), axis=2)
        h_BTF = (self.curve(gate_BTCF) * up_BTCF).squeeze(2)
        # F is split over tensor: the sum over it crosses devices.
        return self.down(h_BTF)


class PlainMlp(nnx.Module):
    """`down(curve(up x))`, the feed-forward of the first Transformers."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        linear = functools.partial(
            Linear,
            sizes={"D": cfg.embed, "F": cfg.mlp},
            axes={"D": "embed", "F": "mlp"},
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
            bias=cfg.arch.mlp_bias,
        )
        self.up = linear("BTD,FD->BTF")
        self.down = linear("BTF,DF->BTD", std=cfg.residual_std)
        self.curve = CURVES[cfg.arch.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = self.curve(checkpoint_name(self.up(x_BTD), "up"))
        # F is split over tensor: the sum over it crosses devices.
        return self.down(h_BTF)


def make_mlp(cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs) -> GatedMlp | PlainMlp:
    """The feed-forward block that the config asks for."""
    kind = GatedMlp if cfg.arch.activation in GATES else PlainMlp
    return kind(cfg, layout, rngs)
