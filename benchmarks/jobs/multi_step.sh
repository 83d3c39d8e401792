#!/usr/bin/env bash
# Several decode steps in one dispatch (ADR 0030) on one H200, 0.6B shape. Run in the repository root; results under $OUT.
# PART picks stages; default: latency,alike. The caches are shared, so only the first start is cold.
set -uo pipefail
OUT=${OUT:-build/multi_step}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [[ ",${PART:-latency,alike}," == *",$1,"* ]]; }
MODEL=$(python3 benchmarks/shapes.py qwen3-0.6b "$OUT/shapes")
bench() { # name limit extra...
  local name=$1 limit=$2; shift 2
  echo "== $name (at most $limit s)"; date -u +%T
  timeout "$limit" python3 -W ignore -m serve.cli bench latency "$MODEL" --batch 1,8 --prefill "" --repeats 2 --label "$COMMIT $name" \
    --out "$OUT/$name.json" --set "cache_dir=\"$OUT/cache\"" --set log_level=info "$@" > "$OUT/$name.log" 2>&1
  echo "rc $?"; grep -E "decode steps in one dispatch|ready in" "$OUT/$name.log"; tail -n 8 "$OUT/$name.log"
}
if part latency; then
  bench single 150 --set decode_steps=1
  bench auto 90
  bench two 90 --set decode_steps=2
  cat <<'P'
predicted, ms a step at batch 1 / 8, kernels = auto (one kernel for all layers, 0.90 / 1.15 on the device): single 1.20 / 1.35 with the host
  exposed for most of the difference; auto (4 steps) 0.93 / 1.18, exposed < 0.02; two 0.95 / 1.20
bars: 1.1 / 1.3. start of auto beside single, both with empty caches: at most 8 s more; compiles after ready 0
If auto is no faster than single: the loop is not launched ahead, or its body's graph is updated in every iteration. A trace of
`jaxllm profile` shows which: gaps between iterations of some 0.3 ms are graph updates, gaps of a whole readback are the loop's condition.
P
fi
if part alike; then
  for rows in 1 8; do
    echo "== tokens, other samplers, arrivals at $rows rows"; date -u +%T
    timeout 120 python3 -W ignore -m benchmarks.multi_step "$MODEL" --rows "$rows" --steps 1,4,2 --cache-dir "$OUT/cache-alike" | tee "$OUT/alike-$rows.jsonl"
  done
  echo "predicted: alike 1.0 (the same kernels in the loop; else see which product differs); arrival + 3 to 6 ms at 4 steps; temperature and top_p"
  echo "gain more than greedy, as they save a second executable's call: 1.6 -> 1.2 ms"
fi
if part apart; then
  bench apart-single 150 --set kernels=apart --set decode_steps=1
  bench apart-auto 90 --set kernels=apart
  echo "predicted: single 1.39 / 1.5, auto 1.08 / 1.28 (1.05 on the device at batch 1)"
fi
date -u +%T
