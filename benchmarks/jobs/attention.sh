#!/usr/bin/env bash
# Attention on one H200: right first, then fast. Run in the repository root; results under $OUT.
# PART picks stages (test,quick,ragged,decode,engine); default all. About 9 minutes; README.md says what each answers.
set -uo pipefail
OUT=${OUT:-build/attention}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
stage() { echo "== $1 (at most $2 s)"; date -u +%T; }
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader

if part test; then
  stage "conformance: every kernel against the float64 oracle" 240
  timeout 240 python3 -m pytest -o addopts="--strict-markers" -p no:cacheprovider -q --timeout 120 \
    tests/pallas_kernels/test_paged_attention.py tests/pallas_kernels/test_paged_attention_kernels.py \
    tests/pallas_kernels/test_partial_attention.py tests/pallas_kernels/test_flash_attention.py \
    > "$OUT/test.log" 2>&1
  echo "rc $? (bar: 0, none declined but f32 and e4m3 of head dims 80 and 256)"; tail -n 15 "$OUT/test.log"
fi
if part quick; then
  stage "e4m3 and lse of the ragged kernel alone, with the plain one" 100
  timeout 100 python3 -W ignore -m benchmarks.kernels --only ragged --match 4x4096 --commit "$COMMIT" --out "$OUT/quick" | tee "$OUT/quick.log"
  cat <<'P'
predicted TFLOP/s at 4x4096, page 64: plain 577 (recorded 577; a fall means the added options cost code), lse 565,
e4m3 430 (the widening warpgroup needs about 1.2 us a block of 1.7; it may be the bottleneck: then 350), flash in place 585,
flash copied 560, cuDNN 555
P
fi
if part ragged; then
  stage "head dims, beside cuDNN" 200
  timeout 200 python3 -W ignore -m benchmarks.kernels --only ragged --match "1x16384,2k over 16k" --commit "$COMMIT" --out "$OUT/ragged" | tee "$OUT/ragged.log"
  cat <<'P'
predicted TFLOP/s: H128 627 (cuDNN 629), lse 620, e4m3 460; 2k over 16k 600; H64 450 (cuDNN 455), H256 667 (cuDNN 600);
H80 420 and H96 500: swizzles of 32 and 64 bytes may conflict in shared memory; bar: cuDNN of the same head dim
P
fi
if part decode; then
  stage "decode, bf16 and e4m3 pages" 150
  timeout 150 python3 -W ignore -m benchmarks.kernels --only decode --match "32x8192,32x1024,8x1024" --commit "$COMMIT" --out "$OUT/decode" | tee "$OUT/decode.log"
  cat <<'P'
predicted us at 32x8192 page 16: Triton 271 (recorded 266-274), e4m3 Triton 190 (never timed at this shape), e4m3 Mosaic 196
(recorded 196.5 = 1.48x); bar 1.7x of bf16
P
fi
if part engine; then
  stage "8B shape through LLM, bf16 and fp8 pages" 240
  SHAPE=$(python3 benchmarks/shapes.py llama-3.1-8b /tmp/shapes)
  for kv in auto fp8; do
    timeout 120 python3 -W ignore -m serve.cli bench latency "$SHAPE" --batch 32,128 --prefill 8192 --repeats 1 \
      --set kv_dtype=$kv --set max_num_batched_tokens=8192 --label "$COMMIT $kv" --out "$OUT/llm-$kv.json" | tee -a "$OUT/engine.log"
  done
  cat <<'P'
predicted: decode step at batch 32 / 128, context 1k: bf16 6.08 / 11.0 ms, fp8 5.8 / 9.7; prefill of 8k 215 -> 225 ms;
"memory": about twice the tokens. Bar: fp8 never slower in decode; the start prints no choice of reference_wide
P
fi
date -u +%T
