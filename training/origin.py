"""Origin: where the state of a run comes from.

The run's own last save, another run's, the weights of a published model, or nowhere. A save that is
damaged is never begun from: a run goes on from the newest good one.
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoint import store
from checkpoint.pretrained import Ours, Pretrained, is_ours, open_pretrained
from configs import load
from configs.run import Run, differences, from_json
from data.loader import Loader
from sharding import mesh as meshes
from sharding import offload, runtime
from text import tokenizer as tokenizers


def resolve(run: Run, workdir: Path, restore: str | None) -> tuple[Run, Pretrained | None]:
    """The run, and the weights that it begins with if `restore` is not the checkpoint of a run:
    a Hugging Face directory, a GGUF file, what tools.convert wrote. They bring model and tokenizer.

    ValueError if `workdir` holds a run that this command does not go on with.
    """
    weights = _open(restore) if restore else None
    if isinstance(weights, Ours) and weights.trained:
        weights = None  # more than weights: the state of a run
    if weights:
        run = _of(run, weights)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is no folder; take another")
    held = workdir / "config.json"
    if held.is_file():
        refuse_another(run, workdir, load.load(str(held)))
    elif os.path.lexists(held):
        raise ValueError(f"{held} must be a file, which tells whose the folder is; it is none")
    return run, weights


def refuse_another(run: Run, workdir: Path, held: Run) -> None:
    """ValueError if the run that `workdir` holds differs from `run` in what may not change."""
    differ = differences(held, run)
    if differ:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(differ)}. Take another --workdir, "
            f"and --restore={workdir} to start from its state"
        )


@dataclass(frozen=True)
class Origin:
    """Where the state of a run comes from.

    At most one of `saved`, a whole state, and `weights`, which begin at step 0, is there.
    """

    saved: store.Saved | None = None  # verified
    weights: Pretrained | None = None
    note: dict = field(default_factory=dict)  # what `Loop.save` noted beside the arrays
    own: bool = False  # the run's own save
    told: str = ""  # what the verification read
    older: tuple[store.Saved, ...] = ()  # to fall back on, newest first
    bad: tuple[tuple[store.Saved, str], ...] = ()  # that are newer, and what is wrong with them

    @property
    def step(self) -> int:
        """Steps done."""
        return self.saved.step if self.saved else 0

    @property
    def name(self) -> str:
        """DIR@STEP of another run, or the published model, that the run begins with, or ""."""
        if self.own or not (self.saved or self.weights):
            return ""
        return f"{self.saved.path}@{self.step}" if self.saved else self.weights.name

    @classmethod
    def find(
        cls, run: Run, workdir: Path, restore: str | None, weights: Pretrained | None
    ) -> "Origin":
        """The newest good save of the run in `workdir`, or else `weights`, or what `restore` names.

        Each bad one that is passed over is told. ValueError if none is good, or the good one does
        not fit the run.
        """
        try:
            own, found = True, store.Saved.all(workdir / "checkpoints")
        except FileNotFoundError:
            if restore is None or weights:
                return cls(weights=weights)
            own, found = False, store.candidates(restore)
        for saved in found if own else ():
            if saved.folder.is_symlink():
                raise ValueError(
                    f"{saved.folder} is a link, and a run deletes its old saves: move it out of "
                    f"{saved.path}; --restore={saved.folder.resolve().parent}@{saved.step} in "
                    f"another --workdir begins with it"
                )
        made = cls(own=own, older=tuple(found))._next()
        if own:  # its config.json may be gone
            refuse_another(run, workdir, from_json(made.note["run"]))
        if made.step >= run.steps:
            raise ValueError(
                f"{made.saved.path} is at step {made.step} of steps={run.steps}: nothing to do; "
                f"to go on, --config.steps={2 * made.step}, say"
            )
        before = made.note["run"]["data"]["tokenizer"]
        if before != run.data.tokenizer:
            raise ValueError(
                f"data.tokenizer={run.data.tokenizer!r}, but the ids of {made.saved.path} are "
                f"those of {before!r}"
            )
        return made

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The one that the state was trained with."""
        if self.weights:
            return self.weights.tokenizer
        return self.saved and tokenizers.from_json(json.dumps(self.saved.json("tokenizer")))

    def restore(self, program: Any, loader: Loader) -> tuple["Origin", Any]:
        """The state of a train.Program on the mesh in use, and where it comes from after all: an
        older save, if the arrays are bad. The loader goes on if its data is the same.

        Bad saves of the run itself are set aside, under names that the run does not use.
        """
        if self.weights:
            if meshes.is_main():
                print(f"weights    {self.weights.name}, with a fresh optimizer")
            return self, program.begin(self.weights.params(program.state.params))
        if self.saved is None:
            return self, program.fresh()
        why, state = "", None
        try:
            state = self.saved.restore(program.state)
        except ValueError as error:
            if not self.own:  # of another model, which the user can mend
                raise
            why = str(error)
        if meshes.agree(int(bool(why))):
            del state
            return self._without(why or self._elsewhere(self.saved)).restore(program, loader)
        broken = not_finite(state)
        if broken:
            del state
            folder = self.saved.folder
            return self._without(f"{folder}: {broken}").restore(program, loader)
        before = from_json(self.note["run"])
        same = (before.data, before.seed) == (program.run.data, program.run.seed)
        if same:
            loader.restore(self.note["data"])
        if meshes.is_main():
            for saved, _ in self.bad if self.own else ():
                print(f"set aside  {saved.set_aside()}: nothing reads or deletes it")
            place = "the data goes on" if same else "the data begins anew: data or seed differ"
            print(f"restored   step {self.step} of {self.saved.path.parent}; {place}; {self.told}")
        meshes.agree(0)  # all go on when the folders have their names
        return self, state

    def _without(self, why: str) -> "Origin":
        """The next older one that is good, this one being bad."""
        self._tell(self.saved, why)
        bad = (*self.bad, (self.saved, why))
        return dataclasses.replace(self, saved=None, bad=bad)._next()

    def _next(self) -> "Origin":
        """The newest of `older` that is as it was saved."""
        bad = list(self.bad)
        for i, saved in enumerate(self.older):
            why, note, start = "", {}, time.monotonic()
            try:
                size = saved.verify(jax.process_index(), jax.process_count())
                note = saved.json("run")
                if not isinstance(note, dict) or not {"run", "data"} <= note.keys():
                    raise ValueError(f"{saved.folder} holds no run, but parameters alone")
            except (ValueError, OSError) as error:
                why = str(error)
            if not meshes.agree(int(bool(why))):
                took = time.monotonic() - start
                told = f"verified {size * jax.process_count() / 1e6:,.0f} MB in {took:.1f} s"
                older = self.older[i + 1 :]
                return dataclasses.replace(
                    self, saved=saved, note=note, told=told, older=older, bad=tuple(bad)
                )
            why = why or self._elsewhere(saved)
            bad.append((saved, why))
            if len(self.older) + len(self.bad) > 1:
                self._tell(saved, why)
        whys = "; ".join(why for _, why in bad)
        path, asked = bad[0][0].path, bad[0][0].step
        others = sorted(one.step for one in store.Saved.all(path) if one.step != asked)
        if len(bad) == 1 and others:  # DIR@STEP was given
            raise ValueError(f"{whys}; take another step: {', '.join(map(str, others))}")
        raise ValueError(
            f"{path} has no good step: {whys}. Nothing was deleted; to begin anew, take another "
            f"--workdir and no --restore of this one"
        )

    @staticmethod
    def _elsewhere(saved: store.Saved) -> str:
        return f"{saved.folder}: another process found it damaged, and tells how"

    def _tell(self, saved: store.Saved, why: str) -> None:
        """One line of a bad save, by process 0 or by the one that knows more."""
        if meshes.is_main() or "another process" not in why:
            print(f"bad save   step {saved.step}: {' '.join(why.split())}", flush=True)


