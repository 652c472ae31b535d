# Sourced by dist_train.sh and dist_test.sh.
# launch SCRIPT GPUS ARGS...: runs tools/SCRIPT with ARGS in GPUS processes on each of NNODES
# machines; without a GPU they run on the CPU.
# More machines: set NNODES, NODE_RANK, MASTER_ADDR and, where 29500 is taken, PORT on each.
# PYTHON: the interpreter, by default the `python` of PATH.
launch() {
    local tools script=$1 gpus=$2 nodes=(--standalone) # takes a free port
    shift 2
    if ! [[ $gpus =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]]; then
        echo "error: GPUS must be a number from 1 on, got '$gpus'" >&2
        exit 2
    fi
    tools=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
    if [ "${NNODES:-1}" != 1 ] || [ -n "${PORT:-}" ]; then
        nodes=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
    fi
    export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
    # In place of the shell: a signal to this script ends the processes, not the shell alone.
    exec "${PYTHON:-python}" -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$gpus" \
        "$tools/$script" "$@"
}
