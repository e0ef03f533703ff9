"""The scripts of examples/, with stand-ins for the commands of the clusters that are not here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sharding.cluster import join

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh"))
HARD = ["--config=a.py:8B", "--workdir=/a folder/$HOME", '--config.sample.prompt=it\'s "so" *']

# Python that tells what it was called with, and ends as it is told.
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$PWD" "$@" > "$(mktemp "$CALLS/python.XXXXXX")"
exit "${CODE:-0}"
"""
RUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@"
"""
TOLD = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS/told"
"""
SSH = """#!/usr/bin/env bash
echo "ssh $1" >> "$CALLS/told"
exec sh -c "$2"
"""
GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$CALLS/told"
for argument; do [[ $argument == --command=* ]] && command=${argument#--command=}; done
mkdir -p ~/meshlm
exec sh -c "$command"
"""


class Cluster:
    """A folder of stand-ins, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder / "bin", folder / "calls"
        self.folder.mkdir()
        self.calls.mkdir()
        for name, text in (
            ("python", PYTHON), ("python3", PYTHON), ("srun", RUN), ("scontrol", TOLD),
            ("squeue", TOLD + 'echo "$STATE"\n'), ("ssh", SSH), ("gcloud", GCLOUD),
            ("sleep", TOLD),
        ):  # fmt: skip
            self.put(name, text)
        self.home = folder / "home"
        self.home.mkdir()

    def put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def run(self, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
        env = {
            **os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "CALLS": str(self.calls),
            "HOME": str(self.home), **environment,
        }  # fmt: skip
        return subprocess.run(
            [EXAMPLES / script, *args], env=env, capture_output=True, text=True, timeout=60,
            cwd=ROOT,
        )  # fmt: skip

    def trained(self) -> list[list[str]]:
        """Of each call of Python its folder and its arguments."""
        return [path.read_text().split("\0")[:-1] for path in self.calls.glob("python.*")]

    def told(self) -> str:
        """What the other stand-ins were called with."""
        file = self.calls / "told"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_say_how_they_are_started(script):
    path = EXAMPLES / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    assert f"examples/{script} " in path.read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", path], check=True)


def test_slurm_hands_its_arguments_to_every_task(cluster):
    ended = cluster.run("slurm.sh", *HARD, SLURM_JOB_ID="77")
    assert ended.returncode == 0, ended.stderr
    assert cluster.trained() == [[str(ROOT), "train.py", *HARD]] and not cluster.told()


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        (143, "RUNNING", "500", True),  # the time is over, however often
        (130, "RUNNING", "0", True),
        (4, "RUNNING", "0", True),
        (137, "RUNNING", "19", True),
        (4, "RUNNING", "20", False),  # too often
        (143, "CANCELLED", "0", False),  # scancel
        (143, "PREEMPTED", "0", False),  # SLURM itself puts it back
        (143, "", "0", False),
        (1, "RUNNING", "0", False),
        (2, "RUNNING", "0", False),
        (3, "RUNNING", "0", False),
        (5, "RUNNING", "0", False),
    ],
)
def test_slurm_goes_back_to_the_queue_where_that_helps(cluster, code, state, restarts, again):
    ended = cluster.run(
        "slurm.sh", CODE=str(code), STATE=state, SLURM_JOB_ID="77", SLURM_RESTART_COUNT=restarts
    )
    assert ended.returncode == code
    assert ("scontrol requeue 77" in cluster.told()) == again, ended.stderr


def test_slurm_asks_to_be_requeued_and_for_the_signal_in_time():
    """What a job gets at the end of its time or of a preemption is SIGTERM, to all tasks."""
    lines = (EXAMPLES / "slurm.sh").read_text().splitlines()
    options = dict(line[8:].partition("=")[::2] for line in lines if line.startswith("#SBATCH "))
    assert "--requeue" in options and options["--open-mode"] == "append"
    signal, _, seconds = options["--signal"].partition("@")
    assert signal == "TERM" and int(seconds) >= 120
    # As JAX takes them: a GPU for each task of a node.
    assert options["--ntasks-per-node"] == options["--gpus-per-node"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[7-8]", "node7"),
        ("node[07,09-12],big1", "node07"),
        ("big1,node[7-8]", "big1"),
    ],
)
def test_a_task_of_slurm_finds_its_place(monkeypatch, nodes, first):
    for name, value in (
        ("JOB_ID", "4103"), ("STEP_NODELIST", nodes), ("NTASKS", "16"), ("PROCID", "11"),
        ("LOCALID", "3"), ("STEP_NUM_NODES", "2"),
    ):  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = join.place(None, None, None)
    port = 65536 - 4096 + 4103 % 4096
    assert found == join.Place(f"{first}:{port}", 16, 11, (3,))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert join.place(None, None, None) is None  # alone, with all GPUs that it sees
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "first")
    with pytest.raises(ValueError, match=r"not this process in it: .*'first'; --coordinator"):
        join.place(None, None, None)
    assert join.place("desk:1", 2, 1) == join.Place("desk:1", 2, 1)  # what is given counts


def test_ssh_starts_one_process_a_host_with_the_same_arguments(cluster):
    ended = cluster.run(
        "ssh.sh", "desk1", "desk2", "desk3", "--", *HARD, PYTHON="python", PORT="4567"
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(cluster.told().split()) == ["desk1", "desk2", "desk3", *["ssh"] * 3]
    where = ["--coordinator=desk1:4567", "--processes=3"]
    assert sorted(cluster.trained()) == [
        [str(ROOT), "train.py", *HARD, *where, f"--process={k}"] for k in range(3)
    ]


def test_ssh_ends_as_its_worst_process_and_says_how_it_is_used(cluster):
    assert cluster.run("ssh.sh", "a", "b", "--", CODE="4", PYTHON="python").returncode == 4
    for wrong in ((), ("a", "b"), ("--", "--config=x")):
        ended = cluster.run("ssh.sh", *wrong)
        assert ended.returncode == 2 and "usage: examples/ssh.sh HOST... --" in ended.stderr


def test_a_tpu_slice_gets_the_command_on_every_host(cluster):
    ended = cluster.run("tpu_vm.sh", *HARD, TPU="slice", ZONE="us-east5-a")
    assert ended.returncode == 0, ended.stderr
    (told,) = cluster.told().splitlines()
    assert told.startswith("compute tpus tpu-vm ssh slice --zone=us-east5-a --worker=all")
    assert cluster.trained() == [[str(cluster.home / "meshlm"), "train.py", *HARD]]


def test_a_tpu_slice_starts_again_where_that_helps_and_not_for_ever(cluster):
    where = {"TPU": "slice", "ZONE": "a"}
    assert cluster.run("tpu_vm.sh", CODE="2", **where).returncode == 2
    assert len(cluster.trained()) == 1
    assert cluster.run("tpu_vm.sh", CODE="143", **where).returncode == 143
    assert len(cluster.trained()) == 1 + 21
    assert cluster.run("tpu_vm.sh").returncode == 1  # no slice was named
