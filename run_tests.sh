#!/usr/bin/env bash
# Lints and runs every test, after the same set-up as run_all.sh. With arguments, pytest alone gets them:
# ./run_tests.sh tests/data/test_cases.py -x
set -euo pipefail
# shellcheck source=setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

find_python
install_missing test
cd "$root"
if [[ $# == 0 ]]; then
  "$python" -m ruff check --quiet
  layers=$("$python" -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-cache) ||
    { echo "$layers"; exit 1; }
  export OMP_NUM_THREADS=1 # for each of two processes
  set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
