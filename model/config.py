"""ModelConfig: the sizes of a Transformer, and Arch, the kind of Transformer it is.

Values only: no mesh, no device, no array. Each class checks itself when it is made.
"""

import dataclasses
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "attention", "dots", "full")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "geglu", "gelu", "relu", "relu2")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless `value >= least`."""
    if not value >= least:
        raise ValueError(f"{name}={value} must be at least {least}")


@dataclass(frozen=True)
class Norm:
    """Normalisation of the residual stream, always computed in float32."""

    kind: str = "rms"  # "rms": Zhang & Sennrich 2019; "layer": Ba et al. 2016
    eps: float = 1e-5
    bias: bool = False  # LayerNorm only

    def __post_init__(self):
        one_of("kind", self.kind, NORMS)
        if self.bias and self.kind != "layer":
            raise ValueError("bias=True needs kind='layer': RMSNorm has no bias")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps} must be positive")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. Su et al. 2021, arXiv:2104.09864."""

    theta: float = 10_000.0  # base of the wavelengths
    local_theta: float = 0.0  # base in windowed layers; 0 means `theta`

    def __post_init__(self):
        if not self.theta > 0:
            raise ValueError(f"theta={self.theta} must be positive")
        at_least("local_theta", self.local_theta, 0)


@dataclass(frozen=True)
class Attention:
    """What the attention of every layer shares, and how its windows repeat over the layers."""

    windows: tuple[int, ...] = (0,)  # tokens that each place of the pattern sees; 0: all
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE
    softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: off
    scale: float = 0.0  # multiplies q.k; 0: 1 / sqrt(head_dim)
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        if not self.windows:
            raise ValueError("windows is empty: a single 0 means full attention in every layer")
        for window in self.windows:
            at_least("windows", window, 0)
        at_least("softcap", self.softcap, 0)
        at_least("scale", self.scale, 0)


@dataclass(frozen=True)
class Head:
    """The language head, its softmax and its loss."""

    tied: bool = False  # the head's weight is the embedding table
    softcap: float = 0.0  # of the final logits; 0: off
    z_loss: float = 0.0  # weight of log(Z)^2. Chowdhery et al. 2022, arXiv:2204.02311
    chunk: int = 4096  # tokens per device whose logits exist at one time

    def __post_init__(self):
        at_least("softcap", self.softcap, 0)
        at_least("z_loss", self.z_loss, 0)
        at_least("chunk", self.chunk, 1)


@dataclass(frozen=True)
class Init:
    """How parameters begin: Gaussian, norms at one, biases at zero.

    Matrices keep the variance of their inputs: std 1 / sqrt(fan-in).
    """

    embed: float = 0.02  # std of the embedding table
    head: float = 0.02  # std of an untied head; 0 begins with uniform predictions
    residual: float = 1.0  # times 1 / sqrt(2 layers), what a branch adds. Radford et al. 2019

    def __post_init__(self):
        for name in ("embed", "head", "residual"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Arch:
    """The kind of Transformer: what a family of models shares at every size."""

    norm: Norm = Norm()
    rope: Rope = Rope()
    attention: Attention = Attention()
    head: Head = Head()
    activation: str = "swiglu"  # gated: swiglu, geglu; plain: gelu, relu, relu2
    mlp_bias: bool = False
    embed_scale: bool = False  # multiply embeddings by sqrt(embed)
    init: Init = Init()

    def __post_init__(self):
        one_of("activation", self.activation, MLPS)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder. `vocab` 0 means: the tokenizer's size, rounded up to 128."""

    layers: int = 4
    embed: int = 256
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    mlp: int = 768
    vocab: int = 0
    dtype: str = "bfloat16"  # of the computation; norms, softmax and loss are float32 always
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1  # layers per iteration of the scan
    arch: Arch = Arch()

    def __post_init__(self):
        for name in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "unroll"):
            at_least(name, getattr(self, name), 1)
        at_least("vocab", self.vocab, 0)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        one_of("dtype", self.dtype, DTYPES)
        one_of("param_dtype", self.param_dtype, DTYPES)
        one_of("remat", self.remat, REMATS)

    @property
    def residual_std(self) -> float:
        """What a branch of a layer adds to the residual stream at first, as a share of unit."""
        return self.arch.init.residual / (2 * self.layers) ** 0.5

    def with_vocab(self, tokens: int) -> "ModelConfig":
        """This config for a tokenizer of `tokens` ids; ValueError if its vocabulary is smaller."""
        if not self.vocab:
            return dataclasses.replace(self, vocab=-(-tokens // 128) * 128)
        if self.vocab < tokens:
            raise ValueError(f"vocab={self.vocab} is smaller than the tokenizer's {tokens} ids")
        return self
