"""Loading what fits where a checkpoint and a script hold different parameters: what may differ, and what came of it.

    Fit (what is where) + patterns -> problems, or a Loading: what stays as constructed, the optimizers' part, a report

Invariant: what fits is loaded whatever the patterns say; what differs and matches none of them is refused by name. It
changes no live object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from dist_train.errors import ConfigError
from dist_train.model_state import Fit
from dist_train.optimizer_state import is_positional, member_names, names_in_order
from dist_train.schedule import group_settings

Json = Any
_MOST_NAMES = 6
_MOST_SUGGESTED = 4


def require_patterns(owner: str, name: str, patterns: Sequence[str]) -> None:
    """Raises ConfigError for what is no sequence of patterns, in the name of the class it was given to."""
    if isinstance(patterns, str):
        raise ConfigError(f"{owner}.{name} is the text {patterns!r}; it is a tuple of patterns: ({patterns!r},).")
    if wrong := [one for one in patterns if not isinstance(one, str) or not one.removeprefix("!")]:
        raise ConfigError(f"{owner}.{name} holds {wrong[0]!r}; it is a tuple of patterns, for instance ('head.*',).")
    if patterns and all(one.startswith("!") for one in patterns):
        raise ConfigError(
            f"{owner}.{name} is {tuple(patterns)!r}: nothing is named that ! could take out; begin with '*'."
        )


def plain_name(full: str, models: Collection[str]) -> str:
    """`model/head.weight` -> `head.weight`; of one of several models `generator.head.weight`, as an optimizer's
    parameters are called.

    Args:
        models: names of the models; that of an only one is "".
    """
    key = full.removeprefix("buffer/").removeprefix("model/")
    return key if "" in models else key.replace("/", ".", 1)


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of them matches, and none that begins with `!`, which takes names out again."""
    out = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    named = any(fnmatchcase(name, pattern) for pattern in patterns if not pattern.startswith("!"))
    return named and not any(fnmatchcase(name, pattern) for pattern in out)


