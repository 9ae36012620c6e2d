#!/bin/bash
# What a GPU has to say, in at most nine minutes on a machine that has JAX for CUDA and pytest, and needs no network:
#
#     experiments/on_gpu.sh [OUT]            correctness, benchmark, block sizes, a packed 1B model; OUT is results/gpu
#     experiments/on_gpu.sh --tiny [OUT]     the same on a CPU, small: kernels in interpret mode; OUT is runs/tiny/gpu
#
# Stages run one after the other, each under a time limit of its own, and write as they go: OUT/log.txt, OUT/kernels/rows.jsonl,
# OUT/blocks.txt (rows for TABLE in qjax/kernels/gpu.py), OUT/decode.jsonl. An interruption loses the stage that is running and
# nothing before it; OUT/stages.txt says how each ended (124: out of time). Exit code: the number of stages that failed.
set -u
cd "$(dirname "$0")/.." || exit 1
tiny=; [ "${1:-}" = --tiny ] && { tiny=--tiny; shift; }
out=${1:-$([ -n "$tiny" ] && echo runs/tiny/gpu || echo results/gpu)}
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out/kernels"
failed=0

stage() { # stage NAME SECONDS COMMAND...: its output goes to the log as it comes
    local name=$1 seconds=$2 begun=$SECONDS code
    shift 2
    echo "== $name: $*" >>"$out/log.txt"
    timeout --kill-after=5 "$seconds" "$@" >>"$out/log.txt" 2>&1
    code=$?
    [ $code -ne 0 ] && failed=$((failed + 1))
    echo "$name: exit $code after $((SECONDS - begun)) s" | tee -a "$out/stages.txt"
}

blocks() { # block sizes for one number of rows, which are printed when they are found
    stage "blocks, $1 rows" 40 bash -c '"$@" | tee -a "$0"' "$out/blocks.txt" \
        "$python" experiments/tune_kernels.py --rows "$1" --shapes 4096x4096,4096x14336
}

echo "$(date -u +%FT%TZ) $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null)" >>"$out/stages.txt"
if [ -n "$tiny" ]; then
    stage devices 60 "$python" -c 'import jax; print(jax.devices(), jax.__version__)'
    stage correctness 200 "$python" -m pytest -q -n 0 -p no:cacheprovider tests/test_kernels_gpu.py -k "split and not real" -m "not gpu"
    stage benchmark 100 "$python" experiments/kernel_benchmark.py --tiny --out "$out/kernels"
    stage decode 100 "$python" experiments/packed_decode.py --tiny --out "$out/decode.jsonl"
    exit $failed
fi
# 30 + 120 + 130 + 4 x 40 + 100 = 540 s, kept for what takes longer than it should; what is worth most comes first
stage devices 30 "$python" -c 'import jax; print(jax.devices(), jax.__version__); assert jax.default_backend() == "gpu"'
stage correctness 120 "$python" -m pytest -q -n 0 -p no:cacheprovider -m gpu tests
stage decode 100 "$python" experiments/packed_decode.py --out "$out/decode.jsonl"
stage benchmark 130 "$python" experiments/kernel_benchmark.py --out "$out/kernels"
for rows in 1 16 128 512; do blocks "$rows"; done
exit $failed
