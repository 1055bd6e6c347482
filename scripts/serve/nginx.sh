#!/usr/bin/env bash
# Runs two replicas behind nginx, stops one while requests come, and checks that none is lost.
# scripts/serve/nginx.sh FOVEAL [MODEL]       needs nginx (Debian: nginx-light), curl
set -euo pipefail
foveal=$(realpath "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
model=()
[ $# -lt 2 ] || model=(--model "$(realpath "$2")")
folder=$(mktemp -d)
children=()
finish() {
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    wait
    rm -rf "$folder"
}
trap finish EXIT
for port in 18081 18082; do
    "$foveal" serve "${model[@]}" --name small --port "$port" --threads 1 2>"$folder/$port.log" &
    children+=($!)
done
nginx -p "$folder" -c "$here/nginx.conf" &
children+=($!)
body='{"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}'
ask() { curl -sf -m 60 http://127.0.0.1:18080/v1/completions -H 'content-type: application/json' -d "$body"; }
for _ in $(seq 200); do ask >/dev/null 2>&1 && break; sleep 0.1; done
expected=$(ask | python3 -c 'import json,sys; print(json.load(sys.stdin)["choices"][0]["text"])')
asking=()
for n in $(seq 40); do
    ask >"$folder/answer-$n" &
    asking+=($!)
    # One replica goes half way: it finishes what it has, and nginx asks the other.
    [ "$n" != 20 ] || kill -TERM "${children[0]}"
    sleep 0.02
done
for process in "${asking[@]}"; do wait "$process"; done
for n in $(seq 40); do
    found=$(python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))["choices"][0]["text"])' "$folder/answer-$n")
    [ "$found" = "$expected" ] || { echo "answer $n differs: $found"; exit 1; }
done
wait "${children[0]}"
curl -sfN http://127.0.0.1:18080/v1/completions -H 'content-type: application/json' \
    -d '{"prompt": "Once", "max_tokens": 8, "stream": true}' | grep -q 'data: \[DONE\]'
echo "40 of 40 answers, all the same, while one of two replicas stopped; streams pass"
