#!/usr/bin/env bash
# A token drawn by a cluster of blocks (ADR 29). One H200, repository root, results under $OUT. PART: build,test,time (default: all).
set -uo pipefail
OUT=${OUT:-build/sampler}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [[ ",${PART:-build,test,time}," == *",$1,"* ]]; }
stage() { echo "== $1 (at most $2 s)"; date -u +%T; }
if part build; then
  stage "nvcc" 90
  timeout 90 python3 -W ignore -c 'from pallas_kernels.sampling import cuda; print(cuda.library())'; echo "rc $? (bar: 0)"
fi
if part test; then
  stage "the draw against the float64 oracle on the card" 100
  timeout 100 python3 -m pytest -o addopts="--strict-markers" -p no:cacheprovider -q -x --timeout 60 \
    tests/pallas_kernels/test_sampling.py -k "draw and cuda" > "$OUT/test.log" 2>&1
  echo "rc $? (bar: 0)"; tail -n 12 "$OUT/test.log"
fi
if part time; then
  stage "timings, predictions beside them" 150
  timeout 150 python3 -W ignore -m benchmarks.small_kernels draw | tee "$OUT/draw.jsonl"
  echo "predicted us: everything on 140, top_p alone 165, temperature alone 150, all rows slow 700; bars 350 / 350 / 240; Triton's with"
  echo "its pass over the logits 657 / 1549 / 636; rows_that_differ_from_cuda 0 (flat, top_p: a few where rounding moves the edge)"
fi
