"""What a user can get wrong on a command line: exit code 2 and one message with what is right."""

import os
import shutil

import pytest
from absl import flags

from configs import command
from configs.run import Run, check

FILES = {
    "good.py": "from configs.run import Run\ndef get_config():\n    return Run()\n",
    "sized.py": "from configs.run import Run\ndef get_config(arg='4'):\n"
    "    return Run(steps=int(arg))\n",
    "needs.py": "from configs.run import Run\ndef get_config(arg):\n    return Run()\n",
    "raises.py": "def get_config():\n    x = 1\n    return x / 0\n",
    "unnamed.py": "from configs.run import Run\nRun(stepps=3)\n",
    "syntax.py": "def get_config():\n    return Run(\n",
    "nothing.py": "from configs.run import Run\n",
    "number.py": "def get_config():\n    return 3\n",
    "heads.py": "from configs.run import *\ndef get_config():\n    return Run(model=ModelConfig(\n"
    "        heads=6))\n",
    "list.py": "from configs.run import *\ndef get_config():\n"
    "    return Run(data=DataConfig(sources='books'))\n",
    "exits.py": "import sys\nsys.exit('bye')\n",
    "imports.py": "import no_such_module\n",
    "zero.py": "x = 1\0\n",
    "evals.py": "eval('(')\n",
    "notes.txt": "steps = 3\n",
    "bad.json": '{"steps": 5,}',
    "key.json": '{"model": {"layrs": 5}}',
    "type.json": '{"optim": {"lr": "fast"}}',
}

