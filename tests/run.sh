#!/usr/bin/env bash
# Install what the tests need into the checkout's virtual environment and run them. Arguments go to pytest.
# Works from any directory; a second start reuses what exists. In a clone of its own, REQUIREMENTS=tests/oldest.txt tests
# the oldest versions that are supported.
set -euo pipefail

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
prepare_environment "${REQUIREMENTS:-requirements.txt}" tests/requirements.txt
cd "$checkout"

ruff check .
ruff format --check .
# One pytest process more than cores, at most nine, because tests often wait; one thread each. The tests of a file stay
# together.
workers=$(($(nproc) + 1))
export OMP_NUM_THREADS=1
exec python -m pytest -n $((workers < 9 ? workers : 9)) --dist loadfile --no-loadscope-reorder "$@"
