#!/usr/bin/env bash
# Starts a training script with torchrun and restarts it when a worker dies. One machine needs no variables:
#
#   launch/torchrun.sh train.py --its --arguments
#
# Several machines: the same line on each of them, with
#
#   NNODES=4 RDZV_ENDPOINT=node0:29400 launch/torchrun.sh train.py --its --arguments
#
#   NPROC           processes on this machine     one for each GPU, or 1 without a GPU
#   MAX_RESTARTS    restarts of the worker group  3
#   NNODES          machines; 2:4 for 2 to 4      1
#   RDZV_ENDPOINT   HOST:PORT of one machine that all the others reach; needed with more than one machine
#   RDZV_ID         name of the job, the same on all machines and another for each job: default
#   RDZV_CONF       times of the rendezvous      last_call_timeout=10: how many seconds late a machine may be
#   PYTHON          the interpreter               python3, or that of the active virtual environment
set -euo pipefail

fail() { printf 'torchrun.sh: %s\n' "$*" >&2; exit 2; }

if [ $# -eq 0 ]; then fail "give the training script and its arguments: launch/torchrun.sh train.py --epochs 20"; fi

choose_python() {
  if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; return; fi
  if [ -n "${VIRTUAL_ENV:-}" ]; then echo "$VIRTUAL_ENV/bin/python"; return; fi
  command -v python3 || command -v python || fail "there is no python3; name the interpreter: PYTHON=/path/to/python"
}

# Asks torch, not nvidia-smi: what counts is what the workers will see (CUDA_VISIBLE_DEVICES, a CPU build, other makers).
count_processes() {
  "$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))' ||
    fail "$python cannot import torch, so the GPUs cannot be counted. Activate the environment of the training, or give" \
      "PYTHON=/path/to/python"
}

python=$(choose_python)
nnodes=${NNODES:-1}
nproc=${NPROC:-$(count_processes)}
flags=(--nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}")
if [ "$nnodes" = 1 ]; then
  flags=(--standalone "${flags[@]}") # a port of its own: two runs on one machine never collide
elif [ -z "${RDZV_ENDPOINT:-}" ]; then
  fail "NNODES is $nnodes, but RDZV_ENDPOINT is not set. Give HOST:PORT of one of the machines, the same on all:" \
    "RDZV_ENDPOINT=node0:29400"
else
  flags+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-default}")
  flags+=(--rdzv-conf "${RDZV_CONF:-last_call_timeout=10}")
  # Without it a machine that comes later, or comes back, ends the launch (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

command=("$python" -m torch.distributed.run "${flags[@]}" "$@")
printf 'torchrun.sh:'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}" # so that a signal to this script reaches torchrun
