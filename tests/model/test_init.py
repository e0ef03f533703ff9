"""Initial parameters: as published, the same on every mesh, never whole on one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from model import transformer
from model.config import Arch, Attention, Head, Init, ModelConfig, Norm
from sharding import mesh as meshes
from sharding.layout import Layout
from tests.marks import mostly_slow
from tests.meshes import hybrid
from tests.model.tiny import WHOLE

CFG = ModelConfig(
    layers=6, embed=64, heads=8, kv_heads=4, head_dim=16, mlp=96, vocab=512, dtype="float32"
)


def init(cfg, layout=WHOLE, seed=0):
    return jax.jit(lambda: transformer.init(cfg, layout, jax.random.key(seed)))()


def std(leaf):
    return np.std(np.asarray(leaf, np.float64))


def test_matrices_keep_variance_and_residual_branches_shrink_with_depth(one_device):
    block = init(CFG)["blocks"][0]
    qkv, out = block["attention"]["qkv"]["weight"], block["attention"]["out"]["weight"]
    up, down = block["mlp"]["gate_up"]["weight"], block["mlp"]["down"]["weight"]
    narrow = 1 / np.sqrt(2 * CFG.layers)  # Radford et al. 2019: one for each residual branch
    fans = {"qkv": (qkv, 64, 1), "out": (out, 8 * 16, narrow)}
    fans |= {"up": (up, 64, 1), "down": (down, 96, narrow)}
    for name, (weight, fan_in, scale) in fans.items():
        assert std(weight) == pytest.approx(scale / np.sqrt(fan_in), rel=0.02), name
        assert abs(np.mean(weight)) < 4 * std(weight) / np.sqrt(weight.size), name


def test_every_layer_and_both_tables_are_drawn_apart(one_device):
    arch = Arch(attention=Attention(windows=(4, 0)))
    params = init(dataclasses.replace(CFG, layers=5, arch=arch))
    down = [stack["mlp"]["down"]["weight"] for stack in params["blocks"].values()]
    drawn = [np.asarray(layer) for stack in down for layer in stack]
    drawn += [np.asarray(params["rest"][0]["mlp"]["down"]["weight"])]
    drawn += [np.asarray(params[name]["table"])[: CFG.embed, :96] for name in ("embedding", "head")]
    flat = [layer.ravel()[:4096] for layer in drawn]
    correlation = np.corrcoef(np.stack(flat)) - np.eye(len(flat))
    assert len(flat) == 7
    assert np.abs(correlation).max() < 0.1  # 6 standard deviations of what chance gives


def test_scales_are_chosen_and_norms_and_biases_begin_plain(one_device):
    arch = Arch(
        norm=Norm("layer", bias=True),
        attention=Attention(qkv_bias=True, out_bias=True, qk_norm="head"),
        mlp_bias=True,
        init=Init(embed=0.5, head=0.0, residual=0.0),
    )
    params = init(dataclasses.replace(CFG, arch=arch))
    assert std(params["embedding"]["table"]) == pytest.approx(0.5, rel=0.02)
    assert not np.any(params["head"]["table"])
    block = params["blocks"][0]
    assert not np.any(block["mlp"]["down"]["weight"])
    assert not np.any(block["attention"]["out"]["weight"])
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in ("scale", "bias"):
            assert np.all(np.asarray(leaf) == (path[-1].key == "scale")), path


def test_another_seed_gives_other_weights(one_device):
    a, b = (init(CFG, seed=seed)["embedding"]["table"] for seed in (0, 1))
    assert np.abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.05


SPLIT = ModelConfig(
    layers=2, embed=64, heads=8, kv_heads=8, head_dim=8, mlp=40, vocab=48, arch=Arch(head=Head())
)


@pytest.mark.parametrize("sizes", mostly_slow([(1, 8, 1), (2, 2, 2)], (2, 2, 2)))
def test_a_mesh_makes_the_same_values_each_device_only_its_part(one_device, sizes):
    alone = jax.device_get(init(SPLIT))
    mesh = meshes.make(hybrid(*sizes))
    with jax.set_mesh(mesh):
        fresh = jax.jit(lambda: transformer.init(SPLIT, Layout(), jax.random.key(0)))
        compiled = fresh.lower().compile()
        _, shapes, _ = transformer.abstract(SPLIT, Layout())
        params = compiled()
    largest = 0
    for shape, leaf, right in zip(*map(jax.tree.leaves, (shapes, params, alone)), strict=True):
        where = NamedSharding(mesh, shape.sharding.spec)
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
        # The draws are equal bit for bit; their scaling may be fused into another product.
        np.testing.assert_allclose(leaf, right, rtol=1e-6)
        largest = max(largest, int(np.prod(where.shard_shape(leaf.shape))))
    buffers = re.findall(r"= [a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    assert max(int(np.prod([*map(int, dims.split(","))])) for dims in buffers) == largest
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective", compiled.as_text())
