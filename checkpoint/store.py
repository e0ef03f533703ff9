"""Store: the checkpoints of a run, each a folder DIR/checkpoints/STEP.

A checkpoint holds the arrays of the state, each under its dotted path, and as JSON what else a run
needs to go on: the resolved run, the position in the data, the tokenizer.
"""

import math
import re
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


def latest(path: Path) -> int | None:
    """The newest step saved in the folder `path`, which need not exist."""
    return max(ocp.utils.checkpoint_steps(path), default=None) if path.is_dir() else None


def locate(name: str) -> tuple[Path, int | None]:
    """The checkpoints folder and the step (None: the newest) that `DIR[@STEP]` names.

    DIR is a run's folder or its checkpoints folder. FileNotFoundError if it holds no checkpoint.
    """
    name, at, step = name.partition("@")
    if at and not step.isdecimal():
        raise ValueError(f"--restore={name}@{step}: {step!r} is no step; {name}@1000, say")
    found = Path(name).expanduser()
    found = found / "checkpoints" if (found / "checkpoints").is_dir() else found
    if latest(found) is None:
        raise FileNotFoundError(f"--restore={name}: there is no checkpoint")
    return found, int(step) if step else None


class Store:
    """Saves beside the computation, restores onto any mesh, keeps the newest."""

    def __init__(self, path: Path, *, keep: int = 2, keep_every: int = 0, read_only: bool = False):
        """`keep`: newest checkpoints that stay; `keep_every`: steps that stay for ever, 0: none."""
        self.path = Path(path).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.path, options=options, item_names=("state", "run", "tokenizer")
        )

    def latest(self) -> int | None:
        """The newest step saved."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, run: dict, tokenizer: dict) -> None:
        """Save `state`, a tree of arrays; returns once they are copied and writes beside the run.

        An array that leads with the layers is written one layer a chunk, so that reading a layer
        takes the memory of a layer. An error of an earlier save surfaces here.
        """
        arrays = flatten(state)

        def chunks(name: str, array: jax.Array) -> ocp.SaveArgs:
            if not STACKED.search(name) or array.ndim < 2:
                return ocp.SaveArgs()
            shard = array.sharding.shard_shape(array.shape)
            layer = max(1, jax.numpy.dtype(array.dtype).itemsize * math.prod(shard[1:]))
            return ocp.SaveArgs(chunk_byte_size=layer, shard_axes=(0,))

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

    def describe(self, step: int | None = None) -> tuple[int, dict, dict]:
        """(step, run, tokenizer) of a checkpoint, without its arrays."""
        step = self._step(step)
        items = ocp.args.Composite(run=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return step, found["run"], found["tokenizer"]

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state, shaped and placed as `abstract`, whatever mesh it was saved on.

        ValueError, naming the array and both shapes, if it was saved from another model or
        optimizer.
        """
        step = self._step(step)
        wanted = flatten(abstract)
        metadata = self._manager.item_metadata(step)["state"]
        saved = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
        _compare(saved, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
        args = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        found = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])

    def wait(self) -> None:
        """Until all saves are on disk; raises what went wrong with them."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, then let go of threads."""
        self._manager.close()

    def _step(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"{self.path} holds no checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.path} holds no step {step}, but {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step


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
