#!/usr/bin/env bash
# A training on one node or several that outlives time limits, preemption and lost nodes. Adapt the #SBATCH lines, then
#
#   sbatch launch/slurm/train.sh train.py --its --arguments
#
# Five minutes before the time limit SLURM sends USR1 to all processes of the step: the run saves, stops and ends with exit
# code 75 (if the script sets requeue_exit=True), on which this file puts the job back into the queue. The same happens when
# SLURM preempts it (TERM). Exit codes 0 (done), 93 (no progress, diverged), 130 and 1 end the job. Run directory, script and
# environment lie on a file system that all nodes see; activate the environment before sbatch, or here.
#
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -eq 0 ]; then echo "train.sh: give the training script and its arguments: sbatch train.sh train.py" >&2; exit 2; fi

export DIST_TRAIN_GRACE=280s # of the 300 between USR1 and the limit
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node never meet

srun dist-train launch --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" "$@"
code=$?
if [ "$code" = 75 ]; then
  echo "train.sh: stopped to be continued; the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
