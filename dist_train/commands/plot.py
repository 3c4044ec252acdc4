"""`show --plot`: loss, metrics and learning rate of a run over its steps, as a picture.

Invariant: it reads a run and writes one file, never into the run directory unless told so; matplotlib is imported when
a picture is asked for, and needs no display.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint.catalog import committed
from dist_train.checkpoint.manifest import EVENTS_LOG, Best
from dist_train.checkpoint.selection import find_checkpoints
from dist_train.checkpoint.store import Store
from dist_train.console import metric_label, metric_text
from dist_train.errors import ConfigError, StorageError
from dist_train.history import chain_of_attempts, parse_line, read_lines, read_metrics

Json = Any
Points = tuple[list[int], list[float]]
COLOURS = ("#2f6db3", "#d9822b", "#3a9a5b", "#b8405e", "#7a5bb5", "#6f6f6f")
LIGHT = "#d9d9d9"
_OWN = {"kind", "global_step", "epoch", "loss", "lr", "train_loss"}
_MARKS = ("resumed", "branched")
_PANEL_INCHES, _RATE_SHARE, _WIDTH_INCHES = 2.6, 0.5, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What of one run is drawn."""

    name: str
    loss: Points
    train_loss: Points
    rate: Points
    metrics: dict[str, Points]
    restarts: list[int]
    """Steps at which an attempt went on from a checkpoint."""
    branches: list[int]
    """Steps at which a branch began."""
    best: Best | None


def read_curves(store: Store) -> Curves:
    """Raises StorageError when nothing was recorded yet."""
    history = read_metrics(store.given)
    if not history:
        raise StorageError(f"{store.given}: nothing was recorded yet, so there is nothing to plot. Try again later.")
    names = dict.fromkeys(name for record in history for name in record if name not in _OWN)
    usable = committed(find_checkpoints(store))
    restarts, branches = _read_marks(store)
    return Curves(
        name=os.path.basename(os.path.abspath(store.given)),
        loss=_points(history, "loss"),
        train_loss=_points(history, "train_loss"),
        rate=_points(history, "lr"),
        metrics={name: _points(history, name) for name in names},
        restarts=restarts,
        branches=branches,
        best=usable[-1][1].best if usable else None,
    )


