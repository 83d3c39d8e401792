#!/usr/bin/env bash
# Beside transformers in one run, and what must be right before its figures count: 8B at batch 1 and 32. One H200, repository root,
# results under $OUT; carry .whl, build/k (python -m benchmarks.jobs.carry) and .peer with peer_hf.py and mkmodel.py. About 7 minutes.
. benchmarks/jobs/device.sh
suite() { date -u +%T; timeout "$1" python3 -m pytest -m gpu -p no:cacheprovider -o addopts="--strict-markers" -q --timeout 60 "${@:2}" 2>&1 | tail -n 4; }
suite 70 tests/pallas_kernels/test_gated_matmul.py
timeout 60 python3 -W ignore -m benchmarks.decode_attention check | grep -c '"good": true'
date -u +%T
python3 .peer/mkmodel.py /tmp/m/llama-3.1-8b llama-3.1-8b
timeout 330 python3 -W ignore benchmarks/compare.py /tmp/m/llama-3.1-8b --engines jaxllm,transformers,generate --batch 1,32,128 --prefill 1024 \
  --requests 0 --repeats 2 --rounds 1 --limit 130 --set max_num_seqs=128 --commit "$COMMIT" --out "$OUT/beside" 2>&1 | grep -v "Delay kernel" | tail -n 30
echo "bars: static cache + compile 1.6x at batch 1, 3.4x at 32; generate 4.86x"
suite 100 tests/gpu/test_deterministic_on_gpu.py
suite 70 tests/pallas_kernels/test_decode_chain.py
date -u +%T
