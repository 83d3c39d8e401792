#!/usr/bin/env bash
# The small kernels of a step on one H200: right first, then in the real step, A/B. Run in the repository root; results
# under $OUT. PART picks stages; default: test,micro,eight,point6. README.md says what each answers.
set -uo pipefail
OUT=${OUT:-build/small_kernels}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [[ ",${PART:-test,micro,eight,point6}," == *",$1,"* ]]; }
stage() { echo "== $1 (at most $2 s)"; date -u +%T; }
bench() { # variant shape limit extra...
  local variant=$1 shape=$2 limit=$3; shift 3
  timeout "$limit" python3 -W ignore -m benchmarks.step_variants "$variant" bench latency "$(python3 benchmarks/shapes.py "$shape" /tmp/shapes)" \
    --repeats 1 --label "$COMMIT $variant" --out "$OUT/$shape-$variant.json" --set max_num_batched_tokens=8192 "$@" > "$OUT/$shape-$variant.log" 2>&1
  echo "rc $? $shape $variant"; tail -n 14 "$OUT/$shape-$variant.log"
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader

if part test; then
  stage "conformance on the card" 240
  timeout 240 python3 -m pytest -o addopts="--strict-markers" -p no:cacheprovider -q --timeout 120 \
    tests/pallas_kernels/test_rope_page_write.py tests/pallas_kernels/test_decode_attention.py tests/pallas_kernels/test_norm.py \
    tests/pallas_kernels/test_sampling.py tests/pallas_kernels/test_paged_attention.py > "$OUT/test.log" 2>&1
  echo "rc $? (bar: 0; f32 declined by the kernels)"; tail -n 15 "$OUT/test.log"
fi
if part micro; then
  stage "kernels alone beside XLA's" 150
  timeout 150 python3 -W ignore -m benchmarks.small_kernels | tee "$OUT/micro.log"
  echo "bars: greedy <= 100 us, sample (everything on, with adjusted) <= 350 us, rope at most XLA's time"
fi
if part eight; then
  for variant in before after parts; do
    stage "8B shape, $variant" 150
    bench $variant llama-3.1-8b 150 --batch 1,32,256 --prefill 1024,8192
  done
  cat <<'P'
predicted, ms (before = recorded 4.83 / 6.07 / 18.7, prefill 1k 26.8 (TTFT), 8k 207-215):
  after: decode 4.60 / 5.95 / 18.5; prefill 1k -1.1, 8k -4.5
  parts: decode 4.50 / 5.80 / 18.4 (at batch 1 the products become reductions: if above 'after', keep parts off there)
bar: never slower than 'before' at any line; then 'after' stays the default, 'parts' goes on where it wins
P
fi
if part point6; then
  for variant in before after attention norms; do
    stage "0.6B shape, $variant" 100
    bench $variant qwen3-0.6b 100 --batch 1,32 --prefill 1024
  done
  cat <<'P'
predicted, ms (before = 1.65 / 2.4): after 1.30 / 2.15; attention alone 1.40 / 2.2; norms alone 1.53 / 2.4 (XLA norms 32 rows in one kernel)
P
fi
if part profile; then
  stage "kernels of the 8B step by time, after" 120
  timeout 120 python3 -W ignore -m serve.cli profile "$(python3 benchmarks/shapes.py llama-3.1-8b /tmp/shapes)" --batch 1 > "$OUT/profile.log" 2>&1
  echo "rc $?"; tail -n 40 "$OUT/profile.log"
fi
date -u +%T
