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
nvidia-smi --query-gpu=name,clocks.max.sm,power.limit --format=csv,noheader
