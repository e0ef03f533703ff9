"""Family: what a kind of published model is called, in its config.json and in its tensors' names.

Data only. `checkpoint/hf.py` reads the keys, `checkpoint/names.py` the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import Arch, ModelConfig

# Their name of a curve -> ours; of two for one curve, the first is written.
GATED_CURVES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}
PLAIN_CURVES = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Key:
    """A key of config.json whose value is not simply that of one field."""

    fields: tuple[str, ...]  # of ModelConfig, dotted; all take the value
    values: Mapping[str, str] | None = None  # theirs -> ours; any other value is refused
    plus: int = 0  # ours = (theirs + plus) ** power
    power: float = 1


@dataclass(frozen=True)
class Family:
    """Names as `transformers` writes them, and where in our model each belongs."""

    name: str  # model_type in config.json
    published: str  # where the architecture is described
    # Architecture -> kind of head. Of two for one kind, the first is written.
    architectures: Mapping[str, str]
    arch: Arch  # what no key says
    keys: Mapping[str, str | Key]  # key of config.json -> field of ModelConfig, dotted
    defaults: Mapping[str, Any]  # what transformers takes where config.json lacks the key
    names: Mapping[str, str]  # tensor -> slot, in the language of checkpoint/names.py
    heads: Mapping[str, Mapping[str, str]]  # the same, for each kind of head
    # Tensors that tied heads share with others: not stored, or stored again.
    copies: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""  # of the names in a model with a head; models without one leave it out
    ignored: tuple[str, ...] = ()  # patterns of tensors that files hold and no model needs
    aliases: Mapping[str, str] = field(default_factory=dict)  # parts of names in other files
    only: Mapping[str, tuple] = field(default_factory=dict)  # key -> the values we can compute
    spellings: Mapping[str, str] = field(default_factory=dict)  # other key -> key
    scalings: tuple[str, ...] = ("none", "linear", "llama3", "yarn")  # of RoPE, that it can say
    inner: str = ""  # key under which a larger model's config.json holds this one's
    outer: str = ""  # model_type of that larger model
    gguf: str = ""  # general.architecture in GGUF files
    sizes: Mapping[str, ModelConfig] = field(default_factory=dict)  # published, by name on the hub
