#!/usr/bin/env bash
# The GPU lines of the first issue, one call: make test-gpu, then `LLM` on two real shapes with random weights, with the
# jnp attention and with our kernels. Results under $OUT. PART picks: test, reference, auto (default: all).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/h200}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
bench() { # shape kernels extra...
  timeout "${LIMIT:-150}" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py "$1" /tmp/shapes)" \
    --set kernels="$2" --label "$COMMIT" --out "$OUT/llm-$1-$2.json" "${@:3}" 2>&1 | tee -a "$OUT/bench.log"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
part test && timeout "${TEST_LIMIT:-280}" make -s test-gpu 2>&1 | tee "$OUT/test-gpu.log" | tail -n 25
for shape in llama-3.1-8b qwen3-0.6b; do
  for kernels in auto reference; do
    part $kernels || continue
    bench $shape $kernels --batch 1,8,32 --prefill 1024 --repeats 1 --set max_num_batched_tokens=2048
  done
done
