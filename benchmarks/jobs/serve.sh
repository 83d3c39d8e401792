#!/usr/bin/env bash
# Issue 5, line 4: vLLM's client against our server and vLLM's in one process tree, then our offline rate. One H200.
# Run in the repository root with carry=[".whl",".peer"]; orjson's wheel must lie in .whl: the machine lacks it.
set -uo pipefail
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
OUT=${OUT:?}; LOG=$OUT/job.log
say() { echo "[$(date -u +%H:%M:%S)] $*" | tee -a "$LOG"; }
nvidia-smi --query-gpu=name,driver_version,temperature.gpu,clocks.sm --format=csv,noheader | tee "$OUT/gpu.txt"

say "1 setup (25 s): our server's packages and vLLM's"
ours=/tmp/oursite
put() { timeout 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $ours "$@" >>"$LOG" 2>&1; }
# In two calls: a wheel that lies in both folders is one that pip refuses to choose.
{ put .whl/*.whl && put .peer/whl/{starlette,uvicorn,pyzmq,pydantic,pydantic_core,annotated_types,typing_inspection,sniffio}-*.whl; } \
  || { say "our packages cannot be installed"; tail -5 "$LOG"; exit 1; }
timeout 90 bash -c '. .peer/setup.sh .peer' >>"$LOG" 2>&1 || { say "vLLM cannot be unpacked"; exit 1; }
timeout 30 python3 .peer/mkmodel.py /tmp/m/llama-3.1-8b llama-3.1-8b >>"$LOG" 2>&1
export PYTHONPATH=$PWD:$ours JAXLLM_CACHE_DIR=/tmp/jax-cache
timeout 60 python3 -c 'import serve.cli, orjson, zmq, uvloop, starlette, pydantic, prometheus_client, llguidance' \
  || { say "an import of our server fails"; exit 1; }

say "2 compare (about 400 s). Predictions, from the decode steps and prefills of compare_8b_h200 (closed loop, equal lengths):"
say "  ours    64: 1024 x (6.1..11 -> 8.2 ms) + 64 x 27 ms prefill = 10.1 s a wave -> 6,400 tok/s;  256: 1024 x 18.6 + 6.9 s = 26 s -> 10,100"
say "  vLLM    64: 1024 x 8.5 ms + 1.7 s = 10.4 s -> 6,300 tok/s;                                 256: 1024 x 18.5 + 6.9 s = 25.9 s -> 10,100"
say "  offline 64 and 256: as ours, 1 to 3% more"
say "  so: ours over vLLM 1.0 (bar 1.2: MISSED), over offline 0.97 to 0.99 (bar 0.97), median TTFT about 0.9 s and 3.5 s on both sides"
say "  (64 or 256 prompts come at once; half of them wait for the other half's prefill), p99 ITL one mixed step, 60 to 110 ms both"
timeout 540 python3 -W ignore benchmarks/compare_serve.py /tmp/m/llama-3.1-8b --peer .peer --client vllm \
  --engines "${ENGINES:-jaxllm,vllm,offline}" --concurrency 64,256 --waves 2 --limit 170 \
  --commit "${COMMIT:-}" --out "$OUT/compare_serve" 2>&1 | tee -a "$LOG"
say "rc $?"
tail -30 "$OUT"/*.log | tail -120 >> "$LOG"
say "done; MFU and MBU as the server saw them are in no file here: see stage 3"

if [ "${METRICS:-0}" = 1 ]; then
  say "3 metrics (90 s, only when METRICS=1): jaxllm_mfu and jaxllm_mbu under 64 streams, beside the floor"
  say "  prediction at batch 64, context 1.5k: decode MBU (15.0 + 12.9 GB) / (8.5 ms x 4.8 TB/s) = 0.68; prefill MFU of 1k prompts 16.5 TFLOP / (27 ms x 989) = 0.62"
  timeout 88 bash -c '
    python3 -W ignore -m serve.cli serve /tmp/m/llama-3.1-8b --load-format dummy --max-model-len 4096 --max-num-seqs 256 \
      --no-enable-prefix-caching --port 8077 --metrics-compat vllm >"$0/metrics-server.log" 2>&1 & pid=$!
    until curl -sf http://127.0.0.1:8077/ready >/dev/null; do kill -0 $pid || exit 1; sleep 0.5; done
    python3 -m serve.cli bench serve --base-url http://127.0.0.1:8077 --num-prompts 64 --max-concurrency 64 \
      --input-len 1024 --output-len 1024 --result-filename "$0/bench-64.json" & load=$!
    for i in 1 2 3 4 5 6; do sleep 2; curl -s http://127.0.0.1:8077/metrics | grep -E "^jaxllm_(mfu|mbu)|_step_s_total|estimated" ; echo; done
    wait $load; kill $pid; wait $pid' "$OUT" 2>&1 | tee "$OUT/metrics.txt"
fi
say end
