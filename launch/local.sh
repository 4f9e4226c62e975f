#!/usr/bin/env bash
# All GPUs of one machine, or two CPU processes: launch/local.sh CONFIG [KEY=VALUE ...]
# Ctrl-C, SIGTERM and SIGUSR1 save and stop the run; the same command continues it. If a process crashes, all restart
# from the newest checkpoint.
set -euo pipefail

PROCESSES=${PROCESSES:-}                     # processes; empty: one per GPU
MAX_RESTARTS=${MAX_RESTARTS:-3}              # restarts after a crash
GRACE=${GRACE:-30}                           # seconds from a signal to SIGKILL (PyTorch before 2.12: always 30)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
PROCESSES=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + PROCESSES - 1) / PROCESSES))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE

config=${1:?usage: launch/local.sh CONFIG [KEY=VALUE ...]}
shift
exec torchrun --standalone --nproc-per-node="$PROCESSES" --max-restarts="$MAX_RESTARTS" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train_ddp.py --config "$config" "$@"
