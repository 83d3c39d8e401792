#!/usr/bin/env bash
# The kernels of ADRs 32 and 33. One H200 (two for shared,tp), repository root, results under $OUT. README.md says what each answers.
# PART picks stages (build,attention,time,heads,check,wide,timeline,variants,engine,shared,tp); default: all that one GPU can do, about 9 minutes.
set -uo pipefail
OUT=${OUT:-build/wide_layers}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec > >(tee -a "$OUT/job.log") 2>&1
GPUS=$(nvidia-smi -L | wc -l)
part() { [ -z "${PART:-}" ] && [[ $1 != shared && $1 != tp ]] || [[ ",$PART," == *",$1,"* ]]; }
stage() { # name, at most seconds, what it answers, command
  part "$1" || return 0
  echo "== $1: $3 (at most $2 s)"; date -u +%T
  timeout "$2" python3 -W ignore -m "${@:4}" || echo "rc $?"
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
part build && python3 -W ignore - <<'P'
from concurrent.futures import ThreadPoolExecutor
from benchmarks import decode_attention, wide_layers
from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_attention import cuda
from pallas_kernels.decode_layers import wide

jobs = [(wide.SOURCE, wide.INCLUDES, flags) for flags in ((), wide_layers.TIMELINE, *wide_layers.VARIANTS.values())]
jobs += [(cuda.SOURCE, cuda.INCLUDES, flags) for flags in decode_attention.VARIANTS.values()]
with ThreadPoolExecutor() as pool:
    list(pool.map(lambda job: built(job[0], job[1], (*NVCC, *job[2])), jobs))
P
date -u +%T
stage attention 60 "warpgroups: right, the same bits again and alone (a hang costs all of it)" benchmarks.decode_attention check
stage time 120 "the bars' shapes: builds of the kernel, and Triton" benchmarks.decode_attention time
stage heads 60 "with rotation and page write, as a step calls it" benchmarks.decode_attention heads
stage check 60 "wide layers: right at every padded number of rows" benchmarks.wide_layers check
stage wide 90 "wide layers: ms of all layers, 8B and 0.6B, 1 to 128 rows" benchmarks.wide_layers time
stage timeline 60 "where a layer's time goes" benchmarks.wide_layers timeline rows=32,128
stage variants 60 "more room for x, runs cut more or less often" benchmarks.wide_layers variants rows=32,128
bench() { # shape kernels batches limit
  timeout "$4" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py "$1" /tmp/shapes)" --batch "$3" --prefill "" \
    --repeats 1 --set kernels=$2 --label "$COMMIT $2" --out "$OUT/$1-$2.json" 2>&1 | tail -n 12
}
part engine && for kernels in auto layers; do
  echo "== engine, $kernels"; date -u +%T
  bench llama-3.1-8b $kernels 16,32,64,128 130
  bench qwen3-0.6b $kernels 32,128 80
done
stage shared 60 "devices that share layers: right, the same bits on each and again (a hang costs all of it)" benchmarks.wide_layers shared rows=8,32,128
part tp && for kernels in auto layers; do
  echo "== engine on $GPUS GPUs, $kernels"; date -u +%T
  timeout 110 python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py llama-3.1-8b /tmp/shapes)" --batch 1,32,128 --prefill "" \
    --repeats 1 --set tp=$GPUS --set kernels=$kernels --label "$COMMIT tp$GPUS $kernels" --out "$OUT/tp$GPUS-$kernels.json" 2>&1 | tail -n 8
done
echo "found before (718fd18), 1 / 32 / 128: two GPUs 2.96 / 3.84 / 6.61 ms; four GPUs (f144ba1, before sums went without flags) 2.71 / 3.72 / 7.02: predicted 2.4 / 3.2 / 5.7"
echo "found before, layers alone: 8B 5.21 / 6.68 / 9.83 ms at 32 / 64 / 128, 0.6B 2.01 / 3.32 / 5.98; predicted steps with layers: 8B 6.9 / 10.5 at 64 / 128"
date -u +%T
