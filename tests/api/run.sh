#!/usr/bin/env bash
# schemathesis against SERVER, from an environment of its own: what the schema allows and what it forbids, EXAMPLES an
# operation. A schema cannot say everything (a token id must be of the vocabulary, stream_options needs stream), so being
# refused with a 400 is no failure; a 5xx, an answer that is not as documented, or a body that breaks the schema and is
# taken all the same, is one. What stops the server for others (pause, sleep) is run by itself, last.
set -uo pipefail
examples=${EXAMPLES:-200}
common=(run "$SERVER/openapi.json" --url "$SERVER" -H "Authorization: Bearer admin-key" --max-examples "$examples"
  --mode all --phases examples,coverage,fuzzing --continue-on-failure --request-timeout 60 --seed 1 --no-color
  --suppress-health-check all --exclude-checks positive_data_acceptance)
alone='^/(pause|resume|sleep|wake_up|update_weights|start_profile|stop_profile)$'
code=0
.api/venv/bin/schemathesis "${common[@]}" --exclude-path-regex "$alone" "$@" || code=1
.api/venv/bin/schemathesis "${common[@]}" --include-path-regex "$alone" "$@" || code=1
exit $code
