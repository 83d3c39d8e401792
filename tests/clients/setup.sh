#!/usr/bin/env bash
# Makes .clients: a virtual environment and a node folder with what outside people use. Nothing of ours is in there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v npm >/dev/null || { echo "the npm client needs nodejs and npm (apt-get install nodejs npm)" >&2; exit 1; }
[ -x .clients/venv/bin/python ] || .venv/bin/python -m venv .clients/venv
.clients/venv/bin/python -m pip install -qq --disable-pip-version-check -r "$here/requirements.txt"
mkdir -p .clients/node
cp "$here/package.json" .clients/node/
npm install --prefix .clients/node --no-audit --no-fund --silent
