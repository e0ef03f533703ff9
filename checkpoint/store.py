"""Store: the checkpoints of a run, each a folder DIR/checkpoints/STEP.

A checkpoint holds the arrays of the state, each under its dotted path, and as JSON what else a run
needs to go on: the resolved run, the position in the data, the tokenizer.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

Arrays = dict[str, jax.Array]
STACKED = re.compile(r"(^|\.)blocks\.")  # arrays that lead with the layers


def flatten(tree: Any) -> Arrays:
    """The leaves of a tree by their dotted paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def locate(name: str) -> "Saved":
    """The checkpoint that `DIR[@STEP]` names, the newest without a step.

    DIR is a run's folder or its checkpoints folder. FileNotFoundError if it holds no checkpoint.
    """
    folder, at, step = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():  # a folder's own name may have an @
        folder, at, step = name, "", ""
    if at and not step.isdecimal():
        raise ValueError(f"{name}: {step!r} is no step; {folder}@1000, say")
    found = Path(folder).expanduser()
    if not found.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    found = found / "checkpoints" if (found / "checkpoints").is_dir() else found
    return Saved.open(found, int(step) if step else None)


@dataclass(frozen=True)
class Saved:
    """One checkpoint, to be read."""

    path: Path  # the checkpoints folder
    step: int

    @classmethod
    def open(cls, path: Path, step: int | None = None) -> "Saved":
        """The checkpoint of `step`, or the newest. FileNotFoundError if there is none."""
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} must be a folder of checkpoints")
        steps = sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []
        if not steps:
            raise FileNotFoundError(f"{path} holds no checkpoint")
        if step is not None and step not in steps:
            found = ", ".join(map(str, steps))
            raise FileNotFoundError(f"{path} holds no step {step}, but {found}")
        return cls(path.absolute(), steps[-1] if step is None else step)

    def json(self, item: str) -> dict:
        """What was saved as `item`: "run" or "tokenizer"."""
        file = self.path / str(self.step) / item / "metadata"
        return json.loads(file.read_text(encoding="utf-8"))

    def restore(self, abstract: Any) -> Any:
        """The state, shaped and placed as `abstract`, whatever mesh it was saved on.

        ValueError, naming the array and both shapes, if it was saved from another model or
        optimizer.
        """
        wanted = flatten(abstract)
        args = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        folder = self.path / str(self.step)
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(),
            run=ocp.JsonCheckpointHandler(),
            tokenizer=ocp.JsonCheckpointHandler(),
        )
        with ocp.Checkpointer(handler) as reader:
            tree = reader.metadata(folder).item_metadata["state"].tree
            saved = {name: tuple(leaf.shape) for name, leaf in tree.items()}
            _compare(saved, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
            found = reader.restore(folder, args=ocp.args.Composite(state=args))["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])


class Store:
    """Saves the checkpoints of a run beside its computation and keeps the newest."""

    def __init__(self, path: Path, *, keep: int = 2, keep_every: int = 0):
        """`keep`: newest checkpoints that stay; `keep_every`: steps that stay for ever, 0: none."""
        self.path = Path(path).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        # The first copy of an array writes all of it. Else each copy writes a part, which makes
        # chunks smaller than a layer, and cutting the parts compiles a program for each array.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "run": ocp.JsonCheckpointHandler(),
                "tokenizer": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest step saved."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, run: dict, tokenizer: dict) -> None:
        """Save `state`, a tree of arrays; returns once they are copied and writes beside the run.

        An array that leads with the layers is written one layer a chunk (1 MiB at least), so that
        reading a layer takes the memory of a layer. An error of an earlier save surfaces here.
        """
        arrays = flatten(state)

        def chunks(name: str, array: jax.Array) -> ocp.SaveArgs:
            if not STACKED.search(name) or array.ndim < 2:
                return ocp.SaveArgs()
            layer = math.prod(array.sharding.shard_shape(array.shape)[1:]) * array.dtype.itemsize
            return ocp.SaveArgs(chunk_byte_size=max(layer, 1 << 20), shard_axes=(0,))

        args = {name: chunks(name, array) for name, array in arrays.items()}
        with jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays, save_args=args),
                    run=ocp.args.JsonSave(run),
                    tokenizer=ocp.args.JsonSave(tokenizer),
                ),
            )

    def wait(self) -> None:
        """Until all saves are on disk; raises what went wrong with them."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, then let go of threads."""
        self._manager.close()


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
