"""Convert: any checkpoint to ours or to a Hugging Face directory, tensor by tensor, and back.

A receipt says what was written, and whether what came in can be had back from it bit by bit:
that is read from the files written, not assumed.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint import hf, safetensors, store
from checkpoint.names import Names
from checkpoint.pretrained import (
    Pretrained,
    Published,
    Read,
    bits,
    compare,
    open_pretrained,
    same_bits,
    stacked,
)
from checkpoint.tensors import Tensor
from configs import fields
from model.families.family import Family

TARGETS = ("meshlm", "hf")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
RECEIPT = "receipt.json"
SHOWN = 10  # names of tensors that differ
KEPT = 3  # arrays that a reader remembers: tensors of one array, or of two in turn, come together

Progress = Callable[[str, int, int], None]  # what is being done; bytes done, and in all


def convert(
    source: Pretrained,
    target: Path,
    *,
    to: str = "meshlm",
    dtype: str = "same",
    shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write `source` as the folder `target`, which then exists whole or not at all; the receipt.

    In memory are a few slices at one time: a layer's part of one array, or an array that is not
    stacked. ValueError or OSError for a target that will not do, and for a full disk.
    """
    target = checked(source, target)
    if dtype == "float16" and to == "meshlm":
        raise ValueError("dtype='float16' is for to='hf': ours hold float32 or bfloat16")
    with whole(target) as folder:
        if to == "hf":
            digests = _write_published(source, folder, dtype, shard_bytes, progress)
        else:
            digests = {}
            _write_ours(source, folder, dtype, progress)
        receipt = _receipt(source, folder, to, digests, progress)
        text = json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"
        (folder / RECEIPT).write_text(text, encoding="utf-8")
    return receipt


