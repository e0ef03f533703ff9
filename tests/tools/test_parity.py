"""`python -m tools.parity` passes what is right, catches what is wrong, says what it did."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest

from configs.load import ROOT, load
from costs import targets
from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Moe, Norm
from model.families import FAMILIES
from model.moe import MoeMlp
from sharding.gather import axes_of, gather
from sharding.layout import AXES, BUILT, Layout
from sharding.mesh import MeshConfig
from tests.commands import status
from tools import parity as tool
from training import moments, shrunk

HYBRID = "data=2,fsdp=2,tensor=2"


def run(*args):
    """The exit code of the command, in this process."""
    jobs = () if any(arg.startswith("--jobs") for arg in args) else ("--jobs=0",)
    return status(tool, *args, *jobs, recipe="configs/quickstart.py")


def forgetful(weight, rows):
    """`gather`, whose backward pass leaves out the sum over data."""
    spec = jax.typeof(weight).sharding.spec

    @jax.custom_vjp
    def whole(w):
        return gather(w, rows)

    def back(_, g):
        def local(g):
            for i, dim in enumerate(spec):
                if axes := tuple(axis for axis in axes_of(dim) if axis in rows):
                    g = jax.lax.psum_scatter(g, axes, scatter_dimension=i, tiled=True)
            return g

        return (jax.shard_map(local, out_specs=spec, check_vma=False)(g),)

    whole.defvjp(lambda w: (whole(w), None), back)
    return whole(weight)


DENSE = ("--config.model.layers=1", f"--meshes={HYBRID}", "--steps=2")


@pytest.fixture(scope="module")
def one_device():
    """`refer`, which does the same run once."""
    known = functools.cache(functools.partial(_refer, tool.refer))
    return lambda run, devices, options: known(run)


def _refer(refer, run):
    return refer(run, jax.devices(), tool.CPU_OPTIONS)


def test_a_dense_recipe_passes_on_hybrid_meshes(one_device, monkeypatch, capsys):
    monkeypatch.setattr(tool, "refer", one_device)
    over_tokens = "data=2,context=2,tensor=2"
    assert run(*DENSE[:1], f"--meshes={HYBRID};{over_tokens}", *DENSE[2:], "--verbose") == 0
    out = capsys.readouterr().out
    for mesh in (HYBRID, over_tokens):
        assert re.search(rf"\| {mesh} .*\| pass \|", out)
    # Five of weights; six of tokens: of a layer's two sums and of what their inputs get back, of
    # the embedding's sum, of what the head gives back.
    assert re.search(rf"\| {HYBRID} +\| \d+: [\d.]+ KiB +\| 11: ", out), "reduce-scatters"
    table = re.search(r"\| embedding\.table +\| (\d+)", out)
    assert int(table[1]) == 64 * 32 * 4 // 4  # vocab over tensor, width over fsdp
    assert "2 of 2 meshes within 1e-05 of one device" in out


def test_a_gradient_that_is_not_summed_over_data_fails(one_device, monkeypatch, capsys):
    monkeypatch.setattr(tool, "refer", one_device)
    monkeypatch.setattr("model.matmul.gather", forgetful)
    assert run(*DENSE) == 1
    out = capsys.readouterr().out
    gradients = re.search(rf"\| {HYBRID} \| \S+ +\| (\S+)", out)
    assert float(gradients[1]) > 1e4 * tool.TOLERANCE
    assert "FAIL" in out and "0 of 1 meshes" in out


@pytest.mark.slow
def test_a_mixture_passes(capsys):
    assert run("--family=mixtral", "--devices=2", "--meshes=fsdp=2", "--steps=1") == 0


def test_rounded_matmuls_may_differ_as_much_as_their_last_bits_make_them():
    right = tool.Reference(None, None, None, [2.0], 0.1, {"loss": 1e-7, "gradients": 0.01})
    assert right.within == {"loss": tool.ROUNDED, "gradients": tool.SWAYS * 0.01}

    def passes(**found):
        return tool.Row({}, found, {}, {}, within=right.within).passed

    assert passes(loss=9e-4, gradients=0.029)
    assert not passes(loss=1.1e-3, gradients=0.0) and not passes(loss=0.0, gradients=0.031)
    assert not passes(loss=0.0, gradients=float("nan"))
    assert not tool.Row({}, {"loss": 2e-5}, {}, {}).passed


def test_a_nudge_is_one_bit_up_or_down():
    values = np.array([[0.0, 1.0, -3.0, 1e-3]] * 50, np.float32)
    (nudged,) = shrunk.nudged([values], 0)
    assert (nudged[:, 0] == 0).all() and nudged.dtype == np.float32
    bits = (nudged[:, 1:].view(np.int32) - values[:, 1:].view(np.int32)).ravel()
    assert set(bits.tolist()) == {-1, 1}


@pytest.mark.slow
def test_a_run_in_8_bits_tells_how_far_its_last_bits_move_it(capsys):
    assert run("--config.precision=fp8", "--devices=2", "--meshes=fsdp=2", "--steps=1") == 0
    said = r"with other last bits of the first it changes loss by \S+, gradients by \S+, param"
    assert re.search(said, capsys.readouterr().out)


def test_one_wrong_copy_is_a_difference_though_the_first_is_right():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    right = np.arange(6, dtype=np.float32)
    copies = [jax.device_put(right + 3 * i, device) for i, device in enumerate(jax.devices()[:2])]
    where = jax.sharding.NamedSharding(mesh, jax.P())
    leaf = jax.make_array_from_single_device_arrays(right.shape, where, copies)
    assert moments.distance([leaf], [right]) == pytest.approx(math.sqrt(6 * 9 / 55))
    assert not moments.distance([leaf * np.nan], [right]) <= tool.TOLERANCE


@pytest.mark.parametrize(("devices", "powers"), [(1, []), (2, [1]), (8, [3]), (12, [2, 1])])
def test_every_factorisation_over_the_axes_is_listed_once(devices, powers):
    """Each prime factor of `devices`, to the power n, is shared out over k axes."""
    k = len(BUILT)
    found = [tuple(vars(mesh).values()) for mesh in tool.meshes_of("all", devices)]
    assert len(found) == len(set(found)) == math.prod(math.comb(n + k - 1, n) for n in powers)
    assert {math.prod(sizes) for sizes in found} == {devices}
    assert set(vars(MeshConfig())) == set(AXES), "each mesh axis has a size"


def test_the_page_holds_every_combination_of_axes():
    page = (ROOT / "docs/parallelism.md").read_text()
    assert tool.combinations() in page, "write what tools.parity.combinations() returns"
    for name in (*AXES, *vars(Layout())):
        assert f"`{name}`" in page, name


def test_a_mesh_that_breaks_fails_and_the_others_are_told(monkeypatch, capsys):
    def compare(run, mesh, devices, right, options):
        if mesh.data == 2:
            raise TypeError("no such type\nand more")
        return tool.Row(vars(mesh), {"loss": 1e-7}, {}, {})

    monkeypatch.setattr(tool, "refer", lambda *_: tool.Reference(None, None, None, [2.0, 1.0], 0.1))
    monkeypatch.setattr(tool, "compare", compare)
    assert run("--devices=2", "--meshes=data=2;fsdp=2;tensor=2") == 1
    out = capsys.readouterr().out
    assert "| data=2 | no such type |" in out
    assert "| fsdp=2   | 1.0e-07 | 0 B                    | pass |" in out
    assert "2 of 3 meshes" in out


@pytest.mark.slow
def test_meshes_are_shared_out_over_processes(capsys):
    meshes = ("--config.model.layers=1", "--devices=2", "--meshes=data=2;fsdp=2", "--steps=1")
    tables = []
    for jobs in ("--jobs=2", "--jobs=0"):
        assert run(*meshes, jobs) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "2 of 2 meshes" in tables[0]


def test_a_mesh_that_is_not_supported_is_refused_by_name_or_listed(monkeypatch, capsys):
    def refuse(run, devices):
        if run.mesh.tensor > 1:
            raise ValueError("tensor=2 with this layout is not built")

    row = tool.Row({"fsdp": 2}, {"loss": 1e-7}, {}, {})
    monkeypatch.setattr(tool, "refer", lambda *_: tool.Reference(None, None, None, [2.0, 1.0], 0.1))
    monkeypatch.setattr(tool, "compare", lambda *_: row)
    monkeypatch.setattr(tool, "check_split", refuse)
    assert run("--devices=2", "--meshes=tensor=2") == 2
    assert "tensor=2 with this layout is not built" in capsys.readouterr().err
    assert run("--devices=2") == 0
    assert "| tensor=2 | tensor=2 with this layout is not built |" in capsys.readouterr().out


def test_meshes_are_read_as_they_are_written():
    text = f"{HYBRID}; fsdp=8"
    assert [tool.named(vars(mesh)) for mesh in tool.meshes_of(text, 8)] == [HYBRID, "fsdp=8"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--meshes=fsdp=4",), "--meshes=fsdp=4: 8 devices do not divide into fsdp=4: "),
        (("--meshes=model=8",), "'model=8' is no AXIS=SIZE, such as .*fsdp=2"),
        (("--meshes=fsdp",), "'fsdp' is no AXIS=SIZE"),
        (("--meshes=;",), "names no mesh, write all or such as fsdp=8"),
        (("--jobs=-1",), "--jobs=-1 must be at least 0"),
        (("--jobs=2", "--platform=cuda"), "--jobs=2 must be .* 0 where devices are real"),
        (("--devices=0",), "--devices=0 and --steps=10 must be at least 1"),
        (("--devices=99", "--meshes=fsdp=99"), "--devices=99 is more than the 8 of cpu here"),
        (("--family=t5",), "--family=t5 is none of llama, .*distilbert, nor a published size"),
        (("--head=span",), "--head=span is none of language, masked"),
        (("--aot=v5e-7",), "'v5e-7' is no target; there are v4-N .*v5e-N .*h100xN"),
        (("--aot=h100x12",), "'h100x12' is no target"),
        (("--platform=cuda",), "--platform=cuda: "),
    ],
)
def test_what_a_user_mends_is_exit_code_2_and_one_message(args, message, capsys):
    platforms = jax.config.jax_platforms
    try:
        assert run(*args) == 2
    finally:
        jax.config.update("jax_platforms", platforms)
        jax.config.update("jax_default_matmul_precision", None)
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_target_without_its_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("costs.targets.importlib.util.find_spec", lambda name: None)
    assert run("--aot=v5e-8") == 2
    assert "v5e-8 needs libtpu to compile for: pip install" in capsys.readouterr().err
    assert run("--aot=h100x8") == 2
    assert "h100x8 needs the CUDA plug-in to compile for: pip" in capsys.readouterr().err


# ---- what a shrunk model keeps -------------------------------------------------------------------

MODELS = {
    **{family.name: next(iter(family.sizes.values())) for family in FAMILIES},
    "quickstart": load("configs/quickstart.py").model,
    "unrolled in part": ModelConfig(layers=30, unroll=3, remat="full"),
    "every other": ModelConfig(layers=7, arch=Arch(moe=Moe(experts=64, active=8, every=2))),
    "one layer": ModelConfig(layers=1),
}


@pytest.mark.parametrize("ways", [1, 2, 3, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_shrunk_model_keeps_its_kind_and_divides(name, ways):
    cfg = MODELS[name]
    small = shrunk.shrunk(cfg, ways)
    for size in (small.embed, small.kv_heads, small.mlp, small.vocab, small.arch.moe.mlp):
        assert size % ways == 0
    assert (small.heads > small.kv_heads) == (cfg.heads > cfg.kv_heads)
    assert small.remat == cfg.remat and small.places == cfg.places
    assert bool(small.layers % small.places) == bool(cfg.layers % cfg.places)
    assert (small.unroll == 1) == (cfg.unroll == 1 or small.layers == small.places)
    whole = [c.unroll >= c.layers // c.places for c in (cfg, small)]
    assert whole[0] == whole[1] or cfg.layers == cfg.places
    for place in range(cfg.places):
        assert bool(small.window(place)) == bool(cfg.window(place))
        assert small.window(place) < shrunk.seq(ways), "a window hides something"
        assert small.sparse(place) == cfg.sparse(place)
    moe = small.arch.moe
    assert not moe.experts or (moe.experts % ways == 0 and moe.active < moe.experts)
    smaller = {name: getattr(Arch(), name) for name in ("attention", "embeddings", "head", "moe")}
    assert dataclasses.replace(cfg.arch, **smaller) == dataclasses.replace(small.arch, **smaller)
    assert dataclasses.replace(cfg.arch.head, chunk=shrunk.CHUNK) == small.arch.head


MIXTURES = {
    "mixtral": MODELS["mixtral"],
    "qwen3_moe": MODELS["qwen3_moe"],
    "sandwich": ModelConfig(
        layers=3,
        arch=Arch(
            moe=Moe(experts=4, every=2, balance=0.1, z_loss=0.01),
            embeddings=Embeddings(positions=12),
            attention=Attention(qk_norm="all"),
            norm=Norm(offset=1.0, placement="sandwich"),
            head=Head(tied=True),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_no_token_is_near_another_choice_of_experts(name, monkeypatch):
    """The gap between the last chosen expert's logit and the next one's, over all steps."""
    gaps, route = [], MoeMlp.route

    def watched(self, x_ND, valid_N, router_ED, rows):
        z_NE = jax.numpy.sort(x_ND @ router_ED.T, axis=-1)[:, ::-1]
        A = self.moe.active
        jax.debug.callback(lambda gap: gaps.append(float(gap)), (z_NE[:, A - 1] - z_NE[:, A]).min())
        return route(self, x_ND, valid_N, router_ED, rows)

    monkeypatch.setattr(MoeMlp, "route", watched)
    recipe = dataclasses.replace(load("configs/quickstart.py"), model=MIXTURES[name])
    tool.refer(shrunk.shrunk_run(recipe, 8, 10), jax.devices(), tool.CPU_OPTIONS)
    jax.effects_barrier()
    assert len(gaps) >= 10
    assert min(gaps) > 0.1


# ---- everything ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_gives_the_values_of_one_device(family):
    assert run(f"--family={family.name}", f"--meshes={HYBRID}") == 0


@pytest.mark.slow
@pytest.mark.parametrize("head", ["masked", "classifier", "pooler", "none"])
def test_every_head_gives_the_outputs_of_one_device(head, capsys):
    assert run("--family=bert", f"--head={head}", "--devices=4", "--meshes=fsdp=2,tensor=2") == 0
    assert "| outputs " in capsys.readouterr().out


# Seven meshes of 2 x 2 x 2 devices that hold each pair of the seven axes once: Fano's plane.
LINES = [
    ("dcn", "fsdp", "tensor"),
    ("dcn", "data", "context"),
    ("dcn", "stage", "expert"),
    ("data", "stage", "tensor"),
    ("expert", "context", "tensor"),
    ("data", "fsdp", "expert"),
    ("stage", "fsdp", "context"),
]


def test_the_selection_holds_each_pair_of_axes_once():
    pairs = [frozenset(pair) for line in LINES for pair in itertools.combinations(line, 2)]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, itertools.combinations(AXES, 2)))


@pytest.mark.slow
def test_every_pair_of_axes_gives_a_mixture_the_values_of_one_device(capsys):
    built = [line for line in LINES if set(line) <= set(BUILT)]
    meshes = ";".join(",".join(f"{axis}=2" for axis in line) for line in built)
    assert run("--family=qwen3_moe", f"--meshes={meshes}", "--steps=3") == 0
    assert f"{len(built)} of {len(built)} meshes" in capsys.readouterr().out


@pytest.mark.slow
def test_gradients_apart_over_data_give_a_mixture_the_values_of_one_device():
    apart = ("--config.layout.optimizer=data", "--config.optim.accumulate=2")
    meshes = "--meshes=data=2,fsdp=2,tensor=2;data=4,expert=2"
    assert run("--family=qwen3_moe", *apart, meshes, "--steps=3") == 0


@pytest.mark.slow
def test_every_axis_alone_gives_the_values_of_one_device(capsys):
    axes = [axis for axis in BUILT if axis not in ("expert", "stage")]  # of a dense model; 2 layers
    meshes = ";".join(f"{axis}=8" for axis in axes)
    assert run("--config=configs/llama.py:1B", f"--meshes={meshes}") == 0
    assert f"{len(axes)} of {len(axes)} meshes" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.parametrize(("target", "count"), [("v5e-8", "11"), ("h100x8", r"\d+")])
def test_a_target_that_is_not_here_reduce_scatters(target, count, capsys):
    try:
        targets.devices_of(target)
    except ValueError as error:
        pytest.skip(str(error))
    args = ("--config=configs/llama.py:1B", f"--meshes={HYBRID};fsdp=8", "--steps=1")
    assert run(*args, f"--aot={target}") == 0
    table = capsys.readouterr().out.partition(f"collectives, {target}")[2]
    for mesh in (HYBRID, "fsdp=8"):  # a GPU's compiler joins some, a TPU's none
        assert re.search(rf"\| {mesh} +\| \d+: [^|]+\| {count}: ", table), mesh
