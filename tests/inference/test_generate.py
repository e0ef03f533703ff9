"""generate.py: what goes to stdout, the flags, and every wrong one an exit code 2."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest

import generate
from configs import command
from configs.load import ROOT
from tests.checkpoint import folders

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KEYS = [
    "prompt_ids", "new_ids", "text", "finish_reason", "prefill_tokens_per_s",
    "decode_tokens_per_s",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face directory with a chat template. Read it only."""
    path = tmp_path_factory.mktemp("llama")
    folders.write(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return path


@pytest.fixture
def call(folder, monkeypatch):
    """`call(*args, stdin=...)` is the command line: (exit code, stdout, stderr)."""

    def call(*args, stdin="", checkpoint=folder, most="--max_tokens=5"):
        for name in generate.FLAGS:
            generate.FLAGS[name].unparse()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err = io.StringIO(), io.StringIO()
        args = [f"--checkpoint={checkpoint}", "--ignore_eos", *([most] if most else []), *args]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.status(generate.main, args, values=generate.FLAGS)
        return code, out.getvalue(), err.getvalue()

    return call


def rows(out):
    return [json.loads(line) for line in out.splitlines()]


def test_text_goes_to_stdout_and_the_rates_to_stderr(call):
    code, out, err = call("--prompt=the quick")
    assert code == 0
    first, last = err.splitlines()
    assert "parameters, float32" in first
    assert "prefill" in last and "decode 4 tokens" in last and "compiled for" in last
    code, printed, _ = call("--prompt=the quick", "--json")
    (row,) = rows(printed)
    assert list(row) == KEYS
    assert out == row["text"] + "\n"
    assert row["prompt_ids"] == folders.tokenizer().prompt("the quick")
    assert len(row["new_ids"]) == 5
    assert row["finish_reason"] == "length"
    assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["the fox", "a dog!"], marks=pytest.mark.slow),
        pytest.param(['{"prompt": "the fox"}', '{"prompt": "a dog!"}'], marks=pytest.mark.slow),
    ],
)
def test_a_file_of_prompts_gives_what_each_gives_alone(call, tmp_path, lines):
    (tmp_path / "prompts").write_text("\n\n".join(lines) + "\r\n")
    how = ("--json", "--temperature=0")
    code, out, _ = call(f"--batch_file={tmp_path / 'prompts'}", *how)
    assert code == 0
    alone = [rows(call(f"--prompt={prompt}", *how)[1])[0] for prompt in ("the fox", "a dog!")]
    for ours, right in zip(rows(out), alone, strict=True):
        assert ours["new_ids"] == right["new_ids"]
        assert ours["prompt_ids"] == right["prompt_ids"]
    _, text, _ = call(f"--batch_file={tmp_path / 'prompts'}")
    assert text == "".join(f"--- {i}\n{row['text']}\n" for i, row in enumerate(alone, 1))


@pytest.mark.slow
def test_equal_prompts_of_a_file_have_draws_of_their_own(call, tmp_path):
    (tmp_path / "prompts").write_text("the\nthe\nthe\n")
    how = ("--json", "--temperature=1", "--top_k=50", "--seed=3")
    found = [row["new_ids"] for row in rows(call(f"--batch_file={tmp_path / 'prompts'}", *how)[1])]
    assert len({tuple(ids) for ids in found}) == 3
    assert found[0] == rows(call("--prompt=the", *how)[1])[0]["new_ids"]


@pytest.mark.slow
def test_a_dialogue_keeps_what_was_said(call):
    how = ("--chat", "--json", "--system=Be brief.")
    code, out, _ = call(*how, stdin="the fox\n\nand the dog\n")
    assert code == 0
    first, second = rows(out)
    words = folders.tokenizer()
    begun = "<|system|>Be brief.\n<|user|>the fox\n<|assistant|>"
    assert first["prompt_ids"] == words.prompt(begun)
    more = f"{begun}{first['text']}\n<|user|>and the dog\n<|assistant|>"
    assert second["prompt_ids"] == words.prompt(more)
    (once,) = rows(call(*how, "--prompt=the fox")[1])
    assert once["new_ids"] == first["new_ids"]


@pytest.mark.slow
def test_a_stop_string_can_be_given_several_times(call):
    (whole,) = rows(call("--prompt=the", "--json")[1])
    stop = whole["text"][-2:]
    (cut,) = rows(call("--prompt=the", "--json", "--stop=@@@", f"--stop={stop}")[1])
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


