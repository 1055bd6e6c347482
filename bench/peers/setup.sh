#!/usr/bin/env bash
# Builds the peers that Foveal is measured against, outside the repository.
#
#   bench/peers/setup.sh [NAME...]      all of them when no name is given
#
# torch   a Python environment with PyTorch and NumPy (about 5.5 GB: PyPI's Linux wheel does not
#         load without its CUDA libraries, although only the CPU is used)
# onnxruntime, openvino
#         Python environments with these (about 170 MB and 430 MB)
# llama   llama.cpp's llama-bench and llama-completion, from the source package of llama-cpp-python,
#         Release, for this machine's own instruction set, statically linked (about 200 MB)
#
# ggml    the same source's libraries of kernels, for its flash attention alone (about 50 MB)
# rust    the program of bench/rust-peers, with candle and burn-flex, and its build folder (about 1 GB;
#         needs cargo)
#
# Everything goes to ${FOVEAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/foveal}/peers. What is already
# there is kept; each peer's folder carries its version and is complete once it holds `.complete`.
# Needs Python 3.11 or newer ($PYTHON names another one than python3), a C++17 compiler, sha256sum.
# JOBS sets the number of compile jobs (1).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/versions.sh"

PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-1}

say() { printf 'peers: %s\n' "$*" >&2; }

# Runs "$@" to fill the folder $1 unless an earlier run completed it.
build_once() {
    local folder=$1 build=$2
    if [[ -e $folder/.complete ]]; then
        return
    fi
    rm -rf "$folder"
    mkdir -p "$folder"
    "$build" "$folder"
    touch "$folder/.complete"
}

build_torch() {
    say "installing torch $TORCH_VERSION (a download of about 3 GB)"
    "$PYTHON" -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir "torch==$TORCH_VERSION" "numpy==$NUMPY_VERSION"
    "$1/bin/python" - <<'CHECK'
import torch
q, k = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16)
out = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
assert torch.equal(out, q), "scaled_dot_product_attention on the CPU gives a wrong answer"
CHECK
}

build_onnxruntime() {
    say "installing onnxruntime $ONNXRUNTIME_VERSION"
    "$PYTHON" -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir "onnxruntime==$ONNXRUNTIME_VERSION" \
        "onnx==$ONNX_VERSION" "numpy==$NUMPY_VERSION"
}

build_openvino() {
    say "installing openvino $OPENVINO_VERSION"
    "$PYTHON" -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir "openvino==$OPENVINO_VERSION" "numpy==$NUMPY_VERSION"
}

build_llama_tools() {
    "$PYTHON" -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir "cmake==$CMAKE_VERSION" "ninja==$NINJA_VERSION" \
        "scikit-build-core==$SCIKIT_BUILD_VERSION"
}

# pip asks the package's build back end for its metadata before it keeps a source package, which is
# why scikit-build-core is among the tools; nothing of the Python package is built.
fetch_llama_source() {
    local folder=$1 archive=$1/llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION.tar.gz
    PATH="$TOOLS_DIR/bin:$PATH" "$TOOLS_DIR/bin/pip" download --quiet --no-deps --no-binary :all: \
        --no-build-isolation --dest "$folder" "llama-cpp-python==$LLAMA_CPP_PYTHON_VERSION"
    echo "$LLAMA_SDIST_SHA256  $archive" | sha256sum --check --quiet
    mkdir "$folder/src"
    tar -xzf "$archive" -C "$folder/src" --strip-components=3 \
        "llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION/vendor/llama.cpp"
    rm "$archive"
}

# Configures the source for this machine's own instruction set and builds the targets named after $2.
compile_llama() {
    local folder=$1 shared=$2
    shift 2
    "$TOOLS_DIR/bin/cmake" -S "$folder/src" -B "$folder/build" -G Ninja \
        -DCMAKE_MAKE_PROGRAM="$TOOLS_DIR/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS="$shared" -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF >"$folder/configure.log" 2>&1
    "$TOOLS_DIR/bin/cmake" --build "$folder/build" --parallel "$JOBS" --target "$@" >"$folder/build.log" 2>&1 || {
        tail -20 "$folder/build.log" >&2
        return 1
    }
}

build_llama() {
    say "building llama.cpp of llama-cpp-python $LLAMA_CPP_PYTHON_VERSION with $JOBS job(s)"
    fetch_llama_source "$1"
    compile_llama "$1" OFF llama-bench llama-completion
}

build_ggml() {
    say "building ggml of llama-cpp-python $LLAMA_CPP_PYTHON_VERSION with $JOBS job(s)"
    "$PYTHON" -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir "numpy==$NUMPY_VERSION"
    fetch_llama_source "$1"
    compile_llama "$1" ON ggml-cpu
}

setup_torch() {
    build_once "$TORCH_DIR" build_torch
    echo "torch $TORCH_VERSION: $TORCH_DIR/bin/python"
}

setup_onnxruntime() {
    build_once "$ONNXRUNTIME_DIR" build_onnxruntime
    echo "onnxruntime $ONNXRUNTIME_VERSION: $ONNXRUNTIME_DIR/bin/python"
}

setup_openvino() {
    build_once "$OPENVINO_DIR" build_openvino
    echo "openvino $OPENVINO_VERSION: $OPENVINO_DIR/bin/python"
}

setup_llama() {
    build_once "$TOOLS_DIR" build_llama_tools
    build_once "$LLAMA_DIR" build_llama
    echo "llama.cpp (llama-cpp-python $LLAMA_CPP_PYTHON_VERSION): $LLAMA_DIR/build/bin"
}

setup_ggml() {
    build_once "$TOOLS_DIR" build_llama_tools
    build_once "$GGML_DIR" build_ggml
    echo "ggml (llama-cpp-python $LLAMA_CPP_PYTHON_VERSION): $GGML_DIR/build/bin"
}

# cargo knows what is new.
setup_rust() {
    say "building bench/rust-peers with $JOBS job(s)"
    cargo build --release --locked --jobs "$JOBS" --target-dir "$RUST_DIR" \
        --manifest-path "$(dirname "${BASH_SOURCE[0]}")/../rust-peers/Cargo.toml"
    echo "candle and burn-flex: $RUST_DIR/release/foveal-rust-peers"
}

all=(torch onnxruntime openvino ggml rust llama)
[[ $# -gt 0 ]] || set -- "${all[@]}"
for peer in "$@"; do
    [[ " ${all[*]} " == *" $peer "* ]] || {
        say "unknown peer '$peer': expected some of ${all[*]}, or nothing for all"
        exit 2
    }
done
for peer in "$@"; do
    "setup_$peer"
done
