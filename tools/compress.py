"""Compress a trained model: `quantize` stores its weights in 8 or 4 bits, as a checkpoint of ours.

Any checkpoint comes in, and what comes out loads wherever one does. A receipt says what it costs:
bytes, perplexity of held-out text (of an encoder the cosine of its embeddings), error of each
layer, decode speed; receipt.json in the target holds it. docs/compress.md
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoint.convert import RECEIPT
from checkpoint.pretrained import Pretrained, open_pretrained
from compressors import texts
from compressors.compress import Recipe, bytes_of, check, compress
from compressors.quantize import METHODS, SCHEMES, USUAL
from configs import command
from evals.scorer import Row, Scorer
from inference.decode import Model
from inference.embedding import Embedder
from inference.engine import Engine
from model import transformer
from sharding import mesh as meshes
from sharding import runtime
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from text import cache

PROMPT, DECODED = 16, 64  # tokens, of the text whose decoding is timed
MOST_NATS = 700.0  # a token, of which a float holds the perplexity

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "checkpoint", None, "DIR[@STEP] of ours, a Hugging Face directory, a .gguf", flag_values=FLAGS
)
flags.DEFINE_string(
    "scheme", None, f"How weights are stored: {', '.join(SCHEMES)}", flag_values=FLAGS
)
flags.DEFINE_string(
    "method",
    None,
    f"How they are rounded: {', '.join(METHODS)}; by default "
    + ", ".join(f"{method} for {scheme}" for scheme, method in USUAL.items()),
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "calibration", None, "A text file; default every second topic of Python's reference",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("tokens", 16_384, "Of the calibration text", flag_values=FLAGS)
flags.DEFINE_string(
    "held_out", None, "A text file, to measure on; default the other topics", flag_values=FLAGS
)
flags.DEFINE_integer("held_out_tokens", 8_192, "Of that text", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to make; default CHECKPOINT-SCHEME", flag_values=FLAGS)
flags.DEFINE_boolean(
    "measure", True, "Load the whole model, before and after, to measure it", flag_values=FLAGS
)


def main() -> None:
    """Quantize, measure, and print the receipt."""
    runtime.prepare()
    with command.user_input():
        for name in ("checkpoint", "scheme"):
            if not FLAGS[name].value:
                raise ValueError(f"--{name} is needed: {FLAGS[name].help}")
        if FLAGS.scheme not in SCHEMES:
            raise ValueError(f"--scheme={FLAGS.scheme} is none of {', '.join(SCHEMES)}")
        method = FLAGS.method or USUAL[FLAGS.scheme]
        if method not in METHODS:
            raise ValueError(f"--method={method} is none of {', '.join(METHODS)}")
        for name in ("tokens", "held_out_tokens"):
            if FLAGS[name].value < 2:
                raise ValueError(f"--{name}={FLAGS[name].value} must be at least 2")
        source = open_pretrained(FLAGS.checkpoint)
        recipe = Recipe(FLAGS.scheme, method)
        text, held = Text.read("calibration", False), Text.read("held_out", True)
        if text.sha256 == held.sha256:
            raise ValueError("--calibration and --held_out are the same text: nothing is held out")
        rows = text.rows(source, FLAGS.tokens)
        check(source, rows)
        if FLAGS.measure and max(map(len, held.rows(source, FLAGS.held_out_tokens)), default=0) < 2:
            raise ValueError(f"{held.name} is too short to measure on: give --held_out more text")
        target = Path(FLAGS.out or default_target(source.name, recipe))
    console = Console()
    started = time.perf_counter()
    receipt: dict[str, Any] = {}

    def written(folder: Path, told: dict[str, Any]) -> None:
        made = open_pretrained(str(folder))
        receipt.update(
            {
                "source": {"name": source.name, "digest": source.digest},
                "target": str(target),
                **dataclasses.asdict(recipe),
                "family": source.family and source.family.name,
                "parameters": sum(math.prod(shape) for shape, _ in source.arrays.values()),
                "bytes": {"before": bytes_of(source.arrays), "after": made.bytes},
                "stored": stored(made),
                **told,
                "calibration": text.describe(sum(map(len, rows))),
                "seconds": round(time.perf_counter() - started, 1),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "device": f"{jax.devices()[0].device_kind}",
            }
        )
        save(folder, receipt)

    with jax.set_mesh(meshes.make(MeshConfig(data=1), jax.devices()[:1])):
        with command.user_input(), bar(console) as show:
            compress(source, target, recipe, rows, show, written)
        if FLAGS.measure:
            receipt |= measured(source, open_pretrained(str(target)), held)
            with command.user_input():
                save(target, receipt)
    print(described(receipt))


def save(folder: Path, receipt: dict[str, Any]) -> None:
    """The receipt in the folder, whole at any time."""
    text = json.dumps(receipt, indent=2) + "\n"
    cache.write(folder / RECEIPT, lambda part: part.write_text(text, encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to calibrate or to measure on."""

    name: str
    text: str

    @classmethod
    def read(cls, flag: str, held_out: bool) -> "Text":
        """What the flag names, or its half of the built-in text."""
        path = FLAGS[flag].value
        if path is None:
            half = "the other half" if held_out else "every second topic"
            return cls(f"pydoc_data.topics, {half}", texts.reference(held_out))
        try:
            return cls(path, Path(path).expanduser().read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--{flag}={path} is no UTF-8 text: {error.reason}") from None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def rows(self, source: Pretrained, tokens: int) -> list[list[int]]:
        """Ids of the text as this model is given them."""
        causal, extra = source.cfg.arch.attention.causal, source.cfg.arch.embeddings
        seq = texts.SEQ[causal]
        seq = min(seq, extra.positions - extra.first) if extra.positions else seq
        return texts.rows(source.tokenizer, self.text, seq, tokens, causal=causal)

    def describe(self, tokens: int) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "tokens": tokens}


