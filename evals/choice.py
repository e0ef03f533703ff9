"""Multiple choice by log-likelihood: the model's answer is the choice that it finds likeliest.

A row of the JSONL file: {"question": "...", "choices": ["...", ...], "answer": 2}; "context" says
the same as "question", and the answer is an index from 0 or a letter from A. What is scored is
question + delimiter + choice.

Context and choice are told apart as lm-evaluation-harness does it, so that scores can be compared:
spaces at the end of the context go to the choice, the whole is tokenized at once, and the choice is
what follows as many tokens as the context alone has.
"""

import string
from dataclasses import dataclass

import numpy as np

from evals.lines import Fields, Lines, kind
from evals.scorer import Row, Scorer
from evals.task import Result, Settings, Task, digest, mean, needs_decoder


@dataclass(frozen=True)
class Question:
    """A context, its choices, the number of the right one, and where the file has it."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str

    @classmethod
    def of(cls, row: Fields) -> "Question":
        """ValueError, with the line, for a row that is none."""
        context, choices = row.text("context", "question"), row.texts("choices", least=2)
        if "" in choices:
            raise row.wrong(f"choice {choices.index('')} is empty")
        answer = row.get("answer")
        right = f"an index from 0 to {len(choices) - 1}, or a letter from A"
        if isinstance(answer, str) and len(answer) == 1 and answer in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int):
            shown = repr(answer) if isinstance(answer, str) else kind(answer)
            raise row.wrong(f"'answer' is {shown}, it must be {right}")
        if not 0 <= answer < len(choices):
            raise row.wrong(f"'answer' is {row.get('answer')!r}, it must be {right}")
        return cls(context, tuple(choices), answer, row.where)


def pair(scorer: Scorer, context: str, continuation: str, seq: int) -> tuple[Row, bool]:
    """The row that scores `continuation` after `context`, and whether it is whole.

    A row has at most `seq` + 1 ids, as its last is only predicted; it loses the beginning of its
    context first. ValueError if the continuation has no token of its own.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    if context:
        before, ids = scorer.document(context), scorer.document(context + continuation)
        scored = len(ids) - len(before)
    else:
        ids = scorer.document(continuation)
        start = scorer.start
        ids = ids if ids[:1] == [start] else [start, *ids]
        scored = len(ids) - 1
    if scored < 1:
        raise ValueError(f"{continuation!r} adds no token to its context")
    whole = len(ids) <= seq + 1
    ids = ids[-(seq + 1) :]
    return Row(ids, min(scored, len(ids) - 1)), whole


class Choice(Task):
    """The questions of a JSONL file."""

    def __init__(self, name: str, path: str, settings: Settings):
        self.name, self.settings = name, settings
        self.lines = Lines.read(path, settings.limit)
        self.questions = [Question.of(row) for row in self.lines]

    def prepare(self, scorer: Scorer) -> None:
        needs_decoder(self.name, scorer)
        seq, delimiter = self.settings.window(scorer.model.cfg), self.settings.delimiter
        self.used = {"seq": seq, "delimiter": delimiter, "limit": self.settings.limit}
        self.rows: list[Row] = []
        self.cut = 0
        for question in self.questions:
            for choice in question.choices:
                try:
                    row, whole = pair(scorer, question.context, delimiter + choice, seq)
                except ValueError as error:
                    raise ValueError(f"{question.where}: {error}") from None
                self.rows.append(row)
                self.cut += not whole

    def run(self, scorer: Scorer) -> Result:
        found = iter(scorer.score(self.rows))
        right: dict[str, list[float]] = {}
        rows = iter(self.rows)
        for question in self.questions:
            nats = np.array([next(found).total for _ in question.choices])
            tokens = np.array([next(rows).scored for _ in question.choices])
            for name, logprobs in {
                "accuracy": nats,
                "accuracy_per_character": nats / [len(text) for text in question.choices],
                "accuracy_per_byte": nats / [len(text.encode()) for text in question.choices],
                "accuracy_per_token": nats / tokens,
            }.items():
                right.setdefault(name, []).append(float(np.argmax(logprobs) == question.answer))
        return Result(
            self.name,
            digest(self.lines.content, {"task": "choice", **self.used}),
            {name: mean(values) for name, values in right.items()},
            {
                "questions": len(self.questions),
                "choices": len(self.rows),
                "tokens": sum(row.scored for row in self.rows),
            },
            self.used,
            (f"{self.cut} of {len(self.rows)} rows lost the beginning of their context",)
            if self.cut
            else (),
        )
