"""Safetensors: the files of a Hugging Face directory, read lazily and written as a stream.

A file is eight bytes of header length, a JSON header, then the values, little-endian and without
a gap. Published at huggingface.co/docs/safetensors.
"""

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from checkpoint.tensors import Tensor, Tensors

# Widest first, in the order in which the safetensors library lays tensors out.
DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, of a header or an index: the format's own limit
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Read = Callable[[str], np.ndarray]


class Safetensors(Tensors):
    """The tensors of a Hugging Face directory.

    Its files may be links, as a download cache makes them: the folder is the user's own. What an
    index names must be plain file names inside the folder.
    """

    def __init__(self, folder: Path):
        """Reads and checks the headers. ValueError or OSError for a file that will not do."""
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}  # the file, and where the values begin
        index = _index(folder)
        for file in dict.fromkeys(index.values()) if index else [_single(folder)]:
            for name, tensor, start in _header(folder / file):
                if name in self.tensors:
                    raise ValueError(
                        f"{folder}: {_short(name)} is in two files, the second is {file}"
                    )
                if index and index.get(name) != file:
                    said = f"in {index[name]}" if name in index else "nowhere"
                    raise ValueError(
                        f"{folder}: {_short(name)} lies in {file}, {INDEX} has it {said}"
                    )
                self.tensors[name] = tensor
                self._places[name] = folder / file, start
        for name, file in (index or {}).items():
            if name not in self.tensors:
                raise ValueError(f"{folder / file} lacks {_short(name)}, which {INDEX} has there")
        self.files = sorted({path for path, _ in self._places.values()})

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self.tensors[name].shape
        start, stop, _ = slice(start, stop).indices(shape[0])
        return self._read(name, start * math.prod(shape[1:]), (max(stop - start, 0), *shape[1:]))

    def read(self, name: str) -> np.ndarray:
        return self._read(name, 0, self.tensors[name].shape)

    def _read(self, name: str, skip: int, shape: tuple[int, ...]) -> np.ndarray:
        """`shape` of the values after the first `skip`.

        Read, not mapped: what is mapped counts as memory of the process until it is let go, and
        a file that shrinks meanwhile would kill it.
        """
        path, begin = self._places[name]
        values = np.empty(shape, DTYPES[self.tensors[name].dtype])
        if not values.size:
            return values
        part = memoryview(values.reshape(-1).view(np.uint8))
        with open(path, "rb", buffering=0) as file:
            file.seek(begin + skip * values.itemsize)
            done = 0
            while done < len(part):  # one call gives 2 GiB at most
                count = file.readinto(part[done:])
                if not count:
                    raise ValueError(
                        f"{path} ends inside {_short(name)}: it changed after it was opened"
                    )
                done += count
        return values


def _single(folder: Path) -> str:
    """The one file of the folder. FileNotFoundError, saying what is there, if there is none."""
    if (folder / SINGLE).exists():
        return SINGLE
    names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{folder} holds {len(found)} safetensors files, {', '.join(found[:3])}, ..., "
            f"but no {INDEX} that says which belong together"
        )
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise ValueError(
            f"{folder} holds its weights as {pickled[0]}: a pickle can run any code, so it is "
            "never read here; load it with transformers where you trust it, and "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder} holds no {SINGLE}, nor {INDEX}")


