"""A Trainer that tracks into TensorBoard's files, killed in its first lives: one kill a life, at the given steps.

tracked.py RUN_DIR 2,8      the first life is killed after step 2, the second after step 8
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import dist_train as dt
from tests.support.small_run import Numbered, small_model, small_optimizer, squared_error


def arm(run_dir: Path, kills: list[int]) -> None:
    """The last rank kills itself after a step; each kill leaves a file beside the run directory."""
    fired = sorted(run_dir.parent.glob("fired-*"))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(fired) == len(kills) or rank != world_size - 1:
        return
    step = dt.Run.step

    def dying_step(run: Any, loss: Any = None) -> None:
        step(run, loss)
        if run.global_step == kills[len(fired)]:
            (run_dir.parent / f"fired-{len(fired)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    dt.Run.step = dying_step  # type: ignore[method-assign]


def main() -> int:
    run_dir, kills = Path(sys.argv[1]), [int(step) for step in sys.argv[2].split(",") if step]
    arm(run_dir, kills)
    model = small_model()
    optimizer, scheduler = small_optimizer(model)
    config = dt.TrainConfig(
        run_dir=str(run_dir),
        epochs=3,
        global_batch_size=4,
        cpu=True,
        log_every_steps=1,
        log_with="tensorboard",
        checkpoint=dt.CheckpointPolicy(every_steps=3, every_epochs=1),
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


if __name__ == "__main__":
    sys.exit(main())
