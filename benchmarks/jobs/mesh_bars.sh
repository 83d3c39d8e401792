#!/usr/bin/env bash
# The bars of several GPUs, one recorded run each, vLLM beside. nvidia-h200-x4, repository root, results under $OUT. PART: pairs (TP2 of ours, then
# vLLM's on the same two GPUs; one-GPU questions on the others, 5 minutes), four (TP4, 1 minute), experts (over four, 3 minutes), peer (vLLM's
# experts over four, 3 minutes), big (70B over four, 1 minute), long (128k over four, 1 minute), sides (disaggregation, 1 minute), quick (prefill and
# experts on one GPU each, 2 minutes); on nvidia-h200-x8: eight (70B over eight, 2 minutes). What `four_gpus.sh` says of `.peer`, models and bare waits holds here too.
set -uo pipefail
OUT=${OUT:?}; COMMIT=${COMMIT:-unknown}; M=/tmp/shapes; pids=""
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OUT COMMIT M
part() { [[ ",${PART:-pairs,four,experts,peer,big,long,sides,quick}," == *",$1,"* ]]; }
on() { # GPUs, seconds, name, command
  (began=$SECONDS; CUDA_VISIBLE_DEVICES=$1 timeout -k 5 "$2" bash -c "$4" > "$OUT/$3.txt" 2>&1; echo "$3 rc $? $((SECONDS - began)) s") & pids="$pids $!"
}
all() { wait $pids; pids=""; date -u +%T; }
latency='python3 -W ignore -m serve.cli bench latency'
peer='export PYTHONPATH=/tmp/vsite VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
  export VLLM_ALLREDUCE_USE_SYMM_MEM=0 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_LOGGING_LEVEL=WARNING
  export VLLM_CACHE_ROOT=/tmp/vllm-$CUDA_VISIBLE_DEVICES; cd .peer; python3 peer_vllm.py'
few='--set max_num_seqs=128 --set decode_buckets=[1,32,128] --set token_buckets=[256,1024,2048] --set token_budget=2048'
long='--batch "" --prefill 131056 --repeats 1 --set max_model_len=131072 --set max_num_seqs=8 --set decode_buckets=[1,8]'
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; date -u +%T
for model in llama-3.1-8b llama-3.3-70b qwen3-0.6b qwen3-30b-a3b; do timeout 20 python3 benchmarks/shapes.py $model $M > /dev/null; done
setup=""
if [ -d .peer ] && [ ! -d /tmp/vsite ] && { part pairs || part peer; }; then  # unpacked beside our packages, not over them
  (for model in llama-3.1-8b qwen3-30b-a3b; do timeout 20 python3 .peer/mkmodel.py /tmp/m/$model $model; done
   PYTHONPATH= timeout 100 bash -c '. .peer/setup.sh .peer; mv /tmp/site /tmp/vsite') > "$OUT/setup.txt" 2>&1 &
  setup=$!
fi
if part pairs; then
  echo "predicted TP2 2.96 3.24 3.84 6.61 ms (vLLM 3.50 4.40 4.50 6.80), 256 requests 14,500 tok/s (vLLM 15,300); layers at 64 / 128 6.9 / 10.5"
  echo "predicted 30B on one GPU 3.3 15.5 23.5 ms, prefill 25.8"
  on 0,1 330 tp2 "JAXLLM_CACHE_DIR=/tmp/jt $latency \$M/llama-3.1-8b --batch 1,8,32,128 --prefill 1024 --repeats 3 --requests 256 --set tp=2 --label \$COMMIT --out \$OUT/tp2.json
    while [ ! -d /tmp/vsite ]; do sleep 1; done; $peer /tmp/m/llama-3.1-8b --tp 2 --batch 1,8,32,128 --prefill 1024 --reps 2"
  on 2 330 one-2 "JAXLLM_CACHE_DIR=/tmp/jl timeout 120 $latency \$M/llama-3.1-8b --batch 64,128 --prefill '' --repeats 3 --set kernels=layers --label \$COMMIT --out \$OUT/8b_layers.json"
  on 3 330 one-3 "JAXLLM_CACHE_DIR=/tmp/ja timeout 120 $latency \$M/llama-3.1-8b --batch 64,128 --prefill '' --repeats 3 --label \$COMMIT --out \$OUT/8b_auto.json
    JAXLLM_CACHE_DIR=/tmp/jx timeout 180 $latency \$M/qwen3-30b-a3b --batch 1,32,128 --prefill 1024 --repeats 2 $few --label \$COMMIT --out \$OUT/experts_one.json"
  all
fi
[ -n "$setup" ] && wait $setup
if part four; then
  echo "predicted TP4 (auto on another day 2.62 3.38 6.46) layers 2.4 3.2 5.7"
  for kernels in ${KERNELS:-layers}; do
    on 0,1,2,3 90 tp4-$kernels "JAXLLM_CACHE_DIR=/tmp/j4$kernels $latency \$M/llama-3.1-8b --batch 1,32,128 --prefill 1024 --repeats 3 $few --set tp=4 --set kernels=$kernels --label \$COMMIT --out \$OUT/tp4_$kernels.json"; all
  done