def _points(history: Sequence[dict[str, Json]], name: str) -> Points:
    """What is not finite is a gap in the line."""
    found = [(record["global_step"], record[name]) for record in history if record.get(name) is not None]
    return [step for step, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def _read_marks(store: Store) -> tuple[list[int], list[int]]:
    """Where the attempts of the present history went on, and where branches began."""
    chain = chain_of_attempts(read_lines(store))
    lines = store.read(EVENTS_LOG).decode(errors="replace").splitlines() if store.exists(EVENTS_LOG) else []
    events = [event for line in lines if (event := parse_line(line)) is not None and event["attempt"] in chain]
    steps = {kind: {event["global_step"] for event in events if event.get("event") == kind} for kind in _MARKS}
    return sorted(steps["resumed"] - steps["branched"]), sorted(steps["branched"])


def write_plot(stores: Sequence[Store], path: str, *, log_scale: bool = False) -> None:
    """Draws the runs into one picture; the kind of file follows from its name.

    Raises:
        ConfigError: matplotlib is missing, or draws no such kind of file.
        StorageError: nothing was recorded, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"A plot needs matplotlib, which is not installed here ({error}). `pip install 'dist-train[plot]'`, or "
            f"`pip install matplotlib`, and try again; `dist_train.read_metrics({stores[0].given!r})` gives the same "
            f"numbers without it."
        ) from error
    runs = [read_curves(store) for store in stores]
    figure: Any = Figure(layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in kinds:
        raise ConfigError(f"{path}: the name must end in one of .{', .'.join(sorted(kinds))}.")
    _Picture(figure, runs, log_scale=log_scale).draw()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Give another file.") from error


class _Picture:
    """Panels below each other: losses, one for each other metric, the learning rate."""

    def __init__(self, figure: Any, runs: Sequence[Curves], *, log_scale: bool) -> None:
        self.figure = figure
        self.runs = runs
        self.log_scale = log_scale
        names = dict.fromkeys(name for run in runs for name in run.metrics)
        self.losses = [name for name in names if "loss" in name.lower()]
        self.metrics = [name for name in names if name not in self.losses]

    def draw(self) -> None:
        panels = ["", *self.metrics, *(["lr"] if any(run.rate[0] for run in self.runs) else [])]
        shares = [1.25, *(1.0 for _ in self.metrics), *([_RATE_SHARE] * (len(panels) - 1 - len(self.metrics)))]
        self.figure.set_size_inches(_WIDTH_INCHES, _PANEL_INCHES * sum(shares) + 0.8)
        grid = self.figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=shares)
        axes = [row[0] for row in grid]
        self._draw_losses(axes[0])
        for axis, name in zip(axes[1:], self.metrics, strict=False):
            self._draw_metric(axis, name)
        if panels[-1] == "lr":
            self._draw_rate(axes[-1])
        for number, axis in enumerate(axes):
            self._finish(axis, is_first=number == 0)
        self.figure.align_ylabels(axes)
        axes[-1].set_xlabel("step (optimizer updates)")
        axes[-1].xaxis.set_major_formatter(lambda step, _: f"{step:.0f}")
        names = ", ".join(run.name for run in self.runs)
        axes[0].set_title(names, loc="left", fontsize=13, fontweight="bold", pad=12)
        if len(self.runs) == 1:
            axes[0].set_title(_extent(self.runs[0]), loc="right", fontsize=9, color="#666666", pad=12)

    def _draw_losses(self, axis: Any) -> None:
        axis.set_ylabel("loss")
        if self.log_scale:
            axis.set_yscale("log")
        for index, run in enumerate(self.runs):
            colour = self._colour(index, 0)
            many = len(run.loss[0]) > 1
            if run.loss[0]:
                axis.plot(*run.loss, color=colour, linewidth=1.0, alpha=0.45, label=self._label(run, "training"))
            if run.train_loss[0]:
                axis.plot(
                    *run.train_loss, color=colour, **_marked("o"), label=self._label(run, "training, mean of epoch")
                )
            for number, name in enumerate(self.losses, 1):
                colour = self._colour(index, number)
                style = _marked("s" if many else "o") | ({"linestyle": "--"} if len(self.runs) > 1 else {})
                points = run.metrics.get(name, ([], []))
                axis.plot(*points, color=colour, **style, label=self._label(run, metric_label(name)))
                self._mark_best(axis, run, name, colour)

    def _draw_metric(self, axis: Any, name: str) -> None:
        axis.set_ylabel(metric_label(name))
        for index, run in enumerate(self.runs):
            colour = self._colour(index, 1 + len(self.losses) + self.metrics.index(name))
            points = run.metrics.get(name, ([], []))
            axis.plot(*points, color=colour, **_marked("o"), label=self._label(run, metric_label(name)))
            self._mark_best(axis, run, name, colour)

    def _draw_rate(self, axis: Any) -> None:
        axis.set_ylabel("learning rate")
        for index, run in enumerate(self.runs):
            colour = self._colour(index, 5)
            axis.plot(*run.rate, color=colour, linewidth=1.2, label=self._label(run, "learning rate"))
        axis.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")

    def _mark_best(self, axis: Any, run: Curves, name: str, colour: str) -> None:
        best = run.best
        if best is None or best.monitor != name:
            return
        text = f"best {metric_text(name, best.value)}, epoch {best.epochs_completed}"
        axis.plot([best.global_step], [best.value], "*", color=colour, markersize=13, markeredgecolor="white", zorder=5)
        share = best.global_step / max(run.loss[0][-1:] + run.train_loss[0][-1:], default=best.global_step or 1)
        side = "left" if share < 0.15 else "right" if share > 0.85 else "center"
        # Nothing lies on the better side of the best point.
        away, edge = (-12, "top") if best.mode == "min" else (12, "bottom")
        place = (best.global_step, best.value)
        axis.annotate(
            text,
            place,
            (0, away),
            textcoords="offset points",
            ha=side,
            va=edge,
            fontsize=9,
            color=colour,
            zorder=6,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )

    def _finish(self, axis: Any, *, is_first: bool) -> None:
        """What every panel has: restarts, a light grid, a legend beside the data."""
        first = self.runs[0]
        marks = [(first.restarts, ":", "#9a9a9a", "restart"), (first.branches, "--", "#b8405e", "branch")]
        for steps, style, colour, what in marks:
            for number, step in enumerate(steps):
                counted = f"{what} ({len(steps)})" if len(steps) > 1 else what
                label = counted if number == 0 and is_first else None
                axis.axvline(step, linestyle=style, color=colour, linewidth=1.1, zorder=1, label=label)
        axis.grid(visible=True, color=LIGHT, linewidth=0.6, alpha=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.02, y=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#8a8a8a")
        axis.tick_params(colors="#444444", labelsize=9)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)

    def _colour(self, run: int, curve: int) -> str:
        """By curve where there is one run, by run where there are several."""
        return COLOURS[(curve if len(self.runs) == 1 else run) % len(COLOURS)]

    def _label(self, run: Curves, text: str) -> str:
        return text if len(self.runs) == 1 else f"{run.name}: {text}"


def _extent(run: Curves) -> str:
    """`1,000 steps, 20 epochs, 2 restarts`."""
    last = max(run.loss[0][-1:] + run.train_loss[0][-1:], default=0)
    counts = {"step": last, "epoch": len(run.train_loss[0]), "restart": len(run.restarts), "branch": len(run.branches)}
    plural = {"branch": "branches"}
    return ", ".join(
        f"{count:,} {what if count == 1 else plural.get(what, what + 's')}" for what, count in counts.items() if count
    )


def _marked(marker: str) -> dict[str, Any]:
    return {"marker": marker, "markersize": 4, "linewidth": 1.8}
