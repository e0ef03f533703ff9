"""`python -m tools.plan` agrees with compilers and measurements, and mends what does not fit."""

import dataclasses
import functools
import json
import re

import pytest

from configs.load import load
from costs import flops, targets
from tests.commands import status
from tools import parity
from tools import plan as tool
from training import plans
from training.search import Search

GIB = 2**30


def run(*args):
    """The exit code of the command, in this process."""
    if args:
        args = ("--nocompile", *(() if "--formats" in args else ("--noformats",)), *args)
    return status(tool, *args, recipe="configs/quickstart.py")


def counted(recipe, target, overrides=None):
    """The plan of a recipe, by counting."""
    target = targets.parse(target)
    return plans.count(load(recipe, overrides or {}), target, tool.tracer(target.platform))


def llama(size):
    return f"configs/llama.py:{size}"


@pytest.fixture
def soon(monkeypatch):
    """A search that ends after few tries."""
    monkeypatch.setattr(tool, "Search", functools.partial(Search, limit_s=4.0))


slow = pytest.mark.slow
FINE = {"model.embed": "2048", "model.layers": "16", "model.mlp": "8192", "model.heads": "32",
        "model.kv_heads": "8", "model.vocab": "128256"}  # fmt: skip
HYBRID = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2", "model.layers": "8"}
FULL = {"model.remat": "full", "data.batch": "16"}
PARTS = {"model.layers": "4", "model.unroll": "4", "data.batch": "32", "optim.accumulate": "4"}
TOKENS_APART = {"mesh.fsdp": "2", "mesh.tensor": "4", "model.remat": "attention",
                "model.layers": "4", "model.unroll": "1", "model.embed": "3072",
                "model.heads": "24", "model.head_dim": "128"}  # fmt: skip
COMPILED = [  # peak bytes by XLA, ahead of time, jax 0.11.2: LOG.md
    ("configs/quickstart.py", "h100x8", {}, 65_960_360),
    pytest.param(llama("124M"), "h100x8", {}, 6_267_000_000, marks=slow),
    pytest.param(llama("350M"), "h100x8", {}, 11_610_000_000, marks=slow),
    pytest.param(llama("8B"), "h100x8", FULL, 27_378_000_000, marks=slow),
    pytest.param(llama("8B"), "h100x8", HYBRID, 20_290_000_000, marks=slow),
    pytest.param(llama("1B"), "h100x8", {}, 13_889_000_000, marks=slow),
    pytest.param(llama("8B-80GB"), "h100x1", {"data.batch": "1"}, 60_050_000_000, marks=slow),
    (llama("124M"), "v5e-8", {}, 6_243_000_000),
    pytest.param(llama("350M"), "v5p-8", {"data.batch": "32"}, 7_259_000_000, marks=slow),
    pytest.param(llama("1B"), "h100x8", PARTS, 8_241_000_000, marks=slow),
    pytest.param(llama("1B"), "h100x8", TOKENS_APART, 4_697_000_000, marks=slow),
]
EXPERTS = [  # the same, of 4 layers of a family
    ("mixtral", {"mesh.fsdp": "8"}, 31_560_000_000),
    ("mixtral", {"mesh.fsdp": "1", "mesh.expert": "8"}, 22_110_000_000),
    ("qwen3_moe", {"mesh.fsdp": "8"}, 57_930_000_000),
    ("qwen3_moe", {"mesh.fsdp": "1", "mesh.expert": "8"}, 28_950_000_000),
]
SMALL_CHUNK = {"model.arch.head.chunk": "2048"}


def precision(forward, dgrad, wgrad, **more):
    """Of all hidden layers."""
    passes = {"forward": forward, "dgrad": dgrad, "wgrad": wgrad}
    kinds = ("attention", "mlp")
    return {
        f"precision.{kind}.{name}": form for kind in kinds for name, form in passes.items()
    } | more


MEASURED = [  # GiB and ms a step: LOG.md, "8 bits on one H100", "One H100" and "Four H200"
    (llama("8B-80GB"), "h100x1", {"data.batch": "1"}, 55.9, 980),
    (llama("8B-80GB"), "h100x1", {}, 66.5, 1823),
    (llama("1B-80GB"), "h100x1", {}, 64.9, 872),
    (llama("1B-80GB"), "h100x1", precision("int8", "int8", "bf16"), 64.0, 789.1),
    (llama("1B-80GB"), "h100x1", precision("int8", "int8", "fp8"), 64.9, 775.2),
    (llama("1B-80GB"), "h100x1", precision("int8", "int8", "int8"), 61.4, 767.7),
    (llama("1B-80GB"), "h100x1",
     precision("int8", "int8", "int8", **{"precision.head.forward": "int8"}), 63.5, 759.3),
    (llama("1B"), "h100x1", {"data.batch": "2", "model.remat": "mlp", **SMALL_CHUNK}, 28.5, 348),
    (llama("1B"), "h100x1", {"data.batch": "3", "model.remat": "attention", **SMALL_CHUNK},
     27.7, 520),
    (llama("8B"), "h200x4", {"data.batch": "12"}, 109.6, 2398),
    (llama("8B"), "h200x4", {"data.batch": "12", "model.unroll": "32"}, 105.4, 2341),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "target", "overrides", "bytes"), COMPILED)
