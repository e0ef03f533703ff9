"""Names: which tensor of a published model is which part of which of our arrays, both ways.

A family's table gives each foreign tensor its slot. In a foreign name the first `{}` is the layer,
a second one the expert. A slot is `array [expert | experts] [part, ...] .T`, for example

    embedding.table                       an array of the model
    block.norm1.scale                     an array of the layer's block
    block.attention.qkv.weight[q]         one part of it: q, k, v, gate or up
    block.attention.qkv.weight[q,k,v]     several parts, their rows one after the other
    block.mlp.gate_up.weight[expert][up]  of one expert; [experts]: of all, in a dim before the rows
    block.mlp.down.weight.T               the tensor lies as [in, out]

A tensor is [rows, columns], where columns are our array's contracted dims, or [rows] alone.
Rows of a table whose array the config has not (biases, experts) do not count. Of two names for
one array the last is read, and both are written.

Letters of dims: V vocabulary, P positions, S token types, N labels, D embed, K kv heads, G query
heads per kv head, J = G + 2, H head size, F hidden, C = 2 (gate and up), E experts, X their hidden.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from checkpoint.tensors import Tensor
from model.config import GATED, ModelConfig
from model.families.family import Family

Shape = tuple[int, ...]

SLOT = re.compile(
    r"(?P<block>block\.)?(?P<array>[\w.]+?)"
    r"(\[(?P<experts>experts?)\])?(\[(?P<parts>[a-z,]+)\])?(?P<turned>\.T)?"
)
# The dim that a part is cut from, and where.
PARTS = {
    "q": ("J", slice(0, -2)),
    "k": ("J", slice(-2, -1)),
    "v": ("J", slice(-1, None)),
    "gate": ("C", slice(0, 1)),
    "up": ("C", slice(1, 2)),
}
BARE = ("pooler", "none")  # kinds of head whose models leave out the family's prefix


def outer_arrays(cfg: ModelConfig) -> dict[str, str]:
    """The arrays outside of the layers, by dotted name: dims as "rows|columns"."""
    arch, head = cfg.arch, cfg.arch.head
    dense = head.kind in ("masked", "classifier", "pooler")
    there = {
        "embedding.table": ("V|D", True),
        "positions.table": ("P|D", arch.embeddings.positions),
        "types.table": ("S|D", arch.embeddings.types),
        "embedding_norm.scale": ("D", arch.embeddings.norm),
        "embedding_norm.bias": ("D", arch.embeddings.norm and arch.norm.bias),
        "norm.scale": ("D", arch.norm.placement != "post"),
        "norm.bias": ("D", arch.norm.placement != "post" and arch.norm.bias),
        "head.dense.weight": ("D|D", dense),
        "head.dense.bias": ("D", dense),
        "head.norm.scale": ("D", head.kind == "masked"),
        "head.norm.bias": ("D", head.kind == "masked" and arch.norm.bias),
        "head.bias": ("V", head.kind == "masked"),
        "head.table": ("V|D", head.kind in ("language", "masked") and not head.tied),
        "head.classifier.weight": ("N|D", head.kind == "classifier"),
        "head.classifier.bias": ("N", head.kind == "classifier"),
    }
    return {name: dims for name, (dims, wanted) in there.items() if wanted}


def block_arrays(cfg: ModelConfig, layer: int) -> dict[str, str]:
    """The arrays of a layer: dims as "rows|columns", or "experts;rows|columns"."""
    arch, attention = cfg.arch, cfg.arch.attention
    sparse, gated = cfg.sparse(layer), arch.activation in GATED
    before = arch.norm.placement != "output"
    after = arch.norm.placement in ("output", "sandwich")
    all_heads = attention.qk_norm == "all"
    there = {
        **{f"norm{i}.scale": ("D", before) for i in (1, 2)},
        **{f"norm{i}.bias": ("D", before and arch.norm.bias) for i in (1, 2)},
        **{f"post{i}.scale": ("D", after) for i in (1, 2)},
        **{f"post{i}.bias": ("D", after and arch.norm.bias) for i in (1, 2)},
        "attention.qkv.weight": ("KJH|D", True),
        "attention.qkv.bias": ("KJH", attention.qkv_bias),
        "attention.out.weight": ("D|KGH", True),
        "attention.out.bias": ("D", attention.out_bias),
        "attention.q_norm.scale": ("KGH" if all_heads else "H", attention.qk_norm != "none"),
        "attention.k_norm.scale": ("K1H" if all_heads else "H", attention.qk_norm != "none"),
        "mlp.router.weight": ("E|D", sparse),
        "mlp.gate_up.weight": ("E;CX|D" if sparse else "CF|D", gated),
        "mlp.gate_up.bias": ("CF", gated and arch.mlp_bias),
        "mlp.up.weight": ("F|D", not gated),
        "mlp.up.bias": ("F", not gated and arch.mlp_bias),
        "mlp.down.weight": ("E;D|X" if sparse else "D|F", True),
        "mlp.down.bias": ("D", arch.mlp_bias),
    }
    return {name: dims for name, (dims, wanted) in there.items() if wanted}


def sizes_of(cfg: ModelConfig) -> dict[str, int]:
    """How long the dim of each letter is; of those that the model has."""
    arch, groups = cfg.arch, cfg.heads // cfg.kv_heads
    return {
        "V": cfg.vocab,
        "P": arch.embeddings.positions,
        "S": arch.embeddings.types,
        "N": arch.head.labels,
        "D": cfg.embed,
        "K": cfg.kv_heads,
        "G": groups,
        "J": groups + 2,
        "H": cfg.head_dim,
        "F": cfg.mlp,
        "C": 2,
        "E": arch.moe.experts,
        "X": arch.moe.mlp or cfg.mlp,
        "1": 1,
    }


def our_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Our arrays and their full shapes; a stacked one leads with L."""
    sizes = sizes_of(cfg)
    repeats = cfg.layers // cfg.places

    def shape(dims: str) -> Shape:
        return tuple(sizes[letter] for letter in dims if letter.isalnum())

    shapes = {name: shape(dims) for name, dims in outer_arrays(cfg).items()}
    for layer in range(cfg.layers):
        for name, dims in block_arrays(cfg, layer).items():
            array, index = place_of(cfg, name, layer)
            lead = () if index is None else (repeats,)
            shapes[array] = (*lead, *shape(dims))
    return shapes


