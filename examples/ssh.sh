#!/usr/bin/env bash
# Train on workstations that reach each other, one process a machine with all of its GPUs.
#
#   examples/ssh.sh desk1 desk2 -- --config=configs/llama.py:1B --workdir=/shared/runs/1b
#
# Before -- stand the machines, the first as the others reach it; behind it the arguments of train.py.
# This folder lies at the same path on all of them, with its .venv, and so does --workdir, on a disk
# that they share. Ctrl-C saves and ends all.
set -euo pipefail

port=${PORT:-3456}
hosts=()
while (($#)) && [[ $1 != -- ]]; do
    hosts+=("$1")
    shift
done
if ((${#hosts[@]} == 0)) || [[ ${1:-} != -- ]]; then
    echo "usage: examples/ssh.sh HOST... -- ARGUMENTS OF train.py" >&2
    exit 2
fi
shift

# A folder that ssh does not enter by itself, and arguments that a shell reads a second time.
command=$(printf '%q ' cd "$PWD")
train=$(printf '%q ' "${PYTHON:-.venv/bin/python}" train.py "$@"
    printf '%q ' "--coordinator=${hosts[0]}:$port" "--processes=${#hosts[@]}")
pidfile=/tmp/meshlm-$port.pid

pids=()
for process in "${!hosts[@]}"; do
    ssh "${hosts[$process]}" "$command && echo \$\$ > $pidfile.$process && exec $train --process=$process" &
    pids+=($!)
done

# One that is told to stop tells the others.
stop() {
    ssh "${hosts[0]}" "kill -TERM \$(cat $pidfile.0)" || true
}
trap stop INT TERM

code=0
for pid in "${pids[@]}"; do
    while true; do
        ended=0
        wait "$pid" || ended=$?
        kill -0 "$pid" 2> /dev/null || break # else a signal to this script cut the wait short
    done
    ((ended <= code)) || code=$ended
done
exit "$code"
