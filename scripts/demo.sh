#!/usr/bin/env bash
# See a run survive: trains two small models on two CPU processes under plain torchrun, kills a worker of each in
# mid-epoch, and compares the end with that of the same run left alone, bit for bit. Two to three minutes after
# installation; exit code 0 only if everything was equal. What it made stays in runs/demo until the next time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/set_up.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python scripts/demo/story.py
