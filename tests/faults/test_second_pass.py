"""A step that is not finite: its first bad layer and tensor are named, and a bundle repeats it."""

import re
import sys

import jax
import numpy as np
import pytest

import train
from configs.run import Run
from data.config import DataConfig
from model.config import Arch, ModelConfig
from sharding import mesh as meshes
from sharding.mesh import MeshConfig
from tools import replay
from training.bundle import Bundle
from training.second_pass import SecondPass

MODEL = ModelConfig(
    layers=3, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab=64, dtype="float32",
    arch=Arch(activation="relu2"),
)  # fmt: skip
RUN = Run(model=MODEL, data=DataConfig(batch=4, seq=16), mesh=MeshConfig(data=2, fsdp=2))
QUICK = ("--config.eval.every=0", "--config.eval.bytes=1", "--config.sample.tokens=0")


@pytest.fixture(scope="module")
def look():
    """`look(name, layer, value)`: what is named with a parameter of a layer set to a value."""
    with jax.set_mesh(meshes.make(RUN.mesh, jax.devices()[:4])):
        program = train.build(RUN)
        second = SecondPass(program)
        params, draw = program.fresh().params, np.random.default_rng(0)
        ids = draw.integers(0, 64, (4, 16), dtype=np.int32)
        ones = np.ones((4, 16), np.int32)
        place = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
        batch = program.place({"inputs": ids, "targets": ids, "positions": place, "segments": ones})

        def changed(name: str, layer, value: float) -> str:
            def change(path, a):
                if jax.tree_util.keystr(path, simple=True, separator=".") != name:
                    return a
                whole = np.array(a)
                whole[layer] = value
                return jax.device_put(whole, a.sharding)

            return second.first_bad(jax.tree.map_with_path(change, params), batch)

        changed.names = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree.leaves_with_path(params)
        ]
        yield changed


@pytest.mark.slow
def test_nothing_is_named_of_a_step_that_is_finite(look):
    assert look("none", 0, 0.0) == ""


@pytest.mark.slow
def test_a_parameter_that_is_not_finite_is_named_with_its_layer(look):
    (name,) = (name for name in look.names if re.search(r"mlp\.down\.weight$", name))
    assert re.match(r"layer 2: the parameter mlp.down.weight has \d+ NaN", look(name, 2, np.nan))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "layer", "words"),
    [
        (r"mlp\.up\.weight$", 1, "layer 1: what its feed-forward gives"),
        (r"attention\..*weight$", 2, "layer 2: what its attention gives"),
        (r"^norm\.scale$", slice(None), "the (states after the last norm|loss)"),
    ],
)
def test_finite_weights_that_overflow_are_named_where_they_do(look, tensor, layer, words):
    name = next(name for name in look.names if re.search(tensor, name))
    assert re.match(words, look(name, layer, 3e38))


def repeated(bundle, monkeypatch, capsys, *args: str) -> tuple[int, str]:
    """Exit code and output of tools.replay."""
    monkeypatch.setattr(sys, "argv", ["replay", str(bundle), *args])
    replay.FLAGS.unparse_flags()
    code = replay.main()
    return code, capsys.readouterr().out


@pytest.fixture(scope="module")
def sick(session_command, tmp_path_factory):
    """A run whose first steps move the parameters so far that the third is not finite."""
    ended = session_command(
        tmp_path_factory.mktemp("sick") / "run", *QUICK, "--config.optim.lr=1e18",
        "--config.optim.clip=0", "--config.optim.warmup=0", "--config.checkpoint.every=1",
        "--config.guard.stop=2", "--config.steps=6", "--config.log.every=1",
        "--config.checkpoint.keep=9",
    )  # fmt: skip
    assert ended.code == 3, ended.out + ended.err
    return ended


@pytest.mark.slow
def test_a_run_names_what_was_not_finite_and_one_device_repeats_it(sick, monkeypatch, capsys):
    ((step, first),) = re.findall(r"not finite step (\d+): first (.*); python -m", sick.out)
    assert re.match(r"layer 0: (what its|the states)|the (states|loss)|.*the gradient of", first)
    assert f"first not finite: {first}" in sick.err
    file = sick.workdir / "bundles" / f"{step}.json"
    bundle = Bundle.read(file)
    assert (bundle.step, bundle.state, bundle.seed) == (int(step), int(step) - 1, 0)
    code, out = repeated(file, monkeypatch, capsys)
    assert code == 0, out
    assert f"recorded   step {step}: {bundle.why}; {first}" in out
    assert "samples    those of the bundle" in out
    assert f"from       {sick.workdir / 'checkpoints' / str(bundle.state)}, 1 steps" in out
    (found,) = re.findall(r"(?m)^replayed   step \d+: .*; (.*)$", out)
    assert found.partition(" has ")[0] == first.partition(" has ")[0]


@pytest.mark.slow
def test_a_bundle_of_a_run_without_saves_is_repeated_from_its_beginning(
    sick, monkeypatch, capsys, tmp_path
):
    (file,) = (sick.workdir / "bundles").iterdir()
    again = tmp_path / "bundle.json"
    again.write_text(re.sub(r'"state": \d+', '"state": 0', file.read_text()))
    code, out = repeated(again, monkeypatch, capsys)
    assert code == 0 and "from       the beginning" in out, out


def test_what_is_no_bundle_is_refused(tmp_path, monkeypatch, capsys):
    for text in ("", "[]", '{"format": "meshlm bundle 1"}', '{"step": 3}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json is no bundle of a run"):
            repeated(tmp_path / "b.json", monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["replay"])
    with pytest.raises(ValueError, match="write one bundle"):
        replay.main()


@pytest.mark.parametrize(("step", "state"), [(10**20, 0), (5, 5), (5, -1)])
def test_a_bundle_of_steps_that_a_run_cannot_have_is_not_repeated_for_ever(step, state, tmp_path):
    made = Bundle(step, "", "", "", "", [], 0, Run(), 1, "", state, "")
    with pytest.raises(ValueError, match=f"state={state} and step={step} must be in order"):
        Bundle.read(made.write(tmp_path))
