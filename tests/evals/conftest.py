"""A run's folder with checkpoints, made without training, and eval.py called in this process."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

import eval as command_line
from checkpoint.store import Store
from configs import command, load
from configs.run import Run, to_json
from tests.evals.tiny import CFG, tiny_scorer
from tests.kept import keeps_programs  # noqa: F401
from text.tokenizer import Bytes

STEPS = 30  # of the run


@dataclass(frozen=True)
class Folder:
    """The folder of a run."""

    path: Path

    def begin(self, steps: int = STEPS) -> None:
        """What train.py writes first."""
        self.path.mkdir(parents=True, exist_ok=True)
        load.save(Run(name="tiny", steps=steps, model=CFG), self.path / "config.json")

    def save(self, *steps: int) -> None:
        """Checkpoints of these steps; each has parameters of its own."""
        store = Store(self.path / "checkpoints", keep=99)
        with contextlib.closing(store):
            for step in steps:
                params = jax.tree.map(lambda a, n=step: a * (1 + n / 100), tiny_scorer().params)
                note = {"run": to_json(Run(name="tiny", steps=STEPS, model=CFG)), "tokens": 0}
                store.save(step, {"params": params}, note, json.loads(Bytes().to_json()))
            store.wait()


@pytest.fixture
def run_folder(tmp_path):
    return Folder(tmp_path / "run")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of a model that was trained here. Read it only."""
    folder = Folder(tmp_path_factory.mktemp("checkpoint") / "run")
    folder.begin()
    folder.save(10)
    return folder.path


@pytest.fixture
def call():
    """`call(*args)` is the command line: (exit code, stdout, stderr)."""

    def call(*args):
        for name in command_line.FLAGS:
            command_line.FLAGS[name].unparse()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.status(command_line.main, list(args), values=command_line.FLAGS)
        return code, out.getvalue(), err.getvalue()

    return call
