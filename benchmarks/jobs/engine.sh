#!/usr/bin/env bash
# The engine's bars on one H200: decode steps, prompts, 256 requests, 8B and 0.6B. Repository root, results under $OUT; carry .whl and
# build/k (python -m benchmarks.jobs.carry). PART picks stages (launches,stamps,beside,suite,8b,06b,prefix); default all, about 6 minutes.
. benchmarks/jobs/device.sh
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
bench() { # what shape batches limit more...
  local what="$1 $(python3 benchmarks/shapes.py "$2" /tmp/shapes)"; [ "$1" = latency ] && what="$what --batch $3 --prefill 1024,8192"
  echo "== $1 $2"; date -u +%T
  timeout "$4" python3 -W ignore -m serve.cli bench $what --repeats 2 --set max_model_len=8256 --set max_num_seqs=256 --label "$COMMIT" \
    --out "$OUT/$2-$1.json" "${@:5}" 2>&1 | tee "$OUT/$2-$1.log" | grep -v "Delay kernel" | tail -n 14
}
part launches && timeout 40 build/k/launches
part stamps && timeout 40 build/k/stamps
part beside && timeout 80 build/k/beside
part suite && timeout 60 python3 -m pytest -m gpu -p no:cacheprovider -o addopts="--strict-markers" -q --timeout 60 tests/pallas_kernels/test_decode_layers.py -k launched 2>&1 | tail -n 4
part 8b && { bench latency llama-3.1-8b 1,8,16,32,64,128,192,256 190; bench throughput llama-3.1-8b - 100
  echo "bars: 3.97 4.30 - 5.19 - 8.98 - 15.2 ms; 22 190 ms; 11,900 tok/s"; }
part prefix && { timeout 100 python3 -W ignore -m serve.cli bench prefix "$(python3 benchmarks/shapes.py llama-3.1-8b /tmp/shapes)" --shared 8192 \
  --set max_num_seqs=64 --set max_num_batched_tokens=8192 --label "$COMMIT" --out "$OUT/llama-3.1-8b-prefix.json" 2>&1 | tail -n 6; echo "bar: 10x"; }
part 06b && { bench latency qwen3-0.6b 1,8,32,128,256 120; bench throughput qwen3-0.6b - 60
  echo "bars: 1.1 1.3 2.0 4.9 9.3 ms; 8 25 ms; 29,000 tok/s"; }
date -u +%T
