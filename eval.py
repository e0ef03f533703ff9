"""Score a checkpoint: perplexity, multiple choice, answers, programs, lm-evaluation-harness.

The checkpoint is one of ours, a Hugging Face directory or a GGUF file. --tasks lists KIND:WHAT:

  perplexity:SOURCE       text files, JSONL, or whatever training reads: nats, bits per byte
  choice:FILE.jsonl       {"question", "choices", "answer"} by log-likelihood
  generation:FILE.jsonl   {"prompt", "answer"}, or programs {"prompt", "test", "entry_point"}
  classify:FILE.jsonl     {"text", "label"}, of a classifier
  lm_eval:NAME            a task of lm-evaluation-harness, of pip install 'meshlm[eval]'
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoint.pretrained import Pretrained, open_pretrained
from configs import command, load
from configs.run import Run, check
from data.config import DataConfig
from evals import results
from evals.scorer import Scorer
from evals.task import Result, Settings, Task, digest
from evals.tasks import open_task
from inference.decode import Model
from model import transformer
from model.config import DTYPES, ModelConfig
from monitor import metrics
from monitor.append import AppendFile
from monitor.events import Events
from monitor.signals import Signals
from sharding import mesh as meshes
from sharding import runtime
from sharding.layout import SERVING, Layout
from sharding.mesh import MeshConfig
from text import cache

POLL_S = 0.5  # between looks for a new checkpoint
DELETED_S = 5.0  # within which a checkpoint that cannot be read turns out to be deleted

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "checkpoint", None, "DIR[@STEP] of ours, a Hugging Face directory, a .gguf", flag_values=FLAGS
)
flags.DEFINE_list("tasks", None, "What to score it on: KIND:WHAT,...", flag_values=FLAGS)
flags.DEFINE_string(
    "output", None, "results.json to write; with --watch a folder", flag_values=FLAGS
)
flags.DEFINE_string(
    "watch", None, "Score every new checkpoint of the run in this folder", flag_values=FLAGS
)
flags.DEFINE_float(
    "idle", 0, "With --watch: end after so many seconds without a new one", flag_values=FLAGS
)
flags.DEFINE_integer("batch", 8, "Rows at one time, over all devices", flag_values=FLAGS)
flags.DEFINE_string(
    "dtype", None, f"Of the computation: {', '.join(DTYPES)}; default as stored, float32 on CPU",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "dequantize", False, "Compute with weights of 8 and 4 bits as numbers of --dtype",
    flag_values=FLAGS,
)  # fmt: skip
for axis in SERVING:
    size = getattr(MeshConfig(), axis)
    flags.DEFINE_integer(f"mesh.{axis}", size, "Devices along this axis", flag_values=FLAGS)
HELP = {
    "limit": "The first documents, questions or prompts of each task only; 0: all",
    "seq": "Tokens that the model sees at one time; 0: 2048, or what it learned",
    "stride": "Of perplexity: tokens between windows; 0: seq / 2",
    "field": "Of perplexity: the field of JSONL and Parquet rows",
    "held_out": "Of perplexity: only this share, as training holds it out",
    "delimiter": "Of choice: what stands between question and choice",
    "max_tokens": "Of an answer",
    "temperature": "Of answers; 0: greedy",
    "top_p": "Of answers",
    "chat": "Put prompts as the checkpoint's chat template does",
    "samples": "Answers to each prompt, for pass@k",
    "stop": "A text that ends an answer; may be repeated",
    "seed": "Of answers",
    "timeout": "Seconds that a program may take",
    "memory": "MiB that a program may take",
    "allow_code_execution": "Run the programs that the model writes",
}
DEFINE = {
    int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean, tuple: flags.DEFINE_multi_string,
}  # fmt: skip
for name, default in vars(Settings()).items():
    given = None if default == () else default
    DEFINE[type(default)](name, given, HELP[name], flag_values=FLAGS)


def settings() -> Settings:
    """What the flags say of the tasks."""
    values = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    return Settings(**{**values, "stop": tuple(values["stop"] or ())})


def config_of(source: Pretrained, mesh: MeshConfig) -> ModelConfig:
    """The model's config as it will run. ValueError if it does not divide over the mesh."""
    dtype = FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else source.cfg.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} is none of {', '.join(DTYPES)}")
    cfg = dataclasses.replace(source.cfg, dtype=dtype, param_dtype=dtype)
    rows = DataConfig(batch=jax.device_count())  # the batch is rounded up to what divides
    check(Run(model=cfg, data=rows, mesh=mesh), jax.device_count())
    return cfg


