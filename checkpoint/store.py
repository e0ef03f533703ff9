"""Store: the checkpoints of a run, each a folder DIR/checkpoints/STEP.

A checkpoint holds the arrays of the state, each under its dotted path, and as JSON what else a run
needs to go on: the resolved run, the position in the data, the tokenizer. A manifest tells damage.
"""

import asyncio
import contextlib
import errno
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from checkpoint import manifest
from sharding import mesh as meshes

Arrays = dict[str, jax.Array]
SHAPE = "/.zarray"  # follows an array's name in the key of its shape
STACKED = re.compile(r"(^|\.)blocks\.")  # arrays that lead with the layers
HISTORY = re.compile(r"(^|\.)history$")  # what layers remember who scale by it: it can begin anew
LAYERS, CHUNK = 1 << 20, 1 << 26  # bytes of a Lazy's chunk: small layers together, or rows
PART = ".orbax-checkpoint-tmp"  # follows the step in the name of a folder that is being written


def flatten(tree: Any) -> Arrays:
    """The leaves of a tree by their dotted paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def histories(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Those of `names` that are histories and not among `others`."""
    return [name for name in names if HISTORY.search(name) and name not in others]


def locate(name: str) -> "Saved":
    """The checkpoint that `DIR[@STEP]` names, the newest without a step.

    DIR is a run's folder or its checkpoints folder. FileNotFoundError if it holds no checkpoint.
    """
    return candidates(name)[0]


def candidates(name: str) -> list["Saved"]:
    """The checkpoints that `DIR[@STEP]` names, newest first: with a step, the one."""
    folder, at, step = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():  # a folder's own name may have an @
        folder, at, step = name, "", ""
    if at and not step.isdecimal():
        raise ValueError(f"{name}: {step!r} is no step; {folder}@1000, say")
    found = Path(folder).expanduser()
    if not found.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    found = found / "checkpoints" if (found / "checkpoints").is_dir() else found
    return [Saved.open(found, int(step))] if step else Saved.all(found)


