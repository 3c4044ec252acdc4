#!/usr/bin/env bash
# Builds the one pure-Python wheel, and fetches beside it the dependencies that a machine with torch may lack and that
# are pure Python, too: what to attach where there is no network (Kaggle: see launch/kaggle/README.md).
#
#   scripts/build_wheel.sh [FOLDER]      default: dist
#
# Needs a network for the build's own tool (hatchling). PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-dist}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$folder"
rm -f "$folder"/dist_train-*.whl # the folder is attached as it is: an old version beside the new one would be a riddle

pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
pip wheel --no-deps --wheel-dir "$folder" .
pip download --no-deps --only-binary :all: --dest "$folder" --constraint constraints.txt accelerate
for wheel in "$folder"/*.whl; do
  case $wheel in
    *-py3-none-any.whl) echo "$wheel" ;;
    *) echo "build_wheel: $wheel is not pure Python" >&2; exit 1 ;;
  esac
done
