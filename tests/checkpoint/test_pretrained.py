"""Opening any checkpoint: its values on any mesh, and what is said when it will not do."""

import dataclasses
import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoint.convert import convert
from checkpoint.names import Names
from checkpoint.pretrained import open_pretrained
from checkpoint.store import flatten
from model import transformer
from model.config import Arch, Attention, Moe
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.checkpoint import folders


def params(found, layout=Layout(), devices=1, dtype="float32", **sizes):  # noqa: B008
    """Every parameter by its dotted name, as the model wants it on a mesh of these sizes."""
    cfg = dataclasses.replace(found.cfg, dtype=dtype, param_dtype=dtype)
    with jax.set_mesh(meshes.make(MeshConfig(**sizes), jax.devices()[:devices])):
        _, shapes, _ = transformer.abstract(cfg, layout)
        tree = found.params(shapes)
    assert jax.tree.structure(tree) == jax.tree.structure(shapes)
    for array, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True):
        assert array.sharding.spec == leaf.sharding.spec and array.dtype == leaf.dtype
    return flatten(tree)


@pytest.fixture(scope="module", params=folders.MODELS)
def pair(request, tmp_path_factory):
    """(the model of a Hugging Face directory, the same in a checkpoint of ours, its arrays)."""
    folder = tmp_path_factory.mktemp("pretrained")
    values = folders.write(folder / "hf", request.param)
    found = open_pretrained(str(folder / "hf"))
    convert(found, folder / "ours")
    names = Names(found.family, found.cfg)
    arrays = {name: names.compose(name, None, values.__getitem__) for name in names.ours()}
    return found, open_pretrained(str(folder / "ours")), arrays


def test_the_values_are_those_of_the_files_on_any_mesh(pair):
    *both, arrays = pair
    for found in both:
        for devices, sizes in (
            (1, {}),
            (8, {"fsdp": 2, "tensor": 2}),
            (4, {"data": 1, "fsdp": 4}),
        ):
            got = params(found, devices=devices, **sizes)
            assert got.keys() == arrays.keys()
            for name, array in got.items():
                assert np.asarray(array).tobytes() == arrays[name].tobytes(), name


def test_the_values_are_cast_to_what_the_model_wants(pair):
    found, _, arrays = pair
    got = params(found, dtype="bfloat16")
    for name, array in got.items():
        assert np.asarray(array).tobytes() == arrays[name].astype(ml_dtypes.bfloat16).tobytes()


def test_both_say_the_same_of_the_model(pair):
    published, ours, _ = pair
    assert published.cfg == ours.cfg and published.family is ours.family
    assert published.tokenizer.digest == ours.tokenizer.digest
    assert published.files == ours.files
    text = "the lazy fox"
    for found in (published, ours):
        assert found.tokenizer.decode(found.tokenizer.encode([text])[0]) == text


def test_without_a_mesh_the_values_are_on_one_device(pair):
    found, _, arrays = pair
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in arrays.items()
    }
    for name, array in found.params(shapes).items():
        assert len(array.devices()) == 1
        assert np.asarray(array).tobytes() == arrays[name].tobytes()


def test_the_digest_tells_checkpoints_apart(tmp_path):
    values = folders.write(tmp_path / "a")
    folders.write(tmp_path / "b")
    first, same = (open_pretrained(str(tmp_path / name)).digest for name in "ab")
    assert first == same and re.fullmatch(r"[0-9a-f]{64}", first)
    values["lm_head.weight"][0, 0] += 1
    folders.save(tmp_path / "b", values)
    assert open_pretrained(str(tmp_path / "b")).digest != first
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert open_pretrained(str(tmp_path / "a")).digest != first


# ---- what is refused ----


