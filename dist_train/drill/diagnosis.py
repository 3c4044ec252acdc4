"""Where two runs of one script went apart first, and why, as pure functions of their records.

    first_difference(uninterrupted, other) -> Difference -> diagnose_twins | diagnose_resume -> Diagnosis

Invariant: a step's inputs are compared in the order in which they act (samples, batch, random generators, loss,
learning rate, weights), so that what is named is a cause and not one of its consequences. [stdlib only]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dist_train.drill.records import Life, Records, shown_names

Json = Any
SEED, ORDER, AUGMENTATION, RATE, KERNEL, OUTSIDE = (
    "seed",
    "data order",
    "augmentation",
    "learning rate",
    "kernel",
    "state outside the checkpoint",
)
_OF_A_BATCH: Final = ("samples", "content", "rng", "loss")
_MOST_SUSPECTS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first thing that is not equal."""

    run: str
    shown: str = ""
    """The run's name for people, where the script has several; empty for one alone."""
    rank: int
    attempt: int
    step: int
    what: str
    """`begin` (weights, before any step), `samples`, `content`, `rng`, `loss`, `lr`, `weights`, or `steps`."""
    expected: Json = None
    """In the uninterrupted run."""
    found: Json = None
    resumed_at: int = 0
    """The step that this life began at; 0, it started afresh."""
    tensor: str = ""
    """The first that differs, of weights."""
    sampler: str = ""
    loader_is_known: bool = True
    """Whether the run was given the training loader."""
    batch_is_known: bool = True
    """Whether a batch was seen: a loop may make its own."""
    optimizers: int = 1
    suspects: Sequence[tuple[str, str, str]] = field(default_factory=tuple)
    """Variables of the script that were other than in the uninterrupted run before that step: (name, there, here)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a person is told."""

    cause: str
    sentence: str
    advice: str


def first_difference(plain: Records, other: Records, *, twin: Records | None = None) -> Difference | None:
    """Where `other` goes apart from the uninterrupted run: in the earliest attempt, at the earliest step.

    Args:
        twin: a second uninterrupted run; a variable that is not equal in both is no suspect.
    """
    found = [
        difference
        for name, lives in plain.items()
        for life in other.get(name, [])
        if (difference := _compare_life(name, _of_rank(lives, life.rank), life, twin)) is not None
    ]
    order = min(found, key=lambda one: (one.attempt, one.step, one.rank), default=None)
    first = order or _missing(plain, other)
    return replace(first, shown=shown_names(plain)[first.run]) if first and len(plain) > 1 else first


def _of_rank(lives: Sequence[Life], rank: int) -> Life:
    """The uninterrupted run has one life a rank."""
    return next((life for life in lives if life.rank == rank), Life(1, rank))


def _compare_life(name: str, plain: Life, life: Life, twin: Records | None) -> Difference | None:
    where: dict[str, Any] = {"run": name, "rank": life.rank, "attempt": life.attempt, "resumed_at": life.began_at}
    if life.begin is not None:
        before = plain.begin if life.began_at == 0 else plain.steps.get(life.began_at)
        if before is not None and (tensor := _first_key(before["weights"], life.begin["weights"])):
            return Difference(**where, step=life.began_at, what="begin", tensor=tensor)
        where |= {"loader_is_known": life.begin["loader"], "optimizers": life.begin["optimizers"]}
    for step in sorted(life.steps):
        expected = plain.steps.get(step)
        if expected is None:
            return Difference(**where, step=step, what="steps", expected="no such step", found="a step")
        for what, one, two, more in _pairs(expected, life.steps[step]):
            if one != two:
                suspects = suspects_at(plain, life, step, _of_rank(twin[name], life.rank) if twin else None)
                return Difference(**where, step=step, what=what, expected=one, found=two, suspects=suspects, **more)
    return None


