# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: a virtual environment in the checkout with what the given requirement
# files pin. The second time it finds everything in place. PYTHON chooses the interpreter (3.10 or newer).

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

prepare_environment() {
  local stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is no Python 3.10 or newer; set PYTHON to one" >&2
    return 2
  fi
  stamp=$checkout/.venv/installed.txt
  wanted=$(cd "$checkout" && cat "$@")
  if [ ! -x "$checkout/.venv/bin/python" ] && ! "$python" -m venv "$checkout/.venv"; then
    rm -rf "$checkout/.venv"
    echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
    return 2
  fi
  # shellcheck disable=SC1091
  source "$checkout/.venv/bin/activate"
  # Each line of the wanted requirements must stand in the record of what was installed.
  if ! printf '%s\n' "$wanted" | grep -vxFf "$stamp" >/dev/null 2>&1 && [ -f "$stamp" ]; then
    return 0
  fi
  echo "installing into $checkout/.venv: $* (PyTorch is several GB; minutes)"
  (cd "$checkout" && python -m pip install --disable-pip-version-check -q "${@/#/-r}") || return 1
  printf '%s\n' "$wanted" >>"$stamp"
}
