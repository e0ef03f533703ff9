"""Whole models in fewer bits: layer by layer, into a checkpoint that loads wherever one does."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from checkpoint import store
from checkpoint.convert import convert
from checkpoint.pretrained import open_pretrained
from compressors import calibration, quantize, scales
from compressors.calibration import Batch, Walk
from compressors.compress import Recipe, compress, forms
from compressors.quantize import SCHEMES
from model import kernels
from model.config import Arch, Attention, Norm
from model.precision import Precision
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.checkpoint import folders
from tests.marks import mostly_slow

BIASES = Arch(attention=Attention(qkv_bias=True, out_bias=True), mlp_bias=True)
KINDS = {
    **folders.MODELS,
    "biases": dataclasses.replace(folders.LLAMA, arch=BIASES),
}  # fmt: skip
FAMILY = {"biases": "llama"}
IDS = np.random.default_rng(1).integers(0, 300, 400)
ROWS = [list(map(int, IDS[i : i + 16])) for i in range(0, 400, 16)]


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(meshes.make(MeshConfig(data=1), jax.devices()[:1])):
        yield


def source_of(folder, kind="llama", **how):
    folders.write(folder, FAMILY.get(kind, kind), KINDS[kind], **how)
    return open_pretrained(str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama in four bits, and what it was made from."""
    folder = tmp_path_factory.mktemp("compress")
    source = source_of(folder / "hf")
    with jax.set_mesh(meshes.make(MeshConfig(data=1), jax.devices()[:1])):
        told = compress(source, folder / "w4", Recipe("w4g64", "gptq"), ROWS)
    return source, open_pretrained(str(folder / "w4")), told


def test_it_opens_as_the_model_that_it_was(made):
    source, copy, _ = made
    assert copy.cfg == source.cfg and copy.family == source.family
    assert {name: shape for name, (shape, _) in copy.arrays.items()} == {
        name: shape for name, (shape, _) in source.arrays.items()
    }
    assert copy.tokenizer.digest == source.tokenizer.digest
    assert copy.quantized["scheme"] == "w4g64" and copy.quantized["method"] == "gptq"


def test_every_linear_and_the_tables_are_rounded_and_nothing_else(made):
    source, copy, _ = made
    rounded = forms(source.cfg, SCHEMES["w4g64"])
    assert {name for name in rounded if "blocks" in name} == {
        f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.out", "mlp.gate_up",
                                               "mlp.down")
    }  # fmt: skip
    for name in source.arrays:
        before, after = source.read(name), copy.read(name)
        if name not in rounded:
            np.testing.assert_array_equal(after, before)
            continue
        assert not np.array_equal(after, before)
        share = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert share < (0.5 if "blocks" in name else 0.01)


def test_bytes_are_those_of_the_levels_and_scales(made):
    source, copy, _ = made
    wanted = 0
    for name, (shape, _) in source.arrays.items():
        form, count = forms(source.cfg, SCHEMES["w4g64"]).get(name), np.prod(shape)
        if form is None:
            wanted += 4 * count
            continue
        width = np.prod(shape[-form.inputs :])
        each = width / 2 if form.kind == "int4" else width
        groups = -(-width // form.group) if form.group else 1
        wanted += count // width * (each + (4 + 2 * form.zeros) * groups)
    assert copy.bytes == wanted


def test_one_repetition_is_read_like_all(made):
    _, copy, _ = made
    name = "blocks.0.mlp.down.weight"
    np.testing.assert_array_equal(copy.read(name)[1], copy.read(name, 1))


def test_it_converts_like_any_other(made, tmp_path):
    _, copy, _ = made
    receipt = convert(copy, tmp_path / "hf", to="hf")
    assert receipt["round_trip_bit_equal"]
    assert receipt["dtypes"]["source"] == {"int4": 4, "int8": 2, "float32": 3}
    back = open_pretrained(str(tmp_path / "hf"))
    name = "blocks.0.attention.qkv.weight"
    np.testing.assert_array_equal(back.read(name), copy.read(name))


@pytest.mark.slow
def test_a_damaged_value_is_found(made, tmp_path):
    source, _, _ = made
    compress(source, tmp_path / "w8", Recipe("w8", "absmax"), ROWS)
    state = tmp_path / "w8" / "checkpoints" / "0" / "state"
    file = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"0 is damaged: .* has other bytes than were saved"):
        open_pretrained(str(tmp_path / "w8")).read("embedding.table")


def test_a_part_that_is_missing_is_named(made):
    _, copy, _ = made
    found = {name: array for name, array in copy._stored.items() if "down.weight.sc" not in name}
    with pytest.raises(ValueError, match=r"lacks blocks.0.mlp.down.weight.scales, a part"):
        copy._whole(found)


