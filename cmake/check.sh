#!/usr/bin/env bash
# Proves the CMake build in the empty directory $1: configure, build, CTest (emulator self tests, install, a consumer of the
# installed package). The CUDA part needs nvcc and cuBLAS (CSAT_CUBLAS_ROOT: see FindCsatCublas.cmake); without nvcc only
# the emulator is built. Further arguments go to CMake.
set -euo pipefail
source_dir=$(cd "$(dirname "$0")/.." && pwd)
build_dir=${1:?usage: check.sh BUILD_DIRECTORY [CMAKE OPTION..]}
options=(-DCSAT_EMULATE=ON)
[ -z "${CSAT_CUBLAS_ROOT:-}" ] || options+=("-DCSAT_CUBLAS_ROOT=$CSAT_CUBLAS_ROOT")
cmake -S "$source_dir" -B "$build_dir" "${options[@]}" "${@:2}"
cmake --build "$build_dir" --parallel "$(nproc)"
ctest --test-dir "$build_dir" --output-on-failure