def test_tensors_that_do_not_make_the_model_are_refused_by_name(tmp_path):
    values = folders.write(tmp_path)
    missing = {name: array for name, array in values.items() if "1.mlp.down" not in name}
    extra = {**values, "model.layers.7.mlp.down_proj.weight": np.zeros((16, 24), np.float32)}
    turned = {**values, "model.layers.1.mlp.down_proj.weight": np.zeros((24, 16), np.float32)}
    whole = {name: array.astype(np.int8) for name, array in values.items()}
    for wrong, message in (
        (missing, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (extra, r"model\.layers\.7\.mlp\.down_proj\.weight"),
        (turned, r"down_proj\.weight has shape \(24, 16\), .*\(16, 24\)"),
        (whole, "holds I8: only F32, F16, BF16 are read"),
    ):
        folders.save(tmp_path, wrong)
        with pytest.raises(ValueError, match=message) as caught:
            open_pretrained(str(tmp_path))
        assert str(tmp_path) in str(caught.value)


def test_a_wrong_model_costs_no_memory(tmp_path):
    """A config that asks for a terabyte, and a header that promises it."""
    folders.write(tmp_path, words=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 2**20, "intermediate_size": 2**22}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    with pytest.raises(ValueError, match="shape"):
        open_pretrained(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json: "),
        ("[1]", "config.json: it must hold an object"),
        ("[" * 100_000, "config.json: .*recursion"),
        ('{"architectures": ["MambaForCausalLM"]}', "MambaForCausalLM.*LlamaForCausalLM"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, config, message):
    folders.write(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        open_pretrained(str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    smaller = dataclasses.replace(folders.LLAMA, vocab=64)
    folders.write(tmp_path, cfg=smaller)
    with pytest.raises(ValueError, match=r"tokenizer of \d+ ids .* 64"):
        open_pretrained(str(tmp_path))


def test_a_model_without_a_tokenizer_opens(tmp_path):
    folders.write(tmp_path / "hf", words=False)
    found = open_pretrained(str(tmp_path / "hf"))
    convert(found, tmp_path / "ours")
    for model in (found, open_pretrained(str(tmp_path / "ours"))):
        assert not model.has_tokenizer
        with pytest.raises(FileNotFoundError, match="has no tokenizer"):
            _ = model.tokenizer


def test_what_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "x.gguf").write_bytes(b"GGUF")
    folders.write(tmp_path / "hf")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "text.txt").write_text("hello")
    pickled = tmp_path / "pickled"
    folders.write(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for name, error, message in (
        ("absent", FileNotFoundError, "no such folder or file, and nothing is downloaded"),
        ("absent@3", FileNotFoundError, "is no folder"),
        ("empty", FileNotFoundError, "neither checkpoints/ nor config.json"),
        ("half", FileNotFoundError, r"is .*x\.gguf meant\?"),
        ("hf/model.safetensors", ValueError, "name its folder, .*hf"),
        ("model.pt", ValueError, "a pickle can run any code"),
        ("pickled", ValueError, "a pickle can run any code"),
        ("text.txt", ValueError, "no GGUF file"),
    ):
        with pytest.raises(error, match=message):
            open_pretrained(str(tmp_path / name))


def test_params_of_another_model_are_refused_with_both_shapes(tmp_path):
    folders.write(tmp_path)
    found = open_pretrained(str(tmp_path))
    for changes, message in (
        ({"mlp": 32}, r"blocks\.0\.mlp\.\S+ has shape \(.*24.*\) in .*, not \(.*32.*\)"),
        ({"arch": Arch(attention=Attention(qkv_bias=True))}, "lacks 1 arrays .*qkv.bias"),
        (
            {"arch": Arch(moe=Moe(experts=2, active=1))},
            r"not \(3, 2, 16, 24\)",
        ),
    ):
        other = dataclasses.replace(found.cfg, **changes)
        with jax.set_mesh(meshes.make(MeshConfig(), jax.devices()[:1])):
            _, shapes, _ = transformer.abstract(other, Layout())
            with pytest.raises(ValueError, match=message):
                found.params(shapes)


def test_a_run_that_trains_on_must_be_the_same_model(tmp_path):
    folders.write(tmp_path, "gemma2")
    found = open_pretrained(str(tmp_path))
    arch = found.cfg.arch
    free = dataclasses.replace(
        found.cfg,
        vocab=0,
        dtype="bfloat16",
        remat="full",
        unroll=2,
        arch=dataclasses.replace(arch, head=dataclasses.replace(arch.head, z_loss=1e-4, chunk=7)),
    )
    assert found.agree(free) == dataclasses.replace(free, vocab=found.cfg.vocab)
    other = dataclasses.replace(free, layers=5, arch=dataclasses.replace(arch, activation="swiglu"))
    wanted = "--config.model.layers=3 --config.model.arch.activation=geglu"
    with pytest.raises(ValueError, match=f"is not the model of .*: {wanted}$"):
        found.agree(other)
