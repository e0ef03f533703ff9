"""A tiny run: its recipe, its corpus, and `train.py` called in this process."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from absl.testing import flagsaver

import train
from configs import command
from configs.load import ROOT
from costs import devices
from data.loader import Loader
from monitor import metrics
from sharding.cluster import join
from tests.commands import python_path
from tests.kept import kept_programs
from training import text

RECIPE = '''"""A run of seconds."""

from configs.run import CheckpointConfig, EvalConfig, LogConfig, Run, SampleConfig
from data.config import DataConfig
from model.config import Arch, ModelConfig
from optim.config import OptimConfig
from sharding.mesh import MeshConfig


def get_config() -> Run:
    return Run(
        steps=12,
        model=ModelConfig(
            layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, dtype="float32",
            arch=Arch(activation="relu2"),
        ),
        data=DataConfig(sources=({corpus!r},), held_out=0.1, batch=8, seq=32),
        optim=OptimConfig(lr=0.01, warmup=3),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        log=LogConfig(every=2),
        eval=EvalConfig(every=6, bytes=500),
        checkpoint=CheckpointConfig(every=4, keep=9),
        sample=SampleConfig(prompt="A", tokens=6),
    )
'''


PATIENCE = 240  # seconds for what takes ten on a machine that does nothing else
NO_SAMPLE = "--config.sample.tokens=0"  # whose programs take long to make


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The path of the tiny recipe, which reads a corpus beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    draw, corpus = random.Random(0), folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        words = (draw.choice(("alpha", "beta", "gamma\n")) for _ in range(draw.randint(1, 60)))
        (corpus / f"{i:02}.txt").write_text(f"{i} {' '.join(words)}")
    path = folder / "tiny.py"
    path.write_text(RECIPE.replace("{corpus!r}", repr(str(corpus))))
    return path


class Recorded(Loader):
    """A loader that notes the samples of its batches, and calls `at[number of the batch]`."""

    batches: list = []  # noqa: RUF012
    at: dict = {}  # noqa: RUF012

    def __next__(self):
        batch = super().__next__()
        self.batches.append(batch)
        self.at.get(len(self.batches), lambda: None)()
        return batch


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str
    batches: list  # all that the loader gave
    workdir: Path

    def rows(self, kind: str = "loss") -> dict[int, dict]:
        """Rows of metrics.jsonl by step: "loss" or "eval_loss"."""
        found = metrics.read(self.workdir / "metrics.jsonl")
        return {row["step"]: row for row in found if kind in row}

    def losses(self) -> dict[int, float]:
        return {step: row["loss"] for step, row in self.rows().items()}

    def samples(self) -> list:
        return [sample for batch in self.batches for row in batch.samples for sample in row]

    def state(self, step: int) -> dict[str, bytes]:
        """The arrays of a checkpoint, as they were saved."""
        return raw_state(self.workdir / "checkpoints" / str(step))

    def steps_saved(self) -> list[int]:
        found = (self.workdir / "checkpoints").iterdir()
        return sorted(int(folder.name) for folder in found if folder.name.isdecimal())


def raw_state(folder: Path) -> dict[str, bytes]:
    """The arrays of a checkpoint folder by name, read without this project's code."""
    import tensorstore

    tree = json.loads((folder / "state" / "_METADATA").read_text())["tree_metadata"]
    found = {}
    for entry in tree.values():
        name = ".".join(key["key"] for key in entry["key_metadata"])
        kvstore = {"driver": "ocdbt", "base": f"file://{folder}/state/", "path": f"{name}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
        found[name] = array.read().result().tobytes()
    return found


@pytest.fixture(scope="session")
def session_command(recipe, compiled):
    """`call(workdir, *args)` runs train.py in this process; `at`: {batch number: call}."""

    def call(workdir: Path, *args: str, at: dict | None = None, config: Path = recipe) -> Ended:
        out, err = Stream(), Stream()
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(join, "detected", lambda: None)  # wherever the tests run
            patch.setattr(devices, "measured_matmul_rate", lambda *_: 1e11)
            patch.setattr(text, "Loader", Recorded)
            patch.setattr(Recorded, "batches", [])
            patch.setattr(Recorded, "at", at or {})
            stack.enter_context(flagsaver.flagsaver())
            stack.enter_context(kept_programs(compiled))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            flags = [f"--config={config}", f"--workdir={workdir}", *args]
            code = command.status(train.train, flags, recipe=str(recipe))
            return Ended(code, out.text(), err.text(), Recorded.batches, Path(workdir))

    return call


class Stream:
    """Keeps what is printed."""

    encoding = "utf-8"
    closed = False

    def __init__(self):
        self.parts = []

    def write(self, text):
        self.parts.append(text)

    def flush(self):
        pass

    def isatty(self):
        return False

    def text(self):
        return "".join(self.parts)


@pytest.fixture
def command_line(session_command, tmp_path):
    """`call(*args, workdir=...)`; default a folder of the test's own."""

    def call(*args: str, workdir: Path = tmp_path / "run", **kwargs) -> Ended:
        return session_command(workdir, *args, **kwargs)

    return call


@pytest.fixture(scope="session")
def finished(session_command, tmp_path_factory):
    """The tiny run, undisturbed, on 8 devices. Read it; copy it to change it."""
    ended = session_command(tmp_path_factory.mktemp("finished") / "run")
    assert ended.code == 0, ended.err
    return ended


DRIVER = '''
"""train.py whose loader notes its samples in a file, and does harm at the batches it is told."""

import json
import os
import shutil
import signal
import threading
import time

import train
from configs import command
from data.loader import Loader
from training import text


class Noted(Loader):
    count = 0

    def __next__(self):
        batch = super().__next__()
        Noted.count += 1
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps(batch.samples) + "\\n")
        if os.environ.get("SIGNAL_AT") == str(Noted.count):
            os.kill(os.getpid(), signal.SIGTERM)
        if os.environ.get("HANG_AT") == str(Noted.count):
            threading.Event().wait()
        if os.environ.get("FAIL_AT") == str(Noted.count):
            raise RuntimeError("a fault of this process alone")
        if os.environ.get("NO_ROOM_AT") == str(Noted.count):
            shutil.disk_usage = lambda _: (0, 0, 0)
        if os.environ.get("SPOIL_AT") == str(Noted.count):
            folder = train.WORKDIR.value + "/checkpoints"
            os.rename(folder, folder + "-moved")
            open(folder, "w").close()
        return batch

    def __exit__(self, *error):
        time.sleep(float(os.environ.get("LINGER", "0")))
        super().__exit__(*error)


if __name__ == "__main__":
    text.Loader = Noted
    command.run(train.train, recipe="configs/quickstart.py")
'''


class Process(subprocess.Popen):
    """A command in a process of its own, which does not outlive the test."""

    def __init__(self, args: Sequence[str], notes: Path, env: dict[str, str]):
        self.notes = notes
        super().__init__(
            [sys.executable, *args], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        try:
            out, err = self.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.communicate()
            pytest.fail(f"still running after {timeout} s\n{out}\n{err}")
        return self.returncode, out, err

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> None:
        """Read stdout up to a line that begins so."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        found = any(re.match(pattern, line) for line in self.stdout)
        late.cancel()
        if not found:
            pytest.fail(f"no line began with {pattern!r}\n{self.communicate()}")

    def samples(self) -> list:
        """By batch and row, what the loader gave."""
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


@contextlib.contextmanager
def starting(recipe, compiled, tmp_path) -> Iterator[Callable[..., Process]]:
    """`start(workdir, *args, **environment)`: train.py in a process with one CPU device."""
    folder, values = compiled
    driver, running = tmp_path / "driver.py", []
    driver.write_text(DRIVER)

    def start(workdir: Path, *args: str, **environment: str) -> Process:
        notes = tmp_path / f"notes{len(running)}"
        env = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            **{name.upper(): str(value) for name, value in values.items()},
            "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": python_path(),
            "NOTES": str(notes), "PYTHONUNBUFFERED": "1", **environment,
        }  # fmt: skip
        flags = [f"--config={recipe}", f"--workdir={workdir}", *args]
        running.append(Process([str(driver), *flags], notes, env))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def start(recipe, compiled, tmp_path):
    """`starting` with notes in the test's own folder."""
    with starting(recipe, compiled, tmp_path) as start:
        yield start


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def several(start, tmp_path):
    """`several(count, *args, each=({...}, ...))`: processes of one run in the folder `run`, and
    each one's environment, with arguments of its own as `args`."""

    def several(count: int, *args: str, each: Sequence[dict] = ()) -> list[Process]:
        at = (*args, f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}")
        started = []
        for k in range(count):
            environment = dict(each[k]) if k < len(each) else {}
            own = environment.pop("args", ())
            started.append(start(tmp_path / "run", *at, f"--process={k}", *own, **environment))
        return started

    return several
