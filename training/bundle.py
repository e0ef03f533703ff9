"""Bundle: a JSON file with all that repeats one step of a run; `python -m tools.replay` does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from configs.run import Run, from_json, to_json

FORMAT = "meshlm bundle 1"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A step that was not finite."""

    step: int
    why: str
    loss: str
    grad_norm: str
    first: str  # layer and tensor, as the second pass found
    samples: Any  # of the rows of process 0: source, epoch, document, first token
    seed: int
    run: Run
    devices: int
    checkpoints: str  # the folder of the run's saves
    state: int  # the newest of them before the step; 0: none, the run began by itself
    origin: str  # DIR@STEP of another run or a published model that the run began with, or ""
    jax: str = jax.__version__

    def write(self, folder: Path) -> Path:
        """The file in `folder`, which has the step's name."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.step}.json"
        plain = {"format": FORMAT, **vars(self), "run": to_json(self.run)}
        file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> "Bundle":
        """ValueError if it is none."""
        try:
            if not file.is_file() and file.exists():  # a pipe would never end
                raise ValueError("it is no file")
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            made = cls(**{**found, "run": from_json(found["run"])})
            kinds = {name: type(getattr(made, name)).__name__ for name in ("step", "state")}
            if set(kinds.values()) != {"int"}:
                raise ValueError(f"step and state must be integers: {kinds}")
            if not 0 <= made.state < made.step <= made.run.steps:
                raise ValueError(
                    f"state={made.state} and step={made.step} must be in order, from 0 to the "
                    f"run's steps={made.run.steps}"
                )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{file} is no bundle of a run: {error}") from None
        return made
