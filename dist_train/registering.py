"""What a run is given besides its model and optimizer: objects to save and restore, and what to call when.

Invariant: everything that a checkpoint holds is known before the first epoch begins.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from dist_train.callbacks import Callback, Callbacks, has_state, name_of
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.each_rank import EachRank, adapt
from dist_train.errors import ConfigError
from dist_train.registered import Stateful
from dist_train.standing import Standing
from dist_train.state import LiveState


class Registering(Standing):
    """The side of `Run` that is used before its loop."""

    _live: LiveState
    _callbacks: Callbacks
    _checkpointer: Checkpointer
    _begun: bool

    def register(self, name: str, one: Stateful | Any, *, each_rank: bool = False) -> None:
        """Saves and restores an object with `state_dict` and `load_state_dict`, or a random generator (torch's,
        numpy's, python's) as it is; before `epochs` is called.

        Args:
            each_rank: every rank has a state of its own there (a replay buffer): all are kept, and each rank gets its
                own back; one that the checkpoint does not know keeps what the script has made. For states of
                megabytes. So it is with generators. Otherwise the state is one for all ranks.

        Raises:
            ConfigError: the name is taken, it is no such object, or `epochs` was called already.
            StateMismatchError: the checkpoint that is resumed from does not hold it.
        """
        adapted = adapt(one, each_rank=each_rank)
        if name in self._live.registered or not (
            isinstance(adapted, EachRank) or (hasattr(one, "state_dict") and hasattr(one, "load_state_dict"))
        ):
            raise ConfigError(
                f"run.register({name!r}, ...): give each object with state_dict and load_state_dict its own name."
            )
        if isinstance(one, torch.optim.Optimizer):
            raise ConfigError(
                f"run.register({name!r}, ...) was given an optimizer, whose own load_state_dict would change the "
                f"dtypes of its state. Give all of them to the Run: optimizer={{'main': ..., {name!r}: ...}}."
            )
        if self._begun:
            raise ConfigError(f"run.register({name!r}, ...) came after run.epochs(); register it before the loop.")
        self._live.registered[name] = adapted
        self._beginning.register(name)

    def attach(self, *items: Any) -> None:
        """Has small files go along with every checkpoint, so that other programs load its folder as it is; before
        `epochs` is called, on all ranks. Those of the main rank count.

        Args:
            items: paths of files; objects with `save_pretrained(folder)`: a transformers config, tokenizer or
                processor, a PEFT config; or the model itself, which means its configs and never its weights.

        Raises:
            ConfigError: no such file or object, a name that a checkpoint needs itself, more than 256 MB in all, or
                `epochs` was called already.
        """
        if self._begun:
            raise ConfigError("run.attach(...) came after run.epochs(); attach files before the loop.")
        self._checkpointer.attach(items)

    def on(self, event: str, callback: Callback, *, name: str | None = None) -> None:
        """Calls `callback(happening)` when `event` happens; see `dist_train.callbacks` for the events.

        Args:
            callback: a function, which needs nothing more; an object with `state_dict` and `load_state_dict`, too, is
                saved and restored, and must be given before `epochs` is called.
            name: of such an object in the checkpoint; its class's name by default.
        """
        if self._callbacks.add(event, callback) and has_state(callback):
            self.register(f"callback.{name or name_of(callback)}", cast(Stateful, callback))
