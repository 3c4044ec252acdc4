"""Live objects <-> named tensors and JSON: models, optimizers, schedulers, GradScaler, RNG, registered objects.

Invariant: `capture` changes nothing that training can see: no optimizer step, no hook, no random number. Tensors are
handed on uncopied. It knows nothing of files, and of ranks only that some values differ between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.buffers import BufferWatch, full_names
from dist_train.capture import Capture, place_of
from dist_train.differences import Differences
from dist_train.each_rank import EachRank
from dist_train.errors import StateMismatchError
from dist_train.exclusion import EXCLUDE, Exclusion, absent_names
from dist_train.fingerprints import fingerprints
from dist_train.fully_sharded import drop_unreduced_gradients, reshard
from dist_train.generators import HeldGenerators
from dist_train.local_state import compare_apart, set_apart
from dist_train.model_state import (
    Fit,
    capture_model,
    clean_name,
    fit_model,
    innermost_module,
    keeps_own_buffers,
    restore_extra,
    restore_model,
    tensors_as_stored,
)
from dist_train.optimizer_state import (
    CPU,
    Shared,
    TensorSource,
    capture_optimizer,
    compare_groups,
    innermost_optimizer,
    member_names,
    own_settings,
    restore_optimizer,
    restore_own,
    restore_told,
    with_inner,
)
from dist_train.pairing import Pairing
from dist_train.partial import Loading, Tolerance, fit_optimizer, some, tell
from dist_train.registered import Stateful, compare_registered, load_registered, tie_registered
from dist_train.rng import capture_rng
from dist_train.schedule import group_settings, innermost_scheduler, scheduler_settings
from dist_train.scheduler_state import state_of
from dist_train.tree import decode, encode_shared, require_apart

Json = Any
_ACCELERATED = "AcceleratedOptimizer"
"""Accelerate's wrapper, by which the class was recorded once: nothing is known then."""
_PARTIAL = "partial_load"
"""Setting with the patterns that the script had."""


