#!/usr/bin/env bash
# Prints llama.cpp's prefill and decoding speed on a model, without and with its flash attention.
#
#   bench/peers/llama_bench.sh MODEL.gguf [-t THREADS] [-p PROMPT,...] [-n GENERATED,...]
#                              [-d DEPTH,...] [-r REPEATS] [-j]
#
#   -t  threads (2)                         -n  tokens to generate (64)
#   -p  prompt lengths (512)                -d  tokens already in the cache when timing starts (0)
#   -r  timed repeats of each case (5)      -j  llama-bench's own JSON instead of the table
#
# Each row gives the best, median and worst repeat in tokens per second. llama-bench runs every
# case's repeats in a row after one untimed run, takes a prompt 512 tokens at a time and keeps K
# and V as f16. Run it on a quiet machine: its threads spin at barriers, so that one competing
# process on their cores makes decoding up to ten times slower.
# Needs bench/peers/setup.sh llama.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/versions.sh"

usage() {
    sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
}

threads=2 prompts=512 generated=64 depths=0 repeats=5 json=
[[ $# -ge 1 && $1 != -* ]] || usage
model=$1
shift
while getopts t:p:n:d:r:j option; do
    case $option in
        t) threads=$OPTARG ;;
        p) prompts=$OPTARG ;;
        n) generated=$OPTARG ;;
        d) depths=$OPTARG ;;
        r) repeats=$OPTARG ;;
        j) json=yes ;;
        *) usage ;;
    esac
done

bench=$LLAMA_DIR/build/bin/llama-bench
[[ -x $bench ]] || { echo "llama-bench is not built; run bench/peers/setup.sh llama" >&2; exit 1; }
[[ -f $model ]] || { echo "no model file at $model" >&2; exit 1; }

# The table is made here because llama-bench prints mean and deviation, which one slow repeat spoils.
table() {
    "${PYTHON:-python3}" -c '
import json, statistics, sys
rows = json.load(sys.stdin)
print("case              fa      best    median     worst   tokens/s")
for row in rows:
    prompt, generated, depth = row["n_prompt"], row["n_gen"], row["n_depth"]
    case = f"prefill {prompt}" if prompt else f"decode {generated}"
    if depth:
        case += f" @ {depth}"
    speeds, flash = row["samples_ts"], int(row["flash_attn"])
    figures = (max(speeds), statistics.median(speeds), min(speeds))
    print(f"{case:16} {flash:3}", *(f"{figure:9.2f}" for figure in figures))
'
}

arguments=(-m "$model" -t "$threads" -p "$prompts" -n "$generated" -d "$depths" -r "$repeats"
    -fa 0,1 -o json)
if [[ $json ]]; then
    "$bench" "${arguments[@]}"
else
    "$bench" "${arguments[@]}" | table
fi
