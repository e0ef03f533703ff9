"""GGUF tensors: which is which part of a model, and what the family's own files hold instead.

GGUF names tensors alike for all architectures, and keeps some in other forms than the published
files: fused, stacked, with rows in another order.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.gguf import Gguf
from checkpoint.gguf_config import ARCHITECTURES
from checkpoint.names import SLOT, Names
from checkpoint.tensors import Tensor, Tensors
from model.config import GATED, ModelConfig
from model.families.family import Family

OUTER = {
    "token_embd.weight": "embedding.table",
    "position_embd.weight": "positions.table",
    "token_types.weight": "types.table",
    "token_embd_norm.weight": "embedding_norm.scale",
    "token_embd_norm.bias": "embedding_norm.bias",
    "output_norm.weight": "norm.scale",
    "output_norm.bias": "norm.bias",
}
HEADS = {
    "language": {"output.weight": "head.table"},
    "pooler": {"cls.weight": "head.dense.weight", "cls.bias": "head.dense.bias"},
    "classifier": {
        "cls.weight": "head.dense.weight",
        "cls.bias": "head.dense.bias",
        "cls.output.weight": "head.classifier.weight",
        "cls.output.bias": "head.classifier.bias",
    },
}
BEFORE = {  # norms of decoders
    "blk.{}.attn_norm.weight": "block.norm1.scale",
    "blk.{}.attn_norm.bias": "block.norm1.bias",
    "blk.{}.ffn_norm.weight": "block.norm2.scale",
    "blk.{}.ffn_norm.bias": "block.norm2.bias",
    "blk.{}.post_attention_norm.weight": "block.post1.scale",
    "blk.{}.post_ffw_norm.weight": "block.post2.scale",
}
AFTER = {  # of encoders
    "blk.{}.attn_output_norm.weight": "block.norm1.scale",
    "blk.{}.attn_output_norm.bias": "block.norm1.bias",
    "blk.{}.layer_output_norm.weight": "block.norm2.scale",
    "blk.{}.layer_output_norm.bias": "block.norm2.bias",
}
ATTENTION = {
    "blk.{}.attn_q.weight": "block.attention.qkv.weight[q]",
    "blk.{}.attn_k.weight": "block.attention.qkv.weight[k]",
    "blk.{}.attn_v.weight": "block.attention.qkv.weight[v]",
    "blk.{}.attn_q.bias": "block.attention.qkv.bias[q]",
    "blk.{}.attn_k.bias": "block.attention.qkv.bias[k]",
    "blk.{}.attn_v.bias": "block.attention.qkv.bias[v]",
}
FUSED_ATTENTION = {
    "blk.{}.attn_qkv.weight": "block.attention.qkv.weight[q,k,v]",
    "blk.{}.attn_qkv.bias": "block.attention.qkv.bias[q,k,v]",
}
OUT = {
    "blk.{}.attn_output.weight": "block.attention.out.weight",
    "blk.{}.attn_output.bias": "block.attention.out.bias",
    "blk.{}.attn_q_norm.weight": "block.attention.q_norm.scale",
    "blk.{}.attn_k_norm.weight": "block.attention.k_norm.scale",
}
PLAIN = {
    "blk.{}.ffn_up.weight": "block.mlp.up.weight",
    "blk.{}.ffn_up.bias": "block.mlp.up.bias",
}
GATED_MLP = {
    "blk.{}.ffn_gate.weight": "block.mlp.gate_up.weight[gate]",
    "blk.{}.ffn_gate.bias": "block.mlp.gate_up.bias[gate]",
    "blk.{}.ffn_up.weight": "block.mlp.gate_up.weight[up]",
    "blk.{}.ffn_up.bias": "block.mlp.gate_up.bias[up]",
}
FUSED_MLP = {
    "blk.{}.ffn_up.weight": "block.mlp.gate_up.weight[gate,up]",
    "blk.{}.ffn_up.bias": "block.mlp.gate_up.bias[gate,up]",
}
DOWN = {
    "blk.{}.ffn_down.weight": "block.mlp.down.weight",
    "blk.{}.ffn_down.bias": "block.mlp.down.bias",
}
EXPERTS = {
    "blk.{}.ffn_gate_inp.weight": "block.mlp.router.weight",
    "blk.{}.ffn_gate_exps.weight": "block.mlp.gate_up.weight[experts][gate]",
    "blk.{}.ffn_up_exps.weight": "block.mlp.gate_up.weight[experts][up]",
    "blk.{}.ffn_down_exps.weight": "block.mlp.down.weight[experts]",
}
FUSED_EXPERTS = {
    "blk.{}.ffn_gate_inp.weight": "block.mlp.router.weight",
    "blk.{}.ffn_gate_up_exps.weight": "block.mlp.gate_up.weight[experts][gate,up]",
    "blk.{}.ffn_down_exps.weight": "block.mlp.down.weight[experts]",
}
SINGLE_EXPERTS = {  # of files before 2024-04
    "blk.{}.ffn_gate_inp.weight": "block.mlp.router.weight",
    "blk.{}.ffn_gate.{}.weight": "block.mlp.gate_up.weight[expert][gate]",
    "blk.{}.ffn_up.{}.weight": "block.mlp.gate_up.weight[expert][up]",
    "blk.{}.ffn_down.{}.weight": "block.mlp.down.weight[expert]",
}
IGNORED = ("rope_freqs.weight", "*.attn_rot_embd.weight")  # what RoPE computes


def _table(file: Gguf, cfg: ModelConfig) -> dict[str, str]:
    """The names of the tensors of this file's layers, and their slots. checkpoint/names.py."""
    there, arch = file.tensors, cfg.arch
    rows = OUTER | (AFTER if arch.norm.placement == "post" else BEFORE) | OUT
    rows |= FUSED_ATTENTION if "blk.0.attn_qkv.weight" in there else ATTENTION
    if arch.moe.experts:
        if "blk.0.ffn_gate.0.weight" in there:
            return rows | SINGLE_EXPERTS
        return rows | (FUSED_EXPERTS if "blk.0.ffn_gate_up_exps.weight" in there else EXPERTS)
    if arch.activation not in GATED:
        return rows | PLAIN | DOWN
    return rows | (GATED_MLP if "blk.0.ffn_gate.weight" in there else FUSED_MLP) | DOWN