# Arguments, and what the message must say: the value, and what would be right.
ROWS = [
    # Fields that do not exist.
    ("--config.model.lyers=3", "no field model.lyers", "did you mean model.layers?", "head_dim"),
    ("--config.lr=1", "no field lr", "did you mean optim.lr?", "there are name, steps, seed"),
    ("--config.modle.layers=3", "did you mean model.layers?"),
    ("--config.model.norm.eps=1", "did you mean model.arch.norm.eps?"),
    ("--config.optim.learning=1", "no field optim.learning", "optim has name, lr, schedule"),
    ("--config.steps.x=3", "steps.x: steps is an integer and has no fields"),
    ("--config..steps=3", "no field .steps", "did you mean steps?"),
    ("--config.model.=3", "no field model.", "model has layers"),
    ("--config.=3", "no field", "there are name, steps"),
    ("--config.model=3", "model is a group of fields", "set one of model.layers"),
    ("--config.model.arch.norm=rms", "set one of model.arch.norm.kind, model.arch.norm.eps"),
    # Values of a wrong type.
    ("--config.model.layers=three", "model.layers='three' must be an integer, such as 4"),
    ("--config.steps=1.5", "steps='1.5' must be an integer, such as 100"),
    ("--config.steps=", "steps='' must be an integer"),
    ("--config.name=", "name='' must be a non-empty text"),
    ("--config.optim.lr=nan", "optim.lr='nan' must be a finite number, such as 0.0003"),
    ("--config.model.arch.head.tied=maybe", "must be true or false, such as false"),
    ("--config.model.arch.attention.windows=8,x", "must be comma-separated integers"),
    ("--config.data.weights=half", "must be comma-separated finite numbers"),
    ("--config.layout.heads=", "must be a non-empty text or comma-separated texts or none"),
    # Values that a config refuses.
    ("--config.steps=0", "steps=0 must be at least 1"),
    ("--config.steps=3e9", "steps=3000000000 must be at least 1 and below 2**31"),
    ("--config.seed=-1", "seed=-1 must be at least 0"),
    ("--config.name=a/b", "name='a/b' must be a plain file name"),
    ("--config.log.every=0", "log: every=0 must be at least 1"),
    ("--config.eval.every=-1", "eval: every=-1 must be at least 0"),
    ("--config.checkpoint.keep=0", "checkpoint: keep=0 must be at least 1"),
    ("--config.checkpoint.keep_every=-5", "checkpoint: keep_every=-5 must be at least 0"),
    ("--config.guard.stop=0", "guard: stop=0 must be at least 1"),
    ("--config.guard.spike=-6", "guard: spike=-6.0 must be at least 0"),
    ("--config.guard.window=200", "guard: window=200 must be 8 to 128 steps"),
    ("--config.model.heads=6", "model: heads=6 must be a multiple of kv_heads=4"),
    ("--config.model.head_dim=7", "model: head_dim=7 must be even"),
    ("--config.model.dtype=int7", "model: dtype='int7' is none of float32, bfloat16"),
    ("--config.model.arch.norm.kind=batch", "model.arch.norm: kind='batch' is none of rms, layer"),
    ("--config.model.arch.norm.bias=1", "model.arch.norm: bias=True needs kind='layer'"),
    ("--config.model.arch.attention.windows=", "model.arch.attention: windows is empty"),
    ("--config.optim.name=adam", "optim: name='adam' is none of adamw, sgd"),
    ("--config.optim.lr=-1", "optim: lr=-1.0 must not be negative"),
    ("--config.data.sources=", "data: sources=() names no source", "stdlib"),
    ("--config.data.weights=1,2", "data: 2 weights for 1 sources"),
    ("--config.data.held_out=1", "data: held_out=1.0 must be at least 0 and below 1"),
    ("--config.data.batch=-8", "data: batch=-8 must be at least 1"),
    ("--config.mesh.tensor=0", "mesh: tensor=0 must be at least 1, or -1"),
    ("--config.mesh.tensor=-1", "mesh: only one mesh axis can be -1"),
    (
        "--config.layout.mlp=tensr",
        "layout: mlp='tensr' is no mesh axis: dcn, data, ",
    ),
    ("--config.layout.mlp=fsdp", "layout: batch and mlp of one array cannot both be on fsdp"),
    ("--config.layout.batch=data,data", "layout: batch=data,data names data twice"),
    # What only shows once the number of devices is known; the test's main has 6 of them.
    ("--config.mesh.data=4", "mesh: 6 devices do not divide into data=4"),
    ("--config.data.batch=8", "data: batch=8 does not divide over data=6", "a multiple of 6"),
    # The form of the command line.
    ("--config.steps", "--config.steps has no value, write --config.steps=VALUE"),
    ("--config.steps --workdir=x", "--config.steps has no value"),
    ("--config.steps=1 --config.steps=2", "--config.steps is given twice"),
    ("--config=good.py --config=good.py", "--config is given twice"),
    ("--config=", "--config= is empty"),
    ("--config", "--config has no value, write --config=VALUE"),
    ("--workdir=", "--workdir= is empty"),
    ("--workdir", "--workdir has no value, write --workdir=VALUE"),
    ("--workdir --fast", "--workdir has no value"),
    ("--workdir=a --workdir=b", "--workdir is given twice"),
    ("--fast --nofast", "--fast is given twice"),
    ("--wrokdir=x", "no flag --wrokdir, did you mean --workdir?", "there are --workdir"),
    ("--steps=3", "no flag --steps, did you mean --config.steps?"),
    ("--lr=3", "no flag --lr, did you mean --config.optim.lr?"),
    ("--model.layers=3", "no flag --model.layers, did you mean --config.model.layers?"),
    ("--confg.steps=3", "no flag --confg.steps, did you mean --config.steps?"),
    ("--configs=good.py", "no flag --configs, did you mean --config?"),
    ("--" + "z" * 5000, "no flag --zzz", "..."),
    ("--zzz=1", "no flag --zzz; there are --workdir"),
    ("--processes=many", "--processes=many must be a positive integer"),
    ("--processes=0", "--processes=0 must be a positive integer"),
    ("--kind=c", "--kind=c must be one of a, b"),
    ("--fast=perhaps", "--fast=perhaps must be true or false"),
    ("--flagfile=absent.txt", "--flagfile: Unable to open", "absent.txt"),
    ("good.py", "good.py stands without a flag, write --config=good.py"),
    ("steps=3", "steps=3 is no flag, write --config.steps=VALUE"),
    ("config.steps=3", "config.steps=3 is no flag, write --config.steps=VALUE"),
    ("workdir=x", "workdir=x is no flag, write --workdir=x"),
    ("--config.steps 3 4", "'4' stands without a flag"),
    ("\u2013\u2013config=good.py", "dash of the keyboard, write --config"),
    # Files.
    ("--config=god.py", "god.py is no file, did you mean good.py?"),
    ("--config=good", "good is no file, did you mean good.py?"),
    ("--config=absent/x.py", "absent/x.py is no file", "the recipes are"),
    ("--config=.", ". is a folder", "the recipes are"),
    ("--config=saved", "saved is a folder; write saved/config.json"),
    ("--config=notes.txt", "notes.txt must be a recipe (.py) or a saved config (.json)"),
    ("--config=good.py:", "nothing follows the colon", "good.py:ARG"),
    ("--config=good.py:big", "good.py takes no argument, got 'big'"),
    ("--config=needs.py", "needs.py needs an argument; write needs.py:ARG"),
    ("--config=sized.py:big", "sized.py:3: invalid literal for int()", "'big'"),
    ("--config=bad.json:x", "only a recipe takes an argument"),
    ("--config=raises.py", "raises.py:3: ZeroDivisionError: division by zero"),
    ("--config=unnamed.py", "unnamed.py:2: TypeError", "stepps"),
    ("--config=syntax.py", "syntax.py:2: '(' was never closed"),
    ("--config=nothing.py", "nothing.py has no function get_config"),
    ("--config=number.py", "number.py:1: get_config returned 3, it must return a Run"),
    ("--config=heads.py", "heads.py:3: heads=6 must be a multiple of kv_heads=4"),
    ("--config=list.py", "list.py:2", "data.sources='books' must be comma-separated texts"),
    ("--config=exits.py", "exits.py:2: SystemExit: bye"),
    ("--config=imports.py", "imports.py:1: ModuleNotFoundError", "no_such_module"),
    ("--config=zero.py", "zero.py", "null bytes"),
    ("--config=evals.py", "evals.py:1: SyntaxError"),
    ("--config=~nobody-here/x.py", "~nobody-here/x.py is no file"),
    ("--config=bad.json", "bad.json:1: this is no JSON"),
    ("--config=key.json", "key.json: no field model.layrs, did you mean model.layers?"),
    ("--config=type.json", "type.json: optim.lr='fast' must be a finite number"),
    ("--config=" + "x" * 5000, "file name too long"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "saved").mkdir()
    shutil.copy(folder / "key.json", folder / "saved" / "config.json")
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Call a command that has a few flags and six devices: exit code, stdout, stderr, its Run."""
    monkeypatch.chdir(folder)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("processes", 1, "processes", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("kind", "a", ["a", "b"], "a kind", flag_values=values)
    flags.DEFINE_bool("fast", False, "be fast", flag_values=values)
    flags.DEFINE_multi_string("note", None, "may be given often", flag_values=values)
    got = []

    def main(run: Run):
        with command.user_input():
            check(run, devices=6)
        got.append(run)

    def call(*args, body=main, recipe="good.py"):
        code = command.status(body, args, recipe=recipe, values=values)
        out = capsys.readouterr()
        return code, out.out, out.err, (*got, None)[0], values

    return call


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_a_wrong_input_ends_with_code_2_and_one_message(call, row):
    arguments, *fragments = row
    code, out, err, run, _ = call(*arguments.split(" "))
    assert (code, out, run) == (2, "", None), err
    assert err.count("\n") == 1, err
    assert ": error: " in err
    assert "Traceback" not in err
    assert len(err) < 700
    for fragment in fragments:
        assert fragment in err


def test_there_are_enough_rows():
    assert len(ROWS) >= 45
    assert len({row[0] for row in ROWS}) == len(ROWS)


def test_a_file_that_may_not_be_read_is_named(call, folder, monkeypatch):
    path = folder / "secret.json"
    path.touch()
    real = type(path).open

    def refuse(self, *args, **kwargs):  # root may read everything: play the refusal
        if self.name == path.name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(path), "open", refuse)
    code, _, err, _, _ = call("--config=secret.json")
    assert code == 2
    assert "secret.json: permission denied" in err


def test_a_recipe_that_is_a_pipe_is_not_waited_for(call, folder):
    os.mkfifo(folder / "pipe.py")
    code, _, err, _, _ = call("--config=pipe.py")
    assert code == 2
    assert "no regular file" in err


FINE = ["--config.data.batch=12"]  # divides over six devices


@pytest.mark.parametrize(
    ("args", "path", "value"),
    [
        (["--config.steps=7"], "steps", 7),
        (["--config.steps", "7"], "steps", 7),
        (["-config.steps=7"], "steps", 7),
        (["--config", "sized.py:9"], "steps", 9),
        (["--config.steps=8", "--config=sized.py:9"], "steps", 8),
        (["--workdir=x", "--note=a", "--note=b", "--nofast"], "steps", 100),
    ],
)
def test_right_inputs_in_every_spelling_reach_main(call, args, path, value):
    code, _, err, run, values = call(*args, *FINE)
    assert (code, err) == (0, "")
    assert getattr(run, path) == value
    if "--note=a" in args:
        assert values.note == ["a", "b"]
        assert values.workdir == "x"


def test_a_negative_number_can_follow_its_flag_as_a_word(call):
    code, _, _, run, _ = call("--config.mesh.fsdp", "1", "--config.mesh.data", "-1", *FINE)
    assert (code, run.mesh.data) == (0, -1)


def test_a_flag_file_sets_defaults_that_the_command_line_overrides(call, folder):
    (folder / "flags.txt").write_text("# comment\n--config.steps=5\n--config.seed=6\n--workdir=w\n")
    code, _, err, run, values = call("--flagfile=flags.txt", "--config.steps=8", *FINE)
    assert (code, err) == (0, "")
    assert (run.steps, run.seed, values.workdir) == (8, 6, "w")


def test_a_command_without_recipe_takes_no_config(call):
    code, _, err, _, _ = call("--config.steps=3", body=lambda: None, recipe=None)
    assert code == 2
    assert "no flag --config.steps" in err
    assert call(body=lambda: None, recipe=None)[0] == 0
    assert call(body=lambda: 1, recipe=None)[0] == 1


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpshort"])
def test_help_is_short_and_names_flags_examples_and_fields(call, flag):
    code, out, err, run, _ = call(flag, "--config.nonsense=3")
    assert (code, err, run) == (0, "", None)
    assert out.startswith("What a user can get wrong")
    for text in ("--workdir=VALUE", "folder of the run", "default a", "--config.PATH=VALUE"):
        assert text in out
    for text in ("Examples:", "--config.steps=500", "layers=4", "model.arch.norm", "lr=0.0003"):
        assert text in out
    assert "verbosity: " not in out
    assert len(out.splitlines()) <= 52
    assert max(map(len, out.splitlines())) <= 100


def test_a_required_flag_that_is_missing_is_named_with_what_it_means(call):
    values = call("--helpfull")[-1]
    flags.DEFINE_string("into", None, "folder for the result", required=True, flag_values=values)
    code, _, err, _, _ = call()
    assert code == 2
    assert "--into=VALUE is required: folder for the result" in err


def test_helpfull_lists_what_absl_knows(call):
    code, out, _, _, _ = call("--helpfull")
    assert code == 0
    assert "--[no]fast: be fast" in out
