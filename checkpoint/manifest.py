"""Manifest: the size and SHA-256 of every file of a checkpoint, so that damage is found.

It is written into the folder before the folder gets its name, so a committed checkpoint has one,
and one without was damaged. Only the two files that orbax writes as it commits come in later, by
`seal`; until then a checkpoint is verified without them, which hold no values.

The file is one line of JSON, and in a second line the SHA-256 of the first.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "manifest.json"
LATE = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})  # that orbax writes as it commits
LONGEST = 1 << 28  # bytes of a manifest that are read; 100,000 files take 12 MB
THREADS = min(os.cpu_count() or 1, 16)  # each hashes 1.4 GB/s

Entry = tuple[int, str]  # bytes, SHA-256


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's files were when it was saved."""

    step: int
    config: str  # SHA-256 of the run that saved it, as `digest` gives it
    tokenizer: str
    files: Mapping[str, Entry]  # by path in the folder, with slashes

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """ValueError if there is none, or it is damaged."""
        try:
            if not stat.S_ISREG((folder / NAME).stat().st_mode):  # a pipe would never end
                raise ValueError(f"{folder} is damaged: {NAME} is no file")
            with open(folder / NAME, "rb") as file:
                content = file.read(LONGEST + 1)
        except FileNotFoundError:
            raise ValueError(
                f"{folder} is damaged: {NAME} is missing, without which nothing can be verified"
            ) from None
        text, _, rest = content.partition(b"\n")
        if rest != hashlib.sha256(text).hexdigest().encode() + b"\n":
            raise ValueError(f"{folder} is damaged: {NAME} is not what was written")
        try:
            said = json.loads(text)
            files = {
                str(name): (int(size), str(sha)) for name, (size, sha) in said["files"].items()
            }
            made = cls(int(said["step"]), str(said["config"]), str(said["tokenizer"]), files)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / NAME} is no manifest: {error!r}") from None
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:  # anyone may have written it
                raise ValueError(f"{folder / NAME} names {name!r}, outside of its folder")
        return made

    def write(self, folder: Path) -> None:
        """Into the folder, whole or not at all."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        part = folder / f"{NAME}.part"
        with open(part, "wb") as file:
            file.write(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / NAME)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(folder: Path, step: int, config: Any, tokenizer: Any) -> None:
    """The manifest of the files in `folder`; `config` and `tokenizer` are JSON values."""
    names = [name for name in _names(folder) if name not in LATE]
    files = dict(zip(names, _entries(folder, names), strict=True))
    Manifest(step, digest(config), digest(tokenizer), files).write(folder)


def seal(folder: Path) -> None:
    """Add what orbax wrote as it committed the folder."""
    before = Manifest.read(folder)
    late = [name for name in sorted(LATE) if (folder / name).is_file()]
    files = {**before.files, **dict(zip(late, _entries(folder, late), strict=True))}
    Manifest(before.step, before.config, before.tokenizer, files).write(folder)


def verify(folder: Path, step: int, share: int = 0, shares: int = 1) -> int:
    """Bytes that were read and found as they were saved.

    Of several processes each takes its share of the files. ValueError, naming folder and files,
    if one is missing, longer, shorter or other than it was.
    """
    made = Manifest.read(folder)
    if made.step != step:
        raise ValueError(f"{folder} is damaged: its {NAME} is that of step {made.step}")
    by_size = sorted(made.files, key=lambda name: (made.files[name][0], name))
    names = by_size[share::shares]

    def wrong(name: str) -> str:
        return _differs(folder / name, *made.files[name])

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(wrong, names), strict=True))
    bad = [f"{name} {why}" for name, why in found.items() if why]
    if bad:
        more = f"; and {len(bad) - 3} files more" if len(bad) > 3 else ""
        raise ValueError(f"{folder} is damaged: {'; '.join(bad[:3])}{more}")
    return sum(made.files[name][0] for name in names)


def _names(folder: Path) -> Iterator[str]:
    """The files of a checkpoint, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / NAME:
            yield path.relative_to(folder).as_posix()


def _entries(folder: Path, names: list[str]) -> list[Entry]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: _entry(folder / name), names))


def _entry(path: Path) -> Entry:
    with open(path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, sha


def _differs(path: Path, size: int, sha: str) -> str:
    """What is wrong with a file; "" if nothing."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != size:
            return f"has {found.st_size:,} bytes, not the {size:,} that were saved"
        return "" if _entry(path)[1] == sha else "has other bytes than were saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
