#!/usr/bin/env bash
# Runs the whole suite, with nothing to install or set first: ./run_all.sh --help
set -euo pipefail
# shellcheck source=setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout, from wherever it is called

find_python
for argument; do
  [[ $argument == -h || $argument == --help ]] && exec "$python" -m brats_helpers run --help
done
"$python" -m brats_helpers run --check "$@" # a wrong argument stops before anything is installed
install_missing
exec "$python" -m brats_helpers run "$@"