@pytest.mark.slow
def test_a_mesh_writes_the_same(call):
    alone = rows(call("--prompt=the", "--json")[1])[0]["new_ids"]
    for axes in (["--mesh.tensor=2"], ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]):
        assert rows(call("--prompt=the", "--json", *axes)[1])[0]["new_ids"] == alone


@pytest.mark.slow
def test_max_tokens_default_to_what_the_positions_leave(call, tmp_path):
    folders.write(tmp_path, "gpt2")
    (row,) = rows(call("--prompt=the", "--json", checkpoint=tmp_path, most="")[1])
    assert len(row["prompt_ids"]) + len(row["new_ids"]) == 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --prompt=TEXT or --batch_file=FILE, or --chat to talk"),
        (["--prompt=a", "--batch_file=b"], "either --prompt or --batch_file, not both"),
        (["--prompt=a", "--temperature=-1"], "--temperature=-1.0 must be at least 0; 0 is greedy"),
        (["--prompt=a", "--temperature=hot"], "--temperature=hot must be a number"),
        (["--prompt=a", "--top_p=0"], "--top_p=0.0 must be above 0"),
        (["--prompt=a", "--seed=-1"], "--seed=-1 must be 0 to"),
        (["--prompt=a", "--stop="], "--stop= is empty"),
        (["--prompt="], "--prompt= is empty"),
        (["--prompt=a", "--system=b"], "add --chat"),
        (["--prompt=a", "--dtype=float16"], "--dtype=float16 is none of float32, bfloat16"),
        (["--prompt=a", "--mesh.tensor=3"], "--mesh.tensor=3 does not divide kv_heads=2"),
        (["--prompt=a", "--mesh.tensor=64"], "it takes 64 devices, there are 8"),
        (["--prompt=a", "--mesh.data=0"], "data=0 must be at least 1"),
        (["--batch_file=/nowhere/prompts"], "/nowhere/prompts: no such file"),
        (["--prompt=a", "--tempreature=1"], "did you mean --temperature?"),
    ],
)
def test_a_wrong_flag_is_told_with_exit_code_2(call, args, message):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_wrong_checkpoint_is_told_with_exit_code_2(call, tmp_path):
    folders.write(tmp_path / "gpt2", "gpt2")
    wrong = [
        (tmp_path / "nothing", ["--prompt=a"], "there is no such folder or file"),
        (tmp_path / "gpt2", ["--prompt=" + "the " * 40], "more than the 32 positions"),
        (tmp_path / "gpt2", ["--prompt=a", "--chat"], "no chat template"),
        (tmp_path / "gpt2", ["--chat"], "no chat template"),
    ]
    for checkpoint, args, message in wrong:
        code, out, err = call(*args, checkpoint=checkpoint)
        assert (code, out) == (2, "") and message in err, err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\nb\n', ":2: this is no JSON, as the first line is"),
        ('{"prompt": 3}\n', ':1: write {"prompt": "TEXT"}'),
        ('{"text": "a"}\n', ':1: write {"prompt": "TEXT"}'),
    ],
)
def test_a_wrong_file_of_prompts_names_the_line(call, tmp_path, text, message):
    (tmp_path / "prompts").write_text(text)
    code, out, err = call(f"--batch_file={tmp_path / 'prompts'}")
    assert (code, out) == (2, "") and message in err


@pytest.mark.slow
def test_who_reads_may_stop_reading(folder):
    args = [sys.executable, "generate.py", f"--checkpoint={folder}", "--prompt=a"]
    running = subprocess.Popen(
        [*args, "--max_tokens=2000", "--ignore_eos"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert running.stdout.read(1)
    running.stdout.close()
    _, err = running.communicate(timeout=120)
    assert running.returncode == 141  # 128 + SIGPIPE
    assert b"Traceback" not in err and b"Exception" not in err


@pytest.mark.slow
def test_ctrl_c_ends_quietly(folder, heeds_ctrl_c):
    args = [sys.executable, "generate.py", f"--checkpoint={folder}", "--chat"]
    running = subprocess.Popen(
        args, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert b"parameters" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.decode() == "generate.py: stopped by Ctrl-C\n"
