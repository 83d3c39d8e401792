#!/usr/bin/env bash
# Weights in 12 bits without loss, with and without, one H200: the kernels' tests, launches, 8B and 0.6B steps. Repository root, results
# under $OUT; carry .whl and build/k (python -m benchmarks.jobs.carry). MODELS picks shapes, BATCH rows, FORMS what is compared.
. benchmarks/jobs/device.sh
[ -z "${SKIP_TESTS:-}" ] && { timeout 30 build/k/launches | tee "$OUT/launches.txt" | grep -E "differ|M 32|fault"
timeout 90 python3 -m pytest -m gpu -p no:cacheprovider -o addopts="--strict-markers" -q --timeout 60 tests/pallas_kernels/test_decode_layers_quantised.py \
  -k "bf12 or 12_bits" > "$OUT/tests.txt" 2>&1; grep -E "^(FAILED|ERROR|E  )|passed|failed" "$OUT/tests.txt" | cut -c1-300 | tail -n 20; }
for model in ${MODELS:-llama-3.1-8b}; do
  for form in ${FORMS:-true false}; do
    echo "== $model packed_weights=$form"; date -u +%T
    timeout "${LIMIT:-130}" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py "$model" /tmp/shapes)" --batch "${BATCH:-16,32}" --prefill "${PREFILL:-1024}" \
      --repeats 2 --set max_model_len=8256 --set max_num_seqs=${SEQS:-32} --set packed_weights=$form --label "$COMMIT" --out "$OUT/$model-$form.json" \
      > "$OUT/$model-$form.log" 2>&1
    grep -E "12 bits|pack|phase|weights|ready|MiB|GiB" "$OUT/$model-$form.log" | cut -c1-200 | head -n 24; tail -n 14 "$OUT/$model-$form.log"
  done
done
date -u +%T
