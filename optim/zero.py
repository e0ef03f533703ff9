"""An optimizer whose state is split over mesh axes that do not split the parameters."""

from typing import Any

import optax

from sharding.gather import Axes
from sharding.zero import own, whole


def split_over(optimizer: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`optimizer`, of which each device along `axes` does its part (sharding/zero.py)."""
    if not axes:
        return optimizer

    def init(params: Any) -> Any:
        return optimizer.init(own(params, axes))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        parts, state = optimizer.update(own(grads, axes), state, own(params, axes))
        return whole(parts, like=params), state

    return optax.GradientTransformation(init, update)
