#!/usr/bin/env bash
# Runs the tests that need a GPU with the torch that is on this machine, and writes what they said, with the date, the
# versions and the device, to a file. It installs nothing and reaches no network: the library is used from this tree.
#
#   scripts/gpu.sh [OUTPUT] [--all] [--benchmark] [-- pytest arguments]
#
#   OUTPUT        file to write; gpu-results.txt by default
#   --all         the twins of these tests on the CPU too
#   --benchmark   benchmarks/gpu_save_cost.py afterwards
#
# The interpreter is python3; DIST_TRAIN_PYTHON=/path/to/python names another. It needs torch >= 2.8, accelerate,
# safetensors, numpy, xxhash, psutil, and for the tests pytest, pytest-timeout and hypothesis. Exit code 3: something is
# missing, or there is no CUDA device, so that nothing was run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${DIST_TRAIN_PYTHON:-python3}
output='' all=false benchmark=false
while [ $# -gt 0 ]; do
  case "$1" in
    --all) all=true ;;
    --benchmark) benchmark=true ;;
    --) shift; break ;;
    -*) echo "usage: scripts/gpu.sh [OUTPUT] [--all] [--benchmark] [-- pytest arguments]" >&2; exit 2 ;;
    *) output=$1 ;;
  esac
  shift
done
output=${output:-gpu-results.txt}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Prints date, versions and device; fails with one line that says what is missing.
describe_machine() {
  "$python" - <<'PY'
import datetime, importlib, platform, sys

def give_up(text):
    print(text, file=sys.stderr)
    sys.exit(3)

versions = []
needed = ["torch", "accelerate", "safetensors", "numpy", "xxhash", "psutil", "pytest", "pytest_timeout", "hypothesis"]
missing = []
for name in needed:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({error})")
        continue
    version = getattr(module, "__version__", getattr(module, "VERSION", ""))
    versions.append(f"{name} {version}".strip())
if missing:
    give_up(f"{sys.executable} lacks what the tests need: {', '.join(missing)}. Nothing was run.")
import torch
if not torch.cuda.is_available():
    give_up(f"torch {torch.__version__} of {sys.executable} sees no CUDA device. Nothing was run.")
print(f"date      {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
print(f"python    {platform.python_version()} ({platform.machine()})")
print(f"versions  {', '.join(versions)}")
print(f"cuda      {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}, nccl {torch.cuda.nccl.version()}")
for index in range(torch.cuda.device_count()):
    one = torch.cuda.get_device_properties(index)
    print(f"device {index}  {one.name}, {one.total_memory / 2**30:.0f} GiB, capability {one.major}.{one.minor}")
PY
}

machine=$(describe_machine) || exit 3
tests=(-m gpu)
if $all; then tests=(); fi
code=0
{
  echo "$machine"
  echo "commit    $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  echo
  "$python" -m pytest -p no:cacheprovider -ra -v --durations=10 ${tests[@]+"${tests[@]}"} tests/gpu "$@" || code=$?
  if $benchmark; then
    echo
    "$python" benchmarks/gpu_save_cost.py --device cuda || code=$?
  fi
  echo "exit code $code"
} 2>&1 | tee "$output"
exit "$(sed -n 's/^exit code \([0-9]*\)$/\1/p' "$output" | tail -n 1)"
