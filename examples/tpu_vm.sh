#!/usr/bin/env bash
# Train on a Cloud TPU slice: one process a host, which find each other by themselves.
#
#   TPU=my-slice ZONE=us-east5-a examples/tpu_vm.sh --config=configs/llama.py:8B --config.data.batch=16 --workdir=/mnt/shared/8b
#
# The slice exists, this folder lies on each of its hosts at ~/meshlm, installed by
#   pip install -e '.[tpu]'
# and --workdir lies on a file system that all of them mount (Filestore, or a bucket by GCS FUSE).
# Stopped and saved, or with a process lost, the run is started again; a slice that was taken away
# has to be made again before.
set -euo pipefail

again_at_most=20
train=$(printf '%q ' python3 train.py "$@")

for ((attempt = 0; attempt <= again_at_most; attempt++)); do
    code=0
    gcloud compute tpus tpu-vm ssh "${TPU:?the name of the slice}" --zone="${ZONE:?its zone}" \
        --worker=all --batch-size=all --command="cd ~/meshlm && exec $train" || code=$?
    case $code in
        4 | 130 | 137 | 143 | 255) echo "tpu_vm.sh: exit code $code, once more" >&2 ;; # 255: of ssh
        *) exit "$code" ;;
    esac
    sleep 10
done
exit "$code"
