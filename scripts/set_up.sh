#!/usr/bin/env bash
# Makes .venv in the repository root: torch, this library (editable) and the test tools. Safe to run again: a second
# run on an unchanged tree takes a fraction of a second. Never replaces a torch that is already there.
#
#   DIST_TRAIN_PYTHON=/path/to/python scripts/set_up.sh     picks the interpreter; else the first fitting python3
#
# A torch of the machine (container, conda, Kaggle) is used through --system-site-packages. Otherwise torch comes, in
# this order, from: a CPU build that pip's own configuration offers; PyTorch's CPU index; pip's default index. With an
# NVIDIA GPU in the machine, straight from pip's default index, whose Linux build carries CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly python=$venv/bin/python
readonly stamp=$venv/.set_up_done
readonly cpu_index=https://download.pytorch.org/whl/cpu
torch_pin=$(sed -n 's/^torch==//p' constraints.txt)
torch_floor=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
readonly torch_pin torch_floor
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 # a `user = true` in pip's configuration makes pip refuse a venv

# The root is part of the key because an editable install in a copied tree still points at the original.
fingerprint() { { pwd -P; cat pyproject.toml constraints.txt; } | cksum; }
is_done() { [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && "$python" -c '' 2>/dev/null; }
say() { printf 'set_up: %s\n' "$*"; }
fail() { printf 'set_up: %s\n' "$*" >&2; exit 1; }

quiet=(--quiet --quiet) # errors only, where nobody watches a progress bar
if [ -t 1 ]; then quiet=(); fi
pip() { "$python" -m pip "$@"; }
pip_install() { pip install ${quiet[@]+"${quiet[@]}"} "$@"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
can_make_venvs() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# Prints the version of the importable torch if it is at least the floor. Importing, not asking the metadata: a torch
# that does not load on this machine is of no use.
torch_version_of() {
  "$1" -c '
import sys, importlib.util
if importlib.util.find_spec("torch") is None: sys.exit(1)
import torch
numbers = lambda text: [int(part) for part in text.split("+")[0].split(".")[:2]]
if numbers(torch.__version__) < numbers(sys.argv[1]): sys.exit(1)
print(torch.__version__)' "$torch_floor" 2>/dev/null
}

# A venv made from inside another venv sees the base interpreter's packages, not that venv's.
system_torch_of() { "$1" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' && torch_version_of "$1"; }

# Sets `interpreter`: the first candidate that brings torch, else the first that can make a venv.
choose_interpreter() {
  local candidates=(python3.13 python3.12 python3.11 python3) fitting=() new_enough='' candidate found=''
  if [ -n "${DIST_TRAIN_PYTHON:-}" ]; then candidates=("$DIST_TRAIN_PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    is_new_enough "$candidate" || continue
    new_enough=${new_enough:-$candidate}
    if can_make_venvs "$candidate"; then fitting+=("$candidate"); fi
  done
  if [ -z "$new_enough" ]; then
    fail "no Python 3.11 or newer among: ${candidates[*]} (python3 is" \
      "$(python3 --version 2>&1 || echo missing)). Install one (Debian and Ubuntu: apt-get install python3.11" \
      "python3.11-venv; or conda, pyenv, uv) and run this again, or name it: DIST_TRAIN_PYTHON=/path/to/python" \
      "scripts/set_up.sh"
  fi
  if [ ${#fitting[@]} -eq 0 ]; then
    local version; version=$("$new_enough" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fail "$new_enough (Python $version) lacks the module venv or ensurepip, which make the virtual environment." \
      "Install them (Debian and Ubuntu: apt-get install python$version-venv) and run this again, or name another" \
      "interpreter: DIST_TRAIN_PYTHON=/path/to/python scripts/set_up.sh"
  fi
  for candidate in "${fitting[@]}"; do
    if system_torch_of "$candidate" >/dev/null; then found=$candidate; break; fi
  done
  interpreter=${found:-${fitting[0]}}
}

make_venv() {
  if [ -x "$python" ] && is_new_enough "$python" && pip --version >/dev/null 2>&1; then return; fi
  local interpreter torch options=(--clear)
  choose_interpreter
  if torch=$(system_torch_of "$interpreter"); then
    say "$interpreter has torch $torch: .venv will use it and leave it as it is"
    options+=(--system-site-packages)
  fi
  say "making .venv with $("$interpreter" --version 2>&1) ($interpreter)"
  "$interpreter" -m venv "${options[@]}" "$venv"
}

# Lists versions without downloading anything; a dry run of an older pip would fetch the whole wheel to read it.
offers_cpu_build() { pip index versions torch --retries 1 "$@" 2>/dev/null | grep -qF "$torch_pin+cpu"; }

install_torch() {
  if nvidia-smi >/dev/null 2>&1; then
    say "an NVIDIA GPU is here: installing torch $torch_pin with CUDA, a download of several GB"
    pip_install -c constraints.txt torch
  elif [ "$(uname -s)" != Linux ]; then
    say "installing torch $torch_pin, a download of about 200 MB"
    pip_install -c constraints.txt torch
  elif offers_cpu_build; then
    say "installing torch $torch_pin+cpu as pip is configured, a download of about 200 MB unless it lies on a disk"
    pip_install -c constraints.txt "torch==$torch_pin+cpu"
  elif offers_cpu_build --index-url "$cpu_index" --timeout 5 --retries 0; then
    say "installing torch $torch_pin+cpu from $cpu_index, a download of about 200 MB"
    pip_install -c constraints.txt --index-url "$cpu_index" "torch==$torch_pin+cpu"
  else
    say "no CPU build of torch $torch_pin is in reach ($cpu_index does not answer or lacks it): installing from pip's" \
      "default index, which may bring the CUDA libraries, a download of several GB"
    pip_install -c constraints.txt torch
  fi
}

# Prints constraints.txt with torch and numpy, which is built against, held at what is installed now.
constraints_of_this_machine() {
  "$python" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
for line in open("constraints.txt"):
    name, pinned, _ = line.partition("==")
    if pinned and name in ("torch", "numpy"):
        try:
            line = f"{name}=={version(name)}\n"
        except PackageNotFoundError:
            pass
    print(line, end="")
PY
}

install_library() {
  local torch=$1 constraints=$venv/constraints.txt
  constraints_of_this_machine >"$constraints"
  if pip_install -c "$constraints" -e '.[tests]'; then return; fi
  say "the tested versions do not all fit here: trying again with torch $torch alone held fixed"
  echo "torch==$torch" >"$constraints"
  pip_install -c "$constraints" -e '.[tests]' ||
    fail "pip could not install the library and its test tools into .venv; its message is above. Without a network," \
      "point pip at local wheels (PIP_FIND_LINKS, PIP_INDEX_URL) and run this again."
}

main() {
  if is_done; then return; fi
  exec 9<pyproject.toml
  if command -v flock >/dev/null; then flock 9; fi # two checks at once must not install into one .venv
  if is_done; then return; fi
  local torch
  make_venv
  torch_version_of "$python" >/dev/null || install_torch ||
    fail "torch $torch_pin could not be installed; pip's message is above. See the order of sources at the top of" \
      "scripts/set_up.sh, or install any torch >= $torch_floor into .venv by hand and run this again."
  torch=$(torch_version_of "$python") ||
    fail "torch is installed in .venv and cannot be imported, or is older than $torch_floor. Its own message:" \
      "$("$python" -c 'import torch; print(torch.__version__)' 2>&1 | tail -n 1)"
  if [ "${torch%%+*}" != "$torch_pin" ]; then say "torch $torch is kept; the tested version is $torch_pin"; fi
  say "installing the library and its test tools"
  install_library "$torch"
  fingerprint >"$stamp"
  say "done: $venv with torch $torch"
}

main "$@"
