"""Our arrays and the tensors of every family, each made from the other, bit for bit."""

import dataclasses
import math
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoint.names import Names
from checkpoint.tensors import Tensor
from model import transformer
from model.families import FAMILIES, bert, gemma3, gpt2, llama, mixtral, phi3, qwen3_moe
from sharding import mesh as meshes
from tests.model.tiny import WHOLE

replace = dataclasses.replace


def tiny(size, kind=None):
    """A published model with its arch, made small: 5 layers, so that patterns leave a rest."""
    arch = size.arch
    head = replace(arch.head, kind=kind or arch.head.kind, labels=3)
    if arch.embeddings.positions:
        arch = replace(arch, embeddings=replace(arch.embeddings, positions=9))
    if arch.moe.experts:
        arch = replace(arch, moe=replace(arch.moe, experts=3, active=2, mlp=5, every=2))
    return replace(
        size,
        layers=5,
        embed=12,
        heads=4,
        kv_heads=2 if size.kv_heads < size.heads else 4,
        head_dim=6,
        mlp=7,
        vocab=11,
        arch=replace(arch, head=head),
    )


def cases():
    """(family, config): each family's different archs, under each of its heads."""
    for family in FAMILIES:
        for kind in dict.fromkeys(family.architectures.values()):
            models = dict.fromkeys(tiny(size, kind) for size in family.sizes.values())
            yield from ((family, cfg) for cfg in models)


CASES = [pytest.param(*case, id=f"{case[0].name}-{i}") for i, case in enumerate(cases())]
LLAMA = llama.FAMILY, tiny(llama.FAMILY.sizes["Meta-Llama-3-8B"])
TIED = llama.FAMILY, tiny(llama.FAMILY.sizes["Llama-3.2-1B"])


def random_tensors(shapes, dtype=np.float32):
    """An array for each name; every entry has bits of its own."""
    start, tensors = 0, {}
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[name] = np.arange(start, stop, dtype=np.float64).astype(dtype).reshape(shape)
        start = stop
    return tensors


def reader(arrays):
    return lambda name, index: arrays[name] if index is None else arrays[name][index]


def described(shapes):
    return {name: Tensor(tuple(shape), "F32") for name, shape in shapes.items()}


@pytest.mark.parametrize(("family", "cfg"), CASES)
def test_arrays_come_back_from_foreign_tensors(family, cfg):
    names = Names(family, cfg)
    ours = random_tensors(names.ours())
    foreign = {name: names.decompose(name, reader(ours)) for name in names.foreign()}
    assert {name: tensor.shape for name, tensor in foreign.items()} == names.foreign()
    for name, array in ours.items():
        np.testing.assert_array_equal(names.compose(name, None, foreign.__getitem__), array)
        if name.startswith("blocks."):
            for i, one in enumerate(array):
                np.testing.assert_array_equal(names.compose(name, i, foreign.__getitem__), one)


@pytest.mark.parametrize(("family", "cfg"), CASES)
def test_foreign_tensors_come_back_from_arrays(family, cfg):
    names = Names(family, cfg)
    foreign = random_tensors(names.foreign())
    ours = {name: names.compose(name, None, foreign.__getitem__) for name in names.ours()}
    assert {name: array.shape for name, array in ours.items()} == names.ours()
    untied_bias = cfg.arch.head.kind == "masked" and not cfg.arch.head.tied
    for name, tensor in foreign.items():
        if not untied_bias:
            np.testing.assert_array_equal(names.decompose(name, reader(ours)), tensor)


@pytest.mark.parametrize(("family", "cfg"), CASES)
def test_arrays_are_those_of_the_model(family, cfg):
    with jax.set_mesh(meshes.make(meshes.MeshConfig(), jax.devices()[:1])):
        _, shapes, _ = transformer.abstract(cfg, WHOLE)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    assert Names(family, cfg).ours() == found


def composed(family, cfg):
    """(foreign tensors, our arrays made of them)."""
    names = Names(family, cfg)
    foreign = random_tensors(names.foreign())
    return foreign, {name: names.compose(name, None, foreign.__getitem__) for name in names.ours()}


