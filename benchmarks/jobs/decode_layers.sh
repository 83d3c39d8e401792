#!/usr/bin/env bash
# All layers of a decode step in one kernel, and what a start costs now. One H200, repository root, results under $OUT.
# PART picks stages (check,time,timeline,variants,engine,start); default all, about 9 minutes. README.md says what each answers.
set -uo pipefail
OUT=${OUT:-build/decode_layers}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
stage() { echo "== $1 (at most $2 s)"; date -u +%T; }
bench() { # shape kernels batches limit
  timeout "$4" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py "$1" /tmp/shapes)" --batch "$3" --prefill "" \
    --repeats 1 --set kernels=$2 --label "$COMMIT $2" --out "$OUT/$1-$2.json" 2>&1 | tail -n 12
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader

part check && { stage "right, the same bits again and alone (a hang costs 100 s: then nothing below is worth running)" 100
  timeout 100 python3 -W ignore -m benchmarks.decode_layers check || echo "rc $?"; }
part time && { stage "time" 90
  timeout 90 python3 -W ignore -m benchmarks.decode_layers time || echo "rc $?"
  echo "predicted, ms, no head / inside / apart: 8B, 1 row 3.74 / 3.97 / 4.00; 8 rows 4.07 / 4.31 / 4.34; 0.6B, 1 row 0.77 / 0.85 / 0.87"; }
part timeline && { stage "where a stage's time goes" 90
  timeout 90 python3 -W ignore -m benchmarks.decode_layers timeline || echo "rc $?"
  echo "predicted at 8B, 1 row: attention's runs 2.2 us (were some 3.5), merge 1.3 (2), head 233 us, 116 us a layer"; }
part variants && { stage "slots on their way, slots in registers" 120
  timeout 120 python3 -W ignore -m benchmarks.decode_layers variants || echo "rc $?"
  echo "predicted, with the head, 8B, 1 row: held 3 / 2 / 1: 3.97 / 3.99 / 4.01 ms; flight 3 as flight 2 or slower"; }
part engine && {
  for kernels in auto layers; do
    stage "engine, $kernels" 110
    bench llama-3.1-8b $kernels 1,8 110
    bench qwen3-0.6b $kernels 1,8 80
  done
  echo "predicted, layers, ms at batch 1 / 8: 8B 3.86 / 4.24 (bars 3.97 / 4.30), 0.6B 0.90 / 1.15 (bars 1.1 / 1.3)"; }
part start && { stage "process start to first token, cold then kept caches, by phase" 200
  timeout 200 python3 -W ignore -m serve.cli bench startup "$(python3 benchmarks/shapes.py llama-3.1-8b /tmp/shapes)" --repeats 2 \
    --label "$COMMIT" --out "$OUT/startup.json" 2>&1 | tail -n 12
  echo "predicted: cold 62 s as before (one more pass to keep the StableHLO, 1 s), kept 15 s (30.6 - 14 s of tracing - 2 s overlapped)"; }
date -u +%T