def not_finite(state: Any) -> str:
    """What is wrong with the numbers of a train.State, "" if nothing: a parameter that is not
    finite, a moment that is no number."""

    def count(tree: Any, good: Any) -> dict[str, jax.Array]:
        floats = {
            name: leaf
            for name, leaf in store.flatten(tree).items()
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }

        def bad(part: jax.Array) -> jax.Array:
            return jnp.sum(~good(offload.fetch(part)), dtype=jnp.int32)

        def stacked(name: str, leaf: Any) -> bool:
            """Whether layers lie in host memory, perhaps, and not each in its own stage."""
            return bool(store.STACKED.search(name)) and jax.typeof(leaf).sharding.spec[0] is None

        return {  # of stacked layers one at a time, lest all come from the host at once
            name: jnp.sum(jax.lax.map(bad, leaf)) if stacked(name, leaf) else bad(leaf)
            for name, leaf in floats.items()
        }

    def counts(params: Any, opt_state: Any) -> tuple[dict, dict]:
        return count(params, jnp.isfinite), count(opt_state, lambda leaf: ~jnp.isnan(leaf))

    bad = jax.jit(counts, compiler_options=runtime.once())(state.params, state.opt_state)
    for where, found in zip(("params", "opt_state"), jax.device_get(bad), strict=True):
        for name, number in found.items():
            if number:
                return f"{where}.{name} has {number:,} values that are NaN or infinite"
    return ""


def _open(restore: str) -> Pretrained:
    """The model that `restore` names: of our checkpoints the newest that can be opened."""
    found = store.candidates(restore) if is_ours(restore) else []
    for saved in found[:-1]:
        try:
            return open_pretrained(f"{saved.path}@{saved.step}")
        except ValueError:
            continue  # damaged: `find` tells
    return open_pretrained(f"{found[-1].path}@{found[-1].step}" if found[1:] else restore)


def _of(run: Run, weights: Pretrained) -> Run:
    """The run with the model of `weights`; how it is computed and trained stays the run's."""
    own, theirs = run.model, weights.cfg
    head = dataclasses.replace(
        theirs.arch.head, z_loss=own.arch.head.z_loss, chunk=own.arch.head.chunk
    )
    moe = dataclasses.replace(
        theirs.arch.moe, balance=own.arch.moe.balance, z_loss=own.arch.moe.z_loss
    )
    model = dataclasses.replace(
        theirs,
        dtype=own.dtype,
        param_dtype=own.param_dtype,
        remat=own.remat,
        unroll=own.unroll,
        precision=own.precision,
        arch=dataclasses.replace(theirs.arch, head=head, moe=moe),
    )
    data = dataclasses.replace(run.data, tokenizer=weights.name)
    return dataclasses.replace(run, model=model, data=data)
