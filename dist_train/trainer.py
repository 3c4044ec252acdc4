"""Trainer: the standard loop, written with `Run`. Read `fit` to see when things happen.

It adds nothing to what `Run` promises; a loop of your own has the same powers (see `examples/own_loop.py`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dist_train.callbacks import Callback
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.restorer import peek
from dist_train.checkpoint.store import Store
from dist_train.data import data_loader, evaluation_loader
from dist_train.errors import ConfigError, StopReason
from dist_train.field_docs import tell_fields
from dist_train.health.policy import HealthPolicy
from dist_train.metrics import EarlyStopping, Mean, Metric
from dist_train.options import RunOptions, require_hang_timeout, require_times
from dist_train.partial import require_patterns
from dist_train.run import Run
from dist_train.sharding import KINDS, make_trainers_accelerator, prepare
from dist_train.world import current_world, init_distributed

Loss = Callable[[nn.Module, Any], Any]


@tell_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. The global batch is the truth; accumulation follows from the world size."""

    run_dir: str
    """Directory of the run; the same on every restart, shared by all nodes."""
    epochs: int
    """Passes over the training data."""
    global_batch_size: int | None = None
    """Samples of one optimizer update, over all ranks and accumulated micro-batches."""
    micro_batch_size: int | None = None
    """Samples of one forward pass on one device; None takes a rank's whole share of the global batch."""
    gradient_accumulation_steps: int | None = None
    """Instead of `global_batch_size`: fixes it at micro_batch_size * this * the world size of the first start."""
    mixed_precision: str = "no"
    """`no`, `bf16` or `fp16` (with a GradScaler, on a GPU); `auto`: bf16 where all GPUs have it, else fp16; CPUs no."""
    max_grad_norm: float | None = None
    """Clip the gradient's norm to this before each update."""
    seed: int = 0
    """Of the order of samples and of augmentation; see `seed_everything` for the model's initialisation."""
    sharding: str = "none"
    """`none`: each rank holds the model (DDP). `fsdp`: parameters, gradients and optimizer state are spread over all
    ranks (FSDP2), so that a larger model fits. `hsdp`: spread over the ranks of a host, with a copy on each host: less
    traffic between hosts. May change between starts, as the number of ranks may; one rank alone holds the model."""
    shard_units: Sequence[str] = ()
    """Class names of the model's blocks, each of which is gathered for its own forward and backward pass alone. Without
    any: what the model says (`_no_split_modules` of transformers), else what its ModuleLists hold."""
    num_workers: int = 0
    """DataLoader workers of each rank; does not change what is trained."""
    drop_last: bool = False
    """Leave out an epoch's last window when it is short; BatchNorm needs it where a rank would get a single sample."""
    max_steps: int | None = None
    """Stop after this many optimizer updates, whatever `epochs` says."""
    log_every_steps: int = 50
    """Optimizer updates between records of the training loss."""
    resume: str = "auto"
    """`auto`, `must`, `never`; or `best`, `epoch:10`, `step:1200` or the path of a checkpoint to branch from. The same
    again goes on with that branch; `epoch:10#b`, with any label, starts another one from there."""
    search: Sequence[str] = ()
    """Read-only places with earlier checkpoints of this run, as patterns: `("/kaggle/input/*/*",)`."""
    max_time: str | float | None = None
    """How long the session lasts, "11h30m" for instance: training stops and saves by itself before it is over."""
    time_reserve: str | float | None = None
    """Part of `max_time` to leave for what follows, packing for instance; None takes 2 %, 5 minutes at most."""
    hang_timeout: str | float | None = "auto"
    """When all ranks come no further for so long, they write their stacks into the run directory's hangs/ and, where a
    launcher restarts them, end. "auto": 5 minutes for a step or a wait for data, or 12 times the usual one. A time
    given here ("10min") holds for these exactly. What compiles, saves, loads, evaluates or is the loop's own code (the
    first step, callbacks) has six times as long, or three times the longest seen. "off" watches nothing."""
    requeue_exit: bool = False
    """End with exit code 75 after a preemption or the time limit, for a scheduler that then starts the run again. Not
    under plain torchrun, which restarts on any code but 0."""
    warm_start: str | None = None
    """Weights that a fresh start begins with: "runs/base", "runs/base:best", a checkpoint, a file; see `RunOptions`."""
    partial_load: Sequence[str] = ()
    """Patterns of the model's parameters and buffers that may differ from a checkpoint; see `RunOptions`."""
    exclude: Sequence[str] = ()
    """Patterns of parameters and buffers that checkpoints do without; see `RunOptions`."""
    checkpoint: CheckpointPolicy = field(default_factory=lambda: CheckpointPolicy(every_epochs=1, every="10min"))
    """When to save and what to keep."""
    early_stopping: EarlyStopping | None = None
    health: HealthPolicy = field(default_factory=HealthPolicy)
    """What happens where a gradient is not finite, or far larger than usual."""
    log_with: str | Sequence[str] | None = None
    """Trackers of Accelerate's, for instance `tensorboard` or `wandb`; they write into the run directory.

    wandb takes WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY and its like from the environment; without a network set
    WANDB_MODE=offline, and `wandb sync RUN/tracker/wandb/offline-run-*` later makes one run of all restarts.
    """
    deterministic: bool = False
    """Deterministic algorithms, needed for bit for bit exact resumes on a GPU; slower."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "global_batch_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "log_every_steps",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"TrainConfig.{name} is {value!r}; it must be a whole number of at least 1.")
        require_times("TrainConfig", self.max_time, self.time_reserve)
        require_hang_timeout("TrainConfig", self.hang_timeout)
        require_patterns("TrainConfig", "partial_load", self.partial_load)
        require_patterns("TrainConfig", "exclude", self.exclude)
        if self.mixed_precision not in ("no", "bf16", "fp16", "auto"):
            raise ConfigError(
                f"TrainConfig.mixed_precision is {self.mixed_precision!r}; give 'no', 'bf16', 'fp16' or 'auto'."
            )
        _require_sharding(self.sharding, self.shard_units)
        if self.gradient_accumulation_steps is None:
            if self.global_batch_size is None:
                raise ConfigError(
                    "TrainConfig needs global_batch_size, or gradient_accumulation_steps and micro_batch_size."
                )
        elif self.global_batch_size is not None or self.micro_batch_size is None:
            raise ConfigError(
                "TrainConfig.gradient_accumulation_steps goes with micro_batch_size and without global_batch_size."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    status: StopReason
    exit_code: int
    global_step: int
    epochs_completed: int
    metrics: dict[str, float]
    """Of the last evaluation."""
    best: float | None
    """Best value of the monitored metric."""


class Trainer:
    """The standard loop over `Run`: DDP or FSDP2, autocast, GradScaler, accumulation, clipping, evaluation, trackers.

    Args:
        model: on the CPU; it is placed and wrapped here.
        optimizer: over the model's parameters.
        train_data: a dataset with `__len__` and `__getitem__`; random augmentation in it is made exact by seeding.
        eval_data: evaluated after each epoch, each sample once over all ranks.
        loss: `loss(model, batch)` returns the micro-batch's mean loss, or (loss, prediction, target) for metrics.
        scheduler: stepped once an optimizer update; ReduceLROnPlateau once an epoch, by the monitored metric.
        metrics: by name, for instance `{"val_smape": SMAPE()}`; `val_loss` is always measured.
        collate_fn: makes a batch of samples; torch's default otherwise.
        callbacks: by event, a function or several: `{"committed": offer_download}`; see `dist_train.callbacks`.
        attach: files that go along with every checkpoint, a config or a tokenizer for instance; see `Run.attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_data: Any,
        loss: Loss,
        config: TrainConfig,
        eval_data: Any | None = None,
        scheduler: Any | None = None,
        metrics: Mapping[str, Metric] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        callbacks: Mapping[str, Callback | Sequence[Callback]] | None = None,
        attach: Sequence[Any] = (),
    ) -> None:
        self.config = config
        self.loss = loss
        self.metrics = dict(metrics or {})
        self.scheduler = scheduler
        self.callbacks = dict(callbacks or {})
        self.attach = tuple(attach)
        if self.metrics and eval_data is None:
            raise ConfigError(f"metrics {sorted(self.metrics)} are given, but no eval_data to measure them on.")
        if "val_loss" in self.metrics:
            raise ConfigError("The name 'val_loss' is taken: it is always measured. Give that metric another name.")
        self._require_known_monitor(eval_data)
        if config.deterministic:
            _be_deterministic()
        init_distributed()
        self.accelerator = make_trainers_accelerator(
            config.sharding,
            model,
            config.shard_units,
            current_world(),
            mixed_precision=_choose_precision(config),
            cpu=config.cpu,
            log_with=config.log_with,
            project_dir=os.path.join(config.run_dir, "tracker") if config.log_with else None,
        )
        if config.log_with and not self.accelerator.log_with:
            raise ConfigError(f"log_with={config.log_with!r} is not installed: pip install it, or leave log_with out.")
        shared: dict[str, Any] = {"seed": config.seed, "num_workers": config.num_workers}
        if collate_fn is not None:
            shared["collate_fn"] = collate_fn
        self.train_loader = data_loader(
            train_data,
            global_batch_size=config.global_batch_size or self._global_batch_size(),
            micro_batch_size=config.micro_batch_size,
            drop_last=config.drop_last,
            **shared,
        )
        self.eval_loader: Any = None
        if eval_data is not None:
            sampler: Any = self.train_loader.batch_sampler
            self.eval_loader = evaluation_loader(eval_data, batch_size=sampler.micro_batch_size, **shared)
        self.model, self.optimizer = prepare(self.accelerator, model, optimizer)

    def fit(self) -> TrainResult:
        """Trains to the end, from the newest good checkpoint if there is one. Collective."""
        with self._run() as run:
            self._add_callbacks(run)
            run.attach(*self.attach)
            for _ in run.epochs(self.config.epochs):
                self.model.train()
                for batch in run.batches(self.train_loader):
                    loss = self._train_on(batch, run)
                    run.step(loss=loss)
                if run.epoch_is_complete:
                    metrics = self._evaluate(run)
                    self._step_plateau(metrics)
                    run.end_epoch(**metrics)
        return TrainResult(
            status=run.reason or StopReason.ERROR,
            exit_code=run.exit_code,
            global_step=run.global_step,
            epochs_completed=run.epochs_completed,
            metrics=run.metrics,
            best=run.best,
        )

    def _train_on(self, batch: Any, run: Run) -> torch.Tensor:
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss, _ = _split_outputs(self.loss(self.model, batch))
            accelerator.backward(loss * run.loss_weight)
            if accelerator.sync_gradients and self.config.max_grad_norm is not None:
                run.tell_norm(accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
        due = accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
        if due and self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        return loss.detach()

    def _step_plateau(self, metrics: dict[str, float]) -> None:
        """ReduceLROnPlateau follows the monitored metric, once an epoch; the epoch's checkpoint holds what it did."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics[self.config.checkpoint.monitor or next(iter(metrics))])

    def _require_known_monitor(self, eval_data: Any | None) -> None:
        measured = [*self.metrics, "val_loss"] if eval_data is not None else []
        monitor = self.config.checkpoint.monitor
        if monitor is not None and monitor not in measured:
            raise ConfigError(
                f"monitor={monitor!r} will not be measured; there will be: {', '.join(measured) or 'nothing'}."
            )
        if isinstance(self.scheduler, ReduceLROnPlateau) and not measured:
            raise ConfigError("ReduceLROnPlateau follows a metric: give eval_data to measure one on.")

    def _evaluate(self, run: Run) -> dict[str, float]:
        """Every sample once, whatever the world size."""
        if self.eval_loader is None:
            return {}
        mean_loss = Mean()
        for metric in self.metrics.values():
            metric.reset()
        with run.evaluation() as model:
            sizes = self.eval_loader.batch_sampler.batch_sizes()
            for size, batch in zip(sizes, run.batches(self.eval_loader), strict=False):
                loss, outputs = _split_outputs(self.loss(model, batch))
                mean_loss.update(loss, size)
                self._update_metrics(outputs)
        values = {name: metric.compute(run.world) for name, metric in self.metrics.items()}
        return {**values, "val_loss": mean_loss.compute(run.world)}

    def _update_metrics(self, outputs: tuple[Any, ...]) -> None:
        if self.metrics and len(outputs) != 2:
            raise ConfigError(
                f"The metrics {sorted(self.metrics)} need predictions: let the loss function return "
                f"(loss, prediction, target) instead of the loss alone."
            )
        for metric in self.metrics.values():
            metric.update(*outputs)

    def _run(self) -> Run:
        config = self.config
        return Run(
            config.run_dir,
            accelerator=self.accelerator,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            loader=self.train_loader,
            policy=config.checkpoint,
            resume=config.resume,
            options=RunOptions(
                early_stopping=config.early_stopping,
                health=config.health,
                max_steps=config.max_steps,
                log_every_steps=config.log_every_steps,
                search=config.search,
                max_time=config.max_time,
                time_reserve=config.time_reserve,
                hang_timeout=config.hang_timeout,
                requeue_exit=config.requeue_exit,
                warm_start=config.warm_start,
                partial_load=config.partial_load,
                exclude=config.exclude,
                config=asdict(config),
            ),
        )

    def _add_callbacks(self, run: Run) -> None:
        for event, given in self.callbacks.items():
            for callback in given if isinstance(given, Sequence) else [given]:
                run.on(event, callback)

    def _global_batch_size(self) -> int:
        """Fixed at the first start, so that another world size trains the same windows. Collective."""
        steps, micro = self.config.gradient_accumulation_steps or 1, self.config.micro_batch_size or 1
        asked = {"gradient_accumulation_steps": steps, "micro_batch_size": micro}
        recorded = current_world().on_main(lambda: _recorded_batch_size(self.config, asked), "the global batch size")
        return int(recorded or steps * micro * self.accelerator.num_processes)


def _recorded_batch_size(config: TrainConfig, asked: dict[str, int]) -> int | None:
    """The global batch of what will be resumed from, unless the user asks for other accumulation now."""
    manifest = peek(Store(config.run_dir), config.resume, config.search)
    recorded = manifest.settings.get("config", {}) if manifest else {}
    same = all(recorded.get("user", {}).get(name) == value for name, value in asked.items())
    return recorded.get("data", {}).get("global_batch_size") if same else None


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch, for the model's initialisation; the same on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _choose_precision(config: TrainConfig) -> str:
    """What `auto` stands for: the best that the devices of all ranks compute natively. Collective."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    on_gpu = torch.cuda.is_available() and not config.cpu
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    no_gpu, no_bf16 = current_world().max([not on_gpu, not has_bf16], "which precision the devices have")
    return "no" if no_gpu else "fp16" if no_bf16 else "bf16"


def _split_outputs(outputs: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    if isinstance(outputs, tuple):
        return outputs[0], outputs[1:]
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(
            f"The loss function returned a {type(outputs).__name__}; it must return the mean loss as a tensor, or "
            f"(loss, prediction, target)."
        )
    return outputs, ()


def _require_sharding(kind: str, units: Sequence[str]) -> None:
    if kind not in KINDS:
        raise ConfigError(f"TrainConfig.sharding is {kind!r}; give one of {', '.join(map(repr, KINDS))}.")
    if isinstance(units, str) or not all(isinstance(name, str) for name in units):
        raise ConfigError(
            f"TrainConfig.shard_units is {units!r}; it must be a sequence of class names, ('Block',) for instance."
        )
    if units and kind == "none":
        raise ConfigError(f"TrainConfig.shard_units={list(units)!r} has no effect without sharding='fsdp' or 'hsdp'.")


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
