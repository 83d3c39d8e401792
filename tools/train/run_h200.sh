#!/usr/bin/env bash
# Train the bundled models on one GPU. Run from the repository's root:
#   tools/train/run_h200.sh smoke   a few steps, an evaluation and an export; fails if something is off
#   tools/train/run_h200.sh data    the training set (in parallel processes)
#   tools/train/run_h200.sh main    first-light: train, export, evaluate, card, weights in parts
#   tools/train/run_h200.sh draft   first-light-draft, distilled from the exported first-light
# WORK holds data and checkpoints, OUT what is to be kept. A run that was cut off goes on with RESUME=--resume.
set -euo pipefail
mode=$1
WORK=${WORK:-/tmp/first-light}
OUT=${OUT:-$WORK/out}
PYTHON=${PYTHON:-python3}
MINUTES=${MINUTES:-7}
REMAT=${REMAT:-$(cat "$WORK/remat" 2>/dev/null || echo layer)}
BATCH=${BATCH:-48}
SHARDS=${SHARDS:-100}
STDLIB=${STDLIB:+--stdlib $STDLIB}
export PYTHONPATH=. PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$WORK/compiled
models=jaxllm/models
mkdir -p "$WORK" "$OUT"

data() { # name shards samples
  [ -e "$WORK/$1/chat-held-out.weights.npy" ] || JAX_PLATFORMS=cpu $PYTHON -W ignore -m tools.train.dataset "$WORK/$1" \
    --tokenizer $models/first-light $STDLIB --shards "$2" --samples "$3" --length "${LENGTH:-2048}"
}

export_model() { # name
  $PYTHON -m tools.train.export export "$WORK/$1" "$WORK/models/$1" --tokenizer $models/first-light
}

weights_home() { # name: the weights in parts, before anything else can go wrong
  $PYTHON -m tools.train.export split "$WORK/models/$1/model.safetensors" "$OUT" --split-bytes $((15 << 20))
  for part in "$OUT"/model.safetensors.part-*; do mv "$part" "$OUT/$1.${part##*/}"; done
}

evaluate() { # name count more-arguments
  $PYTHON -W ignore -m tools.train.evaluate "$WORK/models/$1" --data "$WORK/$DATA" $STDLIB --count "$2" \
    --batch "${EVAL_BATCH:-128}" --report "$WORK/$1.report.json" "${@:3}"
  $PYTHON -m tools.train.export card "$WORK/models/$1" --summary "$WORK/$1/summary.json" --report "$WORK/$1.report.json"
}

rest_home() { # name: all but the weights, in one archive
  cp "$WORK/$1/summary.json" "$WORK/$1.summary.json"
  cp "$WORK/$1/log.jsonl" "$WORK/$1.log.jsonl"
  tar -czf "$OUT/$1.tar.gz" -C "$WORK" --exclude=model.safetensors \
    "models/$1" "$1.report.json" "$1.summary.json" "$1.log.jsonl"
}

case $mode in
smoke)
  DATA=smoke
  data smoke 2 1000
  for remat in layer none; do # keeping everything for the backward pass may not fit
    rm -rf "$WORK/smoke-run-$remat"
    $PYTHON -m tools.train.train "$WORK/smoke-run-$remat" --data "$WORK/smoke" --model "${MODEL:-first-light}" --steps 60 \
      --batch "$BATCH" --remat $remat --warmup 20 --log-every 20 || echo "remat $remat failed"
  done
  $PYTHON - "$WORK" <<'CHOOSE'
import json, pathlib, sys
work, took = pathlib.Path(sys.argv[1]), {}
for log in work.glob("smoke-run-*/log.jsonl"):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["step"] == 60 and lines[-1]["loss"] < lines[0]["loss"] < 9.5, lines
    took[log.parent.name.removeprefix("smoke-run-")] = (lines[-1]["seconds"] - lines[0]["seconds"]) / 40
best = min(took, key=took.get)
print({name: f"{1000 * value:.1f} ms a step" for name, value in took.items()}, "best:", best)
(work / "remat").write_text(best)
CHOOSE
  ln -sfn "smoke-run-$(cat "$WORK/remat")" "$WORK/smoke-run"
  export_model smoke-run
  evaluate smoke-run 12 --max-new 64
  ;;
data)
  data data "$SHARDS" 20000
  ;;
main)
  DATA=data
  data data "$SHARDS" 20000
  $PYTHON -m tools.train.train "$WORK/first-light" --data "$WORK/data" --model first-light --minutes "$MINUTES" \
    --batch "$BATCH" --remat "$REMAT" --save-every 3000 ${RESUME:-}
  export_model first-light
  weights_home first-light
  evaluate first-light 3000
  rest_home first-light
  ;;
draft)
  DATA=data
  data data "$SHARDS" 20000
  $PYTHON -m tools.train.train "$WORK/first-light-draft" --data "$WORK/data" --model first-light-draft --minutes "$MINUTES" \
    --batch "$BATCH" --rate 3e-3 --remat none --teacher "$WORK/models/first-light" --save-every 3000 ${RESUME:-}
  export_model first-light-draft
  weights_home first-light-draft
  evaluate first-light-draft 3000 --target "$WORK/models/first-light"
  rest_home first-light-draft
  ;;
*)
  sed -n '2,7p' "$0"
  exit 2
  ;;
esac
