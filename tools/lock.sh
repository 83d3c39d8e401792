#!/usr/bin/env bash
# requirements.lock: every installed distribution and its version, no host, no hash. Used as pip constraints.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Constraints for pip: made by \`make lock\` from a working .venv; names and versions only."
  .venv/bin/python -m pip freeze --exclude-editable --disable-pip-version-check | grep -v '^-e ' | grep -v '^jaxllm'
  # The CUDA plug-ins are not installed on the machine that makes the lock; they must match jaxlib exactly.
  version=$(.venv/bin/python -c 'import jaxlib; print(jaxlib.__version__)')
  for cuda in 12 13; do printf 'jax-cuda%s-plugin==%s\njax-cuda%s-pjrt==%s\n' $cuda "$version" $cuda "$version"; done
} >requirements.lock.new
mv requirements.lock.new requirements.lock
