#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGS of train.py]
# GPUS (8) in all, GPUS_PER_NODE (8, or GPUS where that is less), CPUS_PER_TASK (5), SRUN_ARGS
# (more options of srun), MASTER_PORT (from the number of the job), PYTHON (the `python` of PATH).
# A job that is requeued goes on where it was with --resume among the ARGS from the start.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [ARGS of train.py]" >&2
    exit 2
fi
tools=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec srun --partition="$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" \
    --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${more[@]+"${more[@]}"} "${PYTHON:-python}" -u "$tools/train.py" "$3" --work-dir "$4" \
    --launcher slurm "${@:5}"
