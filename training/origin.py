"""Origin: where the state of a run comes from.

The run's own last save, another run's, or nowhere.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import store
from configs import load
from configs.run import Run, differences, from_json
from data.loader import Loader
from sharding import mesh as meshes
from text import tokenizer as tokenizers


@dataclass(frozen=True)
class Origin:
    """Where the state of a run comes from: its own last save, another run's, or nowhere."""

    saved: store.Saved | None = None
    note: dict = field(default_factory=dict)  # what `Loop.save` noted beside the arrays
    own: bool = False  # the run's own last save

    @property
    def step(self) -> int:
        """Steps done."""
        return self.saved.step if self.saved else 0

    @classmethod
    def find(cls, run: Run, workdir: Path, restore: str | None) -> "Origin":
        """ValueError if `workdir` holds a run that this command does not go on with."""
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
            if restore is None:
                return cls()
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
        return cls(saved, note, own=saved.path == own.absolute())

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The one that the state was trained with."""
        return self.saved and tokenizers.from_json(json.dumps(self.saved.json("tokenizer")))

    def restore(self, program: Any, loader: Loader) -> Any:
        """The state of a train.Program on the mesh in use; the loader goes on if its data is the
        same."""
        run = program.run
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
