"""eval.py: its table and results.json, and every wrong flag an exit code 2 with one message."""

import json
import math
import platform

import jax
import numpy as np
import pytest

from tests.evals.tiny import log_softmax, tiny_scorer
from text.tokenizer import Bytes

TEXT = "A text of some words, to be scored."


@pytest.fixture
def files(tmp_path):
    """Files of each kind of task."""
    (tmp_path / "a.txt").write_text(TEXT)
    rows = {
        "choice.jsonl": {"question": "Q:", "choices": ["a", "bc"], "answer": "B"},
        "prompts.jsonl": {"prompt": "P", "answer": "A"},
        "programs.jsonl": {"prompt": "x = 1\n", "test": "assert x == 1"},
        "classes.jsonl": {"text": "T", "label": 0},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    return tmp_path


def test_a_checkpoint_is_scored_and_the_results_are_written(call, checkpoint, files):
    tasks = f"perplexity:{files}/a.txt,choice:{files}/choice.jsonl,generation:{files}/prompts.jsonl"
    output = files / "out" / "results.json"
    args = (f"--checkpoint={checkpoint}@10", f"--tasks={tasks}", f"--output={output}")
    code, out, err = call(*args, "--max_tokens=4", "--seq=24", "--stride=8")
    assert (code, err) == (0, "")
    found = json.loads(output.read_text())
    assert list(found["tasks"]) == tasks.split(",")
    for name in ("nats_per_token", "accuracy", "exact_match", str(output)):
        assert name in out
    assert found["model"]["name"] == f"{checkpoint}@10"
    assert len(found["model"]["digest"]) == 64
    assert found["model"]["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(tiny_scorer().params)
    )
    assert found["tokenizer"] == {"digest": Bytes().digest, "size": 257}
    versions = found["versions"]
    assert versions["python"] == platform.python_version()
    assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
    assert versions["meshlm"]
    perplexity = found["tasks"][tasks.split(",")[0]]
    assert perplexity["counts"]["tokens"] == len(TEXT)  # trained here: all after the end
    assert perplexity["settings"] == {"seq": 24, "stride": 8, "limit": 0}
    assert perplexity["seconds"] > 0
    assert len(perplexity["hash"]) == 64


def test_the_score_of_a_checkpoint_is_that_of_its_parameters(call, checkpoint, files):
    task, output = f"perplexity:{files}/a.txt", files / "results.json"
    code, _, err = call(f"--checkpoint={checkpoint}", f"--tasks={task}", f"--output={output}")
    assert (code, err) == (0, "")
    scorer = tiny_scorer()
    scorer.params = jax.tree.map(lambda a: a * 1.1, scorer.params)
    ids = [256, *TEXT.encode()]
    logprobs = log_softmax(scorer, ids)[np.arange(len(TEXT)), ids[1:]]
    figures = json.loads(output.read_text())["tasks"][task]["figures"]
    assert figures["nats_per_token"]["value"] == pytest.approx(-logprobs.mean(), rel=1e-4)
    bits = -logprobs.sum() / math.log(2) / len(TEXT)
    assert figures["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)


def test_a_mesh_gives_the_same_figures(call, checkpoint, files):
    task, figures = f"perplexity:{files}/a.txt", []
    for axes in (["--mesh.data=8"], ["--mesh.fsdp=2", "--mesh.tensor=2"]):
        output = files / "results.json"
        args = (f"--checkpoint={checkpoint}", f"--tasks={task}", f"--output={output}", *axes)
        code, _, err = call(*args, "--dtype=float32")
        assert (code, err) == (0, "")
        result = json.loads(output.read_text())
        figures.append(result["tasks"][task]["figures"]["nats_per_token"]["value"])
    assert result["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


ROWS = [
    ("", "give either --checkpoint=PATH or --watch=DIR"),
    ("--checkpoint=C --watch=C", "give either --checkpoint=PATH or --watch=DIR"),
    ("--checkpoint=C", "--tasks=KIND:WHAT,... is needed"),
    ("--checkpoint=C --tasks=perplexty:a.txt", "no kind 'perplexty', did you mean perplexity?"),
    ("--checkpoint=C --tasks=choice", "'choice' of what? Write choice:file.jsonl"),
    ("--checkpoint=C --tasks=choice:", "'choice' of what?"),
    ("--checkpoint=C --tasks=choice:absent.jsonl", "absent.jsonl: no such file or directory"),
    ("--checkpoint=C --tasks=choice:F/a.txt", "a.txt:1: this is no JSON"),
    ("--checkpoint=C --tasks=choice:F/prompts.jsonl", "prompts.jsonl:1: no field 'context' or"),
    ("--checkpoint=C --tasks=choice:F/choice.jsonl,choice:F/choice.jsonl", "names a task twice"),
    ("--checkpoint=C --tasks=perplexity:absent", "source 'absent' does not exist"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --stride=9 --seq=8", "stride=9 would leave out"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --held_out=2", "held_out=2.0 must be at least 0"),
    ("--checkpoint=C --tasks=generation:F/programs.jsonl", "--allow_code_execution"),
    (
        "--checkpoint=C --tasks=classify:F/classes.jsonl",
        "a model with a classifier, not 'language'",
    ),
    ("--checkpoint=C@11 --tasks=perplexity:F/a.txt", "no step 11"),
    ("--checkpoint=F/absent --tasks=perplexity:F/a.txt", "there is no such folder or file"),
    ("--checkpoint=F --tasks=perplexity:F/a.txt", "is no checkpoint"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --batch=0", "--batch=0 must be at least 1"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --limit=-1", "limit=-1 must be at least 0"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --limit=x", "--limit=x must be an integer"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --dtype=int8", "--dtype=int8 is none of float32"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --output=F", "is a folder"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --mesh.tensor=3", "do not divide into tensor=3"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --mesh.tensor=4", "kv_heads=2 does not divide"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --mesh.data=0", "mesh: data=0 must be at least 1"),
    ("--checkpoint=C --tasks=perplexity:F/a.txt --taks=x", "no flag --taks, did you mean --tasks?"),
    ("--watch=F --tasks=perplexity:F/a.txt --idle=-1", "--idle=-1 must be at least 0"),
    ("--watch=F --tasks=perplexity:F/a.txt", "has no config.json: no run has begun there"),
]


@pytest.mark.parametrize("args, message", ROWS)
def test_a_wrong_command_line_is_told(call, checkpoint, files, args, message, monkeypatch):
    monkeypatch.chdir(files)
    args = args.replace("=C", f"={checkpoint}").replace("=F", f"={files}")
    args = args.replace(":F/", f":{files}/")
    code, out, err = call(*args.split())
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_help_lists_the_kinds_of_task_and_every_flag(call):
    code, out, _ = call("--help")
    assert code == 0
    for text in ("perplexity:SOURCE", "lm_eval:NAME", "--mesh.fsdp=VALUE", "--watch=VALUE"):
        assert text in out
    assert max(map(len, out.partition("Examples:")[0].splitlines())) <= 100


def test_a_task_of_the_harness_needs_it(call, checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, err = call(f"--checkpoint={checkpoint}", "--tasks=lm_eval:arc_easy")
    assert code == 2
    assert "pip install 'meshlm[eval]'" in err
