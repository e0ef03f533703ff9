"""The kinds of task, by name: what `--tasks=KIND:WHAT` opens."""

import difflib

from evals.choice import Choice
from evals.classify import Classify
from evals.generation import Generation
from evals.perplexity import Perplexity
from evals.task import Settings, Task


def harness(name: str, task: str, settings: Settings) -> Task:
    """A task of lm-evaluation-harness. ValueError where that is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(f"{name} needs lm-eval: pip install 'meshlm[eval]'") from None
    from evals.harness_task import HarnessTask

    return HarnessTask(name, task, settings)


KINDS = {
    "perplexity": Perplexity,
    "choice": Choice,
    "generation": Generation,
    "classify": Classify,
    "lm_eval": harness,
}
WHAT = {"perplexity": "perplexity:book.txt", "lm_eval": "lm_eval:arc_easy"}


def open_task(name: str, settings: Settings) -> Task:
    """The task that "KIND:WHAT" names, its files read. ValueError or OSError if it is none."""
    kind, _, what = name.partition(":")
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, 1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise ValueError(f"tasks: no kind {kind!r}{hint} there are {', '.join(KINDS)}")
    if not what:
        raise ValueError(f"tasks: {kind!r} of what? Write {WHAT.get(kind, f'{kind}:file.jsonl')}")
    return KINDS[kind](name, what, settings)
