"""A script that makes Accelerator() before the process group: what it is told, under torchrun.

late_group.py init|run RUN_DIR RESTARTS
"""

import os
import sys

import torch
from accelerate import Accelerator

import dist_train as dt

how, run_dir, restarts = sys.argv[1:]
os.environ["TORCHELASTIC_MAX_RESTARTS"] = restarts  # as `torchrun --max-restarts` sets it, without the restarts
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, "the test would prove nothing"
try:
    if how == "init":
        dt.init_distributed()
    else:
        dt.Run(run_dir, model=torch.nn.Linear(1, 1), accelerator=accelerator)
    print("nothing was said")
except dt.DistTrainError as error:
    print(f"{type(error).__name__}: {error}")
torch.distributed.destroy_process_group()
