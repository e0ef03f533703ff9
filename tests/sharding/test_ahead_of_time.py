"""Programs compiled for hardware that is not here.

pip install --no-deps libtpu (0.5 GB), then pytest -m aot.
"""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest
from jax.experimental import topologies

import train
from costs import hlo
from costs.collectives import collectives, totals
from model.config import Attention
from model.precision import Precision
from sharding import mesh as meshes
from tests.meshes import hybrid
from tests.sharding.tiny import MODEL, check_reduce_scatters, run_of

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

# Large enough that a TPU scatters: for a few KiB its compiler prefers an all-reduce and a slice.
LARGER = dataclasses.replace(
    MODEL, embed=256, heads=16, head_dim=32, mlp=512, vocab=1024, remat="dots"
)


def tpus_of(topology):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.fixture(scope="module")
def tpus():
    return tpus_of("v5e:2x4")


def test_eight_tpus_reduce_scatter_each_weights_gradient(tpus):
    sizes = (2, 2, 2)
    with jax.set_mesh(meshes.make(hybrid(*sizes), list(tpus))):
        program = train.build(run_of(sizes, model=LARGER))
        check_reduce_scatters(program, program.compile().as_text())


@pytest.mark.parametrize(("topology", "sizes"), [("v5e:2x4", (2, 2, 2)), ("v5p:2x2x1", (1, 2, 2))])
def test_tpus_multiply_int8_and_gather_weights_as_int8(topology, sizes):
    devices, moved = list(tpus_of(topology))[: math.prod(sizes)], {}
    for name in ("bf16", "int8"):
        model = dataclasses.replace(LARGER, dtype="bfloat16", precision=Precision.by_name(name))
        with jax.set_mesh(meshes.make(hybrid(*sizes), devices)):
            text = train.build(run_of(sizes, model=model)).compile().as_text()
        moved[name] = totals(collectives(text))["all-gather"][1]
    exact = 0
    for own in hlo.parse(text).computations.values():
        results = {one.name: one.result for one in own}
        products = [one for one in own if one.operation == "convolution"]
        exact += sum(
            one.result.startswith("s32[")
            and all(results[name].startswith("s8[") for name in one.operands)
            for one in products
        )
    assert exact >= 3 * 5  # of five weights: forward, dgrad, wgrad
    # Half of those of layers; ids, the head's table and tokens between blocks stay what they were.
    assert moved["int8"] < 0.65 * moved["bf16"]


@pytest.mark.parametrize(("topology", "sizes"), [("v5e:2x4", (2, 2, 2)), ("v5p:2x2x1", (1, 2, 2))])
def test_tpus_attend_to_long_rows_by_splash(topology, sizes):
    """Of 8,192 tokens; the second layer sees 1,024 back."""
    attention = Attention(windows=(0, 1024))
    arch = dataclasses.replace(LARGER.arch, attention=attention)
    shape = {"heads": 8, "kv_heads": 4, "head_dim": 64, "dtype": "bfloat16"}
    model = dataclasses.replace(LARGER, arch=arch, **shape)
    run = run_of(sizes, model=model)
    rows = sizes[0] * sizes[1]  # one on each device
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=rows, seq=8192))
    with jax.set_mesh(meshes.make(run.mesh, list(tpus_of(topology))[: math.prod(sizes)])):
        compiled = train.build(run).compile()
    text = compiled.as_text()
    kernels = re.findall(r"%splash_mha_(\w+?)_segmented\S* = .*custom-call\(", text)
    # The forward pass is not made again: its results are kept.
    assert sorted(kernels) == ["dkv", "dkv", "dq", "dq", "fwd", "fwd"]
    assert not re.search(r"\[[\d,]*8192,8192\]", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8192**2  # one head's logits