def find_idle(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """Those that match none of the names."""
    return [one for one in patterns if not any(fnmatchcase(name, one.removeprefix("!")) for name in names)]


def some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return ", ".join(listed[:_MOST_NAMES]) + more


@dataclass(slots=True, kw_only=True)
class Loading:
    """What is loaded, as far as it is not everything."""

    left_alone: set[str] = field(default_factory=set)
    """Full names of model tensors that stay as they were constructed."""
    fresh: set[str] = field(default_factory=set)
    """The same as an optimizer calls its parameters: their state starts fresh."""
    kept_states: int = 0
    fresh_states: int = 0
    dropped_states: int = 0
    """Parameters whose optimizer state goes on, starts fresh, is left in the checkpoint; where not all go on."""
    notes: list[str] = field(default_factory=list)


class Tolerance:
    """What may differ.

    Args:
        patterns: of the models' tensors, see `RunOptions.partial_load`.
        models: their names; that of an only one is "".
    """

    def __init__(self, patterns: Sequence[str], models: Collection[str]) -> None:
        self.patterns = tuple(patterns)
        self._models = models

    def refuse(self, fit: Fit) -> list[str]:
        """What differs and may not, one text each."""
        problems = list(fit.problems)
        problems += [f"{name} is in the checkpoint and not in the model" for name in self._strict(fit.unexpected, fit)]
        problems += [f"{name} is in the model and not in the checkpoint" for name in self._strict(fit.missing, fit)]
        reshaped = [(name, *fit.reshaped[name]) for name in self._strict(fit.reshaped, fit)]
        problems += [f"{name} is {then} in the checkpoint and {now} in the model" for name, then, now in reshaped]
        if not problems and not fit.loaded and (fit.missing or fit.reshaped):
            problems.append(
                f"no tensor at all would be loaded into the model: all {len(fit.missing) + len(fit.reshaped)} differ "
                f"and match {self.shown}"
            )
        return problems

    def begin(self, fit: Fit) -> Loading:
        """Of models whose differences `refuse` has nothing against."""
        left_alone = {*fit.missing, *fit.reshaped}
        return Loading(left_alone=left_alone, fresh={plain_name(name, self._models) for name in left_alone})

    def suggest(self, fit: Fit) -> str:
        """How to ask for a partial load of what was refused; "" where no patterns would help."""
        strict = self._strict([*fit.missing, *fit.unexpected, *fit.reshaped], fit)
        if not strict or fit.problems:
            return ""
        converted = [name for name in strict if name in fit.reshaped and _differs_in_dtype(*fit.reshaped[name])]
        told = _tell_dtypes([fit.reshaped[name] for name in converted])
        if len(converted) == len(strict):
            return told
        given = tuple(dict.fromkeys([*self.patterns, *_cover([plain_name(name, self._models) for name in strict])]))
        return told + (
            f" To load what fits and leave the rest as it is constructed, say what may differ: partial_load={given!r}."
        )

    def unmatched(self, fit: Fit, saved: Iterable[str]) -> list[str]:
        """Patterns that match nothing there or here.

        Args:
            saved: full names of the checkpoint's tensors.
        """
        known = [plain_name(name, self._models) for name in [*saved, *fit.missing, *fit.tied]]
        return find_idle(self.patterns, known)

    @property
    def shown(self) -> str:
        return f"partial_load={self.patterns!r}"

    def _strict(self, names: Iterable[str], fit: Fit) -> list[str]:
        """Those that match no pattern; a tied tensor matches by any of its names."""
        return [name for name in names if not any(map(self._matches, fit.tied.get(name, [name])))]

    def _matches(self, full: str) -> bool:
        return matches(plain_name(full, self._models), self.patterns)

    # Optimizers

    def compare_groups(
        self,
        optimizer: torch.optim.Optimizer,
        place: str,
        names: dict[int, str],
        saved_groups: Sequence[Json],
    ) -> list[str]:
        """What keeps parameter groups that differ from being matched by the names of their members."""
        live, saved = _members(optimizer, names, saved_groups)
        strangers = {name for group in live for name in group} ^ {name for group in saved for name in group}
        if any(map(is_positional, strangers)):
            return [
                f"{place} tells its parameters by their place alone (it was imported, or they are in no model), and "
                f"there are others now: leave its state behind when it is imported (--without optimizer)"
            ]
        if strict := sorted(name for name in strangers if not matches(name, self.patterns)):
            return [f"{place}: only there or only here are the parameters {some(strict)}"]
        return []


def _differs_in_dtype(then: str, now: str) -> bool:
    """Of the texts in `Fit.reshaped`: a shape and a dtype."""
    return then.rpartition(" ")[0] == now.rpartition(" ")[0]


def _tell_dtypes(pairs: Sequence[tuple[str, str]]) -> str:
    """A partial load would leave such tensors as they are constructed, which nobody wants of a whole model."""
    if not pairs:
        return ""
    then = sorted({text.rpartition(" ")[2] for text, _ in pairs})
    return (
        f" {len(pairs)} of them {'differs' if len(pairs) == 1 else 'differ'} in the dtype alone, and a load converts "
        f"nothing: build the model in the checkpoint's ({', '.join(then)}). To begin a run with these values in "
        f"another dtype, load and convert them in the script (from_pretrained(folder, dtype=...), or load_state_dict)."
    )


def _cover(names: Sequence[str]) -> list[str]:
    """A few patterns that match all the names: their modules, or the modules that those are in."""
    paths = [name.split(".") for name in names]
    for depth in range(max(map(len, paths)), 0, -1):
        heads = dict.fromkeys(
            ".".join(path[: min(depth, len(path) - 1) or 1]) + ".*" * (len(path) > 1) for path in paths
        )
        if len(heads) <= _MOST_SUGGESTED:
            break
    return list(heads)


def _members(
    optimizer: torch.optim.Optimizer, names: dict[int, str], saved_groups: Sequence[Json]
) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the groups' parameters here and in the checkpoint."""
    live = [member_names(index, group, names) for index, group in enumerate(optimizer.param_groups)]
    return live, [names_in_order(group["params"], live, index) for index, group in enumerate(saved_groups)]


def fit_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    json: Json,
    then: Sequence[Json] | None,
    loading: Loading,
) -> tuple[Json, list[Json] | None]:
    """The checkpoint's state of an optimizer as if it had been saved with today's groups, and their constructions.

    A group goes on as the one that most of its members were in; one of new members alone takes the place of one whose
    members are all gone, and is new where there is none: its settings are those it is constructed with.

    Args:
        json: what the checkpoint holds of it.
        then: its groups' settings when the run that saved was constructed.
        loading: counts what becomes of the parameters' states.
    """
    live, saved = _members(optimizer, names, json["groups"])
    raw = {
        mine: its
        for group, members in zip(json["groups"], saved, strict=True)
        for its, mine in zip(group["params"], members, strict=True)
    }
    states = _states(optimizer, live, saved, raw, json["state"], loading)
    known_then = then is not None and len(then) == len(json["groups"])
    groups, constructions = [], []
    for index, home in enumerate(_homes(live, saved)):
        today = group_settings(optimizer.param_groups[index], "~group")
        groups.append({"params": live[index], "settings": today if home is None else json["groups"][home]["settings"]})
        constructions.append(today if home is None or then is None or not known_then else then[home])
    return {**json, "groups": groups, "state": states}, constructions if known_then else None


