# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: creates a virtual environment in the checkout with the packages of the
# given requirement files, if it does not exist yet. PYTHON chooses the interpreter (3.10 or newer).

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

prepare_environment() {
  local venv=$checkout/.venv python=${PYTHON:-python3} file installed
  if [ ! -f "$venv/ready" ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "error: $python is not Python 3.10 or newer; set PYTHON to one that is" >&2
      return 2
    fi
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
      echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
      return 2
    fi
    touch "$venv/ready"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  for file in "$@"; do
    installed=$venv/installed-${file//\//-}
    if ! cmp -s "$checkout/$file" "$installed"; then
      echo "installing $file into $venv (PyTorch is several GB: minutes)"
      python -m pip install --disable-pip-version-check -q -r "$checkout/$file" || return 1
      cp "$checkout/$file" "$installed"
    fi
  done
}
