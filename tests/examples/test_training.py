"""Two of the scripts train for real, two processes on this machine."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from monitor import metrics
from tests.examples.test_scripts import EXAMPLES, ROOT
from tests.training.conftest import free_port

pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for k in 0 1; do
    SLURM_PROCID=$k SLURM_LOCALID=$k "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    ended=0
    wait "$pid" || ended=$?
    ((ended <= code)) || code=$ended
done
exit "$code"
"""
SSH = '#!/usr/bin/env bash\nexec sh -c "$2"\n'


@pytest.fixture
def script(recipe, compiled, tmp_path):
    """`script(name, *args)`: one of examples/ that trains the tiny run in the folder `run`."""
    folder, values = compiled
    stand_ins, started = tmp_path / "bin", []
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("ssh", SSH)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)

    def script(name: str, *args: str, **environment: str) -> subprocess.Popen:
        env = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            **{name.upper(): str(value) for name, value in values.items()},
            "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUNBUFFERED": "1",
            "PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment,
        }  # fmt: skip
        flags = (f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.sample.tokens=0")
        process = subprocess.Popen(
            [EXAMPLES / name, *args, *flags], env=env, cwd=ROOT, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        late = threading.Timer(240, lambda: os.killpg(process.pid, signal.SIGKILL))
        late.start()
        started.append((process, late))
        return process

    yield script
    for process, late in started:
        late.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the script, and all that it started
        process.stdout.close()
        process.wait()


def test_the_tasks_of_slurm_are_one_run(script, tmp_path):
    process = script("slurm.sh", SLURM_JOB_ID="1", JAX_COORDINATOR_PORT=str(free_port()))
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "mesh " in out and re.search(r"devices +dcn=1 x data=2 ", out), out
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]


def test_workstations_save_and_end_when_the_script_is_told_to(script, tmp_path):
    port = free_port()
    process = script(
        "ssh.sh", "127.0.0.1", "127.0.0.1", "--", "--config.steps=1000000", PORT=str(port)
    )  # fmt: skip
    for line in process.stdout:
        if re.match(r"step +4/", line):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    for k in range(2):
        os.remove(f"/tmp/meshlm-{port}.pid.{k}")
    assert process.returncode == 143, out
    (step,) = set(re.findall(r"stopped by SIGTERM, step (\d+) saved", out))
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()