def test_layers_are_read_one_after_the_other(made, tmp_path, monkeypatch):
    source, _, told = made
    order, read = [], source.read
    monkeypatch.setattr(source, "read", lambda *at: order.append(at) or read(*at))
    monkeypatch.setattr(
        "compressors.compress.check_values", lambda _: None
    )  # it reads all at first
    compress(source, tmp_path / "w8", Recipe("w8", "absmax"), ROWS)
    weights = [at for at in order if at[0].startswith("blocks.")]
    assert all(index is not None for _, index in weights)
    linears = [index for name, index in weights if name.endswith("weight")]
    assert linears == sorted(linears) and set(linears) == {0, 1, 2}
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]


def test_inputs_are_what_the_linear_sees_and_no_padding(made):
    source, _, _ = made
    walk = Walk(source, source.cfg, Layout(), Precision())
    batches = [Batch.of([ROWS[0], ROWS[1][:5], []], 16), Batch.of([ROWS[2], [], []], 16)]
    states = walk.begin(batches)
    weights = walk.read("blocks.0.", 0)
    inputs = walk.observe(0, weights, states, batches)
    x = source.read("embedding.table")[np.array(ROWS[0] + ROWS[1][:5] + ROWS[2])]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + source.cfg.arch.norm.eps)
    x *= weights["norm1.scale"]
    found = inputs["attention.qkv"]
    assert found.tokens == 37
    np.testing.assert_allclose(found.second_II, x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.largest_I, np.abs(x).max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.total_I, np.abs(x).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "gemma2"))
def test_moving_factors_leaves_the_model_as_it_was(kind, tmp_path):
    source = source_of(tmp_path / "hf", kind)
    cfg, draw = source.cfg, np.random.default_rng(0)
    walk = Walk(source, cfg, Layout(), Precision())
    batches = [Batch.of(ROWS[:4], 16)]
    states = walk.begin(batches)

    def choose(weight, inputs, sharing):
        return quantize.tied(np.exp(draw.normal(size=inputs.largest_I.size)), sharing)

    for layer, prefix, index in walk.layers():
        weights = walk.read(prefix, index)
        before = dict(weights)
        exact = walk.as_it_was(layer, weights, states, batches)
        inputs = walk.observe(layer, weights, states, batches)
        moved = scales.migrate(cfg, cfg.sparse(layer), weights, inputs, choose)
        assert "attention.out" in moved
        assert "attention.qkv" in moved
        assert all(not np.allclose(weights[f"{n}.weight"], before[f"{n}.weight"]) for n in moved)
        again = walk.as_it_was(layer, weights, states, batches)
        seen = walk.observe(layer, weights, states, batches)
        assert calibration.apart(exact, again, batches) < 1e-4
        for name in moved:
            np.testing.assert_allclose(seen[name].largest_I, inputs[name].largest_I, rtol=1e-3)
        states = exact


def test_a_norm_after_the_sum_takes_no_factors():
    """Its output is the residual stream, which others read as well."""
    norm = Norm("layer", bias=True, placement="post")
    post = dataclasses.replace(folders.LEARNED, norm=norm)
    cfg = dataclasses.replace(folders.MODELS["gpt2"], arch=post)
    assert set(scales.places(cfg, sparse=False)) == {"attention.out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme", "method"),
    [
        ("gemma2", "w8", "awq"),
        ("gemma2", "w4g64", "awq"),
        ("mixtral", "w4g64", "gptq"),
        ("gpt2", "w8a8", "smoothquant"),
        ("phi3", "fp8", "absmax"),
    ],
)
def test_every_kind_of_model_goes_through(kind, scheme, method, tmp_path):
    """Layers that remain after the pattern, experts, biases, learned positions; bfloat16 norms."""
    source = source_of(tmp_path / "hf", kind, dtype="BF16")
    told = compress(source, tmp_path / "out", Recipe(scheme, method), ROWS)
    copy = open_pretrained(str(tmp_path / "out"))
    assert copy.arrays.keys() == source.arrays.keys()
    most = {"w8": 0.02, "w8a8": 0.02, "fp8": 0.06, "w4g64": 0.2}[scheme]
    assert all(0 < value < most for value in told["largest_linear_error"].values())
    for name in copy.arrays:
        assert np.isfinite(copy.read(name).astype(np.float32)).all()
    moved = {name for layer in told["layers"] for name in layer["moved"]}
    assert bool(moved) == (method in ("smoothquant", "awq"))


@pytest.mark.slow
def test_calibrated_methods_leave_less_error_than_the_absmax(made, tmp_path):
    source, _, told = made
    plain = compress(source, tmp_path / "w4", Recipe("w4g64", "absmax"), ROWS)

    def whole(told):
        return sum(sum(layer["linears"].values()) for layer in told["layers"])

    assert whole(told) < 0.75 * whole(plain)