def _pairs(expected: Json, found: Json) -> Iterator[tuple[str, Json, Json, dict[str, Any]]]:
    """What a step used and did, in the order in which it acts. A generator that stands elsewhere matters only where
    something comes of it: many a script seeds torch alone and draws from nothing else.
    """
    is_known = True
    for one, two in zip(expected["batches"], found["batches"], strict=False):
        is_known = is_known and two["content"] is not None
        same_results = one["loss"] == two["loss"] and expected["weights"] == found["weights"]
        for what in _OF_A_BATCH:
            if what == "rng" and same_results:
                continue
            shown = ("shown", "shown") if what == "samples" and one[what] != two[what] else (what, what)
            a, b = (one[shown[0]], two[shown[1]])
            if a == b and one[what] != two[what]:
                a, b = one[what], two[what]
            yield what, a, b, {"sampler": two.get("sampler", ""), "batch_is_known": is_known}
    yield "samples", len(expected["batches"]), len(found["batches"]), {}
    yield "lr", expected["lr"], found["lr"], {}
    tensor = _first_key(expected["weights"], found["weights"])
    yield (
        "weights",
        expected["weights"].get(tensor),
        found["weights"].get(tensor),
        {"tensor": tensor, "batch_is_known": is_known},
    )


def _first_key(one: Mapping[str, Json], other: Mapping[str, Json]) -> str:
    return next((key for key in one if one[key] != other.get(key)), next((key for key in other if key not in one), ""))


def unseeded_generators(plain: Records, twin: Records) -> list[str]:
    """Random generators that stand elsewhere in two uninterrupted runs which are equal otherwise: nothing draws from
    them, so that they are no difference.
    """
    lines: list[tuple[Json, Json]] = []
    for name, lives in plain.items():
        for life in lives:
            again = _of_rank(twin.get(name, []), life.rank).steps
            lines += [(line["rng"], again[step]["rng"]) for step, line in life.steps.items() if step in again]
    return sorted({name for one, two in lines for name in one if one[name] != two.get(name)})


def _missing(plain: Records, other: Records) -> Difference | None:
    """A run, or its last steps, that the other never came to."""
    for name, lives in plain.items():
        last = max((step for life in lives for step in life.steps), default=0)
        reached = max((step for life in other.get(name, []) for step in life.steps), default=0)
        if reached < last:
            return Difference(run=name, rank=0, attempt=0, step=last, what="steps", expected=last, found=reached)
    return None


def suspects_at(plain: Life, life: Life, step: int, twin: Life | None) -> tuple[tuple[str, str, str], ...]:
    """Variables of the script that differ right before a step of a life, and do not between two uninterrupted runs."""
    there, here = _around(plain, step), _around(life, step)
    if not (there and here) and life.begin and step == life.began_at + 1:
        before = plain.begin if life.began_at == 0 else plain.steps.get(life.began_at)
        there, here = (before or {}).get("around", {}), life.begin["around"]
        other = (twin.begin if life.began_at == 0 else twin.steps.get(life.began_at)) if twin else None
        again = (other or {}).get("around", there)
    else:
        again = _around(twin, step) if twin else there
    names = [name for name in there if name in here and there[name] != here[name] and again.get(name) == there[name]]
    return tuple((name, there[name], here[name]) for name in names[:_MOST_SUSPECTS])


def _around(life: Life, step: int) -> dict[str, str]:
    batches = life.steps[step]["batches"] if step in life.steps else []
    return dict(batches[0].get("around", {})) if batches else {}


# Why


