"""Origin: where the state of a run comes from.

The run's own last save, another run's, the weights of a published model, or nowhere.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import store
from checkpoint.pretrained import Ours, Pretrained, open_pretrained
from configs import load
from configs.run import Run, differences, from_json
from data.loader import Loader
from sharding import mesh as meshes
from text import tokenizer as tokenizers


@dataclass(frozen=True)
class Origin:
    """Where the state of a run comes from.

    At most one of `saved`, a whole state, and `weights`, which begin at step 0, is there.
    """

    saved: store.Saved | None = None
    weights: Pretrained | None = None
    note: dict = field(default_factory=dict)  # what `Loop.save` noted beside the arrays
    own: bool = False  # the run's own last save

    @property
    def step(self) -> int:
        """Steps done."""
        return self.saved.step if self.saved else 0

    @classmethod
    def find(cls, run: Run, workdir: Path, restore: str | None) -> tuple[Run, "Origin"]:
        """The origin, and the run, which takes model and tokenizer from `restore` if that is not
        the checkpoint of a run: a Hugging Face directory, a GGUF file, what tools.convert wrote.

        ValueError if `workdir` holds a run that this command does not go on with.
        """
        weights = open_pretrained(restore) if restore else None
        if isinstance(weights, Ours) and weights.trained:
            weights = None  # more than weights: the state of a run
        if weights:
            run = _of(run, weights)
        if (workdir / "config.json").is_file():
            differ = differences(load.load(str(workdir / "config.json")), run)
            if differ:
                raise ValueError(
                    f"{workdir} holds another run: {'; '.join(differ)}. Take another --workdir, "
                    f"and --restore={workdir} to start from its state"
                )
        own = workdir / "checkpoints"
        try:
            saved = store.Saved.open(own)
        except FileNotFoundError:
            if restore is None or weights:
                return run, cls(weights=weights)
            saved = store.locate(restore)
        note = saved.json("run")
        if saved.step >= run.steps:
            raise ValueError(
                f"{saved.path} is at step {saved.step} of steps={run.steps}: nothing to do; "
                f"to go on, --config.steps={2 * saved.step}, say"
            )
        before = note["run"]["data"]["tokenizer"]
        if before != run.data.tokenizer:
            raise ValueError(
                f"data.tokenizer={run.data.tokenizer!r}, but the ids of {saved.path} are those "
                f"of {before!r}"
            )
        return run, cls(saved, note=note, own=saved.path == own.absolute())

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The one that the state was trained with."""
        if self.weights:
            return self.weights.tokenizer
        return self.saved and tokenizers.from_json(json.dumps(self.saved.json("tokenizer")))

    def restore(self, program: Any, loader: Loader) -> Any:
        """The state of a train.Program on the mesh in use; the loader goes on if its data is the
        same."""
        run = program.run
        if self.weights:
            if meshes.is_main():
                print(f"weights    {self.weights.name}, with a fresh optimizer")
            return program.begin(self.weights.params(program.state.params))
        if self.saved is None:
            return program.fresh()
        state = self.saved.restore(program.state)
        before = from_json(self.note["run"])
        same = (before.data, before.seed) == (run.data, run.seed)
        if same:
            loader.restore(self.note["data"])
        if meshes.is_main():
            place = "the data goes on" if same else "the data begins anew: data or seed differ"
            print(f"restored   step {self.step} of {self.saved.path.parent}; {place}")
        return state


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
        arch=dataclasses.replace(theirs.arch, head=head, moe=moe),
    )
    data = dataclasses.replace(run.data, tokenizer=weights.name)
    return dataclasses.replace(run, model=model, data=data)
