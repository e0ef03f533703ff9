"""ModelConfig: the sizes of a Transformer, and Arch, the kind of Transformer it is.

Values only: no mesh, no device, no array. Each class checks itself when it is made.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from model.precision import Precision

DTYPES = ("float32", "bfloat16")
KERNELS = ("fastest", "plain")
REMATS = ("none", "dots", "mlp", "attention", "full")
NORMS = ("rms", "layer")
PLACEMENTS = ("pre", "post", "output", "sandwich")
SCALINGS = ("none", "linear", "llama3", "yarn")
QK_NORMS = ("none", "head", "all")
HEADS = ("language", "masked", "classifier", "pooler", "none")
GATED = ("swiglu", "geglu")
HEAD_CURVES = ("tanh", "relu")
MLPS = ("swiglu", "geglu", "gelu", "gelu_erf", "relu", "relu2")


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
    offset: float = 0.0  # added to the stored scale: Gemma's norms multiply by 1 + scale
    # "pre": x + f(norm x); "post", of BERT: norm(x + f(x)), and no last norm;
    # "output", of OLMo 2: x + norm(f(x)); "sandwich", of Gemma 2: x + norm(f(norm x)).
    placement: str = "pre"

    def __post_init__(self):
        one_of("kind", self.kind, NORMS)
        one_of("placement", self.placement, PLACEMENTS)
        if self.bias and self.kind != "layer":
            raise ValueError("bias=True needs kind='layer': RMSNorm has no bias")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps} must be positive")


@dataclass(frozen=True)
class Scaling:
    """How a trained RoPE is stretched over longer texts; windowed layers with `local_theta` stay.

    "linear": Chen et al. 2023, arXiv:2306.15595; "yarn": Peng et al. 2023, arXiv:2309.00071;
    "llama3": by wavelength, Llama 3.1.
    """

    kind: str = "none"
    factor: float = 1.0  # times the trained length
    trained: int = 8192  # tokens before stretching: "llama3" and "yarn"
    low: float = 1.0  # "llama3": turns over `trained` below which a pair is stretched whole
    high: float = 4.0  # "llama3": turns above which a pair stays
    beta_fast: float = 32.0  # "yarn": turns above which a pair stays
    beta_slow: float = 1.0  # "yarn": turns below which a pair is stretched whole
    magnitude: float = 0.0  # "yarn": times cosines and sines; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # "yarn": the two borders, rounded to whole pairs

    def __post_init__(self):
        one_of("kind", self.kind, SCALINGS)
        for name in ("factor", "trained"):
            at_least(name, getattr(self, name), 1)
        if not 0 < self.low < self.high:
            raise ValueError(f"low={self.low} must be positive and below high={self.high}")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must be positive and below beta_fast={self.beta_fast}"
            )
        at_least("magnitude", self.magnitude, 0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. Su et al. 2021, arXiv:2104.09864."""

    theta: float = 10_000.0  # base of the wavelengths; 0: no rotation
    local_theta: float = 0.0  # base in windowed layers; 0 means `theta`
    scaling: Scaling = Scaling()

    def __post_init__(self):
        at_least("theta", self.theta, 0)
        at_least("local_theta", self.local_theta, 0)


@dataclass(frozen=True)
class Embeddings:
    """What a token's vector begins as: its row of the table, and what else is added to it."""

    scale: bool = False  # multiply the table's rows by sqrt(embed): Gemma
    positions: int = 0  # rows of a learned table of positions; 0: none
    first: int = 0  # row of the first position: RoBERTa begins at 2
    types: int = 0  # rows of a table of token types (which sentence): BERT; 0: none
    norm: bool = False  # a norm of the sum

    def __post_init__(self):
        for name in ("positions", "first", "types"):
            at_least(name, getattr(self, name), 0)
        if self.first and self.first >= self.positions:
            raise ValueError(f"first={self.first} must be below positions={self.positions}")


@dataclass(frozen=True)
class Attention:
    """What the attention of every layer shares, and how its windows repeat over the layers."""

    causal: bool = True  # False: every token sees the tokens after it too
    windows: tuple[int, ...] = (0,)  # tokens that each place of the pattern sees; 0: all
    qk_norm: str = "none"  # RMSNorm of queries and keys before RoPE, per "head" or over "all"
    softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: off
    scale: float = 0.0  # multiplies q.k; 0: 1 / sqrt(head_dim)
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        if not self.windows:
            raise ValueError("windows is empty: a single 0 means full attention in every layer")
        one_of("qk_norm", self.qk_norm, QK_NORMS)
        for window in self.windows:
            at_least("windows", window, 0)
        if not self.causal and any(self.windows):
            raise ValueError(f"windows={self.windows} need causal=True: they reach back only")
        at_least("softcap", self.softcap, 0)
        at_least("scale", self.scale, 0)


