#!/usr/bin/env bash
# What padded sizes cost (benchmarks/simulate_schedule.py beside a card). One H200, repository root, results under $OUT. PART: new,old
# (default: both; old alone answers only the workload's A/B and what the ladder costs at start).
set -uo pipefail
OUT=${OUT:-build/padding}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [[ ",${PART:-new,old}," == *",$1,"* ]]; }
bench() { # name limit extra...
  local name=$1 limit=$2; shift 2
  echo "== $name (at most $limit s)"; date -u +%T
  timeout "$limit" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py llama-3.1-8b "$OUT/shapes")" --repeats 1 \
    --requests 256 --label "$COMMIT $name" --out "$OUT/$name.json" --set "cache_dir=\"$OUT/cache-$name\"" "$@" > "$OUT/$name.log" 2>&1
  echo "rc $?"; tail -n 16 "$OUT/$name.log"
  python3 -c "import json; d = json.load(open('$OUT/$name.json')); print('start, s', d['first_token_s'], d['start_phases_s'])"
}
if part new; then
  bench new 240 --batch 128,160,192,224,256 --prefill 30,700,1024,1100,1500,3000
  cat <<'P'
predicted, ms: decode 10.8 / 12.6 / 14.4 / 16.1 / 17.9 (padded to 256 they were 13.9 / 15.3 / 16.6 at 160 / 192 / 224: products that go in
  stairs of 64 or 128 rows would show here; then leave out the buckets that are not faster than the next one)
  prompt of 30 / 700 / 1024 / 1100 / 1500 / 3000: 7.9 / 24.1 / 24.8 / 31.9 / 38.8 / 73.2 (padded: 7.7 / 24.5 / 24.8 / 46.7 / 47.2 / 94.0)
  workload 9,840 tok/s
P
fi
if part old; then
  bench old 180 --batch 1 --prefill "" --set 'decode_buckets=[1,2,4,8,16,32,64,128,256]' --set 'token_buckets=[32,64,128,256,512,1024,2048,4096,8192]'
  echo "predicted: workload 9,580 tok/s; start (both with empty caches) as long as new's to 2 s"
fi
date -u +%T
