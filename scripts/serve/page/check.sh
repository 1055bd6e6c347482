#!/usr/bin/env bash
# Checks the page's types with tsc, then clicks through it in a headless Chromium.
# scripts/serve/page/check.sh FOVEAL MIXED [MODEL]       needs npm and chromium (Debian: apt-get install npm chromium)
# MIXED: a folder from `cargo run --release -p foveal-lm --example random_model -- FOLDER "$(cat scripts/serve/page/mixers.json)"`.
# With MODEL, SmolLM2's file, the pictures of the documentation are written; without it the built-in model is served.
set -euo pipefail
foveal=$(realpath "$1")
mixed=$(realpath "$2")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# npm writes beside its own copy, not into the repository.
folder=${XDG_CACHE_HOME:-$HOME/.cache}/foveal/page-check
mkdir -p "$folder/pictures"
pictures=$folder/pictures
model=()
if [ $# -gt 2 ]; then
    model=(--model "$(realpath "$3")" --name SmolLM2)
    pictures=$here/../../../docs/pictures
fi
cp "$here/package.json" "$here/click.mjs" "$folder/"
(cd "$folder" && npm install --no-audit --no-fund --silent) || { echo "*** npm can't be reached: the page is NOT checked ***" >&2; exit 3; }
"$folder/node_modules/.bin/tsc" -p "$here"
echo "tsc: no errors"
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
# Any free port; the server says which.
serve() {
    local log=$folder/log-$1
    shift
    "$foveal" serve --port 0 "$@" 2>"$log" &
    servers+=($!)
    for _ in $(seq 1200); do
        address=$(sed -n 's|.* at \(http://[0-9.:]*\)$|\1|p' "$log")
        [ -z "$address" ] || return 0
        kill -0 "${servers[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    cat "$log" >&2
    return 1
}
serve model "${model[@]}"
base=$address
serve mixed --model "$mixed" --name mixed
CHROMIUM=${CHROMIUM:-$(command -v chromium)} node "$folder/click.mjs" "$base" "$address" "$pictures"