def stored(made: Pretrained) -> dict[str, int]:
    """How many parameters lie in each kind, that of most first."""
    found = collections.Counter()
    for (shape, _), kind in zip(made.arrays.values(), made.kinds(), strict=True):
        found[kind] += math.prod(shape)
    return dict(found.most_common())


def default_target(name: str, recipe: Recipe) -> str:
    """The checkpoint's own name, here, with the scheme behind it."""
    stem = Path(name.partition("@")[0]).expanduser().resolve().name.removesuffix(".gguf")
    return f"{stem}-{recipe.scheme}"


# ---- what it costs -------------------------------------------------------------------------------


def measured(source: Pretrained, made: Pretrained, held: Text) -> dict[str, Any]:
    """What the model does before and after, one in memory at a time."""
    look = decoder if source.cfg.arch.head.kind == "language" else encoder
    rows = held.rows(source, FLAGS.held_out_tokens)
    before, after = (look(model, held, rows) for model in (source, made))
    found = {"held_out": held.describe(sum(map(len, rows)))}
    for name, value in before.items():
        if name == "embeddings":
            cosines = np.sum(value * after[name], axis=1)
            found["embedding_cosine"] = {
                "mean": float(cosines.mean()),
                "least": float(cosines.min()),
                "texts": len(cosines),
            }
        else:
            found[name] = {"before": value, "after": after[name]}
    return found


