#!/usr/bin/env bash
# Experts over GPUs. Run in the repository root:
#   STAGES="one" bash experts.sh        on nvidia-h200
#   STAGES="layer2" bash experts.sh     on nvidia-h200-x2
#   STAGES="layer4 model4" bash experts.sh   on nvidia-h200-x4
# Everything is logged to $OUT/experts.log; figures as JSON under $OUT. See README.md beside this file.
set -uo pipefail
OUT=${OUT:-build/experts}
mkdir -p "$OUT"
exec > >(tee -a "$OUT/experts.log") 2>&1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=EAGER
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
PY=${PY:-python3}
stage() { # name seconds command...
  [[ " ${STAGES:-one} " == *" ${1%%:*} "* ]] || return 0
  echo "=== $1 (limit $2 s) $(date -u +%T)"
  timeout -k 10 "$2" "${@:3}"
  echo "=== $1 ended with $? $(date -u +%T)"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "commit $COMMIT"
DIR=$($PY benchmarks/shapes.py qwen3-30b-a3b "${TMPDIR:-/tmp}/shapes")
bench() { $PY -W ignore -m serve.cli bench latency "$DIR" --label "$COMMIT" --repeats 1 "$@"; }

echo "PREDICTED one: decode 1 / 8 / 32 / 128 = 2.6 / 7.9 / 15.2 / 18.9 ms, prefill 1k = 33 ms. Bars: 2.4, -, 17, 19.5, 30"
stage one 420 bash -c "$(declare -f bench); PY=$PY DIR=$DIR COMMIT=$COMMIT; bench --batch 1,8,32,128 --prefill 1024 \
  --set max_num_seqs=128 --set max_num_batched_tokens=2048 --out $OUT/one.json"
stage one:profile 170 $PY -W ignore -m serve.cli profile "$DIR" --batch 1

echo "PREDICTED layer2, us a layer, sum / ragged: 8 tokens 80 / 150, 32: 150 / 220, 128: 185 / 260, 1024: 400 / 450, 8192: 1150 / 1200"
stage layer2:numbers 240 $PY -m benchmarks.expert_exchange 2 --tokens 8192,1024,128,32,8,1 --out "$OUT/layer2.json"
echo "PREDICTED layer4, us a layer, sum / ragged: 8 tokens 50 / 120, 32: 90 / 160, 128: 110 / 180, 1024: 240 / 270, 8192: 740 / 750; a move 4 ms"
stage layer4:numbers 240 $PY -m benchmarks.expert_exchange 4 --tokens 8192,1024,128,32,8,1 --out "$OUT/layer4.json"

echo "PREDICTED model4, ms at batch 32 / 128: tp4 5.5 / 7.5; ep4 6.5 / 8.5; attention data 6 / 7.5 (vLLM on one GPU: 26.5 / 21.6)"
for mesh in "ep=4 attention_data=true" "ep=4" "tp=4"; do
  sets=(); for pair in $mesh; do sets+=(--set "$pair"); done
  stage "model4:$mesh" 190 bash -c "$(declare -f bench); PY=$PY DIR=$DIR COMMIT=$COMMIT; bench --batch 32,128 --prefill 1024 \
    --set max_num_seqs=128 --set max_num_batched_tokens=2048 ${sets[*]} --out '$OUT/model4-${mesh// /-}.json'"
done
ls -l "$OUT"
