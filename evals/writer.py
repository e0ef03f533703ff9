"""Writer: answers to many prompts, in batches of about one length, from an Engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from evals.scorer import Scorer
from inference.engine import GREEDY, Engine
from inference.sampling import Sampling
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, and how."""

    ids: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()  # texts that end an answer
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # without the end, or the text that ended it
    space: str  # " " where the text goes on with a space that decoding it alone leaves out
    tokens: int
    cut: bool  # it reached its limit of tokens


class Writer:
    """Writes with the parameters that the scorer has at the time."""

    def __init__(self, scorer: Scorer):
        model = scorer.model
        with jax.set_mesh(model.mesh):
            self._engine = Engine(model.graph, None, model.cfg, model.layout, scorer.tokenizer)
        self._scorer = scorer

    def check(self, prompt: Prompt) -> None:
        """ValueError for a prompt that this model cannot answer at this length."""
        self._engine.check(prompt.ids, prompt.max_tokens)

    def write(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers, in the order of the prompts. A prompt's draws depend on its place among
        them, and not on its batch."""
        scorer, engine = self._scorer, self._engine
        engine.params = scorer.params
        found: list[Answer | None] = [None] * len(prompts)
        done = 0
        with jax.set_mesh(engine.model.mesh):
            for numbers in batches(prompts, scorer.batch):
                scorer.each(done, len(prompts))
                batch = [prompts[i] for i in numbers]
                samplings = [replace(prompts[i].sampling, stream=i) for i in numbers]
                results = engine.generate(
                    [prompt.ids for prompt in batch],
                    samplings,
                    max_tokens=batch[0].max_tokens,
                    stop=batch[0].stop,
                ).run()
                for i, result in zip(numbers, results, strict=True):
                    cut = result.finish_reason == "length"
                    space = space_between(scorer.tokenizer, prompts[i].ids[-1], result.new_ids)
                    found[i] = Answer(result.text, space, len(result.new_ids), cut)
                done += len(batch)
        engine.params = None  # the scorer's may be replaced: let go of them
        return found


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """The numbers of prompts that are written side by side: those that end alike, longest first."""
    alike: dict[tuple, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)):
        alike.setdefault((prompts[i].max_tokens, prompts[i].stop), []).append(i)
    return [
        numbers[at : at + size] for numbers in alike.values() for at in range(0, len(numbers), size)
    ]


def space_between(tokenizer: Tokenizer, last: int, ids: Sequence[int]) -> str:
    """The space that `decode` takes from the beginning of a text, SentencePiece's, if it is there
    when the ids follow the id `last`."""
    both = tokenizer.decode([last, *ids[:1]]).removeprefix(tokenizer.decode([last]))
    return " " if both == " " + tokenizer.decode(ids[:1]) else ""
