"""Harness: our models as lm-evaluation-harness wants a model, in this process.

Import it only where lm-eval is installed: `lm_eval.simple_evaluate(model=Harness(...), tasks=...)`.
"""

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.choice import pair
from evals.scorer import Row, Scorer
from evals.task import Settings
from evals.writer import Prompt, Writer
from inference.sampling import Sampling
from text import chat


class Harness(LM):
    """A Scorer and a Writer behind the three calls of the harness."""

    def __init__(self, scorer: Scorer, settings: Settings):
        super().__init__()
        self.scorer, self.writer = scorer, Writer(scorer)
        self.seq, self.seed = settings.window(scorer.model.cfg), settings.seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is what greedy decoding gives) of continuations."""
        pairs = [request.args for request in requests]
        rows = [pair(self.scorer, context, text, self.seq)[0] for context, text in pairs]
        return [(found.total, found.greedy) for found in self.scorer.score(rows)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, by the harness' own windows of `seq` tokens."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.scorer.document(request.args[0])
            for window in get_rolling_token_windows(ids, self.scorer.start, self.seq, 1):
                context, scored = make_disjoint_window(window)
                rows.append(Row([*context, *scored], len(scored)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, found in zip(owners, self.scorer.score(rows), strict=True):
            sums[number] += found.total
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, up to the first of the texts in "until"."""
        prompts, stops = [], []
        for request in requests:
            context, asked = request.args
            asked = normalize_gen_kwargs(asked)
            drawn = asked["do_sample"]
            sampling = Sampling(
                temperature=float(asked.get("temperature", 1.0)) if drawn else 0.0,
                top_k=int(asked.get("top_k", 0)),
                top_p=float(asked.get("top_p", 1.0)),
                seed=self.seed,
            )
            most = min(asked["max_gen_toks"], self.seq - 1)
            ids = self.scorer.document(context)[-(self.seq - most) :] or [self.scorer.start]
            stop = tuple(text for text in asked["until"] if text)
            prompts.append(Prompt(ids, most, stop, sampling))
            stops.append(stop)
        answers = self.writer.write(prompts)
        return [
            postprocess_generated_text(answer.text, list(stop), None)
            for answer, stop in zip(answers, stops, strict=True)
        ]

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and its chat template from others, for caches."""
        return self.scorer.tokenizer.digest

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `apply_chat_template` applies."""
        return self.scorer.tokenizer.template or ""

    def apply_chat_template(self, history: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a dialogue."""
        words = self.scorer.tokenizer
        return chat.render(
            words.template,
            history,
            add_generation_prompt=add_generation_prompt,
            specials=words.specials,
        )
