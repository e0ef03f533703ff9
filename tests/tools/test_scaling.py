"""`python -m tools.scaling`: what a mesh has to do, what times are made of, what it refuses."""

import json
import re

import jax
import pytest

from configs.load import load
from costs import flops
from tests.commands import status
from tools import scaling
from tools.parity import mesh_of

TINY = (
    "--config.model.layers=2", "--config.model.embed=16", "--config.model.heads=8",
    "--config.model.kv_heads=8", "--config.model.head_dim=4", "--config.model.mlp=16",
    "--config.model.vocab=64", "--config.data.seq=32", "--config.data.batch=2",
)  # fmt: skip


def call(*args):
    return status(scaling, *TINY, *args, recipe="configs/quickstart.py")


@pytest.mark.parametrize("axis", ["dcn", "data", "stage", "fsdp", "expert", "context", "tensor"])
def test_a_device_of_a_mesh_has_the_work_of_the_one(axis):
    """But for a head that stages share, and for keys that only a longer row has."""
    run, mesh = load("configs/llama.py:1B"), mesh_of({axis: 4})
    grown = scaling.grown(run, mesh, 6 * run.optim.accumulate)
    parts = 6 if axis == "stage" else 1
    assert grown.optim.accumulate == parts * run.optim.accumulate
    tokens = [one.data.batch * one.data.seq for one in (run, grown)]
    layers = run.model.layers / grown.model.layers
    assert tokens[1] == tokens[0] * 4 * layers * parts
    work = [flops.matmul_params(one.model) for one in (run, grown)]
    assert (work[0] == work[1]) == (axis != "stage")


def test_the_rate_of_a_device_is_held_against_that_of_one_alone(monkeypatch, capsys, tmp_path):
    """A step twice as long at the same work is an efficiency of one half."""

    def measure(run, documents):
        took = 1.0 if jax.sharding.get_mesh().size == 1 else 2.0
        where = {"where_ms": {"communication": 30.0}, "hidden_communication_ms": 10.0}
        return {"step_s": took, "planned_bytes": 0, **where}, None

    monkeypatch.setattr("tools.bench.measure", measure)
    path = tmp_path / "scaling.json"
    assert call("--meshes=fsdp=8;data=2,tensor=4", f"--output={path}") == 0
    out = capsys.readouterr().out
    for mesh in ("fsdp=8", "data=2,tensor=4"):
        assert re.search(rf"\| {mesh} +\| 2000\.0 .*\| 50\.0% .*\| 40\.0 +\| 25% ", out)
    told = json.loads(path.read_text())
    assert [one["efficiency"] for one in told["meshes"]] == [1.0, 0.5, 0.5]
    assert json.loads(out.splitlines()[-1]) == told


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--meshes=fsdp=3", "8 devices do not divide into fsdp=3"),
        ("--meshes=;", "names no mesh, write all or fsdp=8"),
        ("--meshes=expert=8", "expert=8 splits experts, and the model has none"),
        ("--micro_batches=0", "--micro_batches=0 must be a positive integer"),
    ],
)
def test_what_a_user_mends_is_exit_code_2(flag, message, capsys):
    assert call(flag) == 2
    assert message in capsys.readouterr().err
