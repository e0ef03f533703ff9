"""Engine: prompts in, ids and text out, as they come.

Shapes: B rows, T tokens, V vocabulary, N steps.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from inference import unrolled
from inference.decode import Model, Programs, State
from inference.sampling import Sampling, Settings
from model import transformer
from model.cache import Cache
from model.config import ModelConfig
from sharding.layout import Layout
from text.stops import Stops
from text.stream import Stream
from text.tokenizer import Tokenizer

SHORTEST, LONGEST = 16, 1024  # tokens that one pass of a prompt takes: powers of two from and to
LONG = 256
PAGE = 128  # tokens; the size of a cache is a multiple
GREEDY = Sampling()


def passes(tokens: int) -> list[int]:
    """The lengths of the passes that a prompt of so many tokens goes through, its last one padded.

    A power of two each, so that a program serves many prompts, and at most LONGEST, which bounds
    the memory of attention. Where a quarter of a LONG pass would be padding, it is two passes.
    """
    whole, rest = divmod(tokens, LONGEST)
    full = [LONGEST] * whole
    if not rest and whole:
        return full
    last = max(SHORTEST, power_of_two(rest))
    half = last // 2
    if last > LONG and half + power_of_two(rest - half) <= 3 * last // 4:
        return [*full, half, max(SHORTEST, power_of_two(rest - half))]
    return [*full, last]


class Piece(NamedTuple):
    """One more id of a row, and the text that is certain with it: often none, as bytes of a
    character or what may become a stop string have to wait."""

    row: int
    id: int
    text: str


@dataclass(frozen=True)
class Result:
    """What became of a prompt. Rates are of all rows together and leave compilation out."""

    prompt_ids: list[int]
    new_ids: list[int]  # with the end, or with all of the stop string
    text: str  # without either
    finish_reason: str  # "eos", "stop" or "length"
    prefill_tokens_per_s: float  # of the prompts without their last ids, which decoding begins with
    decode_tokens_per_s: float


@dataclass
class Work:
    """Tokens that went through the model, and how long it took; compilation does not count."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.seconds + other.seconds)


@dataclass(frozen=True)
class Held:
    """A cache after a generation, to go on from: `Engine.generate` takes it over."""

    cache: Cache
    ids: list[list[int]]  # of each row, in the cache


