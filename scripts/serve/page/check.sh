#!/usr/bin/env bash
# Checks the page's types with tsc, then clicks through it in a headless Chromium, and writes the pictures of the documentation.
# scripts/serve/page/check.sh FOVEAL MODEL       needs npm and chromium (Debian: apt-get install npm chromium)
set -euo pipefail
foveal=$(realpath "$1")
model=$(realpath "$2")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# npm writes beside its own copy, not into the repository.
folder=${XDG_CACHE_HOME:-$HOME/.cache}/foveal/page-check
mkdir -p "$folder"
cp "$here/package.json" "$here/click.mjs" "$folder/"
(cd "$folder" && npm install --no-audit --no-fund --silent) || { echo "*** npm can't be reached: the page is NOT checked ***" >&2; exit 1; }
"$folder/node_modules/.bin/tsc" -p "$here"
echo "tsc: no errors"
port=18090
"$foveal" serve --model "$model" --name SmolLM2 --port $port 2>"$folder/log" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 200); do curl -sf "http://127.0.0.1:$port/health" >/dev/null && break; sleep 0.1; done
CHROMIUM=${CHROMIUM:-$(command -v chromium)} node "$folder/click.mjs" "http://127.0.0.1:$port" "$here/../../../docs/pictures"
