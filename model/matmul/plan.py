"""Where devices talk in the product of activations and a weight that lies split on the mesh."""

from typing import NamedTuple

import jax

from sharding.gather import Axes, axes_of

Dims = tuple[tuple[int, Axes], ...]  # dims, each with mesh axes


class Plan(NamedTuple):
    """The way of `einsum(spec, x, w)` over the devices, in the order of its fields."""

    x: jax.P  # where x is placed before anything else
    gathers: Dims  # dims of x that come together, over these axes
    rows: Axes  # that split x's rows then: over them weights are gathered
    y: jax.P  # where the product lies, its sums over contracted dims done but for `scatters`
    scatters: Dims  # dims of y along which these sums end up split

    @classmethod
    def make(cls, spec: str, x: jax.P, w: jax.P, out: jax.P) -> "Plan":
        """From where x and w lie to where `out` wants the product."""
        x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
        lies = {letter: axes_of(dim) for letter, dim in zip(x_dims, x, strict=True)}
        wanted = {letter: axes_of(dim) for letter, dim in zip(y_dims, out, strict=True)}
        features = {axis for dim in w.partitions for axis in axes_of(dim)}
        rows = [letter for letter in x_dims if letter not in w_dims]
        sums = {axis for letter in x_dims if letter not in y_dims for axis in lies[letter]}
        for letter in rows:  # as `out` wants them, as far as that is not for the weight to do
            own = tuple(axis for axis in lies[letter] if axis in wanted[letter] or axis in features)
            more = (axis for axis in wanted[letter] if axis not in lies[letter] + tuple(sums))
            lies[letter] = (*own, *more)
        placed = jax.P(*(lies[letter] or None for letter in x_dims))
        gathers, scatters = [], []
        for letter in rows:
            together = tuple(axis for axis in lies[letter] if axis not in wanted[letter])
            apart = tuple(axis for axis in wanted[letter] if axis not in lies[letter])
            lies[letter] = tuple(axis for axis in lies[letter] if axis in wanted[letter])
            gathers += [(x_dims.index(letter), together)] if together else []
            scatters += [(y_dims.index(letter), apart)] if apart else []
        split = tuple(axis for letter in rows for axis in lies[letter])
        if scatters:
            parts = (lies[letter] if letter in rows else wanted[letter] for letter in y_dims)
            unreduced = {axis for _, axes in scatters for axis in axes}
            out = jax.P(*(part or None for part in parts), unreduced=unreduced)
        return cls(placed, tuple(gathers), split, out, tuple(scatters))
