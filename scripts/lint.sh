#!/usr/bin/env bash
# Formats and lints everything; changes nothing. Needs the tools of requirements-lint.txt on PATH
# and, for pyright, the package and its examples' dependencies in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
git ls-files '*.h' '*.cc' '*.cuh' '*.inc' | xargs clang-format --dry-run -Werror
pyright