def diagnose_twins(difference: Difference) -> Diagnosis:
    """Of two uninterrupted runs of the same command."""
    at = f"at step {difference.step}{_where(difference)}"
    if difference.what == "begin":
        return Diagnosis(
            cause=SEED,
            sentence=f"Two uninterrupted runs begin with different weights: {difference.tensor} differs {at}.",
            advice="Call dt.seed_everything(seed) before the model is built.",
        )
    if difference.what == "samples":
        return Diagnosis(
            cause=ORDER,
            sentence=f"Two uninterrupted runs use other samples {at}: {_samples(difference)}.",
            advice="Take dt.data_loader(dataset, global_batch_size=..., seed=0), or seed what decides the order.",
        )
    if difference.what == "content":
        return Diagnosis(
            cause=AUGMENTATION,
            sentence=f"Two uninterrupted runs use the same samples, but other bytes of them {at}: making a sample (or "
            f"its collation) draws randomness that nothing seeds.",
            advice="Draw it from torch's, numpy's or python's global generators, which dt.data_loader seeds for each "
            "sample; not from a generator without a seed, os.urandom or the time.",
        )
    if difference.what == "rng":
        return Diagnosis(
            cause=SEED,
            sentence=f"{_generators(difference)} elsewhere in two uninterrupted runs {at}, with the same batch and "
            f"weights, and the step draws from there.",
            advice="Call dt.seed_everything(seed) at the start, and seed nothing from the time.",
        )
    if difference.what == "steps":
        return Diagnosis(
            cause=ORDER,
            sentence=f"Two uninterrupted runs do not make the same steps{_where(difference)}: "
            f"{difference.expected}, {difference.found}.",
            advice="Let the number of steps depend on nothing but the data and the settings.",
        )
    if difference.what == "lr":
        return Diagnosis(
            cause=RATE,
            sentence=f"Two uninterrupted runs have another learning rate {at}, {_rates(difference)}, though all before "
            "it is the same: it depends on something else than the step, such as the clock, a file or randomness.",
            advice="Compute the rate from run.global_step, or with a scheduler that is given to the Run (scheduler=).",
        )
    return Diagnosis(
        cause=KERNEL,
        sentence=f"Two uninterrupted runs compute another {_result(difference)} {at} from the same batch, weights and "
        f"random generators.",
        advice="Some kernel does not add up in a fixed order: TrainConfig(deterministic=True), or "
        "torch.use_deterministic_algorithms(True) with CUBLAS_WORKSPACE_CONFIG=:4096:8; or the loss depends on the "
        "time or on something outside of the script.",
    )


def diagnose_resume(difference: Difference) -> Diagnosis:
    """Of an interrupted run, whose uninterrupted twins agree."""
    after = f"the first step after a resume at step {difference.resumed_at}"
    first = difference.step == difference.resumed_at + 1 and difference.resumed_at > 0
    at = f"At step {difference.step}{_where(difference)}{f', {after},' if first else ''}"
    if difference.what == "begin":
        return _diagnose_beginning(difference)
    if difference.what == "steps":
        return Diagnosis(
            cause=OUTSIDE,
            sentence=f"The interrupted run does not make the same steps{_where(difference)}: "
            f"{difference.expected}, {difference.found}.",
            advice="Let run.epochs() count, and the number of steps depend on nothing but data and settings.",
        )
    if difference.what == "samples":
        return Diagnosis(
            cause=ORDER,
            sentence=f"{at} the samples are others: {_samples(difference)}.{_loader(difference)}",
            advice="Take dt.data_loader(...), or give the Run the loader (loader=) and iterate run.batches(loader): "
            "then the epoch goes on where it was interrupted.",
        )
    if difference.what == "content":
        return Diagnosis(
            cause=AUGMENTATION if difference.sampler else ORDER,
            sentence=f"{at} the bytes of the batch are others{_of_the_same(difference)}: what makes them has a state "
            f"that no checkpoint holds.{_suspects(difference)}",
            advice="Make a sample a function of its index: draw from the global generators, which dt.data_loader seeds "
            "for each sample, not from a generator of its own that goes on from sample to sample.",
        )
    if difference.what == "rng":
        return Diagnosis(
            cause=SEED,
            sentence=f"{at} {_generators(difference, article='the')} elsewhere, with the same batch, and the step "
            f"draws from there: the script draws, or seeds, between the restore and the step.{_suspects(difference)}",
            advice="Seed before the Run is entered, and draw nothing after it that an uninterrupted run would not.",
        )
    if difference.what == "lr":
        return Diagnosis(
            cause=OUTSIDE,
            sentence=f"{at} the learning rate is {_rates(difference)}: what "
            f"decides it is in no checkpoint.{_suspects(difference)}",
            advice="Give the Run the scheduler (scheduler=), or compute the rate from run.global_step.",
        )
    return _diagnose_result(difference, at)


