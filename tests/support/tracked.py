"""A run with trackers whose first lives end early, each at its own point of a plan.

    tracked.py trainer|loop RUN_DIR 2-kill,5-judged,8-error

`2-kill`: the last rank kills itself after step 2. `5-judged`: step 5 is saved before its evaluation, and the main rank
kills itself when the evaluation was told to the trackers and is not saved. `8-error`: an exception after step 8.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import dist_train as dt
from tests.support.small_run import Numbered, SmallRun, small_model, small_optimizer, squared_error

POLICY = dt.CheckpointPolicy(every_steps=5, every_epochs=1)


def arm(run_dir: Path, plan: list[str]) -> None:
    """One end a life; each leaves a file beside the run directory."""
    fired = sorted(run_dir.parent.glob("fired-*"))
    if len(fired) == len(plan):
        return
    step, _, how = plan[len(fired)].partition("-")
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    is_victim = rank == (0 if how == "judged" else last)
    original = dt.Run._reach_boundary

    def end(run: Any, **moment: Any) -> None:
        if run.global_step == int(step) and how == "judged" and not moment.get("evaluated"):
            run.save()
        if not (run.global_step == int(step) and moment.get("evaluated", False) == (how == "judged")):
            original(run, **moment)
            return
        if how != "judged":
            original(run, **moment)
        run._checkpointer.wait()
        run.world.gather(0, "the end of this life")  # whatever is in flight is done on every rank
        if is_victim:
            (run_dir.parent / f"fired-{len(fired)}").touch()
            if how != "error":
                os.kill(os.getpid(), signal.SIGKILL)
        if how == "error":
            raise RuntimeError(f"the end of life {len(fired) + 1}")

    dt.Run._reach_boundary = end  # type: ignore[method-assign]


def train_with_trainer(run_dir: Path, trackers: list[str]) -> int:
    model = small_model()
    optimizer, scheduler = small_optimizer(model)
    config = dt.TrainConfig(
        run_dir=str(run_dir),
        epochs=3,
        global_batch_size=4,
        cpu=True,
        log_every_steps=1,
        log_with=trackers,
        checkpoint=POLICY,
    )
    trainer = dt.Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        train_data=Numbered(),
        eval_data=Numbered(6),
        loss=squared_error,
        config=config,
    )
    return trainer.fit().exit_code


def train_in_a_loop(run_dir: Path, trackers: list[str]) -> int:
    from accelerate import Accelerator

    dt.init_distributed()
    accelerator = Accelerator(cpu=True, log_with=trackers, project_dir=str(run_dir / "tracker"))
    return SmallRun(run_dir=run_dir, accelerator=accelerator, policy=POLICY).train().exit_code


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    arm(folder, sys.argv[3].split(","))
    train = {"trainer": train_with_trainer, "loop": train_in_a_loop}[kind]
    sys.exit(train(folder, ["tensorboard", "wandb"]))
