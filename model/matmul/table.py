"""The head's three matmuls, of a chunk of tokens and one device's part of the vocabulary.

The loss computes its gradient in the forward pass, so all three run side by side, in a `shard_map`.

Shapes: C tokens of a chunk, D embed, v a device's part of the vocabulary, d its part of D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.matmul.rounded import (
    OF_VALUES,
    Operand,
    Rounded,
    Rounding,
    multiplied,
    of_gradients,
    turned_back,
)
from model.precision import Format, Passes
from sharding.gather import Axes


class Table(NamedTuple):
    """A device's part of the table, with D whole."""

    passes: Passes
    forward_vD: Operand
    dgrad_vD: Operand
    vocab: Axes  # mesh axes that split the vocabulary

    @classmethod
    def gather(
        cls, table_vd: jax.Array, dtype: str, passes: Passes, embed: Axes, vocab: Axes
    ) -> "Table":
        """From each device's slice of D, over the mesh axes `embed`."""
        forward, dgrad = Format.parse(passes.forward), Format.parse(passes.dgrad)

        def whole(form: Format) -> Operand:
            # Devices talk over `embed`: slices of D, the bytes of what they are rounded to.
            gather = lambda a: lax.all_gather(a, embed, axis=1, tiled=True) if embed else a  # noqa: E731
            if form.exact:
                return gather(table_vd.astype(dtype))
            values, scales, _ = Rounding(OF_VALUES[form.kind], over=embed).by_row(table_vd)
            return Rounded(gather(values), scales)

        seen = whole(forward)
        again = not dgrad.exact and (forward.exact or forward.fp8 != dgrad.fp8)
        return cls(passes, seen, whole(dgrad) if again else seen, vocab)

    def logits(self, x_CD: jax.Array, dtype: str) -> jax.Array:
        """[C, v] in `dtype`."""
        form = Format.parse(self.passes.forward)
        if form.exact:
            return jnp.einsum("CD,vD->Cv", x_CD, self.forward_vD, preferred_element_type=dtype)
        if form.weights_only:
            return multiplied(x_CD, self.forward_vD, x_CD.dtype).astype(dtype)
        return multiplied(Rounding(OF_VALUES[form.kind]).by_row(x_CD), self.forward_vD, dtype)

    def dgrad(self, dz_Cv: jax.Array) -> jax.Array:
        """[C, D]: this part of the vocabulary's."""
        rounding = of_gradients(Format.parse(self.passes.dgrad), self.passes, over=self.vocab)
        if rounding is None and not isinstance(self.dgrad_vD, Rounded):
            return jnp.einsum("Cv,vD->CD", dz_Cv, self.dgrad_vD)
        return turned_back(dz_Cv, self.dgrad_vD, rounding)[0]

    def wgrad(self, dz_Cv: jax.Array, x_CD: jax.Array) -> jax.Array:
        """[D, v] float32, of this chunk."""
        form = Format.parse(self.passes.wgrad)
        rounding = of_gradients(form, self.passes)
        if rounding is None:
            return jnp.einsum("Cv,CD->Dv", dz_Cv, x_CD, preferred_element_type=jnp.float32)
        xT_DC = Rounding(OF_VALUES[form.kind]).by_column(x_CD)
        return multiplied(xT_DC, rounding.by_column(dz_Cv), jnp.float32)
