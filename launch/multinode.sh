#!/usr/bin/env bash
# Several machines without a scheduler: run launch/multinode.sh CONFIG [KEY=VALUE ...] on each of them.
# The run directory and the data must be the same folders on all machines. With NODES=1:4 machines may leave and join:
# the others continue from the newest checkpoint, with the same global batch. The rendezvous host must stay.
set -euo pipefail

RDZV_HOST=${RDZV_HOST:?set RDZV_HOST to a name or address of the first machine that all machines can reach}
RDZV_PORT=${RDZV_PORT:-29400}
RDZV_ID=${RDZV_ID:-fcn}                      # different for each run that uses the same host
NODES=${NODES:?set NODES to the number of machines, or to MIN:MAX such as 1:4}
PROCESSES=${PROCESSES:-}                     # processes on this machine; empty: one per GPU
MAX_RESTARTS=${MAX_RESTARTS:-10}             # restarts after a crash or after a machine has left
JOIN_TIMEOUT=${JOIN_TIMEOUT:-900}            # seconds to wait for the minimum number of machines
LAST_CALL=${LAST_CALL:-30}                   # seconds to wait for more machines
NETWORK_TIMEOUT=${NETWORK_TIMEOUT:-900}      # seconds to wait for the network when RDZV_HOST cannot be reached
GRACE=${GRACE:-30}                           # seconds from a signal to SIGKILL (PyTorch before 2.12: always 30)
RDZV_CONF=${RDZV_CONF:-}                     # additional --rdzv-conf for torchrun, such as keep_alive_interval=2
LOCAL_ADDR=${LOCAL_ADDR:-}                   # this machine's address for the others; empty: the one that reaches RDZV_HOST
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
PROCESSES=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + PROCESSES - 1) / PROCESSES))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE

# torchrun would use this machine's own name, which may have another address or none; then no machine would be the host.
route=$(python - "$RDZV_HOST" <<'EOF'
import socket, sys
try:
    family, kind, _, _, address = socket.getaddrinfo(sys.argv[1], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        print(probe.getsockname()[0], address[0])
except OSError as error:
    sys.exit(f"error: RDZV_HOST: {sys.argv[1]}: {error.strerror}; set it to a name or address that this machine can reach")
EOF
) || exit 2
[ "${route% *}" != "${route#* }" ] || RDZV_HOST=localhost  # this machine is the host
[[ $route == 127.* || $route == ::1* ]] || LOCAL_ADDR=${LOCAL_ADDR:-${route% *}}

config=${1:?usage: launch/multinode.sh CONFIG [KEY=VALUE ...]}
shift
# Not every number of machines divides the batch. train.uneven allows any, and the numbers stay the same.
[[ $NODES != *:* ]] || set -- train.uneven=true "$@"
exec python launch/agent.py "$NETWORK_TIMEOUT" --nnodes="$NODES" --nproc-per-node="$PROCESSES" \
  --max-restarts="$MAX_RESTARTS" ${LOCAL_ADDR:+"--local-addr=$LOCAL_ADDR"} \
  --rdzv-backend=c10d --rdzv-endpoint="$RDZV_HOST:$RDZV_PORT" --rdzv-id="$RDZV_ID" \
  --rdzv-conf="join_timeout=$JOIN_TIMEOUT,last_call_timeout=$LAST_CALL${RDZV_CONF:+,$RDZV_CONF}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train_ddp.py --config "$config" "$@"