def _diagnose_beginning(difference: Difference) -> Diagnosis:
    """The weights are others before a life's first step."""
    if difference.resumed_at > 0:
        return Diagnosis(
            cause=OUTSIDE,
            sentence=f"{difference.tensor} is not what it was when the checkpoint of step {difference.step}"
            f"{_where(difference)} was saved: something changed it between the restore and the first step.",
            advice="Change no weights before the loop once run.resumed_from is set.",
        )
    run = f"{difference.shown or 'The run'} (attempt {difference.attempt})"
    return Diagnosis(
        cause=SEED,
        sentence=f"{run} had no checkpoint to go on from, began afresh at step 0, and "
        f"built a model with other weights than the uninterrupted run: {difference.tensor} differs. What decides them "
        "depends on what the script did before: on a Run before it that a restart does not train again, or on a file.",
        advice="Call dt.seed_everything(seed) right before each model is built, also before the second of a script.",
    )


def _diagnose_result(difference: Difference, at: str) -> Diagnosis:
    """The inputs of a step are equal, as far as they are known, and its loss or weights are not."""
    if not difference.batch_is_known and not difference.loader_is_known:
        return Diagnosis(
            cause=ORDER,
            sentence=f"{at} another {_result(difference)} comes of the same weights. The loop iterates batches of its "
            f"own, whose place nobody knows: after a resume the epoch begins again.{_suspects(difference)}",
            advice="Give the Run a loader (loader=) and iterate run.batches(loader), or save at the ends of epochs "
            "only: CheckpointPolicy(every_epochs=1).",
        )
    what = "weights" if difference.what == "weights" else "loss"
    missing = " The Run was given no optimizer." if not difference.optimizers else ""
    return Diagnosis(
        cause=OUTSIDE,
        sentence=f"{at} another {_result(difference)} comes of the same batch, weights and random generators: the "
        f"{what} depends on something that no checkpoint holds.{missing}{_suspects(difference)}",
        advice="Give it to the Run: run.register(name, object with state_dict and load_state_dict), or compute it from "
        "run.global_step and run.epoch.",
    )


def _where(difference: Difference) -> str:
    of_run = f" of {difference.shown}" if difference.shown else ""
    return of_run + (f" on rank {difference.rank}" if difference.rank else "")


def _result(difference: Difference) -> str:
    if difference.what == "weights":
        return f"value of {difference.tensor}"
    return (
        f"loss ({difference.found} instead of {difference.expected})" if difference.what == "loss" else difference.what
    )


def _generators(difference: Difference, article: str = "The") -> str:
    there, here = difference.expected or {}, difference.found or {}
    names = [name for name in there if there[name] != here.get(name)]
    one = len(names) == 1
    return f"{article} random generator{'s' * (not one)} of {' and '.join(names)} stand{'s' * one}"


def _samples(difference: Difference) -> str:
    if not (isinstance(difference.expected, list) and isinstance(difference.found, list)):
        return f"{difference.found} instead of {difference.expected}"
    return f"{', '.join(difference.found)} instead of {', '.join(difference.expected)} at its beginning"


def _loader(difference: Difference) -> str:
    order = f" They come from a DataLoader with a {difference.sampler}" if difference.sampler else ""
    unknown = "" if difference.loader_is_known else " that the Run was not given, so that nobody knows its place"
    return f"{order}{unknown}." if order else ""


def _of_the_same(difference: Difference) -> str:
    return ", though its samples are the same" if difference.sampler else ""


def _suspects(difference: Difference) -> str:
    if not difference.suspects:
        return ""
    pairs = [(name, *_shortened(there, here)) for name, there, here in difference.suspects]
    told = "; ".join(f"{name} was {there} and is {here}" for name, there, here in pairs)
    return f" Of the script's variables, before it: {told}."


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Numbers as people read them, unless that would make different ones equal."""
    try:
        short = f"{float(one):.6g}", f"{float(other):.6g}"
    except (TypeError, ValueError):
        return one, other
    return short if short[0] != short[1] or one == other else (one, other)


def _rates(difference: Difference) -> str:
    there, here = difference.expected, difference.found
    if not (isinstance(there, list) and isinstance(here, list)) or len(there) != len(here):
        return f"{here} instead of {there}"
    pairs = [_shortened(str(one), str(other)) for one, other in zip(there, here, strict=True)]
    return f"{', '.join(other for _, other in pairs)} instead of {', '.join(one for one, _ in pairs)}"
