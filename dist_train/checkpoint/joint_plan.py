"""One plan of all ranks: each makes its own, and before a byte is written they see that the plans fit together.

Invariant: what keeps one rank from saving is told on every rank, by the tensor's name; where the ranks would not write
each element once, nothing is written. Collective, before the first update and when the structure of the state changes.
"""

from __future__ import annotations

from typing import Any

from dist_train.capture import Capture
from dist_train.checkpoint.plan import PLACES, Plan, make_plan
from dist_train.checkpoint.survey import only_one_has, take_survey
from dist_train.errors import DisagreementError, UnsaveableStateError
from dist_train.world import World

Json = Any


def plan_together(capture: Capture, world: World) -> tuple[Plan, int]:
    """This rank's plan, and the bytes that all ranks write.

    Raises:
        UnsaveableStateError: a rank holds what cannot be saved; on all ranks.
        DisagreementError: the ranks hold different tensors, or do not lay one out alike; on all ranks.
    """
    survey = take_survey(capture, world)
    plan, problem = None, ""
    try:
        plan = make_plan(capture, world.rank, world.world_size, survey)
    except UnsaveableStateError as error:
        problem = str(error)
    _tell_problem(problem, world)
    assert plan is not None
    _require_same_tensors(plan, world)
    return plan, _require_each_element_once(plan, world)


def _tell_problem(problem: str, world: World) -> None:
    if world.max([bool(problem)], "whether every rank can save")[0]:
        told = world.gather(problem, "what cannot be saved")
        rank, first = next((rank, text) for rank, text in enumerate(told) if text)
        raise UnsaveableStateError(first if told.count(first) == len(told) else f"On rank {rank}: {first}")


def _require_same_tensors(plan: Plan, world: World) -> None:
    try:
        world.require_equal(plan.digest, "structure of the state (names, shapes and dtypes of tensors)")
    except DisagreementError as error:
        tables = world.gather(plan.described(), "names, shapes and dtypes of tensors")
        rank = next(rank for rank, table in enumerate(tables) if table != tables[0])
        raise DisagreementError(
            f"The ranks do not hold the same state: {_first_difference(tables[0], tables[rank], rank)}. All ranks must "
            f"build the same models and optimizers in the same way."
        ) from error


def _first_difference(main: dict[str, Json], other: dict[str, Json], rank: int) -> str:
    """Between the main rank's table and another's, for people."""
    if main.keys() != other.keys():
        return only_one_has(main, other, rank)
    name = next(name for name in main if main[name] != other[name])
    (shape, dtype, whole), (its_shape, its_dtype, its_whole) = main[name], other[name]
    if (shape, dtype) == (its_shape, its_dtype):
        spread, its_spread = ("held whole" if each else "sharded" for each in (whole, its_whole))
        return f"{name} is {spread} on rank 0 and {its_spread} on rank {rank}"
    hint = " (a DTensor of parts that differ in size is made with shape= and stride= of the whole, the same everywhere)"
    differs = f"{name} is {shape} {dtype} on rank 0 and {its_shape} {its_dtype} on rank {rank}"
    return differs + (hint if shape != its_shape else "")


def _require_each_element_once(plan: Plan, world: World) -> int:
    told = world.sum([*plan.written(), plan.num_bytes], "which rank writes what")
    wanted = plan.to_be_written()
    for place, name in enumerate(plan.tensors):
        count, expected = told[2 * place], wanted[2 * place]
        if count != expected:
            raise DisagreementError(
                f"{name}: the ranks would write {count} of its {expected} elements. All ranks must lay it "
                f"out alike: is it sharded on some and plain on others, or on meshes that overlap?"
            )
        if told[2 * place + 1] % PLACES != wanted[2 * place + 1]:
            raise DisagreementError(
                f"{name}: the ranks would write some of its elements twice and leave out others. All ranks must lay it "
                f"out alike: does its mesh have the ranks in another order on some, or another placement?"
            )
    return told[-1]
