#!/usr/bin/env bash
# Outside clients against OPENAI_BASE_URL, from an environment of their own; every client runs, the worst code counts.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
code=0
for client in openai_client anthropic_client litellm_client langchain_client; do
  .clients/venv/bin/python "$here/$client.py" || code=1
done
NODE_PACKAGES=$PWD/.clients/node node "$here/openai_client.mjs" || code=1
exit $code
