#!/usr/bin/env bash
# Lints and runs every test, after the same set-up as run_all.sh. With arguments, pytest alone gets them:
# ./run_tests.sh tests/test_cases.py -x
set -euo pipefail
# shellcheck source=setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

find_python
install_missing test
cd "$root"
[[ $# == 0 ]] && "$python" -m ruff check --quiet
exec "$python" -m pytest "$@"