def loaded(model: Pretrained) -> tuple[Any, Any, Any, Layout]:
    """(graph, parameters, config, layout), as generate.py loads a model."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = dataclasses.replace(model.cfg, dtype=dtype, param_dtype=dtype)
    graph, shapes, _ = transformer.abstract(cfg, Layout())
    return graph, model.params(model.compressed(shapes)), cfg, Layout()


def decoder(pretrained: Pretrained, held: Text, rows: list[list[int]]) -> dict[str, float]:
    """Perplexity of the rows, each for itself, and tokens decoded a second."""
    graph, params, cfg, layout = loaded(pretrained)
    words, mesh = pretrained.tokenizer, jax.sharding.get_mesh()
    model = Model(graph, cfg, layout, min(words.size, cfg.vocab), mesh)
    scored = [Row(row, len(row) - 1) for row in rows if len(row) > 1]
    nats = -sum(one.total for one in Scorer(model, params, words, batch=4).score(scored))
    engine = Engine.unrolled(params, cfg, layout, words)
    room = engine.longest or PROMPT + DECODED  # of a model with few positions, half is the prompt
    prompt = rows[0][: min(PROMPT, room // 2)]
    most = min(DECODED, room - len(prompt))
    (result,) = engine.generate([prompt], max_tokens=most, ignore_eos=True).run()
    mean = nats / sum(row.scored for row in scored)
    return {
        "perplexity": math.exp(min(mean, MOST_NATS)),
        "decode_tokens_per_s": result.decode_tokens_per_s,
    }


def encoder(pretrained: Pretrained, held: Text, rows: list[list[int]]) -> dict[str, Any]:
    """Embeddings of so many of the text's paragraphs, and how many a second."""
    embed = Embedder(*loaded(pretrained), pretrained.tokenizer)
    seq, words = max(map(len, rows)), pretrained.tokenizer
    parts = [part for part in texts.paragraphs(held.text) if len(words.prompt(part)) <= seq]
    parts = texts.spaced(parts, min(len(rows), len(parts)))
    embed(parts)  # compiles
    started = time.perf_counter()
    vectors = embed(parts)
    rate = len(parts) / (time.perf_counter() - started)
    return {"embeddings": vectors, "texts_per_s": round(rate, 1)}


# ---- what is told of it --------------------------------------------------------------------------


def described(receipt: dict[str, Any]) -> str:
    """The receipt on a few lines."""
    size, layer = receipt["bytes"], receipt["largest_layer_error"]
    ((linear, error),) = receipt["largest_linear_error"].items()
    lines = [
        f"source      {receipt['source']['name']}",
        f"target      {receipt['target']}: {receipt['scheme']} by {receipt['method']}",
        f"model       {receipt['family'] or 'ours'}, {receipt['parameters']:,} parameters",
        f"bytes       {size['before']:,} -> {size['after']:,}, "
        f"{size['after'] / size['before']:.1%}",
        f"stored      {', '.join(f'{n:,} as {kind}' for kind, n in receipt['stored'].items())}",
        f"calibrated  {text_of(receipt['calibration'])}",
    ]
    if "held_out" in receipt:
        lines.append(f"held out    {text_of(receipt['held_out'])}")
    if "perplexity" in receipt:
        before, after = receipt["perplexity"].values()
        shown = ".4f" if max(before, after) < 1e6 else ".4g"
        lines.append(f"perplexity  {before:{shown}} -> {after:{shown}}, {after / before - 1:+.2%}")
    if "embedding_cosine" in receipt:
        cosine = receipt["embedding_cosine"]
        lines.append(
            f"embeddings  cosine {cosine['mean']:.5f} in the mean, {cosine['least']:.5f} at least, "
            f"of {cosine['texts']:,} texts"
        )
    for name, unit in (("decode_tokens_per_s", "decoded tokens/s"), ("texts_per_s", "texts/s")):
        if name in receipt:
            before, after = receipt[name].values()
            lines.append(f"speed       {before:,.1f} -> {after:,.1f} {unit}")
    lines += [
        f"layers      the largest error is {layer['error']:.2%}, of layer {layer['layer']}",
        f"linears     the largest error is {error:.2%}, of {linear}",
        f"took        {receipt['seconds']:,.0f} s, {receipt['peak_bytes'] / 1e9:.2f} GB at most",
    ]
    return "\n".join(lines)


def text_of(text: dict[str, Any]) -> str:
    return f"{text['tokens']:,} tokens of {text['name']}"


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Progress over layers, on a terminal."""
    columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task("layers")
        yield lambda done, layers: shown.update(task, completed=done, total=layers)


if __name__ == "__main__":
    runtime.keep_programs(cache.folder() / "programs")
    if sys.argv[1:2] != ["quantize"]:
        print("tools.compress: error: write quantize first", file=sys.stderr)
        sys.exit(command.UserError.code)
    sys.exit(
        command.status(
            main,
            sys.argv[2:],
            examples=(
                "quantize --checkpoint=SmolLM2-135M --scheme=w8",
                "quantize --checkpoint=model.Q8_0.gguf --scheme=w4g64 --method=awq --out=small",
                "quantize --checkpoint=runs/mine@2000 --scheme=w8a8 --calibration=book.txt "
                "--held_out=other.txt",
            ),
            values=FLAGS,
        )
    )
