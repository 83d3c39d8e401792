#!/usr/bin/env bash
# Products that end in their cluster (ADR 48) and attention by keys times queries (ADR 49): right, and faster? One H200, repository
# root, results under $OUT; carry .whl and build/k (python -m benchmarks.jobs.carry --also=-DJAXLLM_MMA). PART picks stages
# (launches,check,suite,time,few,engine); default all, about 9 minutes. A hang costs its stage: the first ones are the cheapest.
. benchmarks/jobs/device.sh
part() { [ -z "${PART:-}" ] || [[ ",$PART," == *",$1,"* ]]; }
stage() { echo "== $1 (at most $2 s)"; date -u +%T; }
bench() { # shape kernels batches limit more...
  timeout "$4" python3 -W ignore -m serve.cli bench latency "$(python3 benchmarks/shapes.py "$1" /tmp/shapes)" --batch "$3" --prefill "" \
    --repeats 2 --set kernels=$2 --label "$COMMIT $2" --out "$OUT/$1-$2.json" "${@:5}" 2>&1 | tail -n 9
}
suite() { timeout "$1" python3 -m pytest -m gpu -p no:cacheprovider -o addopts="--strict-markers" -q --timeout 60 "${@:2}" 2>&1 | tail -n 8; }

part launches && { stage "layers without JAX: clusters at one time, cuts, both attentions, power and clock" 60
  timeout 30 build/k/launches; echo "-- attention by warps"; timeout 30 build/k/launches_also
  echo "predicted at 128 rows: chain 131 -> 120 us, all 277 -> 266, attention 139 both ways, watts in it 669 -> 570; 32 rows all 168 -> 157; 256 466 -> 455"; }
part check && { stage "attention, both ways: right, the same bits again and alone" 120
  timeout 120 python3 -W ignore -m benchmarks.decode_attention check; }
part suite && { stage "suites" 240
  suite 80 tests/pallas_kernels/test_decode_chain.py
  suite 80 tests/pallas_kernels/test_decode_layers.py -k launched
  suite 80 tests/pallas_kernels/test_gated_matmul.py; }
part time && { stage "attention at the bars' shapes, and what lies between two attentions" 150
  timeout 75 python3 -W ignore -m benchmarks.decode_attention time
  timeout 75 python3 -W ignore -m benchmarks.decode_chain
  echo "predicted us a layer of 8B at 32 / 64 / 96 / 128 / 256 rows: 127 / 125 / 137 / 141 / 192 -> 116 / 114 / 126 / 130 / 182"; }
part few && { stage "16 rows, 32 tokens: the run that ended with logits that are not finite" 120
  for kernels in apart launched; do
    bench llama-3.1-8b $kernels 16 60 --set decode_buckets=[16,32] --set token_buckets=[32,4096] --set max_num_seqs=32 --set max_num_batched_tokens=4096
  done; }
part engine && { stage "engine" 200
  for kernels in apart launched; do bench llama-3.1-8b $kernels 32,64,128,192,256 110; done
  echo "predicted ms, launched: 8B 5.05 / 6.3 / 9.65 / 12.6 / 16.7 (bars 5.19 / - / 8.98 / - / 15.2)"; }
date -u +%T