class Subject:
    """What is scored: a checkpoint on the mesh in use, and those of its run that follow it."""

    def __init__(self, source: Pretrained, cfg: ModelConfig, bar: "Bar"):
        layout = Layout()
        graph, self.shapes, _ = transformer.abstract(cfg, layout)
        words = source.tokenizer
        vocab = min(words.size, cfg.vocab)
        model = Model(graph, cfg, layout, vocab, jax.sharding.get_mesh())
        # A document of the text that a model was trained on here begins with the end of another.
        prefix = (words.end,) if source.family is None else ()
        params = self.read(source)
        self.scorer = Scorer(model, params, words, batch=FLAGS.batch, prefix=prefix, each=bar)
        self.source, self.bar = source, bar

    def read(self, source: Pretrained) -> Any:
        """The values of a checkpoint, on the mesh in use."""
        return source.params(self.shapes if FLAGS.dequantize else source.compressed(self.shapes))

    def follow(self, source: Pretrained) -> None:
        """Take the values of another checkpoint of the same model."""
        self.scorer.params = None  # make room first
        self.scorer.params = self.read(source)
        self.source = source

    def describe(self) -> dict[str, Any]:
        """The part of results.json that is not about tasks."""
        model, words = self.scorer.model, self.scorer.tokenizer
        return {
            "model": {
                "name": self.source.name,
                "digest": self.source.digest,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.shapes)),
                "dtype": model.cfg.dtype,
            },
            "tokenizer": {"digest": words.digest, "size": words.size},
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "mesh": {axis: n for axis, n in model.mesh.shape.items() if n > 1},
            "batch": self.scorer.batch,
        }

    def score(self, tasks: Sequence[Task]) -> list[Result]:
        """The result of each task, with the time that it took."""
        found = []
        for task in tasks:
            self.bar.begin(task.name)
            started = time.perf_counter()
            result = task.run(self.scorer)
            seconds = round(time.perf_counter() - started, 3)
            found.append(dataclasses.replace(result, seconds=seconds))
        return found


class Bar:
    """Progress on a terminal, and the place where a signal ends the work."""

    def __init__(self, console: Console, signals: Signals):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.signals, self.task = signals, self.bar.add_task("rows")

    def __call__(self, done: int, rows: int) -> None:
        self.bar.update(self.task, completed=done, total=rows)
        self.check()

    def begin(self, task: str) -> None:
        """Name what comes."""
        self.bar.update(self.task, description=task)

    def check(self) -> None:
        """End the command if a signal asked for it."""
        if self.signals.received:
            raise command.Stopped(self.signals.received)


def once(tasks: Sequence[Task], console: Console, signals: Signals) -> None:
    """Score --checkpoint."""
    output = Path(FLAGS.output or "results.json").expanduser()
    with command.user_input():
        if output.is_dir():
            raise ValueError(f"--output={output} is a folder; write {output / 'results.json'}")
        output.parent.mkdir(parents=True, exist_ok=True)
        source = open_pretrained(FLAGS.checkpoint)
        mesh = mesh_config()
        cfg = config_of(source, mesh)
    bar = Bar(console, signals)
    with jax.set_mesh(meshes.make(mesh)), bar.bar:
        with command.user_input():
            subject = Subject(source, cfg, bar)
            for task in tasks:
                task.prepare(subject.scorer)
        found = subject.score(tasks)
    results.show(console, found)
    with command.user_input():
        results.write(output, results.to_json(subject.describe(), found))
    console.print(f"{output}", highlight=False, soft_wrap=True)


def mesh_config() -> MeshConfig:
    """What the flags say of the mesh."""
    try:
        return MeshConfig(**{axis: FLAGS[f"mesh.{axis}"].value for axis in SERVING})
    except ValueError as error:
        raise ValueError(f"mesh: {error}") from None


