"""Compress: any checkpoint to one of ours whose weights have 8 or 4 bits, layer by layer.

Each layer sees what the layers before it, already rounded, make of the calibration text.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint import convert, store
from checkpoint.pretrained import Ours, Pretrained, stacked
from checkpoint.quantized import FP8, Form
from compressors import grids, quantize, scales
from compressors.calibration import Batch, Walk, Weights, apart
from compressors.grids import Grid, Levels, Scheme
from compressors.quantize import Inputs
from configs import fields
from model import transformer
from model.config import ModelConfig
from sharding.layout import Layout

Progress = Callable[[int, int], None]  # layers done, and in all
TABLES = ("embedding.table", "head.table")
TABLE = Scheme("int8")  # of the vocabulary, whatever the scheme
ROWS = 1 << 14  # of a table, that are rounded at one time
SOME = 4  # of so many batches of the calibration text, one goes through the model as it was too
BATCH = 4  # rows of the calibration text that go through a layer at one time


@dataclass(frozen=True)
class Recipe:
    """What is done to a model."""

    scheme: str
    method: str

    def __post_init__(self):
        for name, allowed in (("scheme", quantize.SCHEMES), ("method", quantize.METHODS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.method == "smoothquant" and self.how.inputs == "bf16":
            rounding = [name for name, how in quantize.SCHEMES.items() if how.inputs != "bf16"]
            raise ValueError(
                f"method='smoothquant' makes inputs easier to round, and {self.scheme} rounds "
                f"none: it is for {', '.join(rounding)}; take awq or gptq"
            )

    @property
    def how(self) -> Scheme:
        return quantize.SCHEMES[self.scheme]

    def choose(self) -> scales.Choose | None:
        """What finds the factors of a Linear, if the method moves any."""
        if self.method == "smoothquant":
            return quantize.smooth
        if self.method == "awq":
            return lambda weight, inputs, sharing: quantize.aware(weight, self.how, inputs, sharing)
        return None

    def round(self, weight_OI: np.ndarray, inputs: Inputs | None) -> Levels:
        """`inputs` None: nobody saw them, as those of experts."""
        if inputs is None or self.method in ("absmax", "smoothquant"):
            return grids.absmax(weight_OI, self.how)
        if self.method == "gptq":
            return quantize.gptq(weight_OI, self.how, inputs)
        found = grids.searched(weight_OI, self.how, np.diag(inputs.second_II))
        return found.rounded(weight_OI)


def forms(cfg: ModelConfig, scheme: Scheme) -> dict[str, Form]:
    """The arrays that are stored in fewer bits: the Linears of the layers, and tables of words."""
    _, _, roles = transformer.abstract(cfg, Layout())
    found = {}
    for name, role in store.flatten(roles).items():
        if name in TABLES:
            found[name] = Form(TABLE.kind, TABLE.group, 1)
        elif role.kind == "matrix" and not name.startswith("head.") and ".router." not in name:
            found[name] = Form(scheme.kind, scheme.group, role.inputs, scheme.zeros)
    return found


def check(source: Pretrained, rows: Sequence[Sequence[int]]) -> None:
    """ValueError for a model that is quantized already, and for too little text."""
    if isinstance(source, Ours) and source.quantized:
        raise ValueError(
            f"{source.name} is quantized already, as {source.quantized['scheme']}: "
            "quantize what it was made from"
        )
    cfg = source.cfg
    tokens, need = sum(map(len, rows)), max(cfg.mlp, cfg.embed, cfg.heads * cfg.head_dim)
    if tokens < need:
        raise ValueError(
            f"the calibration text is too short: {tokens:,} tokens, where the widest Linear has "
            f"{need:,} inputs; at least as many, better ten times that: a longer --calibration, "
            "or more --tokens of it"
        )


def check_values(source: Pretrained) -> None:
    """ValueError, naming the array, for a number that is not finite; it reads all of them."""
    for name, (shape, _) in source.arrays.items():
        for index in range(shape[0]) if stacked(name) else [None]:
            values = source.read(name, index)
            if count := int(values.size - np.isfinite(values).sum()):
                layer = "" if index is None else f"[{index}]"
                raise ValueError(
                    f"{source.name}: {name}{layer} has {count:,} numbers of {values.size:,} that "
                    "are NaN or infinite; no scale holds these"
                )


def compress(
    source: Pretrained,
    target: Path,
    recipe: Recipe,
    rows: Sequence[Sequence[int]],
    progress: Progress = lambda *_: None,
    last: Callable[[Path, dict[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write `source` as the folder `target`, on the mesh in use; what became of each layer.

    `rows` are the ids of the calibration text. `last` may add to the folder, of which it is told
    before it gets its name. In memory are one layer, the states of the text, or one table.
    ValueError or OSError for numbers that are not finite, for a target that will not do, and for a
    full disk.
    """
    check(source, rows)
    target = convert.checked(source, target)
    check_values(source)
    with convert.whole(target) as folder:
        staged = Staged(folder / "staged", forms(source.cfg, recipe.how))
        need = sum(array.size * array.dtype.itemsize for array in _arrays(source, staged).values())
        convert.room(folder, 2 * need)  # in the order of layers, then in that of names
        layers = _layers(source, recipe, rows, staged, progress)
        _tables(source, staged)
        _write(source, folder, recipe, staged)
        shutil.rmtree(staged.folder)
        told = _told(layers, rows)
        last(folder, told)
    return told