def test_query_head_n_is_query_g_of_kv_head_k():
    foreign, ours = composed(*LLAMA)
    K, G, H, layer = 2, 2, 6, 3
    q, k, v = (foreign[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
    for i in range(K):
        heads = ours["blocks.0.attention.qkv.weight"][layer, i]
        for g in range(G):
            n = i * G + g
            np.testing.assert_array_equal(heads[g], q[n * H : (n + 1) * H])
        np.testing.assert_array_equal(heads[G], k[i * H : (i + 1) * H])
        np.testing.assert_array_equal(heads[G + 1], v[i * H : (i + 1) * H])


def test_gpt2_has_its_matrices_turned_and_fused():
    family, cfg = gpt2.FAMILY, tiny(gpt2.FAMILY.sizes["gpt2"])
    foreign, ours = composed(family, cfg)
    fused, N, H = foreign["transformer.h.4.attn.c_attn.weight"], 4, 6
    array = ours["blocks.0.attention.qkv.weight"][4]
    for j, n in ((j, n) for j in range(3) for n in range(N)):
        start = j * N * H + n * H
        np.testing.assert_array_equal(array[n, j], fused[:, start : start + H].T)
    up = foreign["transformer.h.4.mlp.c_fc.weight"]
    np.testing.assert_array_equal(ours["blocks.0.mlp.up.weight"][4], up.T)


def test_phi3_has_gate_before_up():
    foreign, ours = composed(phi3.FAMILY, tiny(phi3.FAMILY.sizes["phi-4"]))
    fused = foreign["model.layers.2.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(ours["blocks.0.mlp.gate_up.weight"][2], fused.reshape(2, 7, 12))


def test_mixtral_calls_the_gate_w1_and_the_way_up_w3():
    family = mixtral.FAMILY
    cfg = tiny(family.sizes["Mixtral-8x7B-v0.1"])
    cfg = replace(cfg, arch=replace(cfg.arch, moe=replace(cfg.arch.moe, every=1)))
    foreign, ours = composed(family, cfg)
    experts = "model.layers.1.block_sparse_moe.experts.2"
    gate, up = ours["blocks.0.mlp.gate_up.weight"][1, 2]
    np.testing.assert_array_equal(gate, foreign[f"{experts}.w1.weight"])
    np.testing.assert_array_equal(up, foreign[f"{experts}.w3.weight"])
    down = ours["blocks.0.mlp.down.weight"][1, 2]
    np.testing.assert_array_equal(down, foreign[f"{experts}.w2.weight"])


def test_layers_lie_by_place_and_repetition_then_in_the_rest():
    family, cfg = gemma3.FAMILY, tiny(gemma3.FAMILY.sizes["gemma-3-1b-pt"])
    cfg = replace(cfg, layers=8)
    names = Names(family, cfg)
    at = [names.array(f"model.layers.{i}.mlp.down_proj.weight") for i in range(8)]
    blocks = [(f"blocks.{i}.mlp.down.weight", 0) for i in range(6)]
    assert at == [*blocks, ("rest.0.mlp.down.weight", None), ("rest.1.mlp.down.weight", None)]


def test_dense_and_sparse_layers_take_turns():
    names = Names(qwen3_moe.FAMILY, tiny(qwen3_moe.FAMILY.sizes["Qwen3-30B-A3B"])).foreign()
    assert "model.layers.2.mlp.gate_proj.weight" in names
    assert "model.layers.2.mlp.gate.weight" not in names
    assert "model.layers.3.mlp.gate_proj.weight" not in names
    assert names["model.layers.3.mlp.experts.2.up_proj.weight"] == (5, 12)


def test_experts_can_lie_in_one_tensor():
    family = replace(
        mixtral.FAMILY,
        names={
            **llama.NAMES,
            "{}.router": "block.mlp.router.weight",
            "{}.gates": "block.mlp.gate_up.weight[experts][gate]",
            "{}.ups": "block.mlp.gate_up.weight[experts][up]",
            "{}.downs": "block.mlp.down.weight[experts].T",
        },
    )
    cfg = tiny(mixtral.FAMILY.sizes["Mixtral-8x7B-v0.1"])
    foreign, ours = composed(family, cfg)
    assert foreign["1.gates"].shape == (3, 5, 12)
    assert foreign["1.downs"].shape == (3, 5, 12)
    np.testing.assert_array_equal(ours["blocks.1.mlp.gate_up.weight"][0, :, 1], foreign["1.ups"])
    down = ours["blocks.1.mlp.down.weight"][0]
    np.testing.assert_array_equal(down, foreign["1.downs"].swapaxes(1, 2))
    names = Names(family, cfg)
    for name, tensor in foreign.items():
        np.testing.assert_array_equal(names.decompose(name, reader(ours)), tensor)


def test_values_keep_their_dtype_and_mixed_ones_take_the_wider():
    names = Names(*LLAMA)
    half = random_tensors(names.foreign(), ml_dtypes.bfloat16)
    name = "blocks.0.attention.qkv.weight"
    assert names.compose(name, 0, half.__getitem__).dtype == ml_dtypes.bfloat16
    v = "model.layers.1.self_attn.v_proj.weight"
    mixed = half | {v: half[v].astype(np.float32) + 1e-3}
    array = names.compose(name, 1, mixed.__getitem__)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array[:, -1].reshape(mixed[v].shape), mixed[v])
    assert names.compose(name, None, mixed.__getitem__).dtype == np.float32


def test_a_layer_is_composed_in_the_memory_of_the_result_and_one_tensor():
    size = llama.FAMILY.sizes["SmolLM-135M"]
    names = Names(llama.FAMILY, replace(size, layers=3, embed=512, mlp=2048))
    shapes = names.foreign()
    tracemalloc.start()
    try:
        array = names.compose(
            "blocks.0.mlp.gate_up.weight", 1, lambda name: np.ones(shapes[name], np.float32)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.55 * array.nbytes


def test_a_tensor_of_another_shape_is_named_with_both():
    names = Names(*LLAMA)
    name = "model.layers.0.self_attn.k_proj.weight"
    shapes = names.foreign() | {name: (24, 12)}
    message = rf"{name} has shape \(24, 12\), .* \(12, 12\)"
    with pytest.raises(ValueError, match=message):
        names.compose("blocks.0.attention.qkv.weight", 0, lambda at: np.ones(shapes[at]))
    with pytest.raises(ValueError, match=message):
        names.locate(described(shapes))


def test_a_missing_and_a_strange_tensor_are_named():
    names = Names(*LLAMA)
    shapes = names.foreign()
    lacking = {name: shape for name, shape in shapes.items() if "layers.3.mlp.up" not in name}
    with pytest.raises(ValueError, match=r"1 tensors \(model.layers.3.mlp.up_proj.weight\).* lack"):
        names.locate(described(lacking))
    more = shapes | {"model.layers.0.self_attn.q_proj.bias": (24,)}
    with pytest.raises(ValueError, match=r"hold 1 tensors \(.*q_proj.bias\) that .* no place for"):
        names.locate(described(more))


def test_files_may_leave_out_the_prefix_and_hold_what_nobody_needs():
    names = Names(gpt2.FAMILY, tiny(gpt2.FAMILY.sizes["gpt2"]))
    shapes = {name.removeprefix("transformer."): size for name, size in names.foreign().items()}
    found = names.locate(described(shapes | {"h.0.attn.bias": (1, 1, 9, 9)}))
    assert found.sources["transformer.h.0.attn.c_attn.bias"] == "h.0.attn.c_attn.bias"
    assert found.unused == ("h.0.attn.bias",)


def test_a_bare_model_is_found_in_the_files_of_one_with_a_head():
    names = Names(bert.FAMILY, tiny(bert.FAMILY.sizes["all-MiniLM-L6-v2"]))
    assert "pooler.dense.weight" in names.foreign()
    shapes = {f"bert.{name}": shape for name, shape in names.foreign().items()}
    found = names.locate(described(shapes | {"cls.predictions.bias": (11,)}))
    assert found.sources["pooler.dense.weight"] == "bert.pooler.dense.weight"
    assert found.unused == ("cls.predictions.bias",)


def test_old_names_of_bert_are_read():
    names = Names(bert.FAMILY, tiny(bert.FAMILY.sizes["bert-base-uncased"]))
    shapes = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): shape
        for name, shape in names.foreign().items()
    }
    extra = {
        "bert.pooler.dense.weight": (12, 12),
        "cls.seq_relationship.bias": (2,),
        "bert.embeddings.position_ids": (1, 9),
    }
    found = names.locate(described(shapes | extra))
    assert found.sources["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert set(found.unused) == extra.keys()


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.language_model.", "language_model."]
)
def test_gemma3_is_found_in_a_model_of_images(prefix):
    names = Names(gemma3.FAMILY, tiny(gemma3.FAMILY.sizes["gemma-3-4b-pt"]))
    shapes = {name.replace("model.", prefix, 1): shape for name, shape in names.foreign().items()}
    found = names.locate(described(shapes | {"vision_tower.head.probe": (1, 1, 9)}))
    assert found.sources["model.norm.weight"] == f"{prefix}norm.weight"
    assert found.unused == ("vision_tower.head.probe",)


def test_a_tied_table_may_be_stored_twice_or_as_its_copy_alone():
    names = Names(*TIED)
    shapes = names.foreign()
    assert "lm_head.weight" not in shapes
    copy = {"lm_head.weight": shapes["model.embed_tokens.weight"]}
    found = names.locate(described(shapes | copy))
    assert found.copies == {"lm_head.weight": "model.embed_tokens.weight"}
    alone = {name: shape for name, shape in shapes.items() if "embed_tokens" not in name}
    found = names.locate(described(alone | copy))
    assert found.sources["model.embed_tokens.weight"] == "lm_head.weight"
    assert not found.copies


def test_an_array_without_a_name_is_an_error():
    family, cfg = LLAMA
    cfg = replace(cfg, arch=replace(cfg.arch, norm=replace(cfg.arch.norm, placement="sandwich")))
    with pytest.raises(ValueError, match=r"llama has no name for all of blocks.0.post1.scale"):
        Names(family, cfg)