class LiveState:
    """The objects of a run, by name; the name "" is that of an only model, optimizer or scheduler.

    Args:
        models: any wrapping (DDP, FSDP2, torch.compile); names are those of the innermost module.
        optimizers: torch optimizers or Accelerate's wrappers of them.
        partial_load: what may differ from a checkpoint; see `RunOptions`.
        exclude: what checkpoints do without; see `RunOptions`.

    Raises:
        ConfigError: `exclude` matches nothing, or what is trained.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Any],
        schedulers: Mapping[str, Any] | None = None,
        scaler: Any | None = None,
        partial_load: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self.models = {name: innermost_module(model) for name, model in models.items()}
        self.optimizers = {name: innermost_optimizer(optimizer) for name, optimizer in optimizers.items()}
        self.every_optimizer = with_inner(self.optimizers)
        """Those inside of others (SAM, Lookahead) too: each has state."""
        self.schedulers = {name: innermost_scheduler(scheduler) for name, scheduler in (schedulers or {}).items()}
        self._pairing = Pairing(self.optimizers, self.every_optimizer, self.schedulers)
        self.scaler = scaler
        self.registered: dict[str, Stateful | EachRank] = {}
        self._apart: set[str] = set()
        self._made_at_once = {name for name, optimizer in self.every_optimizer.items() if optimizer.state}
        self._own_buffers = any(keeps_own_buffers(model) for model in models.values())
        self._buffers = BufferWatch(self._by_place())
        self._generators = HeldGenerators(self._by_place(), self._movers())
        self._tolerance = Tolerance(partial_load, self.models)
        self._exclusion = Exclusion(exclude, self._by_place(), self.optimizers)
        self.settings = self._settings()

    def drop_gradients(self) -> None:
        """Of a window that was interrupted."""
        for model in self.models.values():
            model.zero_grad()
            drop_unreduced_gradients(model)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def capture(self) -> Capture:
        """Raises UnsaveableStateError, naming the object."""
        self._reshard()
        capture = Capture()
        for name, model in self.models.items():
            capture_model(model, place_of("model", name), capture, self._own_buffers, self._exclusion.leaves_out)
        self._buffers.capture(capture)
        names = self._parameter_names()
        for name, optimizer in self.every_optimizer.items():
            place = place_of("optimizer", name)
            capture.state[place] = capture_optimizer(optimizer, place, names, capture.tensors)
            set_apart(capture, place, optimizer, names)
        if self._apart != capture.tensors.keys():  # views are made with the state, and so with its names
            require_apart(capture.tensors, {name for name in capture.tensors if name.startswith("optimizer")})
            self._apart = set(capture.tensors)
        for place, one in self._plain_objects():
            if isinstance(one, EachRank):
                one.capture(place, capture)
            else:
                own = state_of(one) if place.startswith("scheduler") else one.state_dict()
                in_place = isinstance(one, nn.Module)
                capture.state[place] = encode_shared(own, place, capture.tensors, in_place=in_place)
        self._generators.capture(capture, self.registered)
        tie_registered(self.registered, capture)
        capture.rank_state["rng"] = capture_rng()
        return capture

    def restore(
        self,
        state: Mapping[str, Json],
        settings: Mapping[str, Json],
        source: TensorSource,
        absent: Collection[str] = (),
        global_step: int = 0,
    ) -> Differences:
        """Loads everything but RNG in place; returns what the user changed and what starts fresh.

        Args:
            absent: kinds of state that may be missing; they keep what they were constructed with.
            global_step: where a scheduler that is new stands.

        Raises:
            StateMismatchError: lists what differs; nothing was loaded.
            ConfigError: a changed schedule is shorter than the run already is; no tensor was loaded.
        """
        self._reshard()
        told = Differences()
        fit = self._fit_models(state, source, everything=True)
        loading = self._require_same_structure(state, settings, source, absent, fit)
        state, settings = self._fit_optimizers(state, settings, loading)
        told.tell_absent([kind for kind in absent if self._has(kind)])
        told.notes += tell(fit, loading, self.models) + self._exclusion.compare(settings.get(EXCLUDE), source)
        told.notes += self._tell_idle(fit, settings, source)
        self._pairing.restore(state, settings, source, absent, global_step, told)
        self._restore_models(state, source, loading)
        if self.scaler is not None and state.get("scaler"):
            # Before the optimizer: FSDP2's scaler looks at the optimizer's state when it is loaded.
            self.scaler.load_state_dict(decode(state["scaler"], lambda name, device: source.create(name, CPU)))
        self._restore_optimizers(state, settings, source, told)
        told.notes += self._generators.restore(state, source)
        for name, one in self.registered.items():
            if (place := f"user/{name}") in state:
                load_registered(one, place, state[place], source, self._here)
        return told

    def _restore_optimizers(
        self, state: Mapping[str, Json], settings: Mapping[str, Json], source: TensorSource, told: Differences
    ) -> None:
        """State, after the models': what shares a tensor with them shares it again."""
        names = self._parameter_names()
        live = {
            f"{place}/{name}": value
            for place, model in ((place_of("model", name), model) for name, model in self.models.items())
            for name, value in tensors_as_stored(model, place, source)
        }
        shared = Shared(source, live)
        for name, optimizer in self.every_optimizer.items():
            if (place := place_of("optimizer", name)) in state:
                restore_told(optimizer, shared, state[place])
        for name, optimizer in self.every_optimizer.items():
            if (place := place_of("optimizer", name)) in state:
                then = settings.get(f"{place}/own")
                told.changes |= restore_own(optimizer, place, shared, state[place], then)
                restore_optimizer(optimizer, names, shared, state[place], fresh=name in self._made_at_once)

    def restore_weights(
        self, state: Mapping[str, Json], settings: Mapping[str, Json], source: TensorSource
    ) -> list[str]:
        """Loads the models alone, in place; those of the checkpoint that are not here are left out.

        Returns:
            What was not loaded, for people; empty where everything was.

        Raises:
            StateMismatchError: lists what differs; nothing was loaded.
        """
        self._reshard()
        absent = absent_names(settings.get(EXCLUDE))
        fit = self._fit_models(state, source, absent)
        self._refuse(self._tolerance.refuse(fit), fit)
        loading = self._tolerance.begin(fit)
        notes = tell(fit, loading, self.models) + self._exclusion.compare_absent(settings.get(EXCLUDE))
        loading.left_alone |= absent
        self._restore_models(state, source, loading)
        return notes + self._tell_idle(fit, settings, source)

    def _restore_models(self, state: Mapping[str, Json], source: TensorSource, loading: Loading) -> None:
        left_alone = loading.left_alone | self._exclusion.names
        changes = self._buffers.changes(state, source, left_alone)
        self._buffers.remake(changes, state, source, own=self._own_buffers)
        for place, model in self._by_place().items():
            restore_model(model, place, source, self._own_buffers, left_alone)
            restore_extra(model, place, state, source, self._here)

    def restore_registered(
        self, name: str, state: Mapping[str, Json], source: TensorSource, absent: Collection[str] = ()
    ) -> None:
        """Loads one object that was registered after the rest was restored.

        Raises:
            StateMismatchError: the checkpoint holds nothing for it, and was not made without such objects.
        """
        place = f"user/{name}"
        if place not in state and "user" in absent:
            return
        if place not in state:
            raise StateMismatchError(
                f"The checkpoint holds nothing for the registered {name!r}. Register it from the first start of a run "
                f"on: give another run_dir, or leave it out to continue this run."
            )
        one = self.registered[name]
        if problems := compare_registered(one, place, state[place], source):
            raise StateMismatchError(f"{problems[0]}.")
        load_registered(one, place, state[place], source, self._here)

    def _has(self, kind: str) -> bool:
        """Whether there is anything here that a kind of state would be loaded into."""
        here = {"optimizer": self.optimizers, "scheduler": self.schedulers, "user": self.registered}
        return bool(here.get(kind, kind != "scaler" or self.scaler is not None))

    @property
    def _here(self) -> torch.device:
        """The device of the models."""
        return next((p.device for model in self.models.values() for p in model.parameters()), CPU)

    def _plain_objects(self) -> Iterator[tuple[str, Any]]:
        """Objects that are saved by their state_dict alone, by place."""
        for name, scheduler in self.schedulers.items():
            yield place_of("scheduler", name), scheduler
        if self.scaler is not None:
            yield "scaler", self.scaler
        for name, one in self.registered.items():
            yield f"user/{name}", one

    def _settings(self) -> dict[str, Json]:
        """Each setting's value now, at construction."""
        settings: dict[str, Json] = {}
        for name, optimizer in self.every_optimizer.items():
            place = place_of("optimizer", name)
            settings[f"{place}/class"] = type(optimizer).__name__
            if own := own_settings(optimizer, place):
                settings[f"{place}/own"] = own
            settings[place] = [
                group_settings(group, f"{place}/settings/{index}") for index, group in enumerate(optimizer.param_groups)
            ]
        for name, scheduler in self.schedulers.items():
            place = place_of("scheduler", name)
            settings[f"{place}/class"] = type(scheduler).__name__
            settings[place] = scheduler_settings(scheduler, place)
            settings[f"{place}/functions"] = fingerprints(scheduler)
        if self._tolerance.patterns:
            settings[_PARTIAL] = list(self._tolerance.patterns)
        return {**settings, **self._exclusion.describe()}

    def _reshard(self) -> None:
        """What an evaluation has left gathered; registered modules may be sharded, too."""
        reshard([*self.models.values(), *(one for one in self.registered.values() if isinstance(one, nn.Module))])

    def _by_place(self) -> dict[str, nn.Module]:
        return {place_of("model", name): model for name, model in self.models.items()}

    def _movers(self) -> dict[str, Any]:
        """Optimizers and schedulers."""
        optimizers = {place_of("optimizer", name): one for name, one in self.every_optimizer.items()}
        return optimizers | {place_of("scheduler", name): one for name, one in self.schedulers.items()}

    def _parameter_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, model in self.models.items():
            for key, parameter in model.named_parameters():
                names.setdefault(id(parameter), clean_name(f"{name}.{key}" if name else key))
        return names

    # How a checkpoint fits

    def _fit_models(
        self,
        state: Mapping[str, Json],
        source: TensorSource,
        without: Collection[str] = (),
        *,
        everything: bool = False,
    ) -> Fit:
        """
        Args:
            without: full names of what need not be there.
            everything: a model that is in the checkpoint alone counts, too.
        """
        fit = Fit()
        excluded = self._exclusion.names | set(without)
        made = full_names(self._buffers.changes(state, source, excluded))
        for place, model in self._by_place().items():
            fit.add(fit_model(model, place, source, excluded | made))
        if everything and "" not in self.models:
            places = tuple(f"{place}/" for place in self._by_place())
            known = [name for name in source.names("model/") if not name.startswith(places)]
            fit.unexpected += [name for name in known if "/~extra/" not in name]
        return fit

    def _require_same_structure(
        self,
        state: Mapping[str, Json],
        settings: Mapping[str, Json],
        source: TensorSource,
        absent: Collection[str],
        fit: Fit,
    ) -> Loading:
        """Raises StateMismatchError where something differs that may not; returns what is to be left as it is."""
        problems = self._tolerance.refuse(fit)
        loading = self._tolerance.begin(fit)
        names = self._parameter_names()
        for name, optimizer in self.every_optimizer.items():
            place = place_of("optimizer", name)
            if place not in state:
                problems += self._compare_new_optimizer(optimizer, place, loading) if "optimizer" not in absent else []
                continue
            today, then = type(optimizer).__name__, settings.get(f"{place}/class", _ACCELERATED)
            if then not in (today, _ACCELERATED):
                problems.append(f"the {place} was a {then} and is a {today} now")
            saved_groups = state[place]["groups"]
            if self._tolerance.patterns:
                problems += self._tolerance.compare_groups(optimizer, place, names, saved_groups)
            else:
                problems += compare_groups(optimizer, place, names, saved_groups)
            problems += compare_apart(optimizer, place, names, source, state[place])
        missing = [name for name in self.registered if f"user/{name}" not in state and "user" not in absent]
        problems += [f"the checkpoint holds nothing for the registered {name!r}" for name in missing]
        for name, one in self.registered.items():
            if (place := f"user/{name}") in state:
                problems += compare_registered(one, place, state[place], source)
        self._refuse(problems, fit, settings)
        return loading

    def _compare_new_optimizer(self, optimizer: Any, place: str, loading: Loading) -> list[str]:
        """One that the checkpoint does not hold fits where its parameters are new, too."""
        names = self._parameter_names()
        own = {name for group in optimizer.param_groups for name in member_names(0, group, names)}
        return [] if own <= loading.fresh else [f"the checkpoint holds no {place}"]

    def _refuse(self, problems: list[str], fit: Fit, settings: Mapping[str, Json] | None = None) -> None:
        if not problems:
            return
        more = f" ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        then = (settings or {}).get(EXCLUDE)
        again = f" It was saved with exclude={tuple(then['patterns'])!r}: give that again to go on." if then else ""
        hint = (again if absent_names(then) & set(fit.missing) else "") + self._tolerance.suggest(fit)
        raise StateMismatchError("; ".join(problems[:8]) + more, hint=hint)

    def _fit_optimizers(
        self, state: Mapping[str, Json], settings: Mapping[str, Json], loading: Loading
    ) -> tuple[dict[str, Json], dict[str, Json]]:
        """State and settings as if they had been saved with today's parameter groups."""
        names = self._parameter_names()
        state, settings = dict(state), dict(settings)
        for name, optimizer in self.every_optimizer.items():
            if (place := place_of("optimizer", name)) not in state or not self._tolerance.patterns:
                continue
            own = {one for group in optimizer.param_groups for one in member_names(0, group, names)}
            if own & loading.fresh or compare_groups(optimizer, place, names, state[place]["groups"]):
                fitted = fit_optimizer(optimizer, names, state[place], settings.get(place), loading)
                state[place], settings[place] = fitted
        return state, settings

    def _tell_idle(self, fit: Fit, settings: Mapping[str, Json], source: TensorSource) -> list[str]:
        """Of patterns that match nothing; once a run that had them has saved, nothing is left for them to match."""
        idle = self._tolerance.unmatched(fit, source.names("model/"))
        if not idle or tuple(settings.get(_PARTIAL, ())) == self._tolerance.patterns:
            return []
        return [f"{self._tolerance.shown}: {some(idle)} matches no tensor, here or in the checkpoint."]


def by_name(objects: Any) -> dict[str, Any]:
    """Objects by name; an only one has the name ""."""
    only = {} if objects is None or objects == () else {"": objects}
    return dict(objects) if isinstance(objects, Mapping) else only
