"""Generate text from a checkpoint: of ours, a Hugging Face directory, or a GGUF file.

One --prompt, a --batch_file of prompts, or a dialogue with --chat. The text goes to stdout as it
comes, what is told about it to stderr. Rates leave compilation out.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from checkpoint.pretrained import Pretrained, open_pretrained
from configs import command
from costs import flops
from inference.engine import Engine, Generation, Held, Result, Work, check_kind
from inference.sampling import Sampling
from model import transformer
from model.config import DTYPES, ModelConfig
from sharding import mesh as meshes
from sharding import runtime
from sharding.layout import SERVING, Layout
from sharding.mesh import MeshConfig
from text import cache, chat

MOST = 256  # tokens, where --max_tokens is not given
ROWS = 16  # prompts of a file at one time

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "checkpoint", None, "DIR[@STEP] of ours, a Hugging Face directory, a .gguf", flag_values=FLAGS
)
flags.DEFINE_string(
    "prompt", None, "What the text goes on from; with --chat one question", flag_values=FLAGS
)
flags.DEFINE_string(
    "batch_file", None, 'Prompts: a text a line, or a {"prompt": TEXT} a line', flag_values=FLAGS
)
flags.DEFINE_boolean(
    "chat", False, "Put prompts as the chat template does; without any, talk", flag_values=FLAGS
)
flags.DEFINE_string("system", None, "With --chat: what the model is told first", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", None, f"Of an answer; default {MOST}", flag_values=FLAGS)
HELP = {
    "temperature": "Divides the logits; 0 is greedy",
    "top_k": "Draw from so many likeliest tokens; 0: from all",
    "top_p": "Draw from the fewest likeliest tokens with this probability",
    "min_p": "Draw from tokens at least this share as likely as the likeliest",
    "repetition_penalty": "Over 1: tokens of the text become less likely",
    "seed": "Of the draws",
}
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
for name, text in HELP.items():
    default = getattr(Sampling(), name)
    DEFINE[type(default)](name, default, text, flag_values=FLAGS)
flags.DEFINE_multi_string("stop", [], "Text that ends an answer; repeatable", flag_values=FLAGS)
flags.DEFINE_boolean("ignore_eos", False, "Go on after the end of a text", flag_values=FLAGS)
flags.DEFINE_boolean(
    "json", False, "Print an object of ids, text and rates for each prompt", flag_values=FLAGS
)
flags.DEFINE_string(
    "dtype", None, f"Of the computation: {', '.join(DTYPES)}; default float32 on CPU, else "
    "bfloat16", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "dequantize", False, "Compute with weights of 8 and 4 bits as numbers of --dtype",
    flag_values=FLAGS,
)  # fmt: skip
for axis in SERVING:
    flags.DEFINE_integer(f"mesh.{axis}", 1, "Devices along this axis", flag_values=FLAGS)


def sampling(stream: int = 0) -> Sampling:
    """What the flags say of the draws, for the prompt of this number."""
    try:
        return Sampling(**{name: FLAGS[name].value for name in HELP}, stream=stream)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def check_flags() -> None:
    """ValueError for flags that do not go together, before anything is read."""
    if not FLAGS.checkpoint:
        raise ValueError("--checkpoint=PATH is needed: a folder or a .gguf file")
    if FLAGS.prompt is not None and FLAGS.batch_file is not None:
        raise ValueError("give either --prompt or --batch_file, not both")
    if FLAGS.prompt is None and FLAGS.batch_file is None and not FLAGS.chat:
        raise ValueError("give --prompt=TEXT or --batch_file=FILE, or --chat to talk")
    if FLAGS.system is not None and not FLAGS.chat:
        raise ValueError("--system is told to the model through its chat template: add --chat")
    if FLAGS.max_tokens is not None and FLAGS.max_tokens < 1:
        raise ValueError(f"--max_tokens={FLAGS.max_tokens} must be at least 1")
    if FLAGS.dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype={FLAGS.dtype} is none of {', '.join(DTYPES)}")
    if "" in FLAGS.stop:
        raise ValueError("--stop= is empty: it would end every text before it begins")
    sampling()


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: JSON objects with a "prompt" if the first line is one, else lines."""
    lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--batch_file={path} holds no prompt")
    if not numbered[0][1].lstrip().startswith("{"):
        return [line.removesuffix("\r") for _, line in numbered]
    prompts = []
    for n, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{n}: this is no JSON, as the first line is: {error}"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}:{n}: write {{"prompt": "TEXT"}}')
        prompts.append(row["prompt"])
    return prompts


def mesh_of(cfg: ModelConfig) -> jax.sharding.Mesh:
    """The devices that the flags ask for. ValueError if the model does not divide over them."""
    try:
        config = MeshConfig(**{axis: FLAGS[f"mesh.{axis}"].value for axis in SERVING})
        asked = math.prod(vars(config).values())
        count = asked if asked > 0 else jax.device_count()
        if count > jax.device_count():
            raise ValueError(f"it takes {count} devices, there are {jax.device_count()}")
        sizes = config.sizes(count)
    except ValueError as error:
        raise ValueError(f"mesh: {error}") from None
    moe = cfg.arch.moe.mlp if cfg.arch.moe.experts else 0
    split = {"tensor": {"kv_heads": cfg.kv_heads, "mlp": cfg.mlp, "moe.mlp": moe}}
    split["tensor"]["vocab"] = cfg.vocab
    split["fsdp"] = {"embed": cfg.embed}
    for axis, dims in split.items():
        for name, size in dims.items():
            if size % sizes[axis]:
                raise ValueError(f"--mesh.{axis}={sizes[axis]} does not divide {name}={size}")
    return meshes.make(config, jax.devices()[:count])


