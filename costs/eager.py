"""A program run one operation at a time, as a framework without a compiler would.

Loops, calls and derivatives are taken apart; each primitive in them is dispatched by itself, its
results whole in memory until nobody needs them any more. On one device.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding

# With one device, nobody talks and nothing is placed.
ALONE = (
    "psum", "psum_invariant", "all_gather", "all_gather_reduced", "reduce_scatter", "pvary",
    "pcast", "preduced", "punreduced", "reshard", "optimization_barrier", "all_gather_invariant",
    "unreduced_psum", "unreduced_reduce_scatter", "name",
)  # fmt: skip


class Eager:
    """`Eager()(closed, *args)` is what the program `closed` makes of its arguments."""

    def __init__(self):
        self.count = 0  # operations dispatched

    def __call__(self, closed: core.ClosedJaxpr, *args: Any) -> list[Any]:
        """The results."""
        return self.run(closed.jaxpr, closed.consts, list(args))

    def run(self, jaxpr: core.Jaxpr, consts: Any, args: list[Any]) -> list[Any]:
        """The results of a jaxpr; it empties `args`, so that nobody holds what is not needed."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        args.clear()
        last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _vars(eqn.invars)}
        wanted = set(_vars(jaxpr.outvars))
        for i, eqn in enumerate(jaxpr.eqns):
            ins = [self._value(values, atom) for atom in eqn.invars]
            for var in set(_vars(eqn.invars)):
                if last[var] == i and var not in wanted:
                    del values[var]
            outs = self.one(eqn, ins)
            values.update(zip(eqn.outvars, outs, strict=True))
            for var in eqn.outvars:
                if var not in last and var not in wanted:
                    values.pop(var, None)
        return [self._value(values, atom) for atom in jaxpr.outvars]

    def one(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
        """The results of one equation."""
        name, params = eqn.primitive.name, eqn.params
        if name in ALONE:
            return ins
        if name == "scan":
            return self.scan(eqn, ins)
        if name == "while":
            return self.loop(params, ins)
        if name == "cond":
            index, *args = ins
            return self(params["branches"][int(index)], *args)
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = params.get(key)
            if isinstance(inner, core.ClosedJaxpr):
                return self.run(inner.jaxpr, inner.consts, ins)
            if isinstance(inner, core.Jaxpr):
                return self.run(inner, (), ins)
        self.count += 1
        # All is whole on the one device, inside a shard_map as well.
        params = {key: None if isinstance(v, NamedSharding) else v for key, v in params.items()}
        outs = eqn.primitive.bind(*ins, **params)
        return outs if eqn.primitive.multiple_results else [outs]

    def scan(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
        """A loop over the first dim of arrays, step by step."""
        params, inner = eqn.params, eqn.params["jaxpr"].jaxpr
        # A stack has a dim more outside than inside; the names of the counts change with jax.
        stacked = sum(
            x.aval.ndim > y.aval.ndim for x, y in zip(eqn.invars, inner.invars, strict=True)
        )
        carried = sum(
            x.aval.ndim == y.aval.ndim for x, y in zip(eqn.outvars, inner.outvars, strict=True)
        )
        first = len(ins) - stacked
        consts, carry, xs = ins[: first - carried], ins[first - carried : first], ins[first:]
        ins.clear()
        rounds, index = range(params["length"]), functools.partial(lax.index_in_dim, keepdims=False)
        ys = []
        for i in reversed(rounds) if params["reverse"] else rounds:
            outs = self(params["jaxpr"], *consts, *carry, *(index(x, i) for x in xs))
            carry, made = outs[:carried], outs[carried:]
            ys.append(made)
        if params["reverse"]:
            ys.reverse()
        return [*carry, *(jnp.stack(parts) for parts in zip(*ys, strict=True))]

    def loop(self, params: dict, ins: list[Any]) -> list[Any]:
        """A loop until its condition fails."""
        test, body = params["cond_nconsts"], params["body_nconsts"]
        asked, held, carry = ins[:test], ins[test : test + body], ins[test + body :]
        while bool(self(params["cond_jaxpr"], *asked, *carry)[0]):
            carry = self(params["body_jaxpr"], *held, *carry)
        return carry

    def _value(self, values: dict, atom: Any) -> Any:
        if not isinstance(atom, core.Literal):
            return values[atom]
        return np.asarray(atom.val, atom.aval.dtype)  # the literal knows where it was written


def _vars(atoms: Any) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]
