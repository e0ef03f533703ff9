"""--config.deterministic=true: the same command gives the same bits."""

import os
import subprocess
import sys

import jax
import pytest

from configs.load import ROOT
from sharding.runtime import SAME_BITS
from tests.training.conftest import raw_state


@pytest.mark.slow
def test_on_a_cpu_it_asks_xla_and_changes_nothing(finished, command_line, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    ended = command_line("--config.deterministic=true")
    assert ended.code == 0, ended.err
    assert os.environ["XLA_FLAGS"].split()[1:] == list(SAME_BITS)
    # What an earlier process found fastest is not taken from its cache.
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
    assert ended.state(12) == finished.state(12)
    assert ended.losses() == finished.losses()


@pytest.mark.slow
def test_xla_knows_the_option():
    """It ends a process that gives it one that it does not know."""
    code = "from sharding import runtime; runtime.deterministic(); import jax; jax.numpy.ones(3)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for more, known in (("", True), ("--xla_gpu_no_such_option=true", False)):
        environment["XLA_FLAGS"] = more
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == known, done.stderr


@pytest.mark.gpu
def test_on_a_gpu_two_processes_give_the_same_bits_with_cudnn_attention(start, tmp_path):
    """XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu ...: this process leaves them memory.

    One of the two finds in its cache which kernels were the fastest in a run without the mode.
    """
    sizes = {"layers": 2, "embed": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "mlp": 512}
    model = [f"--config.model.{name}={size}" for name, size in sizes.items()]
    args = [
        *model, "--config.model.dtype=bfloat16", "--config.data.seq=1024",
        "--config.data.documents=16", "--config.sample.tokens=0", "--config.eval.every=0",
        "--config.eval.bytes=1",
    ]  # fmt: skip
    same = ["--config.guard.twice=1", "--config.deterministic=true"]
    own = {"JAX_PLATFORMS": "", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "0")}
    without = {**own, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    fast = start(tmp_path / "fast", *args, **own)
    first = start(tmp_path / "first", *args, *same, **without)
    for process in (fast, first):
        code, out, err = process.end(300)
        assert code == 0, err
    assert "twice      step 1: the same bits" in out
    code, out, err = start(tmp_path / "again", *args, *same, **own).end(300)
    assert code == 0, err
    first, again = (
        raw_state(tmp_path / name / "checkpoints" / "12") for name in ("first", "again")
    )
    assert jax.default_backend() == "gpu" and first == again