def load(source: Pretrained) -> Engine:
    """The model, its values read, on the mesh in use."""
    dtype = FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cfg = dataclasses.replace(source.cfg, dtype=dtype, param_dtype=dtype)
    layout = Layout()
    _, shapes, _ = transformer.abstract(cfg, layout)
    shapes = shapes if FLAGS.dequantize else source.compressed(shapes)
    return Engine.unrolled(source.params(shapes), cfg, layout, source.tokenizer)


class Writer:
    """Generates with what the flags say, prints it, and sums up the work."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.prefill, self.decode = Work(), Work()

    def begin(
        self, prompts: Sequence[list[int]], first: int = 0, held: Held | None = None
    ) -> Generation:
        """Prompts, numbered from `first`, side by side. ValueError for one that does not fit."""
        longest, most = self.engine.longest, FLAGS.max_tokens
        if most is None:
            room = longest - max(map(len, prompts)) if longest else MOST
            most = max(min(MOST, room), 1)
        samplings = [sampling(first + i) for i in range(len(prompts))]
        return self.engine.generate(
            prompts, samplings, max_tokens=most, stop=FLAGS.stop, ignore_eos=FLAGS.ignore_eos,
            held=held,
        )  # fmt: skip

    def stream(self, generation: Generation) -> Result:
        """The one row of a generation, printed as it comes."""
        for piece in generation:
            if piece.text and not FLAGS.json:
                print(piece.text, end="", flush=True)
        return self.end(generation)[0]

    def end(self, generation: Generation) -> list[Result]:
        """The results of a generation that is through."""
        self.prefill += generation.prefill
        self.decode += generation.decode
        return generation.results

    def show(self, result: Result) -> None:
        """What stands after a text: the line's end, or the object instead of it."""
        print(json.dumps(dataclasses.asdict(result)) if FLAGS.json else "", flush=True)

    def tell(self) -> None:
        """The work, on stderr."""
        parts = {"prefill": self.prefill, "decode": self.decode}
        told = [
            f"{name} {work.tokens:,} tokens, {work.rate:,.1f} tokens/s"
            for name, work in parts.items()
        ]
        note(f"{'; '.join(told)}; compiled for {self.engine.compiled_s:.1f} s")


def batch(writer: Writer, prompts: Sequence[list[int]]) -> None:
    """Every prompt of a file, some at a time, in order."""
    for first in range(0, len(prompts), ROWS):
        generation = writer.begin(prompts[first : first + ROWS], first)
        generation.run()
        for i, result in enumerate(writer.end(generation), first + 1):
            if not FLAGS.json:
                print(f"--- {i}\n{result.text}", end="")
            writer.show(result)


def talk(writer: Writer) -> None:
    """Question and answer, until the questions end."""
    dialogue = chat.Dialogue(writer.engine.tokenizer, FLAGS.system)
    held = None
    for question in questions():
        with command.user_input():
            generation = writer.begin([dialogue.ask(question)], held=held)
        result = writer.stream(generation)
        writer.show(result)
        dialogue.answer(result.text)
        held = generation.held


def questions() -> Iterator[str]:
    """The lines of stdin that are not empty; a terminal is asked for them."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def note(text: str) -> None:
    """Tell the user, not the reader of stdout."""
    print(text, file=sys.stderr, flush=True)


def ids_of(source: Pretrained, text: str) -> list[int]:
    """A prompt's ids, as a question of a dialogue if there is one. ValueError if there are none."""
    words = source.tokenizer
    ids = chat.Dialogue(words, FLAGS.system).ask(text) if FLAGS.chat else words.prompt(text)
    if not ids:
        raise ValueError("an empty prompt: there is nothing to go on from")
    return ids


def generate() -> None:
    """What the flags ask for."""
    with command.user_input():
        check_flags()
        texts = read_prompts(FLAGS.batch_file) if FLAGS.batch_file else [FLAGS.prompt or "?"]
        started = time.perf_counter()
        source = open_pretrained(FLAGS.checkpoint)
        check_kind(source.cfg)
        prompts = [ids_of(source, text) for text in texts]
        mesh = mesh_of(source.cfg)
    with jax.set_mesh(mesh):
        with command.user_input():
            engine = load(source)
            for ids in prompts:
                engine.check(ids, FLAGS.max_tokens or 1)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(engine.params)))
        told = f"{flops.params(source.cfg):,} parameters, {engine.model.cfg.dtype}, {size:,} bytes"
        note(f"{source.name}: {told}, {time.perf_counter() - started:.1f} s")
        writer = Writer(engine)
        if FLAGS.batch_file:
            batch(writer, prompts)
        elif FLAGS.prompt is not None:
            generation = writer.begin(prompts)
            writer.show(writer.stream(generation))
        else:
            talk(writer)
        writer.tell()


def main() -> int:
    """The command."""
    runtime.prepare()
    generate()
    return 0


if __name__ == "__main__":
    runtime.keep_programs(cache.folder() / "programs")
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            examples=(
                '--checkpoint=SmolLM2-135M --prompt="The capital of France is"',
                "--checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --chat --temperature=0.6 --top_p=0.9",
                "--checkpoint=runs/mine --batch_file=prompts.txt --max_tokens=64 --json",
                '--checkpoint=Llama-3.1-8B --mesh.tensor=2 --prompt="Once upon a time"',
            ),
            values=FLAGS,
        )
    )
