#!/usr/bin/env bash
# What a prompt waits for beside its kernels: the page table that stays (ADR 50), launches one by one, tokens that the step itself
# writes to host memory. One H200, repository root, results under $OUT; carry .whl and build/k (python -m benchmarks.jobs.carry).
# Nothing is kept between variants, so each compiles its few buckets: about 7 minutes.
. benchmarks/jobs/device.sh
model=$(python3 benchmarks/shapes.py "${SHAPE:-llama-3.1-8b}" /tmp/shapes)
one() { # variant name more...
  echo "== $2"; date -u +%T
  timeout 100 python3 -W ignore -m benchmarks.step_variants "$1" bench latency "$model" --batch 1,32 --prefill 1024,8192 --repeats 5 \
    --set decode_buckets=[1,32,256] --set token_buckets=[1024,8192] --set max_num_seqs=256 --set max_num_batched_tokens=8192 \
    --label "$COMMIT $2" --out "$OUT/${SHAPE:-llama-3.1-8b}-$2.json" "${@:3}" 2>&1 | tail -n 9
}
for variant in ${VARIANTS:-after one_by_one host_tokens prompt}; do one "$variant" "$variant"; done
one after whole_context --set max_model_len=131072
echo "== a prefix of 8k, known"; date -u +%T
timeout 100 python3 -W ignore -m serve.cli bench prefix "$model" --shared 8192 --set max_num_seqs=64 --set max_num_batched_tokens=8192 \
  --label "$COMMIT" --out "$OUT/${SHAPE:-llama-3.1-8b}-prefix.json" 2>&1 | tail -n 6
echo "predicted: 207 ms new, 8 known: 26x (bar 10x)"
echo "predicted, a prompt of 1k of 8B: 23.9 before, after 23.8, one_by_one 23.2, host_tokens 23.3, prompt 22.7 (bar 22); whole_context as after; decode the same"
date -u +%T
