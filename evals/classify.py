"""Accuracy of a classifier: JSONL rows {"text": "...", "label": 1}, or with a "text_pair" too."""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from evals.lines import Fields, Lines, kind
from evals.scorer import Scorer, bucket
from evals.task import Result, Settings, Task, digest, mean


@dataclass(frozen=True)
class Example:
    """One text or two, and the class that is right."""

    text: str
    other: str | None
    label: int
    where: str

    @classmethod
    def of(cls, row: Fields) -> "Example":
        """ValueError, with the line, for a row that is none."""
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            shown = label if isinstance(label, int) else kind(label)
            raise row.wrong(f"'label' is {shown}, it must be the number of a class, from 0")
        other = row.text("text_pair") if "text_pair" in row.row else None
        return cls(row.text("text"), other, label, row.where)


class Classify(Task):
    """The texts of a JSONL file."""

    def __init__(self, name: str, path: str, settings: Settings):
        self.name, self.settings = name, settings
        self.lines = Lines.read(path, settings.limit)
        self.examples = [Example.of(row) for row in self.lines]

    def prepare(self, scorer: Scorer) -> None:
        head = scorer.model.cfg.arch.head
        if head.kind != "classifier":
            raise ValueError(f"{self.name} needs a model with a classifier, not {head.kind!r} head")
        for example in self.examples:
            if example.label >= head.labels:
                raise ValueError(
                    f"{example.where}: 'label' is {example.label}, and the model has classes 0 to "
                    f"{head.labels - 1}"
                )
        self.seq = self.settings.window(scorer.model.cfg)
        self.rows: list[tuple[list[int], list[int]]] = []  # ids and types
        self.cut = 0
        for example in self.examples:
            if example.other is None:
                ids = list(scorer.tokenizer.prompt(example.text))
                types = [0] * len(ids)
            else:
                ids, types = scorer.tokenizer.pair(example.text, example.other)
            if len(ids) > self.seq:  # the last token, a separator, stays
                ids, types = ids[: self.seq - 1] + ids[-1:], types[: self.seq - 1] + types[-1:]
                self.cut += 1
            self.rows.append((ids, types))
        graph = scorer.model.graph
        self.logits = jax.jit(lambda params, *rows: nnx.merge(graph, params).logits(*rows))

    def run(self, scorer: Scorer) -> Result:
        order = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i][0]))
        right = np.zeros(len(order))
        with jax.set_mesh(scorer.model.mesh):
            for at in range(0, len(order), scorer.batch):
                scorer.each(at, len(order))
                numbers = order[at : at + scorer.batch]
                arrays = fill([self.rows[i] for i in numbers], scorer.batch)
                logits_BC = self.logits(scorer.params, *map(scorer.model.place, arrays))
                chosen = np.asarray(jax.device_get(logits_BC)).argmax(axis=-1)
                for i, number in zip(numbers, chosen, strict=False):
                    right[i] = number == self.examples[i].label
        used = {"seq": self.seq, "limit": self.settings.limit}
        return Result(
            self.name,
            digest(self.lines.content, {"task": "classify", **used}),
            {"accuracy": mean(right.tolist())},
            {"texts": len(order), "tokens": sum(len(ids) for ids, _ in self.rows)},
            used,
            (f"{self.cut} of {len(order)} texts lost their end",) if self.cut else (),
        )


def fill(batch: list[tuple[list[int], list[int]]], rows: int) -> tuple[np.ndarray, ...]:
    """Ids, positions, segments and types of a batch, [B, T], padded on the right and below."""
    T = bucket(max(len(ids) for ids, _ in batch))
    ids, segments, types = (np.zeros((rows, T), np.int32) for _ in range(3))
    for b, (own, own_types) in enumerate(batch):
        ids[b, : len(own)], types[b, : len(own)] = own, own_types
        segments[b, : len(own)] = 1
    positions = np.arange(T, dtype=np.int32) * segments  # padding may lie beyond learned ones
    return ids, positions, segments, types