def _index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, if the folder has an index and not one file alone."""
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return None
    data = _json(path, _bytes(path, 0, _size(path, MAX_HEADER)))
    files = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} has no weight_map, an object of tensors and their files")
    for name, file in files.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable()
        if not plain or set(file) & {"/", "\\"}:
            raise ValueError(
                f"{path}: the file of {_short(name)} is {_short(file)}; it must be the plain name "
                "of a .safetensors file in the same folder"
            )
    for file in dict.fromkeys(files.values()):
        if not (folder / file).exists():
            count = sum(other == file for other in files.values())
            raise FileNotFoundError(f"{folder / file} is missing, with {count} tensors of {INDEX}")
    return files


def _header(path: Path) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, offset of its values in the file), in the order of the values."""
    size = _size(path)
    if size < 8:
        raise ValueError(f"{path} has {size} bytes: too short for a safetensors header")
    length = int.from_bytes(_bytes(path, 0, 8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(
            f"{path}: a header of {length:,} bytes does not fit into {size - 8:,} bytes "
            f"(at most {MAX_HEADER:,}): cut short, or no safetensors file"
        )
    header = _json(path, _bytes(path, 8, length))
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be an object of tensors")
    header.pop("__metadata__", None)
    entries = sorted(
        ((*_entry(path, name, entry), name) for name, entry in header.items()),
        key=lambda entry: entry[:2],
    )
    end, values = 0, size - 8 - length
    for start, stop, tensor, name in entries:
        if stop > values:
            raise ValueError(
                f"{path}: {_short(name)} ends at byte {stop:,} of {values:,}: the file is cut short"
            )
        if start != end:
            what = "overlaps the tensor" if start < end else f"leaves {start - end} bytes"
            raise ValueError(f"{path}: {_short(name)} {what} before it")
        yield name, tensor, 8 + length + start
        end = stop
    if end != values:
        raise ValueError(f"{path}: {values - end:,} bytes after the last tensor")


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, Tensor]:
    """(start, stop, tensor) of one entry of a header, its size checked."""

    def wrong(what: str) -> NoReturn:
        raise ValueError(f"{path}: {_short(name)} has {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        wrong(f"the entry {_short(entry)}; it must give dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        wrong(f"the dtype {_short(dtype)}, none of {', '.join(DTYPES)}")
    if not _counts(shape):
        wrong(f"the shape {_short(shape)}, no list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        wrong(f"the data_offsets {_short(offsets)}; they must be a start and an end")
    start, stop = offsets
    if stop - start != (need := math.prod(shape) * DTYPES[dtype].itemsize):
        wrong(f"{stop - start:,} bytes, {dtype} {_short(shape)} takes {need:,}")
    return start, stop, Tensor(tuple(shape), dtype)


def _counts(value: Any) -> bool:
    """Whether this is a short list of integers that a file can have."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _json(path: Path, data: bytes) -> Any:
    """JSON in which no name is given twice. ValueError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{_short(twice)} is given twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no proper JSON: {error}") from None


def _size(path: Path, most: int | None = None) -> int:
    """Bytes of a regular file; a pipe or a device would never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file")
    if most is not None and found.st_size > most:
        raise ValueError(f"{path} has {found.st_size:,} bytes, {most:,} at most are read")
    return found.st_size


def _bytes(path: Path, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def write(
    folder: Path, tensors: Mapping[str, Tensor], read: Read, shard_bytes: int
) -> dict[str, str]:
    """Write the tensors into `folder`, `read` giving one at a time; the SHA-256 of each file.

    Files grow to `shard_bytes`, or to one tensor; several get an index. Within a file dtypes come
    in the order of DTYPES, then names in theirs: the bytes that the safetensors library writes.
    """
    place = {dtype: i for i, dtype in enumerate(DTYPES)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors, key=lambda name: (place[tensors[name].dtype], name)):
        size = size_of(tensors[name])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    digests = {
        file: _write_file(folder / file, {name: tensors[name] for name in shard}, read)
        for file, shard in zip(names, shards, strict=True)
    }
    if count > 1:
        total = sum(size_of(tensor) for tensor in tensors.values())
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        text = (json.dumps(index, indent=2) + "\n").encode()
        (folder / INDEX).write_bytes(text)
        digests[INDEX] = hashlib.sha256(text).hexdigest()
    return digests


def _write_file(path: Path, tensors: Mapping[str, Tensor], read: Read) -> str:
    """One file, tensor by tensor, on disk when this returns; its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + size_of(tensor)
        offsets = [start, end]
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight bytes
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = read(name)
            assert values.shape == tensor.shape and values.dtype == DTYPES[tensor.dtype], name
            put(memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def size_of(tensor: Tensor) -> int:
    """Bytes of the values."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
