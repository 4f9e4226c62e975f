#!/usr/bin/env bash
# Install what the tests need into the checkout's virtual environment and run them. Arguments go to pytest.
# Works from any directory; a second start reuses what exists.
set -euo pipefail

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
prepare_environment requirements.txt tests/requirements.txt
cd "$checkout"

ruff check .
ruff format --check .
# One pytest process per core, with one thread each. The tests of a file stay together.
export OMP_NUM_THREADS=1
exec python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
