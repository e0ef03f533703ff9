"""Schedules of a pipeline: which stage works on which micro-batch at which clock, as a table.

The layers are a line of S x V places, each some of the layers. Stage s holds V of them, its chunks:
chunk k of stage s is place k S + s, so with V > 1 a micro-batch goes round the stages V times.
At a clock each stage does at most one forward, then at most one backward; what it sends is there at
the next clock. All stages are one program and wait for one another, so the clock takes a forward's
time if any stage has one, and a backward's if any has one.

GPipe: Huang et al. 2018, arXiv:1811.06965. 1F1B: Narayanan et al. 2019, arXiv:1806.03377.
Interleaved: Narayanan et al. 2021, arXiv:2104.04473.

Shapes: C clocks, S stages, M micro-batches, V chunks of a stage.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SCHEDULES = ("1f1b", "gpipe", "interleaved")
Clock = Callable[[int, int], int]  # (micro-batch, place) -> clock


@dataclass(frozen=True)
class PipelineConfig:
    """How the micro-batches of a step, `optim.accumulate` of them, go through the stages.

    "gpipe": all forwards, then all backwards; keeps what the backwards of all micro-batches need.
    "1f1b": a backward as soon as there is one; keeps that of at most 2 stages - 1 micro-batches.
    "interleaved": 1f1b on stages that hold `repeats` pieces of the line of layers each: a bubble
    divided by `repeats`, for `repeats` times the sends and a deal of the weights in each step.
    """

    schedule: str = "1f1b"
    repeats: int = 1  # pieces of the line of layers that a stage holds

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}")
        if self.repeats < 1 or (self.repeats > 1) != (self.schedule == "interleaved"):
            right = f"1 for schedule={self.schedule!r}; 'interleaved' repeats"
            if self.schedule == "interleaved":
                right = "at least 2 for schedule='interleaved'"
            raise ValueError(f"repeats={self.repeats} must be {right}")


@dataclass(frozen=True)
class Work:
    """What each stage does forward, or backward, at each clock; all [C, S]. Nothing reads as 0."""

    on: np.ndarray  # whether there is anything to do
    micro: np.ndarray
    chunk: np.ndarray
    first: np.ndarray  # whether that is at the first place of the line
    last: np.ndarray
    # Where a forward puts what its backward takes; one that is not on has a slot that is free.
    slot: np.ndarray

    @classmethod
    def of(cls, clock: Clock, line: "Line", clocks: int) -> "Work":
        """Micro-batch i at place q at the clock (i, q); without slots yet."""
        on, first, last = np.zeros((3, clocks, line.stages), bool)
        micro, chunk, slot = np.zeros((3, clocks, line.stages), np.int32)
        for i, q in line.whole():
            at = clock(i, q), q % line.stages
            assert not on[at], (i, q, at)
            on[at], micro[at], chunk[at] = True, i, q // line.stages
            first[at], last[at] = q == 0, q == line.end
        return cls(on, micro, chunk, first, last, slot)


@dataclass(frozen=True)
class Line:
    """The places of a line, and how many micro-batches go through them."""

    stages: int
    repeats: int
    micro_batches: int

    @property
    def end(self) -> int:
        """The last place."""
        return self.stages * self.repeats - 1

    def whole(self) -> list[tuple[int, int]]:
        """Every micro-batch at every place."""
        return list(itertools.product(range(self.micro_batches), range(self.end + 1)))

    def clocks(self, schedule: str) -> tuple[Clock, Clock]:
        """The clocks of the forward and of the backward of micro-batch i at place q."""

        def forward(i: int, q: int) -> int:
            """Micro-batches set out in groups of S, a group every S V clocks."""
            group, turn = divmod(i, self.stages)
            return group * (self.end + 1) + turn + q

        all_forward = 1 + forward(self.micro_batches - 1, self.end)
        if schedule == "gpipe":
            return forward, lambda i, q: all_forward + forward(i, self.end - q)
        return forward, lambda i, q: forward(i, self.end) + self.end - q


@dataclass(frozen=True)
class Table:
    """A schedule, clock by clock, and the memory that it lends."""

    line: Line
    forward: Work
    backward: Work
    slots: int  # of each stage
    gap: np.ndarray  # [C]: where what comes back from the head waits until the last place takes it
    back: np.ndarray  # [C]: and where that finds it
    gaps: int

    @classmethod
    def make(cls, config: PipelineConfig, stages: int, micro_batches: int) -> "Table":
        """The table of a schedule for so many stages and micro-batches."""
        line = Line(stages, config.repeats, micro_batches)
        forward, backward = line.clocks(config.schedule)
        clocks = 1 + max(backward(i, 0) for i in range(micro_batches))
        ahead, home = Work.of(forward, line, clocks), Work.of(backward, line, clocks)
        slots = 1
        for s in range(stages):
            own = [(forward(i, q), backward(i, q)) for i, q in line.whole() if q % stages == s]
            idle = [(clock, clock) for clock in np.flatnonzero(~ahead.on[:, s]).tolist()]
            lent = first_fit(own + idle)
            slots = max(slots, 1 + max(lent))
            for (begin, end), slot in zip(own + idle, lent, strict=True):
                ahead.slot[begin, s] = slot
                if ahead.on[begin, s]:
                    home.slot[end, s] = slot
        gap, back = np.zeros((2, clocks), np.int32)
        waits = [(forward(i, line.end), backward(i, line.end)) for i in range(micro_batches)]
        lent = first_fit(waits)
        for (begin, end), slot in zip(waits, lent, strict=True):
            gap[begin] = back[end] = slot
        return cls(line, ahead, home, slots, gap, back, 1 + max(lent))

    @property
    def clocks(self) -> int:
        """Clocks of a step."""
        return len(self.gap)

    def in_flight(self) -> np.ndarray:
        """[S]: the most forwards of a stage that wait for their backward at one time."""
        begun, done = np.cumsum(self.forward.on, axis=0), np.cumsum(self.backward.on, axis=0)
        return np.max(begun - done + self.backward.on, axis=0)

    def segments(self) -> list[tuple[int, int, bool, bool]]:
        """Runs of clocks: (the first, the last + 1, whether any stage has forwards, backwards)."""
        kinds = np.stack([np.any(work.on, axis=1) for work in (self.forward, self.backward)], 1)
        edges = np.flatnonzero(np.any(kinds[1:] != kinds[:-1], axis=1)) + 1
        runs = itertools.pairwise([0, *edges.tolist(), self.clocks])
        return [(start, stop, *kinds[start].tolist()) for start, stop in runs]

    def bubble(self, forward: float = 1.0, backward: float = 2.0) -> float:
        """The share of a step in which a stage waits, by what a forward and a backward take."""
        took = sum(
            (stop - start) * (f * forward + b * backward) for start, stop, f, b in self.segments()
        )
        return 1 - self.line.micro_batches * self.line.repeats * (forward + backward) / took


def ideal_bubble(stages: int, micro_batches: int, repeats: int = 1) -> float:
    """The bubble by the formula: (S - 1) / (V M + S - 1)."""
    return (stages - 1) / (repeats * micro_batches + stages - 1)


def first_fit(lives: list[tuple[int, int]]) -> list[int]:
    """A slot for each value that is needed from one clock to another, ends included.

    No slot is lent twice at one time, and there are no more than are ever in use at one time.
    """
    slots, free_from = [0] * len(lives), []
    for n in sorted(range(len(lives)), key=lives.__getitem__):
        begin, end = lives[n]
        slot = next((i for i, free in enumerate(free_from) if free <= begin), len(free_from))
        free_from[slot : slot + 1] = [end + 1]
        slots[n] = slot
    return slots