def test_memory_is_the_compilers_within_ten_per_cent(recipe, target, overrides, bytes):
    assert counted(recipe, target, overrides).counted == pytest.approx(bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh", "bytes"), EXPERTS)
def test_memory_of_experts_is_the_compilers_within_ten_per_cent(family, mesh, bytes):
    run = load(llama("1B"), {"data.seq": "2048", "data.batch": "16", **mesh})
    model = parity.model_named(run.model, family)
    run = dataclasses.replace(run, model=dataclasses.replace(model, layers=4, unroll=1))
    plan = plans.count(run, targets.parse("h100x8"), tool.tracer("gpu"))
    assert plan.counted == pytest.approx(bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "target", "overrides", "gib", "ms"), MEASURED)
def test_memory_and_time_are_what_gpus_were_seen_to_take(recipe, target, overrides, gib, ms):
    plan = counted(recipe, target, overrides)
    assert plan.counted / GIB == pytest.approx(gib, rel=0.1)
    assert plan.step * 1e3 == pytest.approx(ms, rel=0.1)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("recipe", "target", "overrides"),
    [
        ("configs/quickstart.py", "h100x8", {}),
        ("configs/finetune.py", "h100x8", FINE),
        (llama("124M"), "h100x8", {}),
        (llama("350M"), "h100x1", {"data.batch": "4"}),
        (llama("1B"), "h100x8", {}),
        (llama("8B"), "h100x8", {}),
        (llama("8B"), "h100x8", {"mesh.fsdp": "2", "mesh.tensor": "4"}),
        (llama("8B-80GB"), "h100x1", {}),
        ("configs/quickstart.py", "v5e-8", {}),
        (llama("124M"), "v5e-8", {}),
        (llama("350M"), "v5p-8", {"data.batch": "32"}),
    ],
)
def test_memory_is_within_ten_per_cent_of_what_the_compiler_here_says(recipe, target, overrides):
    if lacks := targets.missing(targets.parse(target)):
        pytest.skip(lacks)
    plan = counted(recipe, target, overrides)
    plan = plans.compile_for(plan, tool.tracer(plan.target.platform))
    # A TPU's on-chip memory holds small arrays, which its compiler's figure leaves out.
    small = 8 * 2**20 if plan.target.platform == "tpu" else 0
    assert plan.counted == pytest.approx(plan.compiled["bytes"], rel=0.1, abs=small), plan.compiled