fi
if part experts; then
  echo "predicted ep4 (6.6 8.7 11.7 before) 2.8 6.5 10.6, tp4 (3.1 7.0 11.6) 3.1 6.5 10.4"
  for mesh in ep tp; do
    on 0,1,2,3 110 experts-${mesh}4 "JAXLLM_CACHE_DIR=/tmp/jx$mesh $latency \$M/qwen3-30b-a3b --batch 1,32,128 --prefill 1024 --repeats 2 $few --set $mesh=4 --label \$COMMIT --out \$OUT/experts_${mesh}4.json"; all
  done
fi
if part peer; then on 0,1,2,3 190 vllm-experts "$peer /tmp/m/qwen3-30b-a3b --tp 4 --batch ${PEER_BATCH:-1,32,128} --prefill 1024 --reps 5 --throughput 0 ${EP:-}"; all; fi
if part big; then
  echo "predicted 70B over four (11.8 with kernels apart) 10.6 ms (bar 10.5, floor 8.1), over eight 6.9 (6.5)"
  on 0,1,2,3 100 big4 "JAXLLM_CACHE_DIR=/tmp/jb $latency \$M/llama-3.3-70b --batch 1,32 --prefill 1024 --repeats 2 ${few/,128/} --set max_num_seqs=32 --set tp=4 --set kernels=layers --label \$COMMIT --out \$OUT/big_tp4.json"; all
fi
if part eight; then
  on 0,1,2,3,4,5,6,7 170 big8 "JAXLLM_CACHE_DIR=/tmp/jb $latency \$M/llama-3.3-70b --batch 1,32 --prefill 1024 --repeats 2 ${few/,128/} --set max_num_seqs=32 --set tp=8 --label \$COMMIT --out \$OUT/big_tp8.json"; all
fi
if part long; then
  echo "predicted 128k over four: 3.4x one GPU (bar 3x)"
  on 0,1,2,3 130 long4 "JAXLLM_CACHE_DIR=/tmp/jl4 $latency \$M/llama-3.1-8b $long --set token_buckets=[64,32768] --set token_budget=32768 --set cp=4 --label \$COMMIT --out \$OUT/long_cp4.json"; all
fi
if part quick; then
  prefill='--batch "" --prefill 1024,8192 --repeats 3 --set max_num_seqs=256 --set decode_buckets=[8,256] --set token_buckets=[64,1024,8192] --set token_budget=8192'
  echo "predicted, a mixed step being one graph: 8B prefill 23.6 / 209 -> 23.2 / 208.5 ms, 0.6B 5.7 / 30.1 -> 5.3 / 29.7; 30B 3.16 15.3 23.9 -> 3.15 14.8 22.7, prefill 25.5 -> 24.5"
  on 2 130 prefill "for m in llama-3.1-8b qwen3-0.6b; do JAXLLM_CACHE_DIR=/tmp/jp\$m timeout 70 $latency \$M/\$m $prefill --label \$COMMIT --out \$OUT/prefill_\$m.json; done"
  on 3 130 experts-one "JAXLLM_CACHE_DIR=/tmp/jx $latency \$M/qwen3-30b-a3b --batch 1,32,128 --prefill 1024 --repeats 2 $few --label \$COMMIT --out \$OUT/experts_one.json"
  part sides || all
fi
if part sides; then
  echo "predicted p99 ITL under prefill load 1.02 to 1.10 of idle (bar 1.1), on one GPU 5 to 45; 128k on one GPU 12 s"
  sides="python3 -m benchmarks.disaggregation itl \$M/llama-3.1-8b --batch 8,32 --pressure 4 --set max_model_len=16384 --set max_num_seqs=64
    --set decode_buckets=[8,32,64] --set token_buckets=[64,2048,8192] --set token_budget=8192"; sides=${sides//$'\n'/}
  on 0,1 240 sides "JAXLLM_CACHE_DIR=/tmp/js $sides --prompts 2048,8192 --steps 300 --out \$OUT/sides.jsonl"
  part long && on 3 200 long-one "JAXLLM_CACHE_DIR=/tmp/jlong $latency \$M/llama-3.1-8b $long --set token_buckets=[64,8192] --set token_budget=8192 --label \$COMMIT --out \$OUT/long_one.json"
  part quick || [ -n "${PAIR:-}" ] || on 2 240 sides-one "JAXLLM_CACHE_DIR=/tmp/jso $sides --role none --prompts 2048 --steps 150 --out \$OUT/sides_one.jsonl"
  all
fi
for file in "$OUT"/*.txt; do echo "== $file"; grep -E '^\||^\{|PEER|tok/s|compiles|exposed|rror' "$file" | grep -v '"begin"' | cut -c1-260 | tail -16; done
