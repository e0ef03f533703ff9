"""Answers in the model's own words: exact match, and pass@k of programs.

A row of the JSONL file is a question, {"prompt": "...", "answer": "..." or ["...", ...]}, or a
program to complete as HumanEval has them, {"prompt": "...", "test": "...", "entry_point": "f"}: the
program is prompt + answer + test + a call of `check(f)`, without the call where no entry point is
named. "stop" may list the texts that end an answer.

Programs run on this machine, confined as confine.py says, and only if that is allowed.
"""

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from evals.checker import check_all
from evals.lines import Fields, Lines, kind
from evals.scorer import Scorer
from evals.task import Figure, Result, Settings, Task, digest, mean, needs_decoder
from evals.writer import Answer, Prompt, Writer
from inference.sampling import Sampling
from text import chat

# What comes after a function that is complete. Chen et al. 2021, arXiv:2107.03374, 2.1.
AFTER_A_FUNCTION = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
PASS_AT = (1, 10, 100)
USED = ("limit", "max_tokens", "temperature", "top_p", "samples", "stop", "seed", "chat")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Item:
    """A prompt, and what its answer is held against: the right texts, or a test."""

    prompt: str
    answers: tuple[str, ...]
    test: str | None
    stop: tuple[str, ...]
    where: str

    @classmethod
    def of(cls, row: Fields) -> "Item":
        """ValueError, with the line, for a row that is none."""
        prompt, name = row.text("prompt"), row.name("answer", "test")
        if not prompt:
            raise row.wrong("'prompt' is empty")
        stop = tuple(row.texts("stop")) if "stop" in row.row else ()
        if "" in stop:
            raise row.wrong("'stop' holds an empty text, which would end every answer at once")
        if name == "test":
            test = row.text("test")
            if "entry_point" in row.row:
                entry = row.text("entry_point")
                if not entry.isidentifier():
                    raise row.wrong(
                        f"'entry_point' is {entry!r}, it must be the name of a function"
                    )
                test = f"{test}\ncheck({entry})"
            return cls(prompt, (), test, stop or AFTER_A_FUNCTION, row.where)
        answer = row.get("answer")
        answers = row.texts("answer", least=1) if isinstance(answer, list) else [answer]
        if not isinstance(answers[0], str):
            raise row.wrong(f"'answer' is {kind(answer)}, it must be a text or a list of texts")
        return cls(prompt, tuple(answers), None, stop, row.where)


def normalized(text: str) -> str:
    """Without case, punctuation, articles and spare spaces. Rajpurkar et al. 2016, SQuAD."""
    words = ARTICLES.sub(" ", text.lower().translate(PUNCTUATION))
    return " ".join(words.split())


def pass_at(k: int, samples: int, passed: int) -> float:
    """The chance that one of k answers passes, unbiased, from n `samples` of which c `passed`.

    1 - C(n - c, k) / C(n, k). Chen et al. 2021, arXiv:2107.03374.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


class Generation(Task):
    """The prompts of a JSONL file."""

    def __init__(self, name: str, path: str, settings: Settings):
        self.name, self.settings = name, settings
        self.lines = Lines.read(path, settings.limit)
        self.items = [Item.of(row) for row in self.lines]
        if any(item.test is not None for item in self.items):
            if not settings.allow_code_execution:
                raise ValueError(
                    f"{name} runs programs that the model writes, on this machine: read "
                    f"evals/confine.py, then allow it with --allow_code_execution"
                )
            if any(item.test is None for item in self.items):
                raise ValueError(f"{name} mixes rows with 'test' and rows with 'answer': split it")
            if settings.chat:
                raise ValueError(
                    f"{name} has programs to complete, which --chat makes questions of"
                )

    def prepare(self, scorer: Scorer) -> None:
        needs_decoder(self.name, scorer)
        settings = self.settings
        self.writer = Writer(scorer)
        sampling = Sampling(settings.temperature, top_p=settings.top_p, seed=settings.seed)
        self.prompts: list[Prompt] = []  # each as often as there are samples
        for item in self.items:
            stop = settings.stop or item.stop
            try:
                ids = self.ids(scorer, item.prompt)
                prompt = Prompt(ids, settings.max_tokens, stop, sampling)
                self.writer.check(prompt)
            except ValueError as error:
                raise ValueError(f"{item.where}: {error}") from None
            self.prompts += [prompt] * settings.samples

    def ids(self, scorer: Scorer, prompt: str) -> list[int]:
        """The prompt as it is put to the model."""
        if self.settings.chat:
            return chat.prompt(scorer.tokenizer, [{"role": "user", "content": prompt}])
        return scorer.document(prompt)

    def run(self, scorer: Scorer) -> Result:
        n = self.settings.samples
        answers = self.writer.write(self.prompts)
        each = [answers[at : at + n] for at in range(0, len(answers), n)]
        used = {name: getattr(self.settings, name) for name in USED}
        counts = {
            "prompts": len(self.items),
            "samples": len(answers),
            "tokens": sum(answer.tokens for answer in answers),
            "cut": sum(answer.cut for answer in answers),
        }
        if self.items[0].test is None:
            figures, notes = self.match(each), ()
        else:
            used |= {name: getattr(self.settings, name) for name in ("timeout", "memory")}
            figures, notes = self.pass_rates(each)
        hashed = digest(self.lines.content, {"task": "generation", **used})
        return Result(self.name, hashed, figures, counts, used, notes)

    def match(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Figure]:
        """Shares of answers that equal a right one, as they are without spaces around, and
        `normalized`; several samples of a prompt count as their mean."""
        figures = {}
        for name, form in (("exact_match", str.strip), ("exact_match_normalized", normalized)):
            right = [
                sum(form(answer.text) in map(form, item.answers) for answer in several)
                / len(several)
                for item, several in zip(self.items, answers, strict=True)
            ]
            figures[name] = mean(right)
        return figures

    def pass_rates(self, answers: Sequence[Sequence[Answer]]) -> tuple[dict[str, Figure], tuple]:
        """pass@k for each k that there are samples for; and notes."""
        n = self.settings.samples
        programs = [
            f"{item.prompt}{answer.space}{answer.text}\n{item.test}\n"
            for item, several in zip(self.items, answers, strict=True)
            for answer in several
        ]
        verdicts = check_all(programs, self.settings.timeout, self.settings.memory)
        passed = [
            sum(verdict.passed for verdict in verdicts[at : at + n])
            for at in range(0, len(verdicts), n)
        ]
        figures = {f"pass@{k}": mean([pass_at(k, n, c) for c in passed]) for k in PASS_AT if k <= n}
        confined = sorted({what for verdict in verdicts for what in verdict.confined})
        late = sum(verdict.why.startswith("timed out") for verdict in verdicts)
        return figures, (
            f"programs were confined by {', '.join(confined)}",
            f"{late} of {len(verdicts)} timed out",
        )
