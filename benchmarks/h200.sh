#!/usr/bin/env bash
# Every figure of one NVIDIA H200 at Wan's real size, in about ten minutes, with random weights: nothing is fetched.
#
#   pip install -e '.[gpu,quantize,plot]' && benchmarks/h200.sh [FOLDER]
#
# Writes FOLDER/*.json, *.png and *.txt (default: h200). BUDGET=SECONDS in all (default 580): what does not come to its end
# leaves its .txt, and the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-h200}
budget=${BUDGET:-580}
mkdir -p "$out"
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT

bench() { # NAME SECONDS FLAGS…: one run, of at most so many seconds
    local name=$1 left=$((budget - SECONDS)) limit=$2
    shift 2
    ((left < limit)) && limit=$left
    ((limit < 10)) && { echo "== $name: no time left"; return 1; }
    echo "== $name (at $SECONDS s)"
    timeout -k 5 "$limit" python -m rfjax.bench --config configs/wan_1_3b.py --dtype bfloat16 --skip_preflight \
        --compile_cache "$cache" --json "$out/$name.json" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    ((code == 0)) || echo "== $name ended with code $code"
    return "$code"
}

# Most telling first. Exact mode: each program alone and a short stream.
bench exact 150 --blocks 20 --parts text_kv,window,clean,step,decode,stream
bench tiny 80 --decoder tiny --blocks 30 --parts decode,step,stream
# 8 bits, where memory matters and where speed does; then five minutes of video from the fastest.
for mode in fp8 int8 fp8+kv8; do
    bench "$mode" 60 --decoder tiny --quantize "$mode" --blocks 20 --parts step,stream
done
bench long 170 --decoder tiny --quantize fp8 --frames 4800 --parts stream --plot "$out/long.png"
bench first 120 --parts first
