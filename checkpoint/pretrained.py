"""Pretrained: a model from any checkpoint: ours, a Hugging Face directory or a GGUF file."""

import abc
import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from checkpoint import gguf_config, hf, store
from checkpoint.compressed import in_parts
from checkpoint.gguf import Gguf
from checkpoint.gguf_names import Named
from checkpoint.names import Names, our_shapes
from checkpoint.quantized import Form
from checkpoint.safetensors import DTYPES, PICKLED, Safetensors
from checkpoint.tensors import Tensor, Tensors
from configs import fields
from model.config import ModelConfig
from model.families import FAMILIES
from model.families.family import Family
from text import gguf as gguf_text
from text import pretrained as texts
from text.tokenizer import Tokenizer, from_json

Array = tuple[tuple[int, ...], np.dtype]  # shape, and dtype as stored
READERS = min(os.cpu_count() or 1, 8)  # threads that read; each holds one layer's slice
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
STORED = {"F32": FLOAT32, "F16": np.dtype(np.float16), "BF16": BFLOAT16}
# Fields that a model can be trained with in another way than it was.
FREE = re.compile(
    r"dtype|param_dtype|remat|unroll|precision\.\w+\.\w+|arch\.(init\.\w+|(head|moe)\.z_loss)|"
    r"arch\.(head\.chunk|moe\.balance)"
)
SAMPLES, SAMPLE = 16, 4096  # blocks of a file that go into its digest, bytes of each
FILES = ("config.json", "generation_config.json")  # that go out as they came in

Key = tuple[str, int | None] | str  # of one of ours and its repetition; of a foreign tensor
Read = Callable[[str, int | None], np.ndarray]


