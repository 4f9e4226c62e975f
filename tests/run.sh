#!/usr/bin/env bash
# Set up what the tests need in the checkout's virtual environment and run them. Arguments go to pytest.
# Works from any directory; a second start re-uses what is there.
set -euo pipefail

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
prepare_environment requirements.txt tests/requirements.txt
cd "$checkout"

ruff check .
ruff format --check .
# A process of pytest on each core, and a thread in each. The tests of a file stay together.
export OMP_NUM_THREADS=1
exec python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
