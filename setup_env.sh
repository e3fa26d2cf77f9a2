# shellcheck shell=bash
# The Python of the suite. Sourced by run_all.sh and run_tests.sh.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosted=${COLAB_RELEASE_TAG:-}${KAGGLE_KERNEL_RUN_TYPE:-}
conda=${CONDA_PREFIX:-}
if [[ ${CONDA_DEFAULT_ENV:-} == base ]]; then conda=; fi # always active, and nothing is installed into it
active=${VIRTUAL_ENV:-}$conda$hosted
# pip leaves compiling to the first import. Without bytecode each notebook would compile torch again, in 8 seconds.
unset PYTHONDONTWRITEBYTECODE

# Sets $python: that of the active environment, of .venv, or one that can make .venv.
find_python() {
  local candidates=("$root/.venv/bin/python" python3 python3.13 python3.12 python3.11) modules="sys, venv, ensurepip"
  if [[ -e $root/.venv/being-made ]]; then unset "candidates[0]"; fi
  if [[ -n $active ]]; then candidates=(python python3) modules=sys; fi
  for python in "${candidates[@]}"; do
    "$python" -c "import $modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && return
  done
  echo "❌ needs Python 3.11 or newer, with its modules venv and ensurepip; looked at: ${candidates[*]}" >&2
  exit 1
}

# Makes .venv unless there is one. Never touches one that somebody else made.
make_venv() {
  local unfinished=$root/.venv/being-made # left by a command that was stopped in between
  if [[ -e $root/.venv && ! -e $unfinished ]]; then
    echo "❌ $root/.venv has no Python 3.11 or newer with the modules venv and ensurepip, and is left as it is." \
      "Rename or remove it, or activate another environment, and start again." >&2
    exit 1
  fi
  mkdir -p "$root/.venv"
  touch "$unfinished"
  "$python" -m venv "$root/.venv"
  rm "$unfinished"
}

# Installs what is missing, with what the extra $1 needs unless there is none.
install_missing() {
  if [[ -z $active && $python != "$root/.venv/bin/python" ]]; then
    make_venv
    python=$root/.venv/bin/python
  fi
  # A kernel that is already running, as on Colab and Kaggle, cannot import an editable install.
  local editable=(--editable)
  [[ -n $hosted ]] && editable=()
  "$python" -P "$root/brats_helpers/suite/environment.py" ${editable[@]+"${editable[@]}"} "$@"
}
