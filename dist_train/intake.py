"""Which batches a loop gets: of the run's training loader from the exact next sample, of any other as they come.

    ours         its sampler is set to the position that `progress` counts in samples
    the user's   `UserLoader` finds the place that it counts in batches
    any other    an evaluation's; or, where the Run was given no loader, the training's, whose place nobody knows

Invariant: whether an epoch is complete is known here and nowhere else. It saves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dist_train import differences
from dist_train.checkpoint.manifest import Progress
from dist_train.data import ShardSampler, describe_sampler, shield_workers, training_sampler
from dist_train.errors import ConfigError
from dist_train.evaluation import Cut
from dist_train.feed import BatchFeed
from dist_train.ledger import SkipLedger, Unit, Window
from dist_train.metrics import counting_nothing
from dist_train.order import MicroBatch
from dist_train.places import require_one_order, require_shared_out
from dist_train.progress import RunProgress
from dist_train.user_loader import UserLoader
from dist_train.world import World

logger = logging.getLogger(__name__)
Json = Any


class Intake:
    """The training loader of a run, and where in it the run stands.

    Args:
        should_stop: agreed by all ranks.
        stops_here: that, or a reason to stop before the next batch is trained on.
        cut: of an evaluation, by a signal.
        is_told: whether this rank was told to leave.
        show_replay: told (batches replayed, batches to replay).
        drop_window: called when an epoch has ended inside a window.
    """

    def __init__(
        self,
        feed: BatchFeed,
        progress: RunProgress,
        *,
        should_stop: Callable[[], bool],
        stops_here: Callable[[], bool],
        cut: Cut,
        is_told: Callable[[], bool],
        show_replay: Callable[[int, int], None],
        drop_window: Callable[[], None],
    ) -> None:
        self.epoch_is_complete = False
        self.loader: Any = None
        self._user: UserLoader | None = None
        self._feed = feed
        self._progress = progress
        self._should_stop = should_stop
        self._stops_here = stops_here
        self._cut = cut
        self._is_told = is_told
        self._show_replay = show_replay
        self._drop_window = drop_window
        self.ledger = SkipLedger()
        """Windows that are not trained on."""
        self.on_left_out: Callable[[Window], None] = lambda window: None
        feed.is_left_out, feed.leave_out = self._is_left_out, self._leave_out
        self.needs_all_ranks = False
        """Each forward pass is collective: an evaluation has as many batches on every rank."""
        self.batch_counts = True
        """Whether the evaluation's batch at hand is this rank's to count."""
        self._told_of_window = self._told_of_no_loader = self._told_of_filler = False

    def adopt(self, loader: Any | None) -> None:
        """Takes a loader as the run's training loader: one of ours, or the user's own."""
        self.loader = loader
        self._feed.needs_batch = loader is not None
        if (sampler := training_sampler(loader)) is not None:
            self._feed.place = self._progress.place = sampler.place
        elif loader is not None:
            shield_workers(loader)
            self._user = UserLoader(loader, self._show_replay)

    # Saving and restoring

    def fit(self, world: World) -> list[str]:
        """Ends an epoch whose data has become shorter than the position in it. Returns what to say of that, and of
        windows that these ranks do not share evenly. Collective.

        Raises:
            ConfigError: these ranks do not share the samples of one order out between them.
        """
        sampler, now = training_sampler(self.loader), self._progress.now
        if sampler is None:
            return []
        place = sampler.place
        told = [[place.index, place.count, place.counts], self.describe()]
        rows = world.gather(told, "which samples are whose")
        require_shared_out([row[0] for row in rows], world.world_size)
        require_one_order([row[1] for row in rows])
        uneven = [text for text in [sampler.layout.describe_uneven()] if text]
        if not now.samples_into_epoch:
            return uneven
        sampler.set_position(epoch=now.epoch)  # the user's own order may be of another length in each epoch
        return uneven + self._progress.fit_into(sampler.layout.num_samples)

    def describe(self) -> dict[str, Json]:
        """What decides which samples are used when."""
        return describe_sampler(self.loader)

    def capture(self) -> dict[str, Json]:
        """This rank's place in a loader of the user's, or on a mesh, for `rank_state`."""
        return self._feed.place.to_json() if self._user is None else {"loader": self._user.capture()}

    def restore(self, rows: Sequence[Json], rank: int, world_size: int) -> None:
        """Takes its place from each rank's state in the checkpoint."""
        saved = [row.get("loader") for row in rows]
        is_within = any(one and one["batches"] for one in saved)
        now = self._progress.now
        lost = ""
        if self._user is None:
            lost = "was made with a loader that dist_train.data_loader did not make" if is_within else ""
        elif now.samples_into_epoch:
            lost = "was made with a loader from dist_train.data_loader, which this one is not"
            if now.evaluation != "pending":
                self._progress.now = replace(now, samples_into_epoch=0)
        elif len(saved) == world_size:
            self._user.restore(saved[rank])
        elif is_within or (self._user.way == "state" and any(saved)):
            lost = f"was saved by {len(saved)} ranks, each with a place of its own in its loader; here are {world_size}"
        if lost and now.evaluation != "pending":
            logger.warning("The checkpoint %s: the training loader begins again at its first batch.", lost)

    def prepare(self) -> None:
        """Once, before the loop: a sampler goes to where the run stands; what a loader cannot do exactly is told."""
        sampler, now = training_sampler(self.loader), self._progress.now
        if sampler is not None and now.samples_into_epoch:
            sampler.set_position(epoch=now.epoch, samples_into_epoch=now.samples_into_epoch)
        if self._user is not None:
            differences.warn_of_user_loader(type(self.loader).__name__, self._user.caveats)

    @property
    def is_mid_epoch(self) -> bool:
        """Whether the epoch in progress has been begun."""
        now = self._progress.now
        batches = self._user.batches if self._user is not None else 0
        return bool(now.samples_into_epoch or batches or now.evaluation == "pending")

    # The loop

    def begin_epoch(self) -> None:
        # Without a training loader nobody but the loop knows when an epoch is over: at the body's end.
        self.epoch_is_complete = self.loader is None

    @property
    def has_ended(self) -> bool:
        """Whether the training loader has given its last batch of this epoch."""
        return self.loader is not None and self.epoch_is_complete

    def window_since(self, before: Progress) -> Window | None:
        """The samples of the update that is just counted, which nobody knows of a run without a training loader."""
        now = self._progress.now
        if self._user is not None:
            first, last = self._feed.window_start, self._user.batches - 1
            return Window(epoch=now.epoch, first=first, last=last, unit="batches", global_step=now.global_step)
        if not self._feed.knows_epoch_end:
            return None
        first, last = before.samples_into_epoch, now.samples_into_epoch - 1
        return Window(epoch=now.epoch, first=first, last=last, global_step=now.global_step)

    @property
    def can_go_back(self) -> bool:
        """Whether the training loader gives batches again that it gave before."""
        return self.loader is not None and (self._user is None or self._user.way != "restart")

    def indices_of(self, window: Window) -> list[int]:
        """Dataset indices of a window's samples; empty where only the user's loader knows them."""
        sampler = training_sampler(self.loader)
        if sampler is None or window.unit != "samples":
            return []
        return sampler.indices(window.epoch, window.first, window.last + 1)

    @property
    def _unit(self) -> Unit:
        return "samples" if self._user is None else "batches"

    def _is_left_out(self, first: int, stop: int) -> bool:
        return self.ledger.covers(self._unit, self._progress.now.epoch, first, stop)

    def _leave_out(self, micro: MicroBatch) -> None:
        before = self._progress.now
        self._progress.leave_out(micro)
        now = self._progress.now
        first, last = before.samples_into_epoch, now.samples_into_epoch - 1
        if self._user is None:
            self.epoch_is_complete = micro.ends_epoch
        else:
            first = last = self._user.batches - 1
        step = now.global_step
        self.on_left_out(Window(epoch=now.epoch, first=first, last=last, unit=self._unit, global_step=step))

    def end_epoch(self) -> None:
        self.epoch_is_complete = False
        if self._user is not None:
            self._user.end_epoch()

    def is_training(self, loader: Any) -> bool:
        """Whether it is the run's training loader, which a run that was given none takes here.

        Raises:
            ConfigError: it is another training loader.
        """
        is_ours = training_sampler(loader) is not None
        if self.loader is None and is_ours:
            self.adopt(loader)
        if is_ours and loader is not self.loader:
            raise ConfigError("run.batches() got another training loader than the Run was given; a run has one place.")
        return loader is self.loader and loader is not None

    def training_batches(self) -> Iterator[Any]:
        """The rest of the epoch; the loader's iterator is made, and the place found, at once."""
        if self._user is not None:
            return self._user_batches(self._user)
        sampler, now = training_sampler(self.loader), self._progress.now
        assert sampler is not None
        sampler.set_position(epoch=now.epoch, samples_into_epoch=now.samples_into_epoch)
        self.epoch_is_complete = sampler.layout.num_micro_steps == 0
        return self._feed.training_batches(self.loader, sampler.layout, self._stops_here)

    def _user_batches(self, user: UserLoader) -> Iterator[Any]:
        is_complete = user.is_exhausted or self._progress.now.evaluation == "pending"
        batches = self._feed.user_batches(user, self._stops_here, is_complete=is_complete)
        return self._until_exhausted(user, batches, is_complete=is_complete)

    def _until_exhausted(self, user: UserLoader, batches: Iterator[Any], *, is_complete: bool) -> Iterator[Any]:
        yield from batches
        if not user.is_exhausted:
            return
        if not user.batches and not is_complete:
            raise ConfigError(
                f"The training loader ({type(user.loader).__name__}) gave no batch in epoch "
                f"{self._progress.now.epoch + 1}: give one that can be iterated again in each epoch."
            )
        self.epoch_is_complete = True
        if self._feed.in_window:
            self._feed.in_window = False
            self._drop_window()
            if not self._told_of_window:
                self._told_of_window = True
                differences.warn_of_dropped_window(type(user.loader).__name__)

    def other_batches(self, loader: Any) -> Iterator[Any]:
        """Of an evaluation, or of a run that was not given its loader: a stop ends the latter only."""
        shield_workers(loader)
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, ShardSampler):
            sampler.fills = self.needs_all_ranks
        before = self._progress.now

        def should_stop() -> bool:
            if self.loader is not None:
                return self._should_stop() and not self.epoch_is_complete
            trains = self._progress.now != before
            if trains and not self._told_of_no_loader:
                self._told_of_no_loader = True
                differences.warn_of_no_loader()
            cut = trains and self._should_stop()
            self.epoch_is_complete = self.epoch_is_complete and not cut
            return cut

        batches = self._feed.plain_batches(loader, should_stop)
        if self.loader is not None:
            batches = self._cut.watched(batches, self._is_told)
        return self._joined(batches, sampler) if isinstance(sampler, ShardSampler) else batches

    def _joined(self, batches: Iterator[Any], sampler: ShardSampler) -> Iterator[Any]:
        """With what a rank computes for the others' sake, or as another of its place does, and does not count."""
        for size, batch in zip(sampler.batch_sizes(), batches, strict=False):
            if size and sampler.place.counts:
                yield batch
                continue
            try:
                self.batch_counts = False
                with counting_nothing() as ignored:
                    yield batch
            finally:
                self.batch_counts = True
            if not ignored and not self._told_of_filler:
                self._told_of_filler = True
                differences.warn_of_uncounted(is_filler=not size)
