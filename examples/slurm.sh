#!/usr/bin/env bash
# Train on a SLURM cluster: one process a GPU, all of one run.
#
#   sbatch examples/slurm.sh --config=configs/llama.py:8B --config.data.batch=16 --workdir=/shared/runs/8b
#
# Arguments are those of train.py; --workdir must lie where every node sees it. The job goes back to
# the queue when it is preempted, when its time is over and when a node is lost, and goes on from its
# last save. `scancel` ends it, after a save.
#SBATCH --job-name=meshlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

lost_at_most=20 # times that a lost process sends the job back to the queue

code=0
# All end by themselves when one is lost; --wait is for those that cannot any more.
srun --kill-on-bad-exit=0 --wait=180 "${PYTHON:-python}" train.py "$@" || code=$?

case $code in
    0) exit 0 ;;
    130 | 143) why="stopped and saved" ;;
    4 | 137)
        why="a process was lost"
        if ((${SLURM_RESTART_COUNT:-0} >= lost_at_most)); then
            echo "slurm.sh: $why, for the ${SLURM_RESTART_COUNT}th time: not again" >&2
            exit "$code"
        fi
        ;;
    *) exit "$code" ;; # what is wrong would be wrong again
esac

# Whoever cancels the job does not want it back; a preempted one SLURM itself puts back.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
if [[ $state == RUNNING ]]; then
    echo "slurm.sh: $why (exit code $code): back to the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