def checked(source: Pretrained, target: Path) -> Path:
    """The target as an absolute path. ValueError unless it is free, and outside of the source."""
    target = target.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; the target must be a folder to make")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: nothing is written over; take another target")
    for folder in source.folders:
        if target.is_relative_to(folder.resolve()):
            raise ValueError(f"{target} lies inside the source, {folder}")
    return target


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end, or is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    except (OSError, ValueError, RuntimeError) as error:
        full = ("No space left", "requested and")  # NumPy says how much of an array it wrote
        if getattr(error, "errno", None) == errno.ENOSPC or any(o in str(error) for o in full):
            raise OSError(errno.ENOSPC, "no space left on the disk", str(target)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def room(folder: Path, need: int) -> None:
    """Raise before the work, not after it, if the disk cannot hold `need` bytes."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder.parent} has {free:,} bytes free, and {need:,} are needed")


# ---- to a Hugging Face directory ----


def _write_published(
    source: Pretrained, folder: Path, dtype: str, shard_bytes: int, progress: Progress
) -> dict[str, str]:
    """The SHA-256 of each file of tensors."""
    family = source.family or hf.family_of(source.cfg)
    names = Names(family, source.cfg)
    compare({name: shape for name, (shape, _) in source.arrays.items()}, names.ours(), source.name)
    dtypes = {
        name: DTYPES.get(dtype) or source.dtype(name, names.array(name)[0])
        for name in names.foreign()
    }
    tensors = {
        name: Tensor(shape, safetensors.NAMES[dtypes[name]])
        for name, shape in names.foreign().items()
    }
    total = sum(map(safetensors.size_of, tensors.values()))
    room(folder, total)
    read, done = remembered(source.read), 0

    def tensor(name: str) -> np.ndarray:
        nonlocal done
        values = cast(names.decompose(name, read), dtypes[name], name)
        done += values.nbytes
        progress("write", done, total)
        return values

    for name, text in _texts(source, family, set(dtypes.values())).items():
        if Path(name).name != name:  # it comes out of a checkpoint, which may be anyone's
            raise ValueError(f"{source.name} has a file named {name!r}: it must be a plain name")
        (folder / name).write_text(text, encoding="utf-8")
    return safetensors.write(folder, tensors, tensor, shard_bytes)


def _texts(source: Pretrained, family: Family, dtypes: set[np.dtype]) -> dict[str, str]:
    """The files beside the tensors: those that came in, unchanged where they still hold."""
    tokenizer = source.tokenizer if source.has_tokenizer else None
    original = json.loads(source.files.get("config.json", "null"))
    config = hf.write_config(family, source.cfg, original)
    kind = next(iter(dtypes)).name if len(dtypes) == 1 else "float32"
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = kind
    if original is not None and key not in original and kind == "float32":
        del config[key]  # what its absence says
    if original is None and tokenizer:
        config["eos_token_id"] = list(tokenizer.ends)
    if original is None and source.context and "max_position_embeddings" in family.defaults:
        config.setdefault("max_position_embeddings", source.context)
    files = {**(tokenizer.files() if tokenizer else {}), **source.files}
    if config != original:
        files["config.json"] = json.dumps(config, indent=2) + "\n"
    return files


# ---- to a checkpoint of ours ----


def _write_ours(source: Pretrained, folder: Path, dtype: str, progress: Progress) -> None:
    kept = {"float16": DTYPES["float32"]}  # which holds its values
    dtypes = {
        name: DTYPES.get(dtype) or kept.get(own.name, own)
        for name, (_, own) in source.arrays.items()
    }
    sizes = {
        name: math.prod(shape) * dtypes[name].itemsize for name, (shape, _) in source.arrays.items()
    }
    room(folder, sum(sizes.values()))
    done = 0

    def read(name: str, index: int | None) -> np.ndarray:
        nonlocal done
        values = cast(source.read(name, index), dtypes[name], name)
        done += values.nbytes
        progress("write", done, sum(sizes.values()))
        return values

    arrays = {
        f"params.{name}": store.Lazy(
            shape, dtypes[name], functools.partial(read, name), stacked(name)
        )
        for name, (shape, _) in source.arrays.items()
    }
    kind = "bfloat16" if set(dtypes.values()) == {DTYPES["bfloat16"]} else "float32"
    model = {**fields.encode(source.cfg), "dtype": kind, "param_dtype": kind}
    note = {
        "model": model,
        "family": source.family and source.family.name,
        "source": {"name": source.name, "digest": source.digest},
        "files": source.files,
        "context": source.context,
        "narrow": source.narrow if dtype == "same" else {},
    }
    words = json.loads(source.tokenizer.to_json()) if source.has_tokenizer else {}
    store.save_lazily(folder / "checkpoints", 0, arrays, note, words)


# ---- what both share ----


def remembered(read: Read) -> Read:
    """`read` that keeps the last arrays, of which several foreign tensors are made."""
    return functools.lru_cache(KEPT)(read)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The values in `dtype`. ValueError for one that float16 cannot hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = values.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(found).sum() > np.isinf(values).sum():
        raise ValueError(f"{name} has values beyond 65,504, the largest of float16")
    return found


def _receipt(
    source: Pretrained,
    folder: Path,
    to: str,
    digests: Mapping[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """What was done, from the files in `folder`."""
    copy = open_pretrained(str(folder))
    before, differ = _compared(source, copy, progress)
    after, size = hashlib.sha256(), 0
    for _, values in copy.stored():
        after.update(bits(values))
        size += values.nbytes
        progress("hash", size, volume(copy))
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": digests.get(path.name) or _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    foreign = isinstance(source, Published)
    family = source.family or copy.family
    copies = source.copies() if foreign else {}
    differ += [name for name, same in copies.items() if not same]
    return {
        "source": {"name": source.name, "digest": source.digest},
        "format": to,
        "family": family and family.name,
        "parameters": sum(math.prod(shape) for shape, _ in source.arrays.values()),
        "tensors": len(copy.kinds()),
        "bytes": size,
        "dtypes": {"source": dict(Counter(source.kinds())), "target": dict(Counter(copy.kinds()))},
        "missing": [],  # else nothing would have been written
        "unused": list(source.located.unused) if foreign else [],
        "copies": list(copies),
        "tokenizer": source.tokenizer.digest if source.has_tokenizer else None,
        "files": files,
        # Over the bytes of all tensors or arrays, as they lie there, in the order of their names.
        "values_sha256": {"source": before, "target": after.hexdigest()},
        "round_trip_bit_equal": not differ,
        "differing": len(differ),
        "differ": differ[:SHOWN],
    }


def volume(model: Pretrained) -> int:
    """Bytes of all values."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in model.arrays.values())


def _compared(source: Pretrained, copy: Pretrained, progress: Progress) -> tuple[str, list[str]]:
    """SHA-256 of the source's values, and which of its tensors do not come back from `copy`.

    A tensor comes back if, made from the copy and cast to what it was, it has the same bits.
    """
    again, done, differ = remembered(copy.read), 0, []
    total = volume(source)
    before = hashlib.sha256()
    for key, values in source.stored():
        before.update(bits(values))
        with np.errstate(all="ignore"):
            back = source.remade(key, again).astype(values.dtype, copy=False)
        if not same_bits(back, values):
            differ.append(key if isinstance(key, str) else ".".join(map(str, key)))
        done += values.nbytes
        progress("compare", done, total)
    return before.hexdigest(), differ


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
