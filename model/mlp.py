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
    """`down(curve(gate x) * up x)`. Shazeer 2020, arXiv:2002.05202. Gate and up are one weight."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        linear = functools.partial(
            Linear,
            sizes={"D": cfg.embed, "F": cfg.mlp, "C": 2},
            axes={"D": "embed", "F": "mlp"},
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
            bias=cfg.arch.mlp_bias,
            passes=cfg.precision.mlp,
        )
        self.gate_up = linear("BTD,CFD->BTCF", batch="C")
        self.down = linear("BTF,DF->BTD", std=cfg.residual_std)
        self.curve = GATES[cfg.arch.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if x_BTD.shape[1] == 1:  # a step of decoding: the weight is read once, as it lies
            gate_BTCF, up_BTCF = lax.split(self.gate_up(x_BTD), (1, 1), axis=2)
            gate_BTF, up_BTF = gate_BTCF.squeeze(2), up_BTCF.squeeze(2)
        else:
            gate_BTF, up_BTF = (checkpoint_name(y_BTF, "up") for y_BTF in self.gate_up.each(x_BTD))
        h_BTF = self.curve(gate_BTF) * up_BTF
        # Devices talk over `mlp`: the sum over F crosses them, to where x lives; the bytes of x, or
        # twice where tokens lie together.
        return self.down(h_BTF, out=jax.typeof(x_BTD).sharding.spec)


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
            passes=cfg.precision.mlp,
        )
        self.up = linear("BTD,FD->BTF")
        self.down = linear("BTF,DF->BTD", std=cfg.residual_std)
        self.curve = CURVES[cfg.arch.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = self.curve(checkpoint_name(self.up(x_BTD), "up"))
        # Devices talk over `mlp`: the sum over F crosses them, to where x lives; the bytes of x, or
        # twice where tokens lie together.
        return self.down(h_BTF, out=jax.typeof(x_BTD).sharding.spec)


def make_mlp(cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs) -> GatedMlp | PlainMlp:
    """The feed-forward block that the config asks for."""
    kind = GatedMlp if cfg.arch.activation in GATES else PlainMlp
    return kind(cfg, layout, rngs)
