"""Programs compiled for hardware that is not here.

pip install --no-deps libtpu (0.5 GB), then pytest -m aot.
"""

import dataclasses
import importlib.util

import jax
import pytest
from jax.experimental import topologies

import train
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


@pytest.fixture(scope="module")
def tpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def test_eight_tpus_reduce_scatter_each_weights_gradient(tpus):
    sizes = (2, 2, 2)
    with jax.set_mesh(meshes.make(hybrid(*sizes), list(tpus))):
        program = train.build(run_of(sizes, model=LARGER))
        check_reduce_scatters(program, program.compile().as_text())