class Pretrained(abc.ABC):
    """A model, its values still on disk."""

    name: str  # as the user gave it
    folders: list[Path]  # that hold its files
    digest: str  # SHA-256 of what was opened: small files, and of large ones the size and samples
    cfg: ModelConfig  # vocab resolved; param_dtype the widest stored, dtype the same
    family: Family | None  # None: trained here from a recipe
    context: int | None = None  # tokens of the longest text in training, where the files say it
    files: dict[str, str]  # of FILES, those that there were
    arrays: dict[str, Array]  # ours, dotted; stacked ones lead with L
    narrow: dict[str, str]  # tensors of the family that came in another dtype than ours have

    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """FileNotFoundError if the checkpoint has none."""
        if self._tokenizer is None:
            raise FileNotFoundError(f"{self.name} has no tokenizer")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def agree(self, cfg: ModelConfig) -> ModelConfig:
        """`cfg` with its vocabulary resolved; dtypes and what only training knows may differ.

        ValueError, with the flags that mend it, if it describes another model.
        """
        cfg = dataclasses.replace(cfg, vocab=cfg.vocab or self.cfg.vocab)
        wanted = {path: value for path, _, value in fields.leaves(cfg)}
        differ = [
            f"--config.model.{path}={fields.spell(value)}"
            for path, _, value in fields.leaves(self.cfg)
            if wanted[path] != value and not FREE.fullmatch(path)
        ]
        if differ:
            raise ValueError(f"config.model is not the model of {self.name}: {' '.join(differ)}")
        return cfg

    @abc.abstractmethod
    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """One of `arrays`, or repetition `index` of a stacked one; threads may read at a time."""

    @abc.abstractmethod
    def stored(self) -> Iterator[tuple[Key, np.ndarray]]:
        """What the files hold of the model, as it lies there, in the order of the names."""

    @abc.abstractmethod
    def remade(self, key: Key, read: Read) -> np.ndarray:
        """The values that `stored` gave for `key`, out of another checkpoint's `read`."""

    @abc.abstractmethod
    def dtype(self, foreign: str, array: str) -> np.dtype:
        """What a tensor of the family, part of one of `arrays`, is best written as."""

    @abc.abstractmethod
    def kinds(self) -> list[str]:
        """The dtype of each tensor or array, as its format calls it."""

    def compressed(self, shapes: Any) -> Any:
        """`shapes`, with a QArray for each weight that the files hold in 8 or 4 bits."""
        return shapes

    def lying(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """`arrays`, in parts where `wanted` names these."""
        return self.arrays

    def params(self, shapes: Any) -> Any:
        """The values, in a tree like `shapes`: cast to its dtypes, placed as its shardings say.

        On the host are READERS + 2 slices at one time: a layer's part of one array, or an array
        that is not stacked. Histories that are not stored begin anew. ValueError, naming the array
        and both shapes, if `shapes` are those of another model.
        """
        every = store.flatten(shapes)
        lying = {name: shape for name, (shape, _) in self.lying(every).items()}
        fresh = ((name, every[name]) for name in store.histories(every, lying))
        params = {name: jnp.zeros(a.shape, a.dtype, device=placed(a)) for name, a in fresh}
        wanted = {name: leaf for name, leaf in every.items() if name not in params}
        compare(lying, {name: tuple(leaf.shape) for name, leaf in wanted.items()}, self.name)
        slices = [
            (name, i)
            for name, leaf in wanted.items()
            for i in (range(leaf.shape[0]) if stacked(name) else [None])
        ]

        def load(name: str, index: int | None) -> np.ndarray:
            return self.read(name, index).astype(wanted[name].dtype, copy=False)

        for (name, index), values in zip(slices, ahead(load, slices), strict=True):
            where = placed(wanted[name])
            if index is None:
                params[name] = put(values, where)
                continue
            if index == 0:
                params[name] = jnp.zeros(wanted[name].shape, values.dtype, device=where)
            params[name] = _set(params[name], put(values[None], where), index)
        return jax.tree.unflatten(jax.tree.structure(shapes), [params[name] for name in every])


def stacked(name: str) -> bool:
    """Whether the array of this dotted name leads with L."""
    return name.startswith("blocks.")


def ahead(load: Callable[..., np.ndarray], jobs: list[tuple]) -> Iterator[np.ndarray]:
    """`load(*job)` of each job in order, made by threads, READERS jobs ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        running: collections.deque[Future] = collections.deque()
        try:
            for job in jobs:
                running.append(pool.submit(load, *job))
                if len(running) > READERS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def placed(leaf: jax.ShapeDtypeStruct) -> Sharding:
    """Where an array of a model's shapes lives: on the mesh in use, or else on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, getattr(leaf.sharding, "spec", jax.P()))


def put(values: np.ndarray, where: Sharding) -> jax.Array:
    """The values on the devices of `where`, of which each gets its part."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(values.shape, where, lambda part: values[part])


@functools.partial(jax.jit, donate_argnums=0)
def _set(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """[L, ...] with layer [1, ...] at `index`, in the same memory."""
    return jax.lax.dynamic_update_slice_in_dim(stack, layer, index, 0)


def compare(saved: Mapping[str, tuple], wanted: Mapping[str, tuple], name: str) -> None:
    """ValueError unless both hold arrays of the same names and shapes."""
    for array in sorted(saved.keys() & wanted.keys()):
        if saved[array] != wanted[array]:
            raise ValueError(f"{array} has shape {saved[array]} in {name}, not {wanted[array]}")
    for arrays, what in (
        (wanted.keys() - saved.keys(), "lacks"),
        (saved.keys() - wanted.keys(), "has besides"),
    ):
        if arrays:
            first = ", ".join(sorted(arrays)[:3])
            raise ValueError(f"{name} {what} {len(arrays)} arrays of the model: {first}")


class Ours(Pretrained):
    """A checkpoint of a run, or one that tools.convert wrote; scales are current for its use."""

    def __init__(self, name: str):
        self.name, self.saved = name, store.locate(name)
        note, words = self.saved.json("run"), self.saved.json("tokenizer")
        said = note.get("run", note) if isinstance(note, dict) else None
        if not isinstance(said, dict) or "model" not in said:
            raise ValueError(f"{self.saved.path} does not say what model it holds")
        self.trained = "run" in note  # else it holds parameters alone
        try:
            cfg = fields.decode(ModelConfig, said["model"], "model")
            self.cfg = dataclasses.replace(cfg, precision=cfg.precision.current)
            self._tokenizer = from_json(json.dumps(words)) if words else None
            if self._tokenizer is not None:
                texts.fits(self._tokenizer, self.cfg.vocab)
        except ValueError as error:
            raise ValueError(f"{self.saved.path}: {error}") from None
        self.family = next((one for one in FAMILIES if one.name == note.get("family")), None)
        files = note.get("files", {})
        self.files = {file: str(files[file]) for file in FILES if file in files}
        self.narrow = note.get("narrow", {})
        self.context = said["data"]["seq"] if self.trained else note.get("context")
        self.quantized = note.get("quantized", {})
        self._forms = {
            array: Form(**form) for array, form in self.quantized.get("arrays", {}).items()
        }
        found = {
            array.removeprefix("params."): shape
            for array, shape in self.saved.arrays().items()
            if array.startswith("params.")
        }
        self.arrays, self._stored = self._whole(found), found
        folder = self.saved.folder
        run = self.saved.path.name == "checkpoints"
        self.folders = [self.saved.path.parent if run else self.saved.path]
        small = [json.dumps(item, sort_keys=True).encode() for item in (note, words)]
        self.digest = digest(small, [folder / "state" / "manifest.ocdbt"])
        self._verifying, self.verified = threading.Lock(), False

    def verify(self) -> None:
        """ValueError, naming the step and the files, if they are not as they were saved; once."""
        with self._verifying:
            if not self.verified:
                self.saved.verify()
            self.verified = True

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The first reading verifies all files, which takes 0.4 s a GB and core."""
        self.verify()
        if name not in self._forms:
            return self.saved.read(f"params.{name}", index)
        if index is None and stacked(name):
            return np.stack([self.read(name, i) for i in range(self.arrays[name][0][0])])
        form, (shape, dtype) = self._forms[name], self.arrays[name]
        parts = {part: self.saved.read(f"params.{name}.{part}", index) for part in form.parts}
        shape = shape[1:] if stacked(name) else shape
        return form.read(parts, shape).astype(dtype, copy=False)

    def compressed(self, shapes: Any) -> Any:
        def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
            form = self._forms.get(jax.tree_util.keystr(path, simple=True, separator="."))
            return leaf if form is None else in_parts(form, leaf)

        return jax.tree.map_with_path(one, shapes)

    def lying(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        parts = {name: self._stored[name] for name in self._stored.keys() & wanted.keys()}
        whole = {name.rpartition(".")[0] for name in parts}
        return {name: array for name, array in self.arrays.items() if name not in whole} | parts

    def _whole(self, found: Mapping[str, Array]) -> dict[str, Array]:
        """The model's arrays, of which some lie in parts. ValueError if a part is missing."""
        parts = {f"{name}.{part}" for name, form in self._forms.items() for part in form.parts}
        if missing := parts - found.keys():
            raise ValueError(f"{self.saved.path} lacks {min(missing)}, a part of a quantized array")
        parts |= set(store.histories(found, ()))
        arrays = {name: array for name, array in found.items() if name not in parts}
        if self._forms:
            ours = our_shapes(self.cfg)
            dtype = STORED["BF16" if self.cfg.param_dtype == "bfloat16" else "F32"]
            arrays |= {name: (ours[name], dtype) for name in self._forms}
        return arrays

    def stored(self) -> Iterator[tuple[Key, np.ndarray]]:
        for name, (shape, _) in sorted(self.arrays.items()):
            for index in range(shape[0]) if stacked(name) else [None]:
                yield (name, index), self.read(name, index)

    def remade(self, key: Key, read: Read) -> np.ndarray:
        return read(*key)

    def dtype(self, foreign: str, array: str) -> np.dtype:
        return STORED.get(self.narrow.get(foreign), self.arrays[array][1])

    def kinds(self) -> list[str]:
        return [
            self._forms[name].kind if name in self._forms else dtype.name
            for name, (_, dtype) in self.arrays.items()
        ]

    @property
    def bytes(self) -> int:
        """Of all values, as they are stored."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._stored.values())


class Published(Pretrained):
    """A model in tensors of other names."""

    def __init__(
        self,
        name: str,
        tensors: Tensors,
        family: Family,
        cfg: ModelConfig,
        tokenizer: Tokenizer | None,
        files: dict[str, str],
    ):
        """ValueError for tensors that lack, that have no place, and for shapes that differ."""
        self.name, self.family, self.files = name, family, files
        self.tensors, self.names, self._tokenizer = tensors, Names(family, cfg), tokenizer
        self.located = self.names.locate(tensors.tensors)
        if tokenizer is not None:
            texts.fits(tokenizer, cfg.vocab)
        dtypes: dict[str, set] = collections.defaultdict(set)
        for foreign, source in self.located.sources.items():
            dtypes[self.names.array(foreign)[0]].add(_dtype(source, tensors.tensors[source]))
        self.arrays = {
            array: (shape, _widest(dtypes[array])) for array, shape in self.names.ours().items()
        }
        kinds = zip(self.located.sources, self.kinds(), strict=True)
        self.narrow = {
            foreign: kind
            for foreign, kind in kinds
            if kind == "F16" or STORED.get(kind, FLOAT32) != self._array(foreign)[1]
        }
        stored = _widest({dtype for _, dtype in self.arrays.values()})
        kind = "bfloat16" if stored == BFLOAT16 else "float32"
        self.cfg = dataclasses.replace(cfg, dtype=kind, param_dtype=kind)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        def tensor(foreign: str) -> np.ndarray:
            values = self.tensors.read(self.located.sources[foreign])
            return values.astype(self.arrays[name][1], copy=False)

        return self.names.compose(name, index, tensor)

    def _array(self, foreign: str) -> Array:
        return self.arrays[self.names.array(foreign)[0]]

    def stored(self) -> Iterator[tuple[Key, np.ndarray]]:
        for foreign, name in sorted(self.located.sources.items(), key=lambda item: item[1]):
            yield foreign, self.tensors.read(name)

    def remade(self, key: Key, read: Read) -> np.ndarray:
        return self.names.decompose(key, read)

    def dtype(self, foreign: str, array: str) -> np.dtype:
        source = self.located.sources[foreign]
        return _dtype(source, self.tensors.tensors[source])

    def kinds(self) -> list[str]:
        return [self.tensors.tensors[name].dtype for name in self.located.sources.values()]

    def copies(self) -> dict[str, bool]:
        """Of each tensor that should repeat another: whether it does, bit by bit."""
        read = self.tensors.read
        return {
            name: same_bits(read(name), read(other)) for name, other in self.located.copies.items()
        }


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal, signs of zeros and NaNs included."""
    return a.shape == b.shape and np.array_equal(bits(a), bits(b))


def bits(values: np.ndarray) -> np.ndarray:
    """The bytes of an array, [n] uint8."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _dtype(name: str, tensor: Tensor) -> np.dtype:
    """What the values come as. ValueError for what is stored as no float of a known kind."""
    if tensor.dtype in DTYPES and tensor.dtype not in STORED:
        raise ValueError(f"{name} holds {tensor.dtype}: only {', '.join(STORED)} are read")
    return STORED.get(tensor.dtype, FLOAT32)  # quantized kinds are read as float32


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    """The one dtype, or float32, which holds the values of all."""
    return next(iter(dtypes)) if len(dtypes) == 1 else FLOAT32


def open_pretrained(name: str) -> Pretrained:
    """The model that `name` names: DIR[@STEP] of ours, a Hugging Face directory, a .gguf file.

    Everything is checked, and no values are read. ValueError or OSError, which say what is wrong
    with the files.
    """
    path = Path(name).expanduser()
    if is_ours(name):
        return Ours(name)
    if path.is_dir():
        return _folder(name, path)
    if path.exists():
        return _gguf(name, path)
    raise FileNotFoundError(f"{name}: there is no such folder or file, and nothing is downloaded")


def is_ours(name: str) -> bool:
    """Whether `name`, if it names anything, is DIR[@STEP] of ours."""
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / "checkpoints").is_dir() or any(
            entry.name.isdecimal() and entry.is_dir() for entry in path.iterdir()
        )
    return "@" in name and not path.exists()


def _folder(name: str, path: Path) -> Published:
    """A Hugging Face directory."""
    found = {file: texts.read(path / file) for file in FILES}
    files = {file: text for file, text in found.items() if text is not None}
    if "config.json" not in files:
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; is {ggufs[0]} meant?" if ggufs else ""
        raise FileNotFoundError(
            f"{path} is no checkpoint: it has neither checkpoints/ nor config.json{hint}"
        )
    try:
        config = json.loads(files["config.json"])
        if not isinstance(config, dict):
            raise ValueError("it must hold an object")
        family, cfg = hf.read_config(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    tensors = Safetensors(path)
    words = [path / file for file in ("tokenizer.json", "vocab.json", "vocab.txt", texts.PIECES)]
    there = any(file.exists() or file.is_symlink() for file in words)
    tokenizer = texts.open_folder(path) if there else None
    made = _made(path, name, tensors, family, cfg, tokenizer, files)
    small = [text.encode() for text in (*files.values(), tokenizer.to_json() if tokenizer else "")]
    made.digest, made.folders = digest(small, tensors.files), [path]
    return made


def _gguf(name: str, path: Path) -> Published:
    """A GGUF file."""
    if path.name.endswith(PICKLED):
        raise ValueError(f"{path}: a pickle can run any code, so it is never read here")
    if path.name.endswith((".safetensors", ".json")):
        raise ValueError(f"{path} is one file of a checkpoint: name its folder, {path.parent}")
    file = Gguf(path)
    try:
        family, cfg = gguf_config.read_config(file)
        tensors = Named(file, family, cfg)
        tokenizer = gguf_text.from_metadata(file.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    made = _made(path, name, tensors, family, cfg, tokenizer, {})
    made.digest, made.folders = digest([], [path]), []
    made.context = gguf_config.context(file)
    return made


def _made(path: Path, *args: Any) -> Published:
    try:
        return Published(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def digest(small: list[bytes], large: list[Path]) -> str:
    """SHA-256 of `small` texts and of the sizes and a few blocks of `large` files."""
    total = hashlib.sha256()
    for text in small:
        total.update(hashlib.sha256(text).digest())
    for path in large:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            total.update(size.to_bytes(8, "little"))
            for i in range(SAMPLES):
                file.seek(max(size - SAMPLE, 0) * i // (SAMPLES - 1))
                total.update(file.read(SAMPLE))
    return total.hexdigest()
