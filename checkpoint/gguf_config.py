"""What a GGUF file's metadata say of its model: a Family and a ModelConfig.

The keys begin with the file's general.architecture. What no key says, the tensors tell: biases,
ties, learned positions.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.gguf import Gguf
from checkpoint.hf import MOST, MOST_EXPERTS, MOST_LAYERS
from model.config import Arch, ModelConfig, Moe, Rope, Scaling
from model.families import FAMILIES
from model.families.family import Family
from model.rope import frequencies

REQUIRED = object()


@dataclass(frozen=True)
class Architecture:
    """What a general.architecture means beyond what the file says."""

    permuted: bool = False  # rows of queries and keys lie as pairs, (0, h), (1, h + 1) ...
    activation: str = ""  # "": the family's
    period: int = 0  # layers of which the last sees all, and the others have windows; 0: no windows
    window: int = 0  # where the file has none
    # Of windowed layers, where the file has none; -1: as the others', but never stretched.
    local_theta: float = 0.0
    large: int = 0  # layers of the size whose queries are scaled by embed / heads


ARCHITECTURES = {
    "llama": Architecture(permuted=True, period=1),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    "gemma": Architecture(activation="geglu"),
    "gemma2": Architecture(activation="geglu", period=2, window=4096, large=46),
    "gemma3": Architecture(activation="geglu", period=6, local_theta=10_000.0, large=62),
    "olmo2": Architecture(period=4, local_theta=-1.0),
    "phi3": Architecture(period=1),
    "gpt2": Architecture(),
    "bert": Architecture(),
}
# Keys that change the computation, and their values that do not.
ONLY = {
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "router_logit_softcapping": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


@dataclass(frozen=True)
class Metadata:
    """What a file says of its model, each value checked when it is asked for."""

    values: Mapping[str, Any]
    arch: str

    def get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        """A value of one of these kinds, or one for all layers out of an array of them."""
        key = f"{self.arch}.{key}"
        found = self.values.get(key, default)
        if found is default and default is not REQUIRED:
            return default
        if isinstance(found, np.ndarray) and len(found) and (found == found[0]).all():
            found = found[0].item()
        if isinstance(found, np.ndarray):
            raise ValueError(f"{key} differs from layer to layer, which our model's does not")
        if type(found) not in kinds:
            had = "is missing" if found is REQUIRED else f"is {found!r}"
            raise ValueError(f"{key} {had}: it must be a {kinds[-1].__name__}")
        return found

    def whole(self, key: str, default: Any = REQUIRED, least: int = 1, most: int = MOST) -> Any:
        found = self.get(key, (int,), default)
        if found is not default and not least <= found <= most:
            raise ValueError(f"{self.arch}.{key}={found} must be {least} to {most}")
        return found

    def real(self, key: str, default: Any = REQUIRED) -> Any:
        """A number, of a float32 the shortest that gives its bits: 1e-6 and not 9.9999999e-7."""
        found = self.get(key, (int, float), default)
        if found is not default and not 0 <= found < 1e15:
            raise ValueError(f"{self.arch}.{key}={found} must be a number from 0 on")
        return float(str(np.float32(found))) if np.float32(found) == found else found


def read_config(file: Gguf) -> tuple[Family, ModelConfig]:
    """The family of a file's model, and its sizes. Biases and ties are told by the tensors.

    ValueError for an architecture of no family, and for what our model cannot compute.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"general.architecture {name!r} is none of {', '.join(ARCHITECTURES)}")
    found, usual = Metadata(file.metadata, name), ARCHITECTURES[name]
    for key, allowed in ONLY.items():
        value = found.get(key, (int, float), allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}.{key}={value!r} is not supported, only {allowed[0]!r}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("the file holds no token_embd.weight of two dims, as every model does")
    layers = found.whole("block_count", most=min(MOST_LAYERS, len(file.tensors)))
    embed, heads = found.whole("embedding_length"), found.whole("attention.head_count")
    head_dim = found.whole("attention.key_length", max(embed // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.whole(key, head_dim) != head_dim:
            raise ValueError(f"{name}.{key} must be {head_dim}, as long as the keys of a head")
    family, windows = _family(file, found), _windows(found, usual, layers)
    arch = _arch(file, found, usual, family, windows)
    attention, rope = arch.attention, _rope(file, found, usual, family, head_dim, windows)
    if usual.large:
        width = embed / heads if layers == usual.large else head_dim
        attention = dataclasses.replace(attention, scale=width**-0.5)
    return family, ModelConfig(
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=found.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=found.whole("feed_forward_length", arch.moe.mlp or REQUIRED),
        vocab=embedding.shape[0],
        arch=dataclasses.replace(arch, rope=rope, attention=attention),
    )


def context(file: Gguf) -> int | None:
    """Tokens of the longest text in training; None if the file does not say."""
    found = Metadata(file.metadata, str(file.metadata.get("general.architecture")))
    return found.whole("context_length", None)


def _family(file: Gguf, found: Metadata) -> Family:
    """Of the families whose files have this architecture, the one with experts, or windows."""
    families = [family for family in FAMILIES if family.gguf == found.arch]
    if found.arch == "bert" and "token_types.weight" not in file.tensors:
        return next(family for family in FAMILIES if family.name == "distilbert")
    if found.whole("expert_count", 0, least=0):
        sparse = [family for family in families if "arch.moe.experts" in family.keys.values()]
        if not sparse:
            raise ValueError(f"a {found.arch} with experts is not supported")
        return sparse[0]
    if found.whole("attention.sliding_window", 0, least=0):
        families.sort(key=lambda family: "sliding_window" not in family.defaults)
    return families[0]


def _arch(
    file: Gguf, found: Metadata, usual: Architecture, family: Family, windows: tuple[int, ...]
) -> Arch:
    """The kind of model: what the family says, what the file does, and what its tensors tell."""
    base, there = family.arch, file.tensors
    rms = base.norm.kind == "rms"
    moe = Moe()
    if experts := found.whole("expert_count", 0, least=0, most=MOST_EXPERTS):
        if experts > len(file.tensors) and "blk.0.ffn_gate.0.weight" in file.tensors:
            raise ValueError(f"{experts} experts in {len(file.tensors)} tensors")
        moe = Moe(
            experts=experts,
            active=found.whole("expert_used_count"),
            mlp=found.whole("expert_feed_forward_length", 0),
            normalize=found.get("expert_weights_norm", (bool,), True),
        )

    def rows(name: str) -> int:
        return there[name].shape[0] if name in there else 0

    head = base.head
    if head.kind != "language":
        outputs = rows("cls.output.weight")
        pools = "pooler" if "cls.weight" in there else "none"
        head = dataclasses.replace(
            head, kind="classifier" if outputs else pools, tied=False, labels=outputs or 2
        )
    else:
        head = dataclasses.replace(
            head,
            tied="output.weight" not in there,
            softcap=found.real("final_logit_softcapping", 0.0),
        )
    return dataclasses.replace(
        base,
        norm=dataclasses.replace(
            base.norm, eps=found.real(f"attention.layer_norm_{'rms_' * rms}epsilon")
        ),
        attention=dataclasses.replace(
            base.attention,
            windows=windows,
            causal=found.get("attention.causal", (bool,), base.attention.causal),
            softcap=found.real("attn_logit_softcapping", 0.0),
            scale=found.real("attention.scale", 0.0),
            qkv_bias="blk.0.attn_q.bias" in there or "blk.0.attn_qkv.bias" in there,
            out_bias="blk.0.attn_output.bias" in there,
        ),
        embeddings=dataclasses.replace(
            base.embeddings,
            positions=rows("position_embd.weight"),
            first=0,
            types=rows("token_types.weight"),
        ),
        head=head,
        moe=moe,
        mlp_bias="blk.0.ffn_down.bias" in there,
        activation=usual.activation or base.activation,
    )


def _windows(found: Metadata, usual: Architecture, layers: int) -> tuple[int, ...]:
    """The windows of the layers, as the shortest pattern of them."""
    window = found.whole("attention.sliding_window", usual.window, least=0) if usual.period else 0
    if not window:
        return (0,)
    pattern = found.values.get(f"{found.arch}.attention.sliding_window_pattern", usual.period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) >= layers:
        all_layers = tuple(window * int(windowed) for windowed in pattern[:layers])
        sizes = range(1, layers + 1)
        repeated = (all_layers[:size] * -(-layers // size) for size in sizes)
        return next(
            all_layers[:size]
            for size, again in zip(sizes, repeated, strict=True)
            if again[:layers] == all_layers
        )
    if type(pattern) is not int or not 1 <= pattern <= MOST_LAYERS:
        raise ValueError(f"{found.arch}.attention.sliding_window_pattern={pattern!r} is no period")
    return (window,) * (pattern - 1) + (0,) if pattern > 1 else (window,)


def _rope(
    file: Gguf,
    found: Metadata,
    usual: Architecture,
    family: Family,
    head_dim: int,
    windows: tuple[int, ...],
) -> Rope:
    if not family.arch.rope.theta:
        return family.arch.rope
    theta = found.real("rope.freq_base", 10_000.0)
    scaling = _scaling(file, found, theta, head_dim)
    local = found.real("rope.freq_base_swa", usual.local_theta) if any(windows) else 0.0
    if local < 0:
        local = theta if scaling.kind != "none" else 0.0
    return Rope(theta, local, scaling)


def _scaling(file: Gguf, found: Metadata, theta: float, head_dim: int) -> Scaling:
    older = found.real("rope.scale_linear", 1.0)  # of files before there were types
    kind = found.get("rope.scaling.type", (str,), "linear" if older > 1 else "none")
    factor = found.real("rope.scaling.factor", older)
    if any(f"rope_factors_{length}.weight" in file.tensors for length in ("long", "short")):
        kind = "longrope"
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise ValueError(f"rope_freqs.weight besides {found.arch}.rope.scaling.type={kind!r}")
        trained = found.whole("rope.scaling.original_context_length", 8192)
        return _of_factors(file.read("rope_freqs.weight"), theta, head_dim, trained)
    if kind == "none":
        return Scaling()
    if factor < 1:
        raise ValueError(f"{found.arch}.rope.scaling.factor={factor} must be 1 or more")
    if kind == "linear":
        return Scaling("linear", factor)
    if kind != "yarn":
        raise ValueError(
            f"{found.arch}.rope.scaling.type={kind!r} is not supported: none, linear, yarn and "
            f"Llama 3's are"
        )
    size = found.real("rope.scaling.yarn_attn_factor", 0.0)
    times = found.real("rope.scaling.attn_factor", 1.0)
    return Scaling(
        "yarn",
        factor,
        trained=found.whole("rope.scaling.original_context_length"),
        beta_fast=found.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=found.real("rope.scaling.yarn_beta_slow", 1.0),
        magnitude=size or (times * (0.1 * math.log(factor) + 1) if times != 1 else 0.0),
    )


def _of_factors(factors: np.ndarray, theta: float, head_dim: int, trained: int) -> Scaling:
    """The scaling by whose factors [h] the pairs of a head turn slower, Llama 3's in the end.

    A file has the factors alone. They tell `trained`, `low` and `high` up to a common factor, and
    all published models have low = 1.
    """
    factors = factors.astype(np.float64).reshape(-1)
    if len(factors) != head_dim // 2 or not (np.isfinite(factors) & (factors >= 0.999)).all():
        raise ValueError(
            f"rope_freqs.weight must be {head_dim // 2} factors of one or more, not {factors}"
        )
    factor = round(float(factors.max()), 4)
    if factor == 1:
        return Scaling()
    plain = frequencies(head_dim, theta, Scaling())
    guesses = [Scaling("linear", factor), Scaling("llama3", factor, trained, 1.0, 4.0)]
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)  # 0 to 1, linear in between
    ramp = (kept > 1e-3) & (kept < 1 - 1e-3)
    if ramp.sum() >= 2:
        slope, least = np.polyfit(plain[ramp] / (2 * math.pi), kept[ramp], 1)
        if slope > 0 > least and 1 <= slope / -least < MOST:
            high = round(1 - 1 / least, 2)
            guesses.append(Scaling("llama3", factor, round(slope / -least), 1.0, high))
    for guess in guesses:
        if np.allclose(plain / frequencies(head_dim, theta, guess), factors, rtol=1e-3):
            return guess
    raise ValueError(f"rope_freqs.weight stretches RoPE in no known way: {factors}")
