#!/usr/bin/env bash
# Builds the module as it is, runs the GPU tests and writes their report.
# Usage: scripts/gpu_tests.sh REPORT.json [pytest arguments]; needs an NVIDIA GPU, jax[cuda], and
# the test dependencies in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$1
shift
python3 -m pip install -q --no-build-isolation --no-deps .
export XLA_PYTHON_CLIENT_PREALLOCATE=false
pytest -m gpu -n 8 -q --gpu-report "$report" "$@"