class Journal:
    """What was found of each checkpoint of a run, in `folder`: evals.jsonl and tensorboard/.

    A row is one checkpoint. Rows of other tasks or settings stay, but do not count as done.
    """

    def __init__(self, folder: Path, tasks: str):
        folder.mkdir(parents=True, exist_ok=True)
        rows = metrics.read(folder / "evals.jsonl")
        self.done = {row["step"] for row in rows if row.get("tasks") == tasks}
        self._tasks = tasks
        self._lines = AppendFile(folder / "evals.jsonl")
        # A kill between point and row leaves a point that this makes void.
        last = max((row["step"] for row in rows), default=-1)
        self._events = Events(folder / "tensorboard", last + 1)

    def add(self, step: int, model: dict[str, Any], found: Sequence[Result]) -> None:
        """Write what was found of the checkpoint of `step`."""
        values = dict(results.flat(found))
        self._events.scalars(step, {f"eval/{name}": value for name, value in values.items()})
        seconds = sum(result.seconds for result in found)
        row = {"step": step, "tasks": self._tasks, "digest": model["digest"], "seconds": seconds}
        self._lines.write(metrics.encode({**row, **values}))
        self.done.add(step)

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def watch(tasks: Sequence[Task], console: Console, signals: Signals) -> None:
    """Score every checkpoint of --watch once, as they come, until the run is done."""
    folder = Path(FLAGS.watch).expanduser()
    with command.user_input():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json: no run has begun there")
        asked = {"tasks": [task.name for task in tasks], **dataclasses.asdict(settings())}
        output = Path(FLAGS.output or folder / "evals").expanduser()
        journal = Journal(output, digest(b"", asked))
        mesh = mesh_config()
        made = meshes.make(mesh)
    bar, subject, lost, since = Bar(console, signals), None, set(), time.monotonic()
    with contextlib.closing(journal), jax.set_mesh(made), bar.bar:
        while True:
            bar.check()
            steps = saved(folder)
            left = [step for step in steps if step not in journal.done | lost]
            if not left:
                with command.user_input():
                    last = load.load(str(folder / "config.json")).steps
                if steps and steps[-1] >= last:
                    console.print(f"step {last} was the last: done", highlight=False)
                    return
                if FLAGS.idle and time.monotonic() - since > FLAGS.idle:
                    console.print(f"nothing came for {FLAGS.idle:g} s: done", highlight=False)
                    return
                time.sleep(POLL_S)
                continue
            step = left[0]
            try:
                with command.user_input():
                    subject = next_subject(subject, f"{folder}@{step}", tasks, mesh, bar)
            except command.UserError:
                if not deleted(folder, step):
                    raise
                lost.add(step)
                console.print(f"step {step} was deleted before it was read", highlight=False)
                continue
            found = subject.score(tasks)
            journal.add(step, subject.describe()["model"], found)
            told = ", ".join(f"{name} {value:.4f}" for name, value in results.flat(found))
            console.print(f"step {step}: {told}", highlight=False, markup=False, soft_wrap=True)
            since = time.monotonic()


def next_subject(
    subject: Subject | None, name: str, tasks: Sequence[Task], mesh: MeshConfig, bar: Bar
) -> Subject:
    """The checkpoint `name` in the place of the one before it, or the first one."""
    source = open_pretrained(name)
    if subject is not None:
        subject.follow(source)
        return subject
    subject = Subject(source, config_of(source, mesh), bar)
    for task in tasks:
        task.prepare(subject.scorer)
    return subject


def saved(folder: Path) -> list[int]:
    """The steps that a run has saved; a checkpoint gets its name once it is whole."""
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def deleted(folder: Path, step: int) -> bool:
    """Whether a checkpoint is gone, or soon will be."""
    end = time.monotonic() + DELETED_S
    while time.monotonic() < end:
        if step not in saved(folder):
            return True
        time.sleep(POLL_S)
    return False


def main() -> None:
    """The command."""
    runtime.prepare()
    with command.user_input():
        if bool(FLAGS.checkpoint) == bool(FLAGS.watch):
            raise ValueError("give either --checkpoint=PATH or --watch=DIR")
        if FLAGS.batch < 1:
            raise ValueError(f"--batch={FLAGS.batch} must be at least 1")
        if not FLAGS.idle >= 0:
            raise ValueError(f"--idle={FLAGS.idle:g} must be at least 0; 0 waits for ever")
        if not FLAGS.tasks:
            raise ValueError("--tasks=KIND:WHAT,... is needed, such as perplexity:book.txt")
        if len(set(FLAGS.tasks)) < len(FLAGS.tasks):
            raise ValueError(f"--tasks={','.join(FLAGS.tasks)} names a task twice")
        chosen = settings()
        tasks = [open_task(name, chosen) for name in FLAGS.tasks]
    console = Console()
    with Signals() as signals:
        (watch if FLAGS.watch else once)(tasks, console, signals)


if __name__ == "__main__":
    runtime.keep_programs(cache.folder() / "programs")
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            examples=(
                "--checkpoint=runs/mine --tasks=perplexity:book.txt,choice:questions.jsonl",
                "--checkpoint=model.Q4_K_M.gguf --tasks=perplexity:stdlib --limit=20 --seq=1024",
                "--checkpoint=SmolLM2-135M --tasks=generation:HumanEval.jsonl.gz "
                "--samples=10 --temperature=0.8 --allow_code_execution",
                "--watch=runs/mine --tasks=perplexity:book.txt --idle=600",
            ),
            values=FLAGS,
        )
    )