@pytest.mark.slow
def test_w8a8_computes_with_the_levels_that_are_stored(tmp_path):
    """The model rounds the weights that it loads to what they were rounded to already."""
    source = source_of(tmp_path / "hf")
    compress(source, tmp_path / "out", Recipe("w8a8", "smoothquant"), ROWS)
    copy = open_pretrained(str(tmp_path / "out"))
    assert copy.cfg.precision.attention.forward == copy.cfg.precision.mlp.forward == "int8"
    assert source.cfg == dataclasses.replace(copy.cfg, precision=Precision())
    for name in ("attention.qkv", "mlp.down"):
        weight = copy.read(f"blocks.0.{name}.weight", 1)
        levels, _ = kernels.quantize.rows(weight.reshape(-1, weight.shape[-1]))
        stored = copy.saved.read(f"params.blocks.0.{name}.weight.values", 1)
        np.testing.assert_array_equal(np.asarray(levels).reshape(stored.shape), stored)
    assert convert(copy, tmp_path / "back", to="hf")["round_trip_bit_equal"]


def test_the_note_says_how_each_array_lies(made):
    _, copy, _ = made
    note = store.locate(copy.name).json("run")["quantized"]
    assert note["arrays"]["blocks.0.attention.out.weight"] == {
        "kind": "int4", "group": 64, "inputs": 3, "zeros": True
    }  # fmt: skip
    assert note["arrays"]["embedding.table"] == {
        "kind": "int8",
        "group": 0,
        "inputs": 1,
        "zeros": False,
    }
    assert json.loads(json.dumps(note)) == note


def test_quantized_twice_and_too_little_text_are_refused(made, tmp_path):
    source, copy, _ = made
    with pytest.raises(ValueError, match="w4 is quantized already, as w4g64: quantize what it was"):
        compress(copy, tmp_path / "again", Recipe("w8", "absmax"), ROWS)
    with pytest.raises(ValueError, match="too short: 16 tokens, where the widest Linear has 32 in"):
        compress(source, tmp_path / "short", Recipe("w8", "absmax"), ROWS[:1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "value", "where"),
    [
        ("model.layers.1.mlp.down_proj.weight", np.nan, r"blocks\.0\.mlp\.down\.weight\[1\]"),
        ("model.embed_tokens.weight", np.inf, r"embedding\.table"),
        ("model.norm.weight", -np.inf, r"norm\.scale"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_array(tensor, value, where, tmp_path):
    values = folders.write(tmp_path / "hf")
    values[tensor].flat[5] = value
    folders.save(tmp_path / "hf", values)
    source = open_pretrained(str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=rf"hf: {where} has 1 numbers of .* NaN or infinite"):
        compress(source, tmp_path / "w8", Recipe("w8", "absmax"), ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_inputs_beyond_float32_are_refused_with_their_linear(tmp_path):
    values = folders.write(tmp_path / "hf")
    values["model.layers.1.mlp.up_proj.weight"] *= 1e25
    folders.save(tmp_path / "hf", values)
    source = open_pretrained(str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=r"layer 1: mlp\.down gets numbers up to .*beyond float32"):
        compress(source, tmp_path / "w8", Recipe("w8", "absmax"), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_of_zeros_stays_one(scheme, tmp_path):
    """Its groups have no largest number, and the inputs of some Linears no second moments."""
    values = folders.write(tmp_path / "hf")
    for name in values:
        values[name][:] *= "layers.1." not in name
    folders.save(tmp_path / "hf", values)
    source = open_pretrained(str(tmp_path / "hf"))
    for method in ("gptq", "awq"):
        compress(source, tmp_path / method, Recipe(scheme, method), ROWS)
        copy = open_pretrained(str(tmp_path / method))
        for name in forms(source.cfg, SCHEMES[scheme]).keys() - {"embedding.table", "head.table"}:
            assert not copy.read(name, 1).any() and copy.read(name, 0).any()


def test_a_disk_without_room_is_found_before_the_work(made, tmp_path, monkeypatch):
    source, _, _ = made
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(ValueError, match=r"20,000 bytes free, and [0-9,]+ are needed"):
        compress(source, tmp_path / "w8", Recipe("w8", "absmax"), ROWS, lambda *_: pytest.fail())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["scheme", "method"])
def test_unknown_names_are_refused_with_those_known(field):
    with pytest.raises(ValueError, match=f"{field}='w3' is none of .*(w4g64|gptq)"):
        Recipe(**{"scheme": "w8", "method": "absmax", field: "w3"})
