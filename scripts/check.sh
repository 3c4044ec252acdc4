#!/usr/bin/env bash
# Format, lint, types, tests: the one command for people, pre-commit and CI. Stops at the first stage that fails, with
# its exit code. Tests come last, so that pytest's closing line ends the output.
#
#   scripts/check.sh          everything but the slow tests
#   scripts/check.sh --all    the slow tests too
#   scripts/check.sh --fast   unit tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  '') tests=(-m 'not slow') ;;
  --all) tests=() ;;
  --fast) tests=(-m 'not slow' tests/unit) ;;
  *)
    echo "usage: scripts/check.sh [--all | --fast]" >&2
    exit 2
    ;;
esac

export OMP_NUM_THREADS=1 # several ranks share a few cores, and exact comparisons need one thread count

header() { printf '== %s\n' "$1"; }
stage() {
  local name=$1 start=$SECONDS code=0
  shift
  header "$name"
  "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    printf '== %s failed with exit code %d after %d s\n' "$name" "$code" $((SECONDS - start)) >&2
    exit "$code"
  fi
  printf '   %d s\n' $((SECONDS - start))
}

# Some fault tests inject errors into system calls, and those of several hosts make network namespaces: they are skipped
# without strace, and without ip.
install_tools() {
  [ "${CI:-}" = true ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || return 0
  command -v strace >/dev/null && command -v ip >/dev/null && return 0
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y strace iproute2; } >/dev/null 2>&1 ||
    echo "strace and ip (iproute2) could not be installed: the tests that need them are skipped"
}

stage set-up scripts/set_up.sh
export PATH="$PWD/.venv/bin:$PATH"
install_tools
stage 'ruff format' python -m ruff format --check .
stage 'ruff check' python -m ruff check .
stage mypy python -m mypy
header pytest
# Two files at a time: a test that starts ranks mostly waits for them to start. A file's tests share their fixtures.
exec python -m pytest -n 2 --dist loadfile ${tests[@]+"${tests[@]}"}