@dataclass(frozen=True)
class Source:
    """Rows of a tensor in the file, that are a part of one of the family's."""

    name: str
    array: str
    part: str  # "": all of the array
    expert: int | None  # one of those that the file has stacked
    rows: slice


class Named(Tensors):
    """The tensors of a GGUF file as the family's own files hold them, and by their names.

    ValueError, by the file's names, for tensors that are missing, have no place in the model, or
    another shape than its sizes ask.
    """

    def __init__(self, file: Gguf, family: Family, cfg: ModelConfig):
        self.file, self.cfg = file, cfg
        self.permuted = ARCHITECTURES[family.gguf or "bert"].permuted
        table = _table(file, cfg)
        head = HEADS.get(cfg.arch.head.kind, {})
        view = dataclasses.replace(
            family,
            name=f"GGUF {family.name}",
            names=table,
            heads={cfg.arch.head.kind: head},
            copies={},
            prefix="",
            ignored=IGNORED,
            aliases={},
        )
        Names(view, cfg).locate(file.tensors)
        self._sources: dict[str, tuple[Source, ...]] = {}
        self._turned: set[str] = set()
        self._match(table | head, family.names | family.heads.get(cfg.arch.head.kind, {}))
        self.tensors = {name: self._tensor(name) for name in self._sources}

    def read(self, name: str) -> np.ndarray:
        parts = [self._part(source) for source in self._sources[name]]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(found.swapaxes(-1, -2)) if name in self._turned else found

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.read(name)[start:stop].copy()

    def _part(self, source: Source) -> np.ndarray:
        if source.expert is None:
            found = self.file.read(source.name)
        else:
            found = self.file.rows(source.name, source.expert, source.expert + 1)[0]
        found = found[source.rows]
        if self.permuted and source.part in ("q", "k"):
            heads = self.cfg.heads if source.part == "q" else self.cfg.kv_heads
            pairs = found.reshape(heads, -1, 2, *found.shape[1:])
            found = pairs.swapaxes(1, 2).reshape(found.shape)
        offset = self.cfg.arch.norm.offset
        if offset and source.array.endswith(".scale"):
            found = found - np.float32(offset)  # files hold what the norm multiplies by
        return found

    def _match(self, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
        """Find the sources of the family's tensors, by slots that both tables have."""
        places: dict[tuple[str, str, bool], tuple[str, bool, slice]] = {}
        for name, slot in ours.items():
            found, start = SLOT.fullmatch(slot), 0
            parts = (found["parts"] or "").split(",")
            for part in parts:
                stop = start + self._size(part) if len(parts) > 1 else None
                place = name, found["experts"] == "experts", slice(start, stop)
                places[found["array"], part, bool(found["experts"])] = place
                start = stop
        for name, slot in theirs.items():
            found = SLOT.fullmatch(slot)
            parts = (found["parts"] or "").split(",")
            wanted = [places.get((found["array"], part, bool(found["experts"]))) for part in parts]
            for at in self._each(found) if None not in wanted else ():
                sources = tuple(
                    Source(
                        source.format(*at), found["array"], part, at[1] if stacked else None, rows
                    )
                    for part, (source, stacked, rows) in zip(parts, wanted, strict=True)
                )
                if all(source.name in self.file.tensors for source in sources):
                    self._sources[name.format(*at)] = sources
                    if found["turned"]:
                        self._turned.add(name.format(*at))

    def _each(self, slot: Any) -> Iterator[tuple[int, ...]]:
        """The numbers in the names of a slot: layers, and experts where each has a tensor."""
        if not slot["block"]:
            yield ()
            return
        for layer in range(self.cfg.layers):
            if slot["experts"] == "expert":
                yield from ((layer, expert) for expert in range(self.cfg.arch.moe.experts))
            else:
                yield (layer,)

    def _size(self, part: str) -> int:
        """Rows of a part where several lie in one tensor."""
        if part in ("gate", "up"):
            return self.cfg.arch.moe.mlp or self.cfg.mlp
        return self.cfg.head_dim * (self.cfg.heads if part == "q" else self.cfg.kv_heads)

    def _tensor(self, name: str) -> Tensor:
        """What the family's tensor is: its sources' rows together, their kind if they share it."""
        sources = self._sources[name]
        whole = [self.file.tensors[source.name] for source in sources]
        shapes = [
            tensor.shape if source.expert is None else tensor.shape[1:]
            for source, tensor in zip(sources, whole, strict=True)
        ]
        rows = sum(
            len(range(shape[0])[source.rows]) for source, shape in zip(sources, shapes, strict=True)
        )
        shape = (rows, *shapes[0][1:])
        kinds = {tensor.dtype for tensor in whole}
        return Tensor(
            shape[::-1] if name in self._turned else shape,
            kinds.pop() if len(kinds) == 1 else "F32",
        )