def test_it_says_what_a_device_holds_and_how_long_a_step_takes(capsys):
    assert run(f"--config={llama('8B')}", "--target=h100x8", "--json") == 0
    out = capsys.readouterr().out
    assert "fits: " in out and "predicted: " in out and "h100x8 as fsdp=8" in out
    told = json.loads(out.splitlines()[-1])
    assert told["fits"] and told["mesh"]["fsdp"] == 8
    parts = dict(told["bytes"])
    assert parts.pop("counted") == sum(parts.values()) == pytest.approx(46_220_000_000, rel=0.1)
    params = 8_030_261_248 * 4 / 8
    assert parts["parameters"] == pytest.approx(params, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(2 * params, rel=1e-3)
    assert 0.4 < told["mfu"] < 0.65
    gathered = sum(one["bytes"] for one in told["collectives"] if one["kind"] == "all-gather")
    # Each matrix is gathered in bfloat16 forward and backward, the head's once; norms stay whole.
    layers = 8_030_261_248 - 2 * 128_256 * 4096
    assert gathered == pytest.approx(2 * (2 * layers + 128_256 * 4096), rel=0.01)


@pytest.mark.slow
def test_what_lies_on_the_host_counts_there_and_for_the_way():
    sizes = {"model.layers": "2", "model.vocab": "1024", "data.batch": "2", "model.remat": "dots"}
    plan = counted(llama("124M"), "h100x1", {**sizes, "layout.host": "optimizer,input"})
    moments = 8 * flops.params(plan.run.model)
    waiting = 2 * 2 * 2 * 1024 * 768  # bfloat16, of 2 layers' 2 rows of 1,024 tokens
    assert plan.parts["optimizer"] == 8, "two counts of steps"
    assert plan.host == moments + waiting
    assert plan.time.host == pytest.approx(2 * (moments + waiting) / 50e9)
    here = counted(llama("124M"), "h100x1", sizes)
    assert here.parts["activations"] - plan.parts["activations"] == waiting
    assert (here.host, here.time.host) == (0, 0)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_the_smallest_change(capsys):
    sizes = ("--config.model.layers=16", "--config.data.batch=2")
    args = (f"--config={llama('8B')}", "--target=h100x2", "--mesh=data=2", *sizes, "--json")
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert re.search(r"does not fit: .* GiB are more than the 72.5 GiB", out)
    told = json.loads(out.splitlines()[-1])
    assert not told["fits"]
    assert set(told["smallest_change"]["flags"]) == {"--config.mesh.data=1", "--config.mesh.fsdp=2"}
    assert "--config.mesh.fsdp=2" in out


@pytest.mark.slow
def test_what_fits_on_no_mesh_says_how_many_devices_its_state_takes(soon, capsys):
    sizes = ("--config.data.batch=1", "--config.optim.name=lion")
    assert run(f"--config={llama('8B')}", "--target=h100x1", *sizes) == 0
    assert "The state and its gradients alone take 2 devices" in capsys.readouterr().out


@pytest.mark.slow
def test_what_fits_on_no_mesh_may_fit_with_a_smaller_state(soon, capsys):
    assert run(f"--config={llama('8B')}", "--target=h100x1", "--config.data.batch=1", "--json") == 0
    change = json.loads(capsys.readouterr().out.splitlines()[-1])["smallest_change"]
    smaller = {"--config.optim.moments=int8", "--config.model.param_dtype=bfloat16"}
    assert smaller <= set(change["flags"]) and change["bytes"] < 72.6 * GIB


@pytest.mark.slow
def test_a_recipe_that_cannot_be_split_is_told_with_the_best_mesh_that_was_found(soon, capsys):
    sizes = ("--config.data.batch=2", "--config.model.layers=2")
    assert run(f"--config={llama('124M')}", "--target=h100x4", *sizes, "--search") == 0
    out = capsys.readouterr().out
    assert re.search(r"cannot be split over h100x4: .*batch=2 does not divide over fsdp=4", out)
    assert re.search(r"this is with --config.mesh.*, on h100x4 as \w+=2,\w+=2\n", out, re.DOTALL)


@pytest.mark.slow
def test_formats_are_counted_and_have_their_prices(capsys):
    args = ("--formats", "--config.model.layers=2", "--config.model.unroll=2", "--json")
    assert run(f"--config={llama('1B-80GB')}", "--target=h100x1", *args) == 0
    out = capsys.readouterr().out
    ms = r"([\d.]+) ms, [\d.]+ GiB"
    [base] = re.findall(rf"bfloat16 matmuls, float32 state +\| {ms}", out)
    [eight] = re.findall(rf"--config.precision=int8 +\| {ms}.*yes, for its speed", out)
    assert 0.8 < float(eight) / float(base) < 0.97
    assert re.search(r"--scheme=w4g64 .* no: costs more than 1 %", out)
    told = json.loads(out.splitlines()[-1])["formats"]
    for found in (told["to train in"], told["to serve in"]):
        for one in found:
            row = " +\\| ".join(re.escape(one[key]) for key in ("name", "gain", "price", "use"))
            assert re.search(rf"\| {row} +\|", out), one


@pytest.mark.slow
def test_a_search_lists_the_fastest_that_fit(capsys):
    small = ("--config.model.layers=4", "--config.data.batch=16")
    assert run(f"--config={llama('124M')}", "--target=h100x4", *small, "--search", "--json") == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])["best"]
    assert 5 <= len(best) <= 10
    assert [one["step_s"] for one in best] == sorted(one["step_s"] for one in best)
    assert all(one["bytes"] < 72.6 * GIB for one in best)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--target=VALUE is required"),
        (("--target=h100x12",), "'h100x12' is no target; there are .*v5e-N .*h100xN .*cpuxN"),
        (("--target=v5e-7",), "'v5e-7' is no target"),
        (("--target=b300x8",), "'b300x8' is no target"),
        (("--target=h100x8", "--mesh=fsdp=3"), "--mesh=fsdp=3: 8 devices do not divide"),
        (("--target=h100x8", "--mesh=rows=8"), "--mesh: 'rows=8' is no AXIS=SIZE"),
        (("--target=h100x4", "--mesh=tensor=4", "--config.model.kv_heads=2"), "kv_heads=2"),
        (("--target=h100x1", "--family=llama9"), "--family=llama9 is none of llama"),
    ],
)
def test_what_a_user_mends_is_exit_code_2_and_one_message(args, message, capsys):
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("name", ["h100x1", "h200x16", "v5e-256", "v5p-1024", "v6e-4", "cpux3"])
def test_targets_of_any_size_that_is_built_are_known(name):
    target = targets.parse(name)
    assert target.count == int(re.search(r"\d+$", name)[0]) and target.usable > 0
