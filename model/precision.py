"""Precision: to what numbers the operands of a matmul are rounded, by kind of layer and by pass.

Parameters, the activations between matmuls, sums and gradients stay what they are. docs/int8.md
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

FORMATS = {
    "bf16": "not rounded: the compute dtype, whatever that is",
    "int8": "-127 to 127 times a scale; sums are exact",
    "fp8": "float8_e4m3 times a scale, gradients float8_e5m2; sums are float32",
    "w8": "weights to int8, nothing else; multiplied in the compute dtype",
    "w4": "weights to -7 to 7, nothing else; multiplied in the compute dtype",
}
GRADIENTS = ("bf16", "int8", "fp8")  # of dgrad and wgrad
ROUNDINGS = ("nearest", "stochastic")
SCALINGS = ("current", "delayed")
EXPERTS = ("bf16", "int8")  # of experts
GROUPS = (16, 1 << 16)


class Format(NamedTuple):
    """The numbers of both operands of a matmul."""

    kind: str  # of FORMATS
    group: int = 0  # neighbours along the contracted dim that share a scale; 0: all of them

    @classmethod
    def parse(cls, text: str) -> "Format":
        """`int8`, or in groups `int8g128`."""
        kind, _, group = text.partition("g")
        return cls(kind, int(group or 0))

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.kind == "bf16"

    @property
    def fp8(self) -> bool:
        """Whether numbers are floating."""
        return self.kind == "fp8"

    @property
    def weights_only(self) -> bool:
        """Whether activations are not rounded, and products not in 8 bits."""
        return self.kind in ("w8", "w4")


@dataclass(frozen=True)
class Passes:
    """The formats of the matmuls of one kind of layer, y = x w'."""

    forward: str = "bf16"  # of x and w
    dgrad: str = "bf16"  # dx = dy w: of dy and w, by default the w that the forward pass saw
    wgrad: str = "bf16"  # dw = dy' x: of dy and x, whose contracted dim are the tokens
    rounding: str = "nearest"  # of dy; or "stochastic": up or down by chance, right on average
    scaling: str = "current"  # scales made of what is rounded; or "delayed": of the steps before

    def __post_init__(self):
        for name, known in (("forward", FORMATS), ("dgrad", GRADIENTS), ("wgrad", GRADIENTS)):
            text = getattr(self, name)
            grouped = re.fullmatch(r"(.*[0-9])g([0-9]{1,6})", text)
            if grouped and grouped[1] in known and grouped[1] != "bf16":
                if not GROUPS[0] <= int(grouped[2]) <= GROUPS[1]:
                    least, most = GROUPS
                    raise ValueError(f"{name}={text!r} must have groups of {least} to {most}")
            elif text not in known:
                raise ValueError(f"{name}={text!r} {unknown(text, known)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is none of {', '.join(ROUNDINGS)}")
        kinds = [Format.parse(text).kind for text in (self.dgrad, self.wgrad)]
        if self.rounding == "stochastic" and (set(kinds) - {"bf16"} != {"int8"}):
            raise ValueError(
                f"rounding='stochastic' is of int8 gradients, not of dgrad={self.dgrad!r}, "
                f"wgrad={self.wgrad!r}"
            )
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} is none of {', '.join(SCALINGS)}")
        texts = {name: getattr(self, name) for name in ("forward", "dgrad", "wgrad")}
        if self.delayed and set(texts.values()) - {"bf16"} != {"fp8"}:
            raise ValueError(
                f"scaling='delayed' is of passes in fp8 without groups, others in bf16, not of "
                f"{', '.join(f'{name}={text!r}' for name, text in texts.items())}"
            )

    @classmethod
    def by_name(cls, name: str) -> "Passes":
        """What a preset does in a feed-forward."""
        return Precision.by_name(name).mlp

    @property
    def name(self) -> str:
        """Of the preset that does this in a feed-forward; empty: of none."""
        return next((name for name, every in PRESETS.items() if every.mlp == self), "")

    @property
    def quantized(self) -> bool:
        """Whether any pass rounds its operands."""
        return self != BF16

    @property
    def delayed(self) -> bool:
        """Whether scales are made of what the steps before have seen."""
        return self.scaling == "delayed"


@dataclass(frozen=True)
class Precision:
    """The formats of all matmuls. The name of a preset sets every field, or those of one kind."""

    attention: Passes = Passes()  # to queries, keys and values, and back
    mlp: Passes = Passes()
    head: Passes = Passes()  # over the vocabulary; no groups
    experts: Passes = Passes()  # int8, without groups; routers stay as they are

    def __post_init__(self):
        for name in ("forward", "dgrad", "wgrad"):
            text = getattr(self.experts, name)
            if text not in EXPERTS:
                raise ValueError(f"experts: {name}={text!r} is none of {', '.join(EXPERTS)}")
        for name in ("forward", "dgrad", "wgrad"):
            text = getattr(self.head, name)
            if Format.parse(text).group:
                raise ValueError(f"head: {name}={text!r} has groups, which are of hidden layers")
        if self.head.delayed:
            raise ValueError("head: scaling='delayed' is of hidden layers; 'current' of any")

    @property
    def quantized(self) -> bool:
        """Whether any matmul rounds its operands."""
        return self != Precision()

    @property
    def delayed(self) -> bool:
        """Whether any layer remembers what it has seen."""
        return self.attention.delayed or self.mlp.delayed

    @property
    def current(self) -> "Precision":
        """The same, of layers that remember nothing."""
        kinds = {"attention": self.attention, "mlp": self.mlp}
        return replace(self, **{kind: replace(p, scaling="current") for kind, p in kinds.items()})

    @classmethod
    def by_name(cls, name: str) -> "Precision":
        """The preset of this name."""
        if name not in PRESETS:
            raise ValueError(unknown(name, PRESETS))
        return PRESETS[name]

    @property
    def name(self) -> str:
        """Of the preset that this is; empty: of none."""
        return next((name for name, every in PRESETS.items() if every == self), "")


def unknown(name: str, known: Iterable[str]) -> str:
    """What is wrong with a name that is none of those known, and which was meant."""
    close = difflib.get_close_matches(name, list(known), 1)
    hint = f", did you mean {close[0]}?" if close else ";"
    return f"is no precision{hint} there are {', '.join(known)}"


def hidden(*passes: str) -> Precision:
    """The same in all hidden layers."""
    return Precision(attention=Passes(*passes), mlp=Passes(*passes))


BF16 = Passes()
INT8 = Passes("int8", "int8", "int8")
PRESETS = {
    "bf16": Precision(),
    "int8": Precision(attention=INT8, mlp=INT8),
    "fp8": hidden("fp8", "fp8", "fp8"),
    "fp8_delayed": hidden("fp8", "fp8", "fp8", "nearest", "delayed"),
    # Quantization-aware: the gradients of weights that will be stored so.
    "w8": hidden("w8"),
    "w4": hidden("w4g64"),
}
