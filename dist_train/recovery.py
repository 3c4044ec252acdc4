"""What becomes of a run whose update or weights have gone bad: it stops, leaves the update out, or goes back.

    end_window   the samples that the update at hand was of
    judge        what the guard has found -> stop | skip | the decision to roll back, durable before anything moves
    is_sound     before each save: what is not finite is never committed

Invariant: each decision follows from what is equal on all ranks; after one to stop or to go back nothing more is saved
of what is in memory. How a run is restored is `Run`'s business.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from dist_train.boundary import Boundary
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.construction import Construction
from dist_train.errors import StopReason
from dist_train.health.nonfinite import BadUpdate, GradientGuard, agree_on_largest, find_not_finite
from dist_train.health.policy import HealthPolicy
from dist_train.intake import Intake
from dist_train.ledger import Window
from dist_train.progress import RunProgress
from dist_train.reporter import Reporter
from dist_train.state import LiveState
from dist_train.world import World

logger = logging.getLogger(__name__)
Json = Any
MOST_SCALER_SKIPS = 64
"""Updates in a row that the GradScaler leaves out: by then it has halved its scale below every float16."""
_MOST_NAMES = 4


class Recovery:
    """Watches one attempt's updates. Every method but `open` and `close` is collective.

    Args:
        intake: of the training loader, whose windows are left out.
        own_gradients: nothing but the loop averages gradients, so that they may differ between the ranks.
    """

    def __init__(
        self,
        policy: HealthPolicy,
        world: World,
        live: LiveState,
        boundary: Boundary,
        checkpointer: Checkpointer,
        progress: RunProgress,
        reporter: Reporter,
        intake: Intake,
        *,
        own_gradients: bool,
    ) -> None:
        self.is_rolling_back = False
        """It is decided and recorded; what is in memory counts for nothing."""
        self._ledger = intake.ledger
        self._intake = intake
        self._policy = policy
        self._world = world
        self._live = live
        self._boundary = boundary
        self._checkpointer = checkpointer
        self._progress = progress
        self._reporter = reporter
        may_differ = world.world_size > 1 and (own_gradients or policy.spike is not None)
        self.guard: GradientGuard[Window | None] = GradientGuard(
            live.optimizers,
            policy,
            models=live.models.values(),
            agree=agree_on_largest if may_differ else None,
        )
        self._construction = Construction(live.every_optimizer, live.schedulers) if policy.rolls_back else None
        intake.on_left_out = reporter.left_out
        self._skips = self._scaler_skips = 0
        self._last_skipped = -1

    def open(self) -> None:
        """From now on updates are watched."""
        self.guard.open()

    def close(self) -> None:
        self.guard.close()

    # At a boundary

    def end_window(self, window: Window | None, *, by_scaler: bool) -> None:
        """The update since the last call was of this window, of which nobody knows where there is no loader."""
        self.guard.end_window(window)
        self._scaler_skips = self._scaler_skips + 1 if by_scaler else 0

    def judge(self, *, all_of_them: bool = False) -> None:
        """Acts on what the guard has found since.

        Args:
            all_of_them: the updates too that a GPU has not told of yet.
        """
        for bad in self.guard.find_bad(all_of_them=all_of_them):
            if self._boundary.saves_are_over:
                return
            self._meet(bad)
        if self._scaler_skips >= MOST_SCALER_SKIPS and not self._boundary.saves_are_over:
            self._diverge(
                f"the GradScaler has left out {self._scaler_skips} updates in a row: no scale is small enough"
            )

    def is_sound(self) -> bool:
        """Whether what is in memory may be saved; where not, the run stops or goes back."""
        self.judge(all_of_them=True)
        if self._boundary.saves_are_over:
            return False
        names = find_not_finite(self._live.models)
        if not self._world.max([bool(names)], "whether the weights are finite")[0]:
            return True
        listed = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[4:] else "")
        where = f"of {listed} are" if names else "on another rank are"
        self._reporter.events.write("not_finite", global_step=self._step, names=names[:_MOST_NAMES])
        self._diverge(f"weights {where} not finite at step {self._step}, so that no checkpoint was made of them")
        return False

    # In checkpoints

    def capture(self) -> Json:
        """After `is_sound`."""
        return {
            "norms": self.guard.capture(),
            "skips": [self._skips, self._last_skipped, self._scaler_skips],
            "ledger": self._ledger.to_json(),
        }

    def restore(self, captured: Json, recorded: list[Json]) -> None:
        """Takes over what a checkpoint says, None for a fresh start, and what the record of the branch adds."""
        captured = captured or {}
        self.guard.restore(captured.get("norms", {}))
        self._skips, self._last_skipped, self._scaler_skips = captured.get("skips", [0, -1, 0])
        self.is_rolling_back = False
        self._ledger.replace(captured.get("ledger", []), recorded)

    def put_back(self) -> None:
        """Before a restore in this process: what the script made is as it made it."""
        assert self._construction is not None
        self._construction.put_back()

    # Decisions

    @property
    def _step(self) -> int:
        return self._progress.now.global_step

    def _meet(self, bad: BadUpdate[Window | None]) -> None:
        action = self._policy.action(bad.kind)
        self._tell(bad, action)
        if action == "skip":
            self._count_skip(bad)
        elif action == "roll_back":
            self._roll_back(bad)
        else:
            self._diverge(f"{_what(bad)}{self._where(bad.window)}; {_ADVICE}")

    def _roll_back(self, bad: BadUpdate[Window | None]) -> None:
        """Decides, and records it durably; or the run has diverged."""
        what, window = f"{_what(bad)}{self._where(bad.window)}", bad.window
        if window is None or not self._intake.can_go_back:
            again = "a roll-back needs a training loader that can be gone through again, given to the Run as loader="
            self._diverge(f"{what}; {again}")
            return
        if len(self._ledger) >= self._policy.max_roll_backs:
            before = ", ".join(f"at step {one.global_step} ({one})" for one in self._ledger.entries)
            most = f"max_roll_backs={self._policy.max_roll_backs} times before, {before}"
            self._diverge(f"{what}, and the run has gone back {most}. {self._suspect(window)}")
            return
        self._boundary.wait_for_save()
        proved = max(window.global_step - 1 - self._policy.clean_steps, self._ledger.proved_step)
        place = asdict(window)

        def ledger_of(back_to: int) -> list[Json]:
            return [*self._ledger.to_json(), {**place, "kind": bad.kind, "back_to": back_to}]

        decided = self._checkpointer.decide_roll_back(proved, ledger_of)
        if decided is None:
            self._diverge(
                f"{what}, and there is no checkpoint to go back to: none has {self._policy.clean_steps} updates after "
                f"it (clean_steps). Save more often, CheckpointPolicy(every_steps=...), or ask for fewer clean steps"
            )
            return
        path, step = decided
        self.is_rolling_back = self._boundary.saves_are_over = True
        self._reporter.rolls_back(path, what, {**place, "kind": bad.kind, "back_to": step})

    def _suspect(self, window: Window) -> str:
        """What the windows that were bad have in common."""
        windows = [window, *self._ledger.entries]
        common = set.intersection(*(set(self._intake.indices_of(one)) for one in windows))
        if len(windows) > 1 and common:
            shared = ", ".join(map(str, sorted(common)[:_MOST_NAMES]))
            return f"All of those hold dataset index {shared}: look at it, and leave it out or use not_finite='skip'"
        return "They have no sample in common: look at the learning rate"

    def _where(self, window: Window | None) -> str:
        """The window, and which samples of the dataset that are."""
        if window is None:
            return ""
        indices = self._intake.indices_of(window)
        more = ", ..." if len(indices) > _MOST_INDICES else ""
        known = f", dataset indices {', '.join(map(str, indices[:_MOST_INDICES]))}{more}" if indices else ""
        return f" at step {window.global_step} ({window}{known})"

    def _count_skip(self, bad: BadUpdate[Window | None]) -> None:
        step = bad.window.global_step if bad.window is not None else self._step
        self._skips = self._skips + 1 if step == self._last_skipped + 1 else 1
        self._last_skipped = step
        if self._skips > self._policy.max_skips:
            self._diverge(f"{self._skips} updates in a row were left out, the last one since {_what(bad)}")

    def _diverge(self, why: str) -> None:
        """The run ends here; what is in memory is not saved."""
        self._boundary.wait_for_save()
        step = self._boundary.committed_step
        kept = f"The newest checkpoint is step {step}" if step >= 0 else "There is no checkpoint"
        self._boundary.why = f"Training has diverged: {why}. {kept}; running the same command again would do the same."
        self._boundary.stop = StopReason.DIVERGED
        self._boundary.saves_are_over = True
        self._reporter.diverged(self._boundary.why)

    def _tell(self, bad: BadUpdate[Window | None], action: str) -> None:
        where: dict[str, Json] = {}
        if (window := bad.window) is not None:
            where = {"epoch": window.epoch, "first": window.first, "last": window.last, "unit": window.unit}
            where |= {"indices": indices} if (indices := self._intake.indices_of(window)) else {}
        step = bad.window.global_step if bad.window is not None else self._step
        self._reporter.bad_update(bad.kind, step, f"{_what(bad)}{self._where(bad.window)}", action, where)


_MOST_INDICES = 16
_ADVICE = (
    "the update was not made. Look at those samples, the learning rate and the loss; HealthPolicy(not_finite='skip') "
    "leaves such updates out, 'roll_back' goes back to a good checkpoint and on without those samples"
)


def _what(bad: BadUpdate[Any]) -> str:
    if bad.kind == "not_finite":
        return "the gradient was not finite"
    return f"the gradient's norm was {bad.norm:.4g}, above the limit of {bad.limit:.4g}"