def _told(layers: list[dict[str, Any]], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of the layers, with those that lost most."""
    linears = {
        f"layer {layer['layer']}: {name}": error
        for layer in layers
        for name, error in layer["linears"].items()
    }
    worst = max(layers, key=lambda layer: layer["error"])
    return {
        "layers": layers,
        "largest_layer_error": {"layer": worst["layer"], "error": worst["error"]},
        "largest_linear_error": dict([max(linears.items(), key=lambda one: one[1])]),
        "calibration_tokens": sum(map(len, rows)),
    }


def _layers(
    source: Pretrained,
    recipe: Recipe,
    rows: Sequence[Sequence[int]],
    staged: "Staged",
    progress: Progress,
) -> list[dict[str, Any]]:
    """Round the Linears of every layer."""
    kind = "float32" if jax.default_backend() == "cpu" else source.cfg.dtype
    cfg = dataclasses.replace(source.cfg, dtype=kind, param_dtype=kind, remat="none")
    walk = Walk(source, cfg, Layout(), recipe.how.precision)
    tokens, told = max(map(len, rows)), []
    padded = [*rows, *[[]] * (-len(rows) % BATCH)]
    batches = [Batch.of(padded[i : i + BATCH], tokens) for i in range(0, len(padded), BATCH)]
    states = walk.begin(batches)
    exact, some = states[::SOME], batches[::SOME]
    for layer, prefix, index in walk.layers():
        weights = walk.read(prefix, index)
        inputs = walk.observe(layer, weights, states, batches)
        _check_inputs(inputs, layer)
        exact = walk.as_it_was(layer, weights, exact, some)
        before = dict(weights)
        choose, moved = recipe.choose(), []
        if choose is not None:
            moved = scales.migrate(cfg, cfg.sparse(layer), weights, inputs, choose)
        errors = _round(recipe, prefix, index, weights, inputs, staged)
        for name in weights:
            if weights[name] is not before[name] and f"{prefix}{name}" not in staged.forms:
                staged.keep(f"{prefix}{name}", index, weights[name])
        states = walk.through(layer, weights, states, batches)
        error = apart(exact, states[::SOME], some)
        if not math.isfinite(error):
            raise ValueError(f"what layer {layer} makes of the calibration text is not finite")
        told.append({"layer": layer, "error": error, "moved": moved, "linears": errors})
        progress(layer + 1, cfg.layers)
    return told


def _check_inputs(inputs: Mapping[str, Inputs], layer: int) -> None:
    """ValueError for inputs of a Linear whose squares float32 does not hold."""
    for name, seen in inputs.items():
        if not np.isfinite(seen.second_II).all():
            raise ValueError(
                f"layer {layer}: {name} gets numbers up to {seen.largest_I.max():.3g} of the "
                "calibration text, whose squares are beyond float32"
            )


def _round(
    recipe: Recipe,
    prefix: str,
    index: int | None,
    weights: Weights,
    inputs: Mapping[str, Inputs],
    staged: "Staged",
) -> dict[str, float]:
    """Round a layer's Linears in `weights` and on disk; what that does to their outputs."""
    errors = {}
    for name, weight in weights.items():
        form = staged.forms.get(f"{prefix}{name}")
        if form is None:
            continue
        linear = name.removesuffix(".weight")
        flat_OI = weight.reshape(-1, form.sizes(weight.shape)[1])
        levels = recipe.round(flat_OI, inputs.get(linear))
        if linear in inputs:
            errors[linear] = quantize.relative(levels, flat_OI, inputs[linear])
        staged.put(f"{prefix}{name}", index, levels, weight.shape)
        weights[name] = levels.weight().reshape(weight.shape)
    return errors


def _tables(source: Pretrained, staged: "Staged") -> None:
    """Round the vocabulary's vectors, some at a time."""
    for name in TABLES:
        if name in staged.forms:
            table_VD = source.read(name)
            values_VD = np.empty(table_VD.shape, np.int8)
            scales_VG, zeros_VG = np.zeros((2, len(table_VD), 1), np.float32)
            for start in range(0, len(table_VD), ROWS):
                some = slice(start, start + ROWS)
                part = grids.absmax(table_VD[some].astype(np.float32), TABLE)
                values_VD[some], scales_VG[some] = part.values_OI, part.grid.scales_OG
            levels = Levels(values_VD, Grid(TABLE, scales_VG, zeros_VG))
            staged.put(name, None, levels, table_VD.shape)


class Staged:
    """Arrays of a checkpoint to be, on disk: they come by layer, and are written by name."""

    def __init__(self, folder: Path, forms: dict[str, Form]):
        folder.mkdir()
        self.folder, self.forms = folder, forms
        self.kept: set[str] = set()

    def put(self, name: str, index: int | None, levels: Levels, shape: tuple[int, ...]) -> None:
        """A rounded weight."""
        grid = levels.grid
        parts = self.forms[name].write(levels.values_OI, grid.scales_OG, grid.zeros_OG, shape)
        for part, values in parts.items():
            self._save(f"{name}.{part}", index, values)

    def keep(self, name: str, index: int | None, values: np.ndarray) -> None:
        """An array that changed and is not rounded."""
        self.kept.add(name)
        self._save(name, index, values)

    def read(self, name: str, index: int | None) -> np.ndarray:
        values = np.load(self._path(name, index))
        return values.view(FP8) if values.dtype.kind == "V" else values

    def _save(self, name: str, index: int | None, values: np.ndarray) -> None:
        np.save(self._path(name, index), values)

    def _path(self, name: str, index: int | None) -> Path:
        return self.folder / f"{name}.{index}.npy"


def _arrays(source: Pretrained, staged: Staged) -> dict[str, store.Lazy]:
    """The checkpoint's, out of the staged arrays and those of the source that stay."""
    arrays = {}

    def add(name: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable) -> None:
        read = functools.partial(read, name)
        arrays[f"params.{name}"] = store.Lazy(shape, dtype, read, stacked(name))

    kept = {np.dtype(np.float16): np.dtype(np.float32)}  # which holds its values
    for name, (shape, dtype) in source.arrays.items():
        if name in staged.forms:
            lead = shape[:1] if stacked(name) else ()
            parts = staged.forms[name].shapes(shape[len(lead) :])
            for part, (own, kind) in parts.items():
                add(f"{name}.{part}", (*lead, *own), kind, staged.read)
        elif name in staged.kept:
            add(name, shape, np.dtype(np.float32), staged.read)
        else:
            to = kept.get(dtype, dtype)
            add(name, shape, to, lambda name, i, to=to: source.read(name, i).astype(to))
    return arrays


def _write(source: Pretrained, folder: Path, recipe: Recipe, staged: Staged) -> None:
    """The checkpoint."""
    note = {
        "model": fields.encode(dataclasses.replace(source.cfg, precision=recipe.how.precision)),
        "family": source.family and source.family.name,
        "source": {"name": source.name, "digest": source.digest},
        "files": source.files,
        "context": source.context,
        "quantized": {
            "scheme": recipe.scheme,
            "method": recipe.method,
            "arrays": {name: dataclasses.asdict(form) for name, form in staged.forms.items()},
        },
    }
    words = json.loads(source.tokenizer.to_json()) if source.has_tokenizer else {}
    store.save_lazily(folder / "checkpoints", 0, _arrays(source, staged), note, words)


def bytes_of(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """Of all values."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())