@dataclass(frozen=True)
class Saved:
    """One checkpoint, to be read."""

    path: Path  # the checkpoints folder
    step: int

    @classmethod
    def open(cls, path: Path, step: int | None = None) -> "Saved":
        """The checkpoint of `step`, or the newest. FileNotFoundError if there is none."""
        found = {saved.step: saved for saved in cls.all(path)}
        if step is not None and step not in found:
            steps = ", ".join(map(str, sorted(found)))
            raise FileNotFoundError(f"{path} holds no step {step}, but {steps}")
        return found[max(found) if step is None else step]

    @classmethod
    def all(cls, path: Path) -> list["Saved"]:
        """The checkpoints in the folder, newest first. FileNotFoundError if there is none."""
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} must be a folder of checkpoints")
        names = [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
        steps = {int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name)}
        if not steps:
            raise FileNotFoundError(f"{path} holds no checkpoint")
        return [cls(path.absolute(), step) for step in sorted(steps, reverse=True)]

    @property
    def folder(self) -> Path:
        """Of its files."""
        return self.path / str(self.step)

    def verify(self, share: int = 0, shares: int = 1) -> int:
        """Bytes found as they were saved; of several processes each reads its share of the files.

        ValueError, naming the step's folder and the files, if one is not as it was. 0.4 s a GB
        and core.
        """
        read = manifest.verify(self.folder, self.step, share, shares)
        made = manifest.Manifest.read(self.folder)
        for name, sha, found in (
            ("config", made.config, _config(self.json("run"))),
            ("tokenizer", made.tokenizer, self.json("tokenizer")),
        ):
            if sha != manifest.digest(found):
                raise ValueError(f"{self.folder} is damaged: its {name} is not the one saved")
        return read

    def set_aside(self) -> Path:
        """Rename the folder so that nothing takes it for a checkpoint or deletes it."""
        names = (f"{self.step}.bad{number}" for number in ("", *range(2, 1000)))
        free = next(self.path / name for name in names if not (self.path / name).exists())
        return self.folder.rename(free)

    def json(self, item: str) -> dict:
        """What was saved as `item`: "run" or "tokenizer"."""
        file = self.folder / item / "metadata"
        try:
            if not file.is_file():  # a pipe would never end
                raise ValueError("it is no file")
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array, without their values. ValueError if it is damaged."""
        with self._told("the arrays"):
            keys = tensorstore.KvStore.open(self._database()).result().list().result()
        names = sorted(key.decode()[: -len(SHAPE)] for key in keys if key.endswith(SHAPE.encode()))
        with self._told("a shape"):
            opened = {name: self._open(name) for name in names}
        return {name: (array.shape, array.dtype.numpy_dtype) for name, array in opened.items()}

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """An array, or one layer of a stacked one, without reading the others."""
        with self._told(name):
            array = self._open(name)
            return (array if index is None else array[index]).read().result()

    def _database(self) -> dict[str, Any]:
        """Where orbax keeps the arrays, as tensorstore opens it."""
        base = {"driver": "file", "path": f"{self.folder}/state/"}
        return {"driver": "ocdbt", "base": base}

    def _open(self, name: str) -> tensorstore.TensorStore:
        """An array, of which a slice is read when asked for; 0.4 ms."""
        kvstore = {**self._database(), "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of tensorstore in a line, with the checkpoint."""
        try:
            yield
        except ValueError as error:
            why = str(error).partition(" [")[0]
            raise ValueError(f"{self.folder} is damaged: cannot read {what}: {why}") from None

    def restore(self, abstract: Any) -> Any:
        """The state, shaped and placed as `abstract`, whatever mesh it was saved on. Histories that
        it lacks begin anew, others are left.

        ValueError, naming the array and both shapes, if it was saved from another model or
        optimizer.
        """
        every = flatten(abstract)
        saved = {name: shape for name, (shape, _) in self.arrays().items()}
        found = {
            name: jnp.zeros(every[name].shape, every[name].dtype, device=every[name].sharding)
            for name in histories(every, saved)
        }
        wanted = {name: leaf for name, leaf in every.items() if name not in found}
        left = histories(saved, every)
        args = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=bool(left),
        )
        for name in left:
            del saved[name]
        _compare(saved, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
        with ocp.Checkpointer(_handler()) as reader:
            found |= reader.restore(self.folder, args=ocp.args.Composite(state=args))["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in every])


def _room(folder: Path, need: int) -> None:
    """OSError, in all processes, if the disk of one lacks `need` bytes. Half of the arrays' bytes
    will do: how far orbax compresses them is unknown, and a disk that fills up on the way is told
    as well, with more noise from its threads."""
    free = shutil.disk_usage(folder).free
    # Devices talk over the whole mesh, 8 bytes of each process: one that saves would wait for one
    # that does not.
    if meshes.agree(int(free < need)):
        why = f"No space left on device: {free:,} bytes free, and the state takes {2 * need:,}"
        raise OSError(errno.ENOSPC, why if free < need else "No space left for another process")


def _raised_anyhow(record: logging.LogRecord) -> bool:
    """Filters the tracebacks that orbax prints from its threads before it raises the same error."""
    return not (record.exc_info and "orbax" in record.pathname)


def _config(run: Any) -> Any:
    """What was configured, of what was saved as "run"; beside it stands how far the run was."""
    return run.get("run", run) if isinstance(run, dict) else run


def _handler(state: Any = None) -> ocp.CompositeCheckpointHandler:
    """Of the items of a checkpoint; `state`: of its arrays."""
    return ocp.CompositeCheckpointHandler(
        state=state or ocp.PyTreeCheckpointHandler(),
        run=ocp.JsonCheckpointHandler(),
        tokenizer=ocp.JsonCheckpointHandler(),
    )


class Store:
    """Saves the checkpoints of a run beside its computation and keeps the newest.

    The manifest is made by the thread that writes, before the folder gets its name.
    """

    def __init__(self, path: Path, *, keep: int = 2, keep_every: int = 0):
        """`keep`: newest checkpoints that stay; `keep_every`: steps that stay for ever, 0: none."""
        self.path = Path(path).absolute()
        self._saving: tuple[int, Any, Any] | None = None  # step, config and tokenizer on their way
        self._failed: list[tuple[int, Exception]] = []  # that nobody asked for yet
        self._sealing: Future | None = None
        self._thread = ThreadPoolExecutor(1, "seal")
        logging.getLogger("absl").addFilter(_raised_anyhow)
        # The first copy of an array writes all of it. Else each copy writes a part, which makes
        # chunks smaller than a layer, and cutting the parts compiles a program for each array.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                # Called by process 0 when the files of all processes are written.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._before_commit,
                    # Else a folder that cannot be made is told after minutes of time-outs.
                    create_directories_asynchronously=False,
                ),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "run": ocp.JsonCheckpointHandler(),
                "tokenizer": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest step saved."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps saved."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: Any, run: dict, tokenizer: dict) -> None:
        """Save `state`, a tree of arrays; returns once they are copied and writes beside the run.

        An array that leads with the layers is written one layer a chunk (1 MiB at least), so that
        reading a layer takes the memory of a layer. Waits for the save before, whose error is for
        `failed` to tell.
        """
        self._settle()
        arrays = flatten(state)
        _room(self.path, sum(array.nbytes for array in arrays.values()) // 2)

        def chunks(name: str, array: jax.Array) -> ocp.SaveArgs:
            if not STACKED.search(name) or array.ndim < 2:
                return ocp.SaveArgs()
            layer = math.prod(array.sharding.shard_shape(array.shape)[1:]) * array.dtype.itemsize
            return ocp.SaveArgs(chunk_byte_size=max(layer, 1 << 20), shard_axes=(0,))

        args = {name: chunks(name, array) for name, array in arrays.items()}
        self._saving = (step, _config(run), tokenizer)
        try:
            with jax.transfer_guard("allow"):
                done = self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(arrays, save_args=args),
                        run=ocp.args.JsonSave(run),
                        tokenizer=ocp.args.JsonSave(tokenizer),
                    ),
                )
            if not done:
                raise ValueError(f"{self.path} holds step {self.latest()} already")
        except Exception:
            self._saving = None
            self._sweep(step)
            raise

    def failed(self) -> tuple[int, Exception] | None:
        """(step, error) of a save that failed, each told once, None if none did; does not wait."""
        if self._saving and not self._manager.is_saving_in_progress():
            self._settle()
        return self._failed.pop(0) if self._failed else None

    def wait(self) -> None:
        """Until all saves are on disk; raises what went wrong with the one on its way."""
        good = self._settle()
        if self._sealing:
            self._sealing.result()
        if not good:
            raise self._failed.pop()[1]

    def close(self) -> None:
        """Wait, then let go of threads. An error of the last save stays for `failed` to tell."""
        self._settle()
        self._manager.close()
        self._thread.shutdown()
        logging.getLogger("absl").removeFilter(_raised_anyhow)

    def _before_commit(self) -> None:
        """Write the manifest into the folder that is about to become a checkpoint.

        Soon after, orbax deletes the oldest, which must not be while that is being sealed.
        """
        if self._sealing:
            self._sealing.result()
        step, config, tokenizer = self._saving
        (folder,) = self._parts(step)
        manifest.write(folder, step, config, tokenizer)

    def _settle(self) -> bool:
        """Wait for the save on its way; keep its error, or seal its manifest. False: an error."""
        if self._saving is None:
            return True
        step, *_ = self._saving
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed.append((step, error))
            self._sweep(step)
            return False
        else:
            if jax.process_index() == 0:
                self._sealing = self._thread.submit(self._seal, self.path / str(step))
            return True
        finally:
            self._saving = None

    @staticmethod
    def _seal(folder: Path) -> None:
        # Without room for it the checkpoint is good, and verified without two files.
        with contextlib.suppress(OSError):
            manifest.seal(folder)

    def _sweep(self, step: int) -> None:
        """After a save that failed: give its room back, and find what orbax did not delete."""
        with contextlib.suppress(Exception):
            self._manager.check_for_errors()  # else the next save raises a second error of this one
        if jax.process_index() == 0:
            for part in self._parts(step):
                shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError):
            self._manager.reload()

    def _parts(self, step: int) -> list[Path]:
        """Folders of the step that are no checkpoint yet."""
        return list(self.path.glob(f"{step}{PART}*"))


