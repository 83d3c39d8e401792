#!/usr/bin/env bash
# Makes .api: a virtual environment for schemathesis, which shares nothing with ours.
set -euo pipefail
[ -x .api/venv/bin/python ] || .venv/bin/python -m venv .api/venv
.api/venv/bin/python -m pip install -qq --disable-pip-version-check 'schemathesis>=4.32,<5'