@dataclass(frozen=True)
class Moe:
    """Feed-forward by experts: each token goes through the few that its router prefers.

    Shazeer et al. 2017, arXiv:1701.06538. No token is dropped, whatever the balance.
    """

    experts: int = 0  # 0: one dense feed-forward in every layer
    active: int = 2  # experts of a token
    every: int = 1  # layers `every - 1`, `2 every - 1`, ... have experts
    mlp: int = 0  # hidden size of an expert; 0: the model's mlp
    normalize: bool = True  # the weights of a token's experts sum to one
    balance: float = 0.0  # weight of the load-balance loss. Fedus et al. 2021, arXiv:2101.03961
    z_loss: float = 0.0  # weight of log(Z)^2 of the router. Zoph et al. 2022, arXiv:2202.08906

    def __post_init__(self):
        for name in ("experts", "mlp", "balance", "z_loss"):
            at_least(name, getattr(self, name), 0)
        at_least("every", self.every, 1)
        if self.experts and not 1 <= self.active <= self.experts:
            raise ValueError(f"active={self.active} must be 1 to experts={self.experts}")


@dataclass(frozen=True)
class Head:
    """What is read from the last hidden states.

    "language": the next token, with its softmax and its loss. "masked": the token itself, of a
    masked-LM, through a dense layer, the feed-forward's curve, a norm and a bias. "classifier":
    a dense layer over the first token, `curve`, then one number for each of `labels`; "pooler":
    the same without the labels. "none": the hidden states.
    """

    kind: str = "language"
    tied: bool = False  # the weight over the vocabulary is the embedding table
    labels: int = 2  # of a classifier
    curve: str = "tanh"  # of a classifier's or pooler's dense layer
    softcap: float = 0.0  # of the final logits; 0: off
    z_loss: float = 0.0  # weight of log(Z)^2. Chowdhery et al. 2022, arXiv:2204.02311
    chunk: int = 4096  # tokens per device whose logits exist at one time
    logits: str = "float32"  # in memory, in the loss; "bfloat16" halves what softmax reads

    def __post_init__(self):
        one_of("kind", self.kind, HEADS)
        one_of("curve", self.curve, HEAD_CURVES)
        one_of("logits", self.logits, DTYPES)
        at_least("labels", self.labels, 1)
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
    embeddings: Embeddings = Embeddings()
    moe: Moe = Moe()
    # Gated: swiglu, geglu (tanh); plain: gelu (with tanh), gelu_erf (exact), relu, relu2
    activation: str = "swiglu"
    mlp_bias: bool = False
    init: Init = Init()

    def __post_init__(self):
        one_of("activation", self.activation, MLPS)
        if self.moe.experts and (self.mlp_bias or self.activation not in GATED):
            raise ValueError(
                f"experts={self.moe.experts} need a gated activation without mlp_bias, "
                f"not activation={self.activation!r}, mlp_bias={self.mlp_bias}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Transformer. `vocab` 0 means: the tokenizer's size, rounded up to 128."""

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
    kernels: str = "fastest"  # that apply here; "plain": those that apply anywhere, to compare with
    precision: Precision = field(default_factory=Precision)  # of the operands of matmuls
    arch: Arch = Arch()

    def __post_init__(self):
        for name in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "unroll"):
            at_least(name, getattr(self, name), 1)
        at_least("vocab", self.vocab, 0)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2 and self.arch.rope.theta:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        one_of("dtype", self.dtype, DTYPES)
        one_of("param_dtype", self.param_dtype, DTYPES)
        one_of("remat", self.remat, REMATS)
        one_of("kernels", self.kernels, KERNELS)

    @property
    def residual_std(self) -> float:
        """What a branch of a layer adds to the residual stream at first, as a share of unit."""
        return self.arch.init.residual / (2 * self.layers) ** 0.5

    @property
    def places(self) -> int:
        """Layers after which the pattern of windows and experts repeats; at most all of them."""
        every = self.arch.moe.every if self.arch.moe.experts else 1
        return min(math.lcm(len(self.arch.attention.windows), every), self.layers)

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees; 0: all."""
        windows = self.arch.attention.windows
        return windows[layer % len(windows)]

    def sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is made of experts."""
        return bool(self.arch.moe.experts) and (layer + 1) % self.arch.moe.every == 0

    def with_vocab(self, tokens: int) -> "ModelConfig":
        """This config for a tokenizer of `tokens` ids; ValueError if its vocabulary is smaller."""
        if not self.vocab:
            return dataclasses.replace(self, vocab=-(-tokens // 128) * 128)
        if self.vocab < tokens:
            raise ValueError(f"vocab={self.vocab} is smaller than the tokenizer's {tokens} ids")
        return self
