"""Tasks of lm-evaluation-harness among ours. Import it only where lm-eval is installed.

Nothing is downloaded here, but many of its tasks name data sets that it wants to download.
"""

import difflib
import functools
import importlib.metadata
import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from evals.harness import Harness
from evals.scorer import Scorer
from evals.task import Figure, Result, Settings, Task, digest, needs_decoder


@functools.cache
def manager() -> TaskManager:
    """All tasks of the harness, found in some seconds."""
    return TaskManager()


class HarnessTask(Task):
    """A task or group of the harness, by its name or by the path of its YAML file."""

    def __init__(self, name: str, task: str, settings: Settings):
        self.name, self.task, self.settings = name, task, settings
        self.manager = manager()
        if task not in self.manager.all_tasks and not Path(task).is_file():
            close = ", ".join(difflib.get_close_matches(task, self.manager.all_tasks, 3))
            hint = f"; did you mean {close}?" if close else ""
            raise ValueError(f"{name}: lm-evaluation-harness has no task {task!r}{hint}")
        try:
            self.manager.load([task])
        except Exception as error:  # a data set that cannot be had, a YAML file that is wrong
            raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from None

    def prepare(self, scorer: Scorer) -> None:
        needs_decoder(self.name, scorer)
        if self.settings.chat and scorer.tokenizer.template is None:
            raise ValueError(f"{self.name}: --chat needs a chat template, and there is none")
        self.model = Harness(scorer, self.settings)

    def run(self, scorer: Scorer) -> Result:
        found = lm_eval.simple_evaluate(
            model=self.model,
            tasks=[self.task],
            task_manager=self.manager,
            limit=self.settings.limit or None,
            log_samples=False,
            apply_chat_template=self.settings.chat,
            confirm_run_unsafe_code=self.settings.allow_code_execution,
        )
        figures = {}
        for task, row in found["results"].items():
            for key, value in row.items():
                metric, comma, how = key.partition(",")
                if comma and not metric.endswith("_stderr"):
                    error = row.get(f"{metric}_stderr,{how}")
                    label = metric if how == "none" else f"{metric} ({how})"
                    label = label if len(found["results"]) == 1 else f"{task}: {label}"
                    stderr = error if isinstance(error, float) else None
                    figures[label] = Figure(float(value), stderr)
        used = {name: getattr(self.settings, name) for name in ("limit", "seed", "chat")}
        used |= {"seq": self.model.seq, "lm_eval": importlib.metadata.version("lm_eval")}
        asked = {name: found[name] for name in ("configs", "versions", "n-shot")}
        content = json.dumps(asked, sort_keys=True, default=handle_non_serializable).encode()
        counts = {task: row["effective"] for task, row in found["n-samples"].items()}
        return Result(self.name, digest(content, used), figures, counts, used)