class Row:
    """A row on the host: its ids, and the text that they become."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, stop: Sequence[str], most: int):
        self.prompt, self.most = prompt, most
        self.ids: list[int] = []
        self.text = ""
        self.finish = ""
        self._stream, self._stops = Stream(tokenizer), Stops(stop)

    def take(self, i: int, ends: Sequence[int]) -> str:
        """One more id; the text that is certain with it."""
        self.ids.append(i)
        if i in ends:
            self.finish = "eos"
        elif len(self.ids) == self.most:
            self.finish = "length"
        text = "" if self.finish == "eos" else self._stops.push(self._stream.push(i))
        if self.finish:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        if self._stops.found is not None:
            self.finish = "stop"
        self.text += text
        return text


class Engine:
    """Generates with one set of parameters on the mesh in use.

    Programs are compiled by the rounded-up sizes of rows, prompts and cache, and kept: neither a
    growing text nor another prompt of the same rounded size compiles anything, nor do other
    settings. A cache is allocated whole, for the prompt and `max_tokens`.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: Any,
        cfg: ModelConfig,
        layout: Layout,
        tokenizer: Tokenizer,
        *,
        steps: int | None = None,
    ):
        """`steps`: ids of a row per call of the device; by default 1 on CPU, where a call costs
        little beside a step, else 8. ValueError for a model that does not generate."""
        check_kind(cfg)
        mesh = jax.sharding.get_mesh()
        self.model = Model(graph, cfg, layout, min(tokenizer.size, cfg.vocab), mesh)
        self.params, self.tokenizer = params, tokenizer
        self.steps = steps or (1 if mesh.devices.flat[0].platform == "cpu" else 8)
        self._programs = Programs(mesh)
        self.program = self._programs.get

    @classmethod
    def unrolled(
        cls, params: dict, cfg: ModelConfig, layout: Layout, tokenizer: Tokenizer, **how: Any
    ) -> "Engine":
        """An engine that takes over `params`, emptying it, and lays its layers apart for speed."""
        flat = unrolled.config(cfg)
        graph, _, _ = transformer.abstract(flat, layout)
        return cls(graph, unrolled.params(params, cfg), flat, layout, tokenizer, **how)

    @property
    def compiled_s(self) -> float:
        """Seconds that went into compiling."""
        return self._programs.seconds

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text, where positions were learned one by one."""
        extra = self.model.cfg.arch.embeddings
        return extra.positions - extra.first if extra.positions else None

    def check(self, prompt: Sequence[int], max_tokens: int) -> None:
        """ValueError unless this prompt can go on for `max_tokens` ids."""
        if not prompt:
            raise ValueError("the prompt has no tokens: there is nothing to go on from")
        wrong = [i for i in prompt if not 0 <= i < self.model.cfg.vocab]
        if wrong:
            raise ValueError(f"the prompt's id {wrong[0]} must be 0 to {self.model.cfg.vocab - 1}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        if self.longest and len(prompt) + max_tokens > self.longest:
            room = self.longest - len(prompt)
            right = f"max_tokens={room} at most" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} are more than the "
                f"{self.longest} positions that the model learned: {right}"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        held: Held | None = None,
    ) -> "Generation":
        """Begin to go on with the prompts, side by side; each row gets what it would get alone.

        `sampling` is one for all or one for each; `stop` are texts that end a row. `held` is what
        an earlier generation left: ids that a row's prompt begins with are not computed again.
        """
        prompts = [list(map(int, prompt)) for prompt in prompts]
        if not prompts:
            raise ValueError("no prompts: give one at least")
        for prompt in prompts:
            self.check(prompt, max_tokens)
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        rows = [Row(prompt, self.tokenizer, stop, max_tokens) for prompt in prompts]
        ends = () if ignore_eos else self.tokenizer.ends
        return Generation(self, rows, samplings, max_tokens, ends, held)


def check_kind(cfg: ModelConfig) -> None:
    """ValueError unless models of this config generate text."""
    head, causal = cfg.arch.head.kind, cfg.arch.attention.causal
    if head != "language" or not causal:
        what = "reads text in both directions" if not causal else f"has a head for {head!r}"
        raise ValueError(f"this model {what}: it does not generate, a causal language model does")


class Generation:
    """One batch under way. Iterate to run it; `results` and `held` are there at its end."""

    def __init__(
        self,
        engine: Engine,
        rows: list[Row],
        samplings: list[Sampling],
        most: int,
        ends: Sequence[int],
        held: Held | None,
    ):
        self.rows, self._most, self._ends, self._held = rows, most, ends, held
        self._engine, self._model = engine, engine.model
        ways = self._model.ways
        padding = ways * power_of_two(-(-len(rows) // ways)) - len(rows)
        self._prompts = [row.prompt for row in rows] + [[0]] * padding
        self._samplings = samplings + [GREEDY] * padding
        self.prefill, self.decode = Work(), Work()
        self._cache: Cache | None = None
        self._placed: tuple[list[bool], jax.Array] = ([], None)  # what `_active` gave

    def __iter__(self) -> Iterator[Piece]:
        engine, most = self._engine, self._most
        state = self._begin()
        settings = jax.tree.map(self._model.place, Settings.of(self._samplings))
        args = engine.params, state, settings, self._active()
        advance = engine.program(self._model.advance, *args, static=(engine.steps,), donate=(1,))
        del args
        coming: deque[jax.Array] = deque()
        asked, begun, first_came = 0, time.perf_counter(), 0.0
        while not all(row.finish for row in self.rows):
            # One call ahead of the host: the device works while its last ids become text.
            while len(coming) < 2 and asked < most:
                state, ids_NB = advance(engine.params, state, settings, self._active())
                coming.append(ids_NB)
                asked += engine.steps
            ids_NB, came = np.asarray(coming.popleft()), time.perf_counter()
            for piece in (piece for ids_B in ids_NB for piece in self._take(ids_B)):
                self.decode.tokens += bool(first_came)
                yield piece
            # The first call of a program does more than the others: the clock starts after it.
            self.decode.seconds = came - (first_came or begun)
            first_came = first_came or came
        if not self.decode.tokens:
            self.decode.tokens = sum(len(row.ids) for row in self.rows)
        self._cache = state.cache

    def _take(self, ids_B: np.ndarray) -> Iterator[Piece]:
        for b, row in enumerate(self.rows):
            if not row.finish:
                i = int(ids_B[b])
                yield Piece(b, i, row.take(i, self._ends))

    def _active(self) -> jax.Array:
        """[B], rows that still want ids."""
        active = [not row.finish for row in self.rows]
        if active != self._placed[0]:
            padding = [False] * (len(self._prompts) - len(active))
            self._placed = (active, self._model.place(np.array(active + padding)))
        return self._placed[1]

    def _begin(self) -> State:
        """The prompts in the cache, all but their last ids."""
        seen_BV = np.zeros((len(self._prompts), self._model.cfg.vocab), bool)
        for seen_V, prompt in zip(seen_BV, self._prompts, strict=True):
            seen_V[prompt] = True
        last_B = np.array([prompt[-1] for prompt in self._prompts], np.int32)
        return State(self._fill(), self._model.place(last_B), self._model.place(seen_BV))

    def _fill(self) -> Cache:
        model, params = self._model, self._engine.params
        rows = [prompt[:-1] for prompt in self._prompts]
        size = max(sum(passes(len(row))) for row in rows) + self._most
        size = -(-size // PAGE) * PAGE
        cache, start = self._take_over(rows, size)
        done = list(start)
        for length in passes(max(len(row) - n for row, n in zip(rows, start, strict=True))):
            ids_BT = np.zeros((len(rows), length), np.int32)
            counts_B = np.zeros((len(rows),), np.int32)
            for b, row in enumerate(rows):
                part = row[done[b] : done[b] + length]
                ids_BT[b, : len(part)] = part
                counts_B[b] = len(part)
                done[b] += len(part)
            batch = model.place(ids_BT), model.place(counts_B)
            if cache is None:
                cache = self._timed(model.fill, params, *batch, static=(size,))
            else:
                cache = self._timed(model.fill_more, params, cache, *batch, donate=(1,))
        self.prefill.tokens = sum(done) - sum(start)
        return cache

    def _take_over(self, rows: list[list[int]], size: int) -> tuple[Cache | None, list[int]]:
        """A cache that begins as the rows do, and how many ids of each it holds; None, of none."""
        held, self._held = self._held, None
        if held is None or len(held.ids) != len(rows):
            return None, [0] * len(rows)
        start = [shared(old, row) for old, row in zip(held.ids, rows, strict=True)]
        cache = held.cache
        if cache.size < size:
            cache = self._engine.program(self._model.grow, cache, static=(size,))(cache)
        lengths_B = self._model.place(np.array(start, np.int32))
        return dataclasses.replace(cache, lengths=lengths_B), start

    def _timed(self, function: Callable, *args: Any, **how: Any) -> Cache:
        """The function's program, run, with the time of its run added to that of the prefill."""
        compiled_s = self._engine.compiled_s
        program = self._engine.program(function, *args, **how)
        if self._engine.compiled_s > compiled_s and "donate" not in how:
            jax.block_until_ready(program(*args))  # the first run of a program does more
        started = time.perf_counter()
        made = jax.block_until_ready(program(*args))
        self.prefill.seconds += time.perf_counter() - started
        return made

    @property
    def held(self) -> Held:
        """What a next generation can go on from."""
        ids = [(row.prompt + row.ids)[:-1] for row in self.rows]
        return Held(self._cache, ids + [[]] * (len(self._prompts) - len(ids)))

    @property
    def results(self) -> list[Result]:
        """Of each row, in the order of the prompts."""
        rates = round(self.prefill.rate, 1), round(self.decode.rate, 1)
        return [Result(row.prompt, row.ids, row.text, row.finish, *rates) for row in self.rows]

    def run(self) -> list[Result]:
        """To the end."""
        deque(self, maxlen=0)
        return self.results


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def power_of_two(n: int) -> int:
    """The least that is at least n."""
    return 1 << (n - 1).bit_length()
