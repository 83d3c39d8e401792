#!/usr/bin/env bash
# Several single-GPU questions at one time on the four GPUs of one host, then several GPUs together. nvidia-h200-x4, repository root, results
# under $OUT. PART: one (ours beside vLLM, 5 minutes), start (starts and kernels, 3 minutes), many (TP2 beside vLLM, TP4, 5 minutes),
# replicas (DP1, DP4, 6 minutes).
# vLLM needs .peer; with it the tree must stay under what may be carried: take the bundled models out of a commit of its own for the run.
# Four processes share the host, so host times are those of a busy machine. Wait for pids by name: a bare `wait` waits for ever for a `tee`
# that bash started for `exec > >(tee)` (470 s of four GPUs went there once).
set -uo pipefail
OUT=${OUT:?}; COMMIT=${COMMIT:-unknown}; M=/tmp/shapes; pids=""
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OUT COMMIT M
part() { [[ ",${PART:-one,start,many,replicas}," == *",$1,"* ]]; }
on() { # GPUs, seconds, name, command
  (began=$SECONDS; CUDA_VISIBLE_DEVICES=$1 timeout -k 5 "$2" bash -c "$4" > "$OUT/$3.txt" 2>&1; echo "$3 rc $? $((SECONDS - began)) s") & pids="$pids $!"
}
all() { wait $pids; pids=""; date -u +%T; }
ours='exec python3 -W ignore -m serve.cli bench'
every='--batch 1,8,32,128,256 --prefill 1024,8192 --repeats 1 --requests 256 --label $COMMIT'
peer='export PYTHONPATH=/tmp/vsite VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
  export VLLM_ALLREDUCE_USE_SYMM_MEM=0 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_LOGGING_LEVEL=WARNING
  export VLLM_CACHE_ROOT=/tmp/vllm-$CUDA_VISIBLE_DEVICES; cd .peer; exec python3 peer_vllm.py'
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; date -u +%T
for model in llama-3.1-8b qwen3-0.6b qwen3-30b-a3b; do timeout 20 python3 benchmarks/shapes.py $model $M > /dev/null; done
if [ -d .peer ] && { part one || part many; }; then  # unpacked beside our packages, not over them
  for model in llama-3.1-8b qwen3-0.6b; do timeout 20 python3 .peer/mkmodel.py /tmp/m/$model $model; done
  PYTHONPATH= timeout 90 bash -c '. .peer/setup.sh .peer; mv /tmp/site /tmp/vsite'
fi
if part one; then
  on 0 175 ours-8b "JAXLLM_CACHE_DIR=/tmp/c8 $ours latency \$M/llama-3.1-8b $every --out \$OUT/ours-8b.json"
  on 1 175 ours-0.6b "JAXLLM_CACHE_DIR=/tmp/c06 $ours latency \$M/qwen3-0.6b $every --out \$OUT/ours-0.6b.json"
  [ -d /tmp/vsite ] && on 2 175 vllm-8b "$peer /tmp/m/llama-3.1-8b --batch 1,8,32,128,256 --reps 1"
  [ -d /tmp/vsite ] && on 3 175 vllm-0.6b "$peer /tmp/m/qwen3-0.6b --batch 1,8,32,128,256 --reps 1"
  all
  echo "predicted 8B, 1/8/32/128/256: 4.0 4.3 5.9 10.1 16.9 ms; 0.6B: 0.85 1.13 2.3 5.8 8.1; vLLM as in shared/measured-h200.md"
fi
if part start; then
  on 0 140 start-8b "$ours startup \$M/llama-3.1-8b --repeats 1 --label \$COMMIT --out \$OUT/start-8b.json"
  on 1 140 start-0.6b "$ours startup \$M/qwen3-0.6b --repeats 1 --label \$COMMIT --out \$OUT/start-0.6b.json"
  on 2 165 experts "$ours latency \$M/qwen3-30b-a3b --batch 1,32,128 --prefill 1024 --repeats 1 --set max_num_seqs=128 \
    --set max_num_batched_tokens=2048 --label \$COMMIT --out \$OUT/experts.json"
  on 3 165 kernels 'for what in check variants timeline; do timeout 60 python3 -W ignore -m benchmarks.decode_layers $what; done
    timeout 40 python3 -W ignore -m benchmarks.decode_attention heads'
  all
fi
if part many; then
  on 0,1 170 ours-tp2 "$ours latency \$M/llama-3.1-8b --batch 1,32,128 --prefill 1024 --repeats 1 --requests 256 --set tp=2 --label \$COMMIT --out \$OUT/tp2.json"
  [ -d /tmp/vsite ] && on 2,3 170 vllm-tp2 "$peer /tmp/m/llama-3.1-8b --tp 2 --batch 1,32,128 --prefill 1024 --reps 1"
  all
  on 0,1,2,3 110 ours-tp4 "$ours latency \$M/llama-3.1-8b --batch 1,32,128 --prefill 1024 --repeats 1 --set tp=4 --label \$COMMIT --out \$OUT/tp4.json"
  all
fi
if part replicas; then  # as many requests for each replica; needs pyzmq and msgspec. The first run of each fills the caches
  work="throughput \$M/llama-3.1-8b --set max_model_len=2304 --set max_num_seqs=256 --repeats 2 --label \$COMMIT"
  on 0 190 ours-dp1 "$ours $work --requests 512 --out \$OUT/dp1.json"
  all
  on 0,1,2,3 190 ours-dp4 "$ours $work --requests 2048 --set dp=4 --set data_processes=true --out \$OUT/dp4.json"
  all
  echo "predicted dp4 >= 3.8x dp1; four processes at one time gave 3.98x, one process with threads 2.64x"
fi
for file in "$OUT"/*.txt; do echo "== $file"; grep -E '^\||^\{|^decode|PEER|tok/s|compiles|start to|rror' "$file" | grep -v '"begin"' | cut -c1-230 | tail -30; done
