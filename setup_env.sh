# shellcheck shell=bash
# The Python of the suite. Sourced by run_all.sh and run_tests.sh.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosted=${COLAB_RELEASE_TAG:-}${KAGGLE_KERNEL_RUN_TYPE:-}
conda=${CONDA_PREFIX:-}
if [[ ${CONDA_DEFAULT_ENV:-} == base ]]; then conda=; fi # always active, and not to be filled
active=${VIRTUAL_ENV:-}$conda$hosted

# Sets $python: that of the active environment, of .venv, or one that can make .venv.
find_python() {
  local candidates=("$root/.venv/bin/python" python3 python3.13 python3.12 python3.11) modules="sys, venv, ensurepip"
  if [[ -n $active ]]; then candidates=(python python3) modules=sys; fi
  for python in "${candidates[@]}"; do
    "$python" -c "import $modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && return
  done
  echo "❌ needs Python 3.11 or newer, with its modules venv and ensurepip; looked at: ${candidates[*]}" >&2
  exit 1
}

# Installs what is missing, with what the extra $1 needs unless there is none.
install_missing() {
  if [[ -z $active && $python != "$root/.venv/bin/python" ]]; then
    "$python" -m venv --clear "$root/.venv"
    python=$root/.venv/bin/python
  fi
  # A kernel that is already running, as on Colab and Kaggle, cannot import an editable install.
  local editable=(--editable)
  [[ -n $hosted ]] && editable=()
  "$python" -P "$root/brats_helpers/suite/environment.py" ${editable[@]+"${editable[@]}"} "$@"
}
