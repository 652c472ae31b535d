#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [ARGS of train.py]; dist_launch.sh names the variables.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [ARGS of train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh"
launch train.py "$2" "$1" --launcher pytorch "${@:3}"
