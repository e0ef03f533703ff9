"""--config.deterministic=true: the same command gives the same bits."""

import os
import subprocess
import sys

import jax
import pytest

from configs.load import ROOT
from tests.training.conftest import raw_state

FLAG = "--xla_gpu_deterministic_ops=true"


@pytest.mark.slow
def test_on_a_cpu_it_asks_xla_and_changes_nothing(finished, command_line, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    ended = command_line("--config.deterministic=true")
    assert ended.code == 0, ended.err
    assert os.environ["XLA_FLAGS"].split()[-1] == FLAG
    assert ended.state(12) == finished.state(12)
    assert ended.losses() == finished.losses()


@pytest.mark.slow
def test_xla_knows_the_option():
    """It ends a process that gives it one that it does not know."""
    code = "from sharding import runtime; runtime.deterministic(); import jax; jax.numpy.ones(3)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for more, known in ((FLAG, True), ("--xla_gpu_no_such_option=true", False)):
        environment["XLA_FLAGS"] = more
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == known, done.stderr


@pytest.mark.gpu
def test_on_a_gpu_two_processes_give_the_same_bits_with_cudnn_attention(start, tmp_path):
    """XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu ...: this process leaves them memory."""
    sizes = {"layers": 2, "embed": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "mlp": 512}
    model = [f"--config.model.{name}={size}" for name, size in sizes.items()]
    args = [
        *model, "--config.model.dtype=bfloat16", "--config.data.seq=512",
        "--config.data.documents=16", "--config.guard.twice=1", "--config.deterministic=true",
    ]  # fmt: skip
    for name in "ab":
        own = {"JAX_PLATFORMS": "", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}
        code, out, err = start(tmp_path / name, *args, **own).end(600)
        assert code == 0 and "twice      step 1: the same bits" in out, err
    a, b = (raw_state(tmp_path / name / "checkpoints" / "12") for name in "ab")
    assert jax.default_backend() == "gpu" and a == b
