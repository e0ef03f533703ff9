"""Conversion takes the memory of a few slices, whatever the size of the model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoint import hf, safetensors
from checkpoint.names import Names
from checkpoint.tensors import Tensor
from model.config import ModelConfig
from tests.checkpoint.folders import BY_NAME

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LARGE = ModelConfig(
    layers=28, embed=640, heads=10, kv_heads=10, head_dim=64, mlp=1728, vocab=1000, dtype="float32"
)
SLICE = 4 * 2 * LARGE.mlp * LARGE.embed  # bytes of a layer's largest array, gate and up
# Read, made into ours, and kept by two readers; buffers of the libraries.
BOUND = 6 * SLICE + 100 * 2**20
PROGRAM = """
import sys
from pathlib import Path
import jax
from checkpoint.convert import convert
from checkpoint.pretrained import open_pretrained

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])

source, target, to = sys.argv[1:]
jax.devices()
before = memory("VmRSS")
receipt = convert(open_pretrained(source), Path(target), to=to)
assert receipt["round_trip_bit_equal"]
print(memory("VmHWM") - before, receipt["bytes"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_a_model_larger_than_the_memory_that_it_takes_converts(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    family, draw = BY_NAME["llama"], np.random.default_rng(0)
    shapes = Names(family, LARGE).foreign()
    safetensors.write(
        folder,
        {name: Tensor(shape, "F32") for name, shape in shapes.items()},
        lambda name: draw.standard_normal(shapes[name], np.float32),
        2 * 10**8,
    )
    (folder / "config.json").write_text(json.dumps(hf.write_config(family, LARGE)))
    for source, target, to in (("hf", "ours", "meshlm"), ("ours", "back", "hf")):
        command = [sys.executable, "-c", PROGRAM, tmp_path / source, tmp_path / target, to]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown, size = map(int, done.stdout.split())
        assert size > 3 * BOUND
        assert grown < BOUND, f"{to}: {grown / 2**20:.0f} MiB for slices of {SLICE / 2**20:.1f}"