def _states(
    optimizer: torch.optim.Optimizer,
    live: list[list[str]],
    saved: list[list[str]],
    raw: Mapping[str, str],
    states: Mapping[str, Json],
    loading: Loading,
) -> dict[str, Json]:
    """By the names of today, of parameters that are still there and as they were."""
    here, there = {name for group in live for name in group}, {name for group in saved for name in group}
    kept = (here & there) - loading.fresh
    if isinstance(optimizer, torch.optim.LBFGS) and here != kept:
        kept = set()  # its one state, under its first parameter's name, is of all of them together
    loading.kept_states += len(kept)
    loading.fresh_states += len(here - kept)
    loading.dropped_states += len(there - kept)
    return {name: states[raw[name]] for group in live for name in group if name in kept and raw[name] in states}


def _homes(live: list[list[str]], saved: list[list[str]]) -> list[int | None]:
    """For each group the saved one that it goes on as; None for a new one."""
    home = {name: index for index, group in enumerate(saved) for name in group}
    votes = [Counter(home[name] for name in group if name in home) for group in live]
    found = [vote.most_common(1)[0][0] if vote else None for vote in votes]
    free = set(range(len(saved))) - {one for one in found if one is not None} if len(live) == len(saved) else set()
    return [index if one is None and index in free else one for index, one in enumerate(found)]


# The report


def tell(fit: Fit, loading: Loading, models: Collection[str]) -> list[str]:
    """What was loaded and what was not, a line each; empty where everything was."""
    total = fit.loaded + len(loading.left_alone)
    if not (loading.left_alone or fit.unexpected or loading.fresh_states or loading.dropped_states):
        return []
    lines = [f"Loaded in part: {fit.loaded} of the {total} tensors of the model are those of the checkpoint."]
    told = {
        "new, as constructed": [plain_name(name, models) for name in fit.missing],
        "of another shape or dtype, as constructed": [
            f"{plain_name(name, models)} ({then} -> {now})" for name, (then, now) in fit.reshaped.items()
        ],
        "left in the checkpoint": [plain_name(name, models) for name in fit.unexpected],
    }
    lines += [f"  {what} ({len(names)}): {some(names)}" for what, names in told.items() if names]
    if loading.fresh_states or loading.dropped_states:
        lines.append(
            f"  optimizer state: of {loading.kept_states} parameters it goes on, of {loading.fresh_states} it starts "
            f"fresh, of {loading.dropped_states} it is left in the checkpoint"
        )
    return lines
