#!/usr/bin/env bash
# What a build with `--features mpi` needs, on Debian and Ubuntu: Open MPI with its headers, and libclang, which reads them.
# With --if-possible it does nothing, successfully, where it can't install: without apt-get, or without the rights.
set -euo pipefail

if command -v mpirun >/dev/null && command -v mpicc >/dev/null; then
    exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    if [ "${1:-}" = --if-possible ]; then
        exit 0
    fi
    echo "install_mpi.sh: needs apt-get and root; install Open MPI's development files and libclang by hand" >&2
    exit 1
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends libopenmpi-dev openmpi-bin libclang-dev clang
