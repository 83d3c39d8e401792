#!/usr/bin/env bash
# Makes .venv with the given extras ("" or "dev"), from whatever Python >= 3.12 this machine has. Prints one line per act.
set -euo pipefail
extras=${1:-}
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3 python; do
    [ -n "$candidate" ] && fits "$candidate" && { command -v "$candidate"; return; }
  done
  for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do # a version no shim points at
    [ -x "$candidate" ] && fits "$candidate" && { echo "$candidate"; return; }
  done
  return 1
}

if ! { [ -x .venv/bin/python ] && fits .venv/bin/python; }; then
  if python=$(find_python); then
    echo "setup: $("$python" --version) at $python"
    "$python" -m venv .venv
  elif command -v uv >/dev/null; then
    echo "setup: Python from uv"
    uv venv --seed --python '>=3.12' .venv
  else
    echo "jaxllm needs Python >= 3.12 and found none: install python3.12 with its venv module (or uv) and run make again" >&2
    exit 1
  fi
fi

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  major=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' | head -n 1)
  [ "${major:-12}" -ge 13 ] && cuda=cuda13 || cuda=cuda12
  extras=${extras:+$extras,}$cuda
fi

echo "setup: installing jaxllm${extras:+[$extras]} into .venv"
.venv/bin/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e ".${extras:+[$extras]}"
