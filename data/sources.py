"""What `data.sources` may name, and how it is opened: `stdlib`, files, folders, globs, shards."""

import difflib
import glob
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from data import formats, shards
from data.config import DataConfig
from data.documents import Files, Source
from data.formats import Bad, Scan
from data.split import Split, split

SECTION = 1 << 18  # bytes of a document that are tokenized in one piece, or more for long rows
SECTION_PER_TOKEN = 8  # bytes of it per token of a row
IN_MEMORY = 64 << 20  # bytes of unpacked files that a source keeps in memory; the rest on disk
NOT_LIBRARY = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


def open_sources(config: DataConfig) -> tuple[Split, ...]:
    """Every source of `config`, with what is held out of it.

    ValueError or FileNotFoundError for a source that is missing, has no usable document, or more
    bad rows than `config.bad_rows`; a missing library is a ValueError too.
    """
    splits = []
    for spec in config.sources:
        source = _open(spec, config)
        if isinstance(source, shards.Shards):
            splits.append(source.split(config.held_out))
        else:
            splits.append(split(source, config.held_out))
    return tuple(splits)


def _open(spec: str, config: DataConfig) -> Source:
    if (Path(spec).expanduser() / shards.MANIFEST).is_file():
        source = shards.Shards(spec, Path(spec).expanduser())
        if not len(source):
            raise ValueError(f"source {spec!r} has no document")
        return source
    section = max(SECTION, SECTION_PER_TOKEN * config.seq)
    if spec == "stdlib":
        paths = _library(Path(sysconfig.get_paths()["stdlib"]))
        source = _read(spec, paths, config.field, section)
        source.bad = Bad()  # empty and Latin-1 modules are no fault of the user's
    else:
        source = _read(spec, _paths(spec), config.field, section)
    bad, first = source.bad, "; ".join(source.bad.first)
    if not source.rows:
        raise ValueError(f"source {spec!r} has no usable document" + f" ({first})" * bool(first))
    share = bad.count / (bad.count + source.rows)
    if share > config.bad_rows:
        more = f"; and {bad.count - len(bad.first)} more" * (bad.count > len(bad.first))
        raise ValueError(
            f"source {spec!r}: {bad.count} of {bad.count + source.rows} rows are bad, "
            f"{share:.2%} and over data.bad_rows={config.bad_rows}: {first}{more}"
        )
    return source


def _read(spec: str, paths: Iterable[Path], field: str, section: int) -> Files:
    scans: list[Scan] = []
    bad, room = Bad(), IN_MEMORY
    for path in paths:
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
                bad.add(str(path), "it is no file, but a pipe or a device")
                continue
            scan = formats.scan(path, field, section, room)
        except OSError as error:
            bad.add(str(path), error.strerror or str(error))
            continue
        room = max(room - scan.blob.in_memory(), 0)
        scans.append(scan)
        bad.extend(scan.bad)
    return Files(spec, scans, bad)


def _library(root: Path) -> list[Path]:
    """The modules of the standard library at `root`, without its tests."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_LIBRARY)
        paths += [Path(folder, file) for file in sorted(files) if file.endswith(".py")]
    return paths


def _paths(spec: str) -> list[Path]:
    """The files that `spec` names, sorted."""
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
        known = [path for path in found if formats.is_known(path)]
        if not known:
            raise ValueError(
                f"source {spec!r} has no usable document: none of its {len(found)} files ends in "
                f"{', '.join(sorted(formats.KNOWN))} (or these with .gz or .zst)"
            )
        return known
    if glob.has_magic(spec):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [path for path in found if path.is_file()]
        if not files:
            raise FileNotFoundError(f"source {spec!r} matches no file")
        return files
    if path.exists():
        raise ValueError(f"source {spec!r} is a pipe or a device: write its text into a file")
    raise FileNotFoundError(f"source {spec!r} does not exist{_nearest(path)}")


def _nearest(path: Path) -> str:
    """Of the names beside a missing path the one most like it, as a question."""
    names = ["stdlib"] if path.parent == Path(".") else []
    if path.parent.is_dir():
        names += sorted(str(path.parent / name) for name in os.listdir(path.parent))
    close = difflib.get_close_matches(str(path), names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
