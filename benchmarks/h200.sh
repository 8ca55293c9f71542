#!/usr/bin/env bash
# Every figure of one NVIDIA H200 at Wan's real size, with random weights: nothing is fetched.
#
#   pip install -e '.[gpu13,quantize,plot]' && benchmarks/h200.sh [1] [2] [3]
#
# Three parts of at most nine minutes each, the most telling first; all of them by default. Writes NAME.json, NAME.txt and long.png
# to $OUT (default: h200, in the clone). A run that is cut off leaves what it has measured, and the others run all the same.
# Whether cuDNN's numbers are plain products' is the tests' to say: pip install -e '.[test]' && python -m pytest tests/test_attention.py
set -uo pipefail
cd "$(dirname "$0")/.."
[[ "$*" =~ ^[1-3\ ]*$ ]] || { echo "usage: benchmarks/h200.sh [1] [2] [3]" >&2; exit 2; }
(($#)) || set -- 1 2 3
out=${OUT:-h200} failed=0
mkdir -p "$out"

bench() { # NAME SECONDS FLAGS…: one run, of at most so many seconds
    local name=$1 limit=$2
    shift 2
    echo "== $name (at $SECONDS s)"
    timeout -k 5 "$limit" python3 -m rfjax.bench --config configs/wan_1_3b.py --dtype bfloat16 --skip_preflight \
        --json "$out/$name.json" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    ((code == 0)) || { echo "== $name ended with code $code"; failed=1; }
}

for part; do
    case $part in
    1) # the stream and each program alone: exact, with the tiny decoder, and that in the 8 bits of which most is hoped
        bench exact 250 --blocks 20 --seconds 60 --parts stream,step,decode,window,clean,text_kv
        bench tiny 120 --decoder tiny --blocks 30 --seconds 40 --parts stream,step,decode
        bench fp8 150 --decoder tiny --quantize fp8 --blocks 20 --seconds 40 --parts stream,step,decode
        ;;
    2) # plain products in place of cuDNN's attention, the other modes of 8 bits, and the first frame
        bench xla 100 --attention xla --blocks 6 --seconds 30 --parts stream,step
        bench int8 110 --decoder tiny --quantize int8 --blocks 20 --seconds 40 --parts stream,step,decode
        bench fp8-kv8 110 --decoder tiny --quantize fp8+kv8 --blocks 20 --seconds 40 --parts stream,step,decode
        bench first 200 --parts first
        ;;
    3) # five minutes of video, or as much of it as five minutes are enough for
        bench long 500 --decoder tiny --quantize fp8 --frames 4800 --seconds 300 --parts stream,step,decode --plot "$out/long.png"
        ;;
    esac
done
exit "$failed"
