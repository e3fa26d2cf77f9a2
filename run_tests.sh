#!/usr/bin/env bash
# Runs every test, after the same set-up as run_all.sh. Arguments go to pytest: ./run_tests.sh tests/test_cases.py -x
set -euo pipefail
# shellcheck source=setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

find_python
install_missing test
cd "$root"
exec "$python" -m pytest "$@"