@dataclass(frozen=True)
class Lazy:
    """An array whose values are made when they are written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int | None], np.ndarray]  # one layer of a stacked array, or all of another
    stacked: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the first dim in a chunk: of layers, or as many as CHUNK holds."""
        row = self.size // self.shape[0] * self.dtype.itemsize
        return min(max((LAYERS if self.stacked else CHUNK) // row, 1), self.shape[0])

    def parts(self) -> Iterator[np.ndarray]:
        """The values, `rows` of the first dim at a time."""
        whole = None if self.stacked else self.read(None)
        for start in range(0, self.shape[0], self.rows):
            stop = min(start + self.rows, self.shape[0])
            if whole is None:
                layers = [self.read(i) for i in range(start, stop)]
                yield np.stack(layers) if len(layers) > 1 else layers[0][None]
            else:
                yield whole[start:stop]

    def __deepcopy__(self, _: dict) -> "Lazy":
        return self  # orbax copies what it is given, lest it change


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes one Lazy after the other, a chunk at a time.

    After an error it goes on without values: orbax would print it, and leave threads that write.
    """

    def __init__(self):
        super().__init__()
        self.error: BaseException | None = None
        self._turn = asyncio.Lock()

    async def _open_and_write(self, value: Lazy, spec: dict, context: tensorstore.Context) -> None:
        spec["metadata"]["chunks"] = [value.rows, *value.shape[1:]]
        async with self._turn:
            try:
                array = await tensorstore.open(spec, create=True, open=True, context=context)
                at = 0
                for part in value.parts() if self.error is None else ():
                    if self.error is not None:
                        break
                    await array[at : at + len(part)].write(part)
                    at += len(part)
            except Exception as error:
                self.error = self.error or error


def save_lazily(
    path: Path, step: int, arrays: Mapping[str, Lazy], run: dict, tokenizer: dict
) -> None:
    """A checkpoint in the folder `path`, in the memory of a layer or of one unstacked array.

    `Saved` reads it like those of a `Store`. After an error what lies there is no checkpoint, but
    may look like one; nothing is written any more.
    """
    lazy = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Lazy, lazy)
    )
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays)),
        run=ocp.args.JsonSave(run),
        tokenizer=ocp.args.JsonSave(tokenizer),
    )
    with ocp.Checkpointer(_handler(state)) as writer, ThreadPoolExecutor(1) as thread:
        saving = thread.submit(writer.save, path.absolute() / str(step), args=args)
        try:
            saving.result()
        except BaseException as error:  # Ctrl-C, which reaches this thread alone
            lazy.error = lazy.error or error
    if lazy.error is not None:
        raise lazy.error
    folder = path.absolute() / str(step)
    manifest.write(folder, step, _config(run), tokenizer)
    manifest.seal(folder)


def _compare(saved: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """ValueError unless both hold arrays of the same names and shapes."""
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name]:
            raise ValueError(
                f"the checkpoint's {name} has shape {saved[name]}, the run's {wanted[name]}"
            )
    for names, what in (
        (saved.keys() - wanted.keys(), "has"),
        (wanted.keys() - saved.keys(), "lacks"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"the checkpoint {what} {len(names)} arrays that the run "
                f"{'lacks' if what == 'has' else 'has'}: {first}; model or optimizer differ"
            )
