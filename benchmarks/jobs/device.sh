# To be sourced at the beginning of a run on the GPU machine, in the repository root: says where results go, and puts what carry.py made
# where it is looked for. Carry .whl and build/k. Results go under $OUT, of which eight files come back: pack them.
set -uo pipefail
OUT=${OUT:-build/$(basename "$0" .sh)}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"
exec > >(tee -a "$OUT/job.log") 2>&1
export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-true}
[ -d .whl ] && python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl 2>&1 | tail -n 2
mkdir -p ~/.cache/jaxllm/kernels && chmod 700 ~/.cache/jaxllm ~/.cache/jaxllm/kernels
[ -f build/k/kernels.tar.xz ] && tar xJf build/k/kernels.tar.xz -C ~/.cache/jaxllm/kernels && mv ~/.cache/jaxllm/kernels/{launches,stamps,beside} build/k
# What a kernel that fails leaves, told by where_it_failed.
export CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1 CUDA_COREDUMP_FILE=/tmp/core_%p
export CUDA_COREDUMP_GENERATION_FLAGS=skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory,skip_constbank_memory,skip_abort
where_it_failed() {
  local core
  for core in /tmp/core_*; do
    [ -f "$core" ] && timeout 60 cuda-gdb -batch -ex "target cudacore $core" -ex "info cuda kernels" -ex "info cuda exception" -ex 'x/8i $pc-64' 2>&1 | tail -n 40
  done
}
trap where_it_failed EXIT
nvidia-smi --query-gpu=name,clocks.max.sm,power.limit --format=csv,noheader
