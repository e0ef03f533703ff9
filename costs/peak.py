"""The most bytes that a schedule holds at one moment, and what they are."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from costs.kernels import GATHERS, Buffer, Schedule

PARTS = ("gradients", "activations", "logits", "gathered", "workspace")


@dataclass
class Moment:
    """What is alive when most is."""

    bytes: int = 0
    buffers: list[Buffer] = field(default_factory=list)
    inside: list[Buffer] = field(default_factory=list)  # a round of a loop
    path: tuple[str, ...] = ()  # the kernel, after the loops that it is in


def peak(plan: Schedule) -> Moment:
    """The moment at which the buffers of a schedule, its loops' bodies included, take most."""
    last: dict[Buffer, int] = {}
    for i, kernel in enumerate(plan.kernels):
        last.update(dict.fromkeys((*kernel.reads, *kernel.writes), i))
    last.update(dict.fromkeys(plan.kept, len(plan.kernels)))
    alive: dict[Buffer, None] = {}
    held, best = 0, Moment()
    for i, kernel in enumerate(plan.kernels):
        dying = [b for b in kernel.reads if last[b] == i and b in alive]
        inner = max(map(peak, kernel.inner), key=lambda m: m.bytes, default=Moment())
        over = overwritten(kernel.writes[: kernel.in_place], dying)
        new = sum(b.bytes for b in kernel.writes)
        total = held + new - sum(b.bytes for b in over) + inner.bytes
        if total > best.bytes:
            own = [b for b in alive if b not in over] + kernel.writes
            best = Moment(total, own, inner.buffers + inner.inside, (kernel.name, *inner.path))
        alive.update(dict.fromkeys(kernel.writes))
        held += new
        for b in (*dying, *(b for b in kernel.writes if last[b] == i)):
            held -= b.bytes
            alive.pop(b)
    best.buffers += plan.always
    best.bytes += sum(b.bytes for b in plan.always)
    return best


def overwritten(writes: Iterable[Buffer], dying: Iterable[Buffer]) -> list[Buffer]:
    """The buffers that results may take over: as many bytes, and nobody reads them again."""
    pool, over = list(dying), []
    for new in writes:
        old = next((old for old in pool if old.bytes == new.bytes), None)
        if old is not None:
            pool.remove(old)
            over.append(old)
    return over


def parts(
    moment: Moment, params: Iterable[tuple[tuple[int, ...], str]], vocab: int
) -> dict[str, int]:
    """The bytes of a moment by component.

    `params`: (shape, dtype) of each parameter on one device; `vocab`: rows of the vocabulary there.
    """
    shapes = {(tuple(shape), str(dtype)) for shape, dtype in params}
    found = dict.fromkeys(PARTS, 0)
    for inside, buffers in ((False, moment.buffers), (True, moment.inside)):
        for buffer in buffers:
            found[part(buffer, shapes, vocab, inside)] += buffer.bytes
    return found


def part(buffer: Buffer, params: set[tuple[tuple[int, ...], str]], vocab: int, inside: bool) -> str:
    """The component that a buffer counts to; `inside`: of one round of a loop."""
    value = buffer.value
    if (value.shape, str(value.dtype)) in params and buffer.kind != "turned":
        return "gradients"
    if vocab in value.shape and buffer.kind == "carry":
        return "gradients"  # the head's, summed up over the chunks of tokens
    if len(value.shape) > 1 and value.shape[-1] == vocab:
        return "logits"
    if value.made != "experts" and (buffer.kind == "turned" or value.made in GATHERS):
        return "gathered"
    if value.phase == "forward" and not inside:
        return "activations"
    return "workspace"
