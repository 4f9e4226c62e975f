#!/usr/bin/env bash
# From a fresh checkout to a trained network with its mIoU and pictures: environment, data, training, evaluation.
# Works from any directory; a second start reuses what exists. Arguments are KEY=VALUE overrides of the config.
set -euo pipefail

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare_environment requirements.txt
cd "$checkout"

python -m fcn.data.shapes data/shapes --train 600

# One process per GPU, as long as a batch of 16 divides equally; or two on the CPU.
processes=$(python -c 'import torch; n = torch.cuda.device_count() or 2; print(max(d for d in (1, 2, 4, 8, 16) if d <= n))')
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  OMP_NUM_THREADS=$((($(nproc) + processes - 1) / processes))
  export OMP_NUM_THREADS
fi

torchrun --standalone --nproc_per_node="$processes" train_ddp.py --config configs/quickstart.yaml "$@"
echo "Before you type these commands in another shell: cd $checkout; source .venv/bin/activate"