def place_of(cfg: ModelConfig, name: str, layer: int) -> tuple[str, int | None]:
    """An array of a layer: its dotted name, and which repetition it is."""
    repetition, place = divmod(layer, cfg.places)
    if repetition < cfg.layers // cfg.places:
        return f"blocks.{place}.{name}", repetition
    return f"rest.{place}.{name}", None


@dataclass(frozen=True)
class Piece:
    """What a foreign tensor is of one of our arrays: its rows, cut into parts."""

    array: str  # dotted
    index: int | None  # which repetition, of a stacked array
    experts: Shape  # dims before the rows
    parts: tuple[tuple[Any, int], ...]  # index into our array, rows in the tensor
    columns: Shape
    turned: bool  # columns before rows

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        rows = (sum(rows for _, rows in self.parts),)
        turned = (*self.columns, *rows) if self.turned else (*rows, *self.columns)
        return (*self.experts, *turned)

    def turn(self, tensor: np.ndarray) -> np.ndarray:
        """Columns and rows change places, if the family has them turned."""
        return tensor.swapaxes(-1, -2) if self.turned else tensor

    def write(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Put the tensor in its places of the array."""
        tensor, start = self.turn(tensor), 0
        lead = (slice(None),) * len(self.experts)
        for at, rows in self.parts:
            array[at] = tensor[(*lead, slice(start, start + rows))].reshape(array[at].shape)
            start += rows

    def read(self, array: np.ndarray) -> np.ndarray:
        """The tensor, out of the array."""
        own = [array[at].reshape(*self.experts, rows, *self.columns) for at, rows in self.parts]
        tensor = own[0] if len(own) == 1 else np.concatenate(own, axis=len(self.experts))
        return np.ascontiguousarray(self.turn(tensor))


@dataclass(frozen=True)
class Located:
    """The tensors of a model among those of some files, by the files' names."""

    sources: dict[str, str]  # foreign name -> the files' name
    copies: dict[str, str]  # a tensor that should repeat another -> that other
    unused: tuple[str, ...]


class Names:
    """The arrays of one model and the tensors of its family, each made from the other."""

    def __init__(self, family: Family, cfg: ModelConfig):
        """ValueError if the model has an array that the family has no name for."""
        self.family, self.cfg = family, cfg
        self._sizes = sizes_of(cfg)
        self._repeats = cfg.layers // cfg.places
        self._outer = outer_arrays(cfg)
        self._blocks = [block_arrays(cfg, layer) for layer in range(cfg.layers)]
        self._arrays = our_shapes(cfg)
        tied = cfg.arch.head.tied and cfg.arch.head.kind in ("language", "masked")
        self._copies = {self._bare(a): self._bare(b) for a, b in family.copies.items() if tied}
        self._pieces = {
            name: piece for name, piece in self._all_pieces() if name not in self._copies
        }
        self._sources = self._choose_sources()

    def foreign(self) -> dict[str, Shape]:
        """Foreign tensors and their shapes, in file order; those of one array are neighbours."""
        return {name: piece.shape for name, piece in self._pieces.items()}

    def ours(self) -> dict[str, Shape]:
        """Our arrays and their full shapes; a stacked one leads with L."""
        return dict(self._arrays)

    def compose(
        self, name: str, index: int | None, read: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        """Our array `name`, or repetition `index` of a stacked one, in the tensors' dtype.

        `read` gives a foreign tensor. Beside the result, one such tensor lives at a time.
        ValueError, with both shapes, if it has another shape than it should.
        """
        shape, out = self._arrays[name], None
        if index is None and (name, None) not in self._sources:
            for i in range(self._repeats):
                one = self.compose(name, i, read)
                out = _room(out, shape, one.dtype)
                out[i] = one
            return out
        shape = shape if index is None else shape[1:]
        sources = self._sources[name, index]
        for source in sources:
            piece, tensor = self._pieces[source], read(source)
            _check(source, tensor.shape, piece.shape)
            if len(sources) == 1 and len(piece.parts) == 1:  # the whole array
                return np.ascontiguousarray(piece.turn(tensor)).reshape(shape)
            out = _room(out, shape, tensor.dtype)
            piece.write(tensor, out)
            del tensor  # before the next is read
        return out

    def decompose(self, foreign: str, read: Callable[[str, int | None], np.ndarray]) -> np.ndarray:
        """One foreign tensor. `read(name, index)` gives ours, of a stacked array one repetition.

        Neighbours in `foreign()` ask for the same array: a reader does well to keep the last.
        """
        piece = self._pieces[foreign]
        return piece.read(read(piece.array, piece.index))

    def array(self, foreign: str) -> tuple[str, int | None]:
        """Our array that a foreign tensor is part of, and which repetition of a stacked one."""
        piece = self._pieces[foreign]
        return piece.array, piece.index

    def locate(self, found: Mapping[str, Tensor]) -> Located:
        """Which of the tensors `found` in files are this model's.

        Files may leave out the family's prefix or put it in, use its aliases, and hold of a shared
        tensor the copy alone. ValueError names the tensors that are missing, or have no place in
        the model, or another shape.
        """
        idle = {self._bare(name) for rows in self.family.heads.values() for name in rows}
        known = {**dict.fromkeys(idle), **self._copies, **self._pieces}
        spelled = {name: self._spell(name, known) for name in found}
        sources = {plain: name for name, plain in spelled.items() if plain in self._pieces}
        copies = {}
        for name, plain in spelled.items():
            if plain in self._copies:
                of = sources.setdefault(self._copies[plain], name)
                copies |= {name: of} if of != name else {}
        unused = tuple(
            name
            for name, plain in spelled.items()
            if plain not in self._pieces and plain not in self._copies
            if plain in idle or any(fnmatchcase(plain, each) for each in self.family.ignored)
        )
        strange = found.keys() - {*sources.values(), *copies, *unused}
        missing = self._pieces.keys() - sources.keys()
        what = f"{self.family.name} model of these sizes"
        if missing:
            raise ValueError(f"a {what} has {_some(missing)} that the files lack")
        if strange:
            raise ValueError(f"the files hold {_some(strange)} that a {what} has no place for")
        for plain, name in sources.items():
            _check(name, found[name].shape, self._pieces[plain].shape)
        return Located({name: sources[name] for name in self._pieces}, copies, unused)

    def _shape(self, dims: str) -> Shape:
        return tuple(self._sizes[letter] for letter in dims if letter.isalnum())

    def _all_pieces(self) -> Iterator[tuple[str, Piece]]:
        """The rows of the family's tables that the model has an array for, in file order."""
        rows = {**self.family.names, **self.family.heads.get(self.cfg.arch.head.kind, {})}
        slots = {name: SLOT.fullmatch(slot) for name, slot in rows.items()}

        def outer(last: bool) -> Iterator[tuple[str, Piece]]:
            for name, slot in slots.items():
                dims = None if slot["block"] else self._outer.get(slot["array"])
                if dims and last == slot["array"].startswith(("norm.", "head.")):
                    yield self._bare(name), self._piece(slot, slot["array"], None, dims)

        yield from outer(last=False)
        for layer, arrays in enumerate(self._blocks):
            for name, slot in slots.items():
                dims = arrays.get(slot["array"]) if slot["block"] else None
                if not dims or (";" in dims) != bool(slot["experts"]):
                    continue
                at = place_of(self.cfg, slot["array"], layer)
                each = range(self._sizes["E"]) if slot["experts"] == "expert" else (None,)
                for expert in each:
                    numbers = (layer,) if expert is None else (layer, expert)
                    yield self._bare(name.format(*numbers)), self._piece(slot, *at, dims, expert)
        yield from outer(last=True)

    def _piece(
        self, slot: re.Match, array: str, index: int | None, dims: str, expert: int | None = None
    ) -> Piece:
        dims, _, columns = dims.partition("|")
        experts, _, rows = dims.rpartition(";")
        lead = () if not experts else (slice(None),) if expert is None else (expert,)
        parts = []
        for part in (slot["parts"] or "").split(","):
            letter, cut = PARTS.get(part, ("", slice(None)))
            at = [cut if dim == letter else slice(None) for dim in rows]
            sizes = [len(range(self._sizes[dim])[own]) for dim, own in zip(rows, at, strict=True)]
            parts.append(((*lead, *at), math.prod(sizes)))
        return Piece(
            array,
            index,
            self._shape(experts) if expert is None else (),
            tuple(parts),
            (math.prod(self._shape(columns)),) if columns else (),
            bool(slot["turned"]),
        )

    def _choose_sources(self) -> dict[tuple[str, int | None], list[str]]:
        """The tensors that each array, or repetition of one, is read from."""
        chosen: dict[tuple[str, int | None], dict[str, str]] = {}
        for name, piece in self._pieces.items():
            chosen.setdefault((piece.array, piece.index), {})[repr(piece.parts)] = name
        for name, shape in self._arrays.items():
            indices = range(self._repeats) if name.startswith("blocks.") else (None,)
            wanted = math.prod(shape) // len(indices)
            for index in indices:
                sources = chosen.get((name, index), {}).values()
                if wanted != sum(math.prod(self._pieces[source].shape) for source in sources):
                    raise ValueError(f"{self.family.name} has no name for all of {name}")
        return {at: list(sources.values()) for at, sources in chosen.items()}

    def _bare(self, name: str) -> str:
        """A name as models with this kind of head have it."""
        return name.removeprefix(self.family.prefix) if self.cfg.arch.head.kind in BARE else name

    def _spell(self, name: str, known: Mapping[str, Any]) -> str:
        """A name in files, as the family has it."""
        for old, new in self.family.aliases.items():
            name = name.replace(old, new)
        for plain in (name, self.family.prefix + name, name.removeprefix(self.family.prefix)):
            if plain in known:
                return plain
        return name


def _check(name: str, found: Shape, wanted: Shape) -> None:
    if tuple(found) != wanted:
        raise ValueError(f"{name} has shape {tuple(found)}, where the model's sizes ask {wanted}")


def _room(array: np.ndarray | None, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """The array, made when first wanted, of a dtype that holds all values so far."""
    if array is None:
        return np.empty(shape, dtype)
    return array.astype(np.promote_types(array.dtype, dtype), copy=False)


def _some(names: Collection[str]) -> str:
    few = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensors ({few})"
