#!/usr/bin/env bash
# Builds the module with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests once.
# Usage: scripts/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)/venv
python3 -m venv "$venv"
"$venv/bin/pip" install -q '.[test]' -C build-dir=build/sanitize -C cmake.build-type=RelWithDebInfo \
  -C install.strip=false -C cmake.define.JFA_SANITIZE=address,undefined
# The sanitizer must be in the process before Python's own allocations. Leaks are not looked for:
# the interpreter and XLA keep what they allocate until the process ends. Death by a signal must
# reach pytest, so XLA's and faulthandler's handlers stay off.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  "$venv/bin/pytest" -p no:faulthandler "$@"
