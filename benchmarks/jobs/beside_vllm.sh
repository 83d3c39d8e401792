#!/usr/bin/env bash
# The engine's bars beside vLLM, one machine, in turn: 8B steps, prompts, 256 requests, starts. One H200, repository root, results under
# $OUT; carry .whl, build/k (python -m benchmarks.jobs.carry) and .peer (python -m benchmarks.jobs.peer). About 6 minutes.
. benchmarks/jobs/device.sh
mv /tmp/site /tmp/oursite && export PYTHONPATH=.:/tmp/oursite # vLLM's packages go to /tmp/site; what both have need not travel twice
python3 -m pip install -q --no-index --no-deps --target /tmp/oursite \
  .peer/whl/{annotated_types,llguidance,msgspec,pydantic,pydantic_core,pyzmq,starlette,typing_inspection,uvicorn}-*.whl 2>&1 | grep -v exists
date -u +%T
timeout 60 python3 -m pytest -m gpu -p no:cacheprovider -o addopts="--strict-markers" -q --timeout 60 tests/pallas_kernels/test_decode_layers.py -k launched 2>&1 | tail -n 4
python3 .peer/mkmodel.py /tmp/m/llama-3.1-8b llama-3.1-8b
date -u +%T
timeout 490 python3 -W ignore benchmarks/compare.py /tmp/m/llama-3.1-8b --peer .peer --engines "${ENGINES:-jaxllm,vllm}" --batch 1,8,32,128,256 \
  --prefill 1024,8192 --requests 256 --repeats 2 --rounds 1 --limit 280 --set max_model_len=8256 --set max_num_seqs=256 --commit "$COMMIT" \
  --out "$OUT/beside_vllm" 2>&1 | grep -v "Delay kernel" | tail -n 40
date -u +%T
