#!/usr/bin/env bash
# Decode attention as a CUDA kernel. One H200, repository root, results under $OUT.
# PART picks stages (check,time,heads,splits); default all, about 2 minutes. README.md says what each answers.
set -uo pipefail
OUT=${OUT:-build/decode_attention}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
stage() { # name, at most seconds, what it answers
  part "$1" || return 0
  echo "== $3 (at most $2 s)"; date -u +%T
  timeout "$2" python3 -W ignore -m benchmarks.decode_attention "$1" || echo "rc $?"
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader

stage check 90 "right, the same bits again and alone (a hang costs all of it: then nothing below is worth running)"
stage time 120 "the bars' shapes: builds of the kernel and Triton, each with its bar and prediction"
stage heads 60 "with rotation and page write, as a step calls it"
stage splits 60 "other lengths of the smallest split"
date -u +%T
