"""docs/what-is-saved.md, from the tables of kinds that the tests go through.

    python -m tests.support.kinds_page docs/what-is-saved.md

Where a kind lies is read from a checkpoint of it, and the words of a refusal are those of the refusal.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

import dist_train as dt
from dist_train.errors import ConfigError, UnsaveableStateError
from tests.support.kinds import SECTIONS
from tests.support.kinds_refused import REFUSED, Refused
from tests.support.kinds_refused_later import REFUSED_LATER
from tests.support.kinds_sharded import SHARDED
from tests.support.kinds_torch_refuses import TORCH_REFUSES
from tests.support.scripts import Kind, train

UNIT = "tests/unit/test_kinds.py"
SHARDED_TEST = "tests/distributed/test_kinds_sharded.py"
HEADS = {
    "kinds": "| what the script holds | what is saved of it | where | sharded |",
    "refused": "| what the script holds | the message says | do this |",
    "others": "| what the script does | what comes of it | test |",
}
OTHERS = {
    "registers a `Stateful` of `torch.distributed.checkpoint`": (
        "what its `state_dict()` returns; of a sharded model each rank its share",
        "tests/unit/test_registered_stateful.py::test_what_implements_the_protocol_of_torch_comes_back_as_it_was",
    ),
    "adds or removes parameters between two starts": (
        "refused by name; with `partial_load=` what fits is loaded, the rest is told "
        "([how](warm-starts.md#parameters-added-removed-resized))",
        "tests/unit/test_partial_load.py::test_a_resume_after_a_partial_load_is_exact_across_kills",
    ),
    "begins with another run's weights": (
        "weights and buffers, nothing else ([how](warm-starts.md#a-warm-start))",
        "tests/unit/test_warm_start.py::test_a_start_that_is_killed_before_its_first_checkpoint_is_the_same_again",
    ),
    "leaves tensors out (`exclude=`)": (
        "they are in no file and no load touches them; a digest tells when they change "
        "([how](warm-starts.md#what-is-not-saved))",
        "tests/unit/test_exclude.py::test_a_resume_takes_it_from_the_script_and_is_exact_across_kills",
    ),
    "saves within a window of Accelerate's `accumulate`, FSDP2": (
        "saved when the window ends",
        "tests/distributed/test_sharded_windows.py::"
        "test_a_save_within_a_window_of_accelerate_resumes_as_the_run_that_was_not_left",
    ),
    "saves within a window of its own (`set_requires_gradient_sync`)": (
        "saved when the window ends",
        "tests/distributed/test_sharded_windows.py::"
        "test_a_save_within_a_window_by_hand_is_made_at_its_end_and_resumes_as_the_bare_loop",
    ),
    "calls `run.step()` at each micro-batch of such a window": (
        "refused: call it once an update",
        "tests/distributed/test_sharded_windows.py::"
        "test_a_step_that_leaves_gradients_unreduced_is_refused_with_the_way_out",
    ),
    "keeps optimizer state as plain tensors of each rank's part (8 bits, `to_local()`)": (
        "each rank's own; resumes on the same ranks and mesh, another layout is refused by name",
        "tests/distributed/test_local_state.py::test_another_layout_is_refused_and_the_tensor_named",
    ),
    "wraps it in DistributedDataParallel": (
        "the same; buffers that DDP makes equal are the main rank's, others each rank's own",
        "tests/distributed/test_kinds_replicated.py::test_what_two_ranks_leave_and_resume_ends_as_the_bare_loop_does",
    ),
    "has a buffer of another shape on each rank": (
        "refused by the save, by name",
        "tests/distributed/test_kinds_replicated.py::"
        "test_a_buffer_of_another_shape_on_each_rank_is_refused_by_the_save_and_named",
    ),
    "uses FSDP2's Accelerate plugin, killed at any moment": (
        "the run that never died",
        "tests/distributed/test_fsdp_kills.py::"
        "test_a_killed_sharded_run_equals_the_run_that_never_died_and_the_bare_loop",
    ),
}
"""Cases with tests of their own."""

INTRODUCTION = f"""# What is saved

What a checkpoint holds of the things that training scripts hold, and what it refuses. Each row of the tables is a test:
the page is written from the tests' own lists by `python -m tests.support.kinds_page docs/what-is-saved.md`, and
`tests/unit/test_what_is_saved_page.py` fails where a row and a test do not belong together.

**Everything in the first four tables resumes bit for bit.** The test leaves a run after three updates, builds all
objects anew, resumes, and compares weights, buffers, optimizer, scheduler, registered objects and losses with those of
the loop without the library (`{UNIT}::test_what_is_left_and_resumed_ends_as_the_bare_loop_does`).

*Where* says under which names it lies in the checkpoint: `model`, `optimizer`, `buffer` (non-persistent ones),
`scheduler`, `user` (what was registered), `generators`. Tensors are in the safetensors files, all else in
`manifest.json`; see the [format](checkpoint-format.md#tensor-names).

*Sharded*: **yes** is the same test after `fully_shard` on two ranks, and what these left is loaded whole by one and by
three (`{SHARDED_TEST}`). *Not by torch*: torch itself raises at the first update, or before; a test
holds it to that. A dash: no test of it sharded.
"""

LIMITS = """
## What no checkpoint can know

- **Attributes that nobody tells of**: a tensor or a number that a module keeps as a plain attribute, an object inside
  of an optimizer. Make a tensor a buffer (`register_buffer(..., persistent=False)` keeps it out of the `state_dict`),
  return the rest from `get_extra_state`, or register the object. `dist-train drill` finds what was forgotten: it kills
  the script and compares.
- **What is under two names.** A tensor that two names of one object share is one tensor again, and so is what a
  registered module shares with a model. A list, a dictionary or an array comes back as two; so does a tensor of two
  registered objects, or of one that is no module and a model.
- **Types made of plain ones.** A subclass of `int`, `str`, `dict`, `list`, `tuple` comes back as the plain type, a
  `Parameter` in a registered object as a tensor. `load_state_dict` makes of it what it should be.
- **Strides** of buffers that are views: their values come back, laid out as the script's own buffers.
- **Functions.** A lambda in a scheduler is the script's; where one of torch's schedulers has another one now, it is
  told.
- **What ranks hold unlike** in an object that is registered as one for all: the main rank's is saved, and it is told.
"""


def page(places: Mapping[str, str], words: Mapping[str, str]) -> str:
    """
    Args:
        places: of each kind where it lies.
        words: of each refusal a part of its message.
    """
    lines = [INTRODUCTION]
    for title, kinds in SECTIONS.items():
        lines += [f"## {title}", "", *_table("kinds"), *(kind_row(name, one, places) for name, one in kinds.items())]
        lines.append("")
    lines += ["## Sharded in ways of their own", "", "| what the script holds | sharded |", "|---|---|"]
    own = [name for name in SHARDED if not any(name in kinds for kinds in SECTIONS.values())]
    lines += [f"| {name} | yes |" for name in own]
    lines += ["", "## Cases with tests of their own", "", *_table("others")]
    lines += [f"| {name} | {comes} | `{test}` |" for name, (comes, test) in OTHERS.items()]
    lines += ["", "## Refused before the first update", ""]
    lines += [f"`{UNIT}::test_what_cannot_be_kept_is_refused_before_the_first_step_with_the_way_out`.", ""]
    lines += [*_table("refused"), *_refusals(REFUSED, words)]
    lines += ["", "## Refused by the save", "", "What only comes up in training: the first save raises, and writes"]
    lines += ["nothing that a load would refuse"]
    lines += [f"(`{UNIT}::test_what_comes_up_in_training_is_refused_by_the_save_and_not_by_the_load`).", ""]
    lines += [*_table("refused"), *_refusals(REFUSED_LATER, words)]
    return "\n".join(lines) + "\n" + LIMITS


def kind_row(name: str, kind: Kind, places: Mapping[str, str]) -> str:
    sharded = "yes" if name in SHARDED else "not by torch" if name in TORCH_REFUSES else "-"
    return f"| {name} | {kind.kept} | {places[name]} | {sharded} |"


def _table(which: str) -> list[str]:
    return [HEADS[which], "|---" * (HEADS[which].count("|") - 1) + "|"]


def _refusals(refused: Mapping[str, Refused], words: Mapping[str, str]) -> Iterable[str]:
    return (f"| {name} | *{words[name]}* | {one.instead} |" for name, one in refused.items())


def cells(text: str) -> dict[str, list[str]]:
    """Of each row of the page its cells, by the first one."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def place_of_kind(run_dir: Path) -> str:
    """Where the newest checkpoint has what the script holds."""
    newest = max((run_dir / "checkpoints").glob("step-*/manifest.json"))
    manifest = json.loads(newest.read_text())
    names = [name.partition("/")[2] if name.startswith("rank-") else name for name in manifest["tensors"]]
    found = {name.partition("/")[0] for name in [*names, *manifest["state"]]} - {"health"}
    return ", ".join(f"`{place}`" for place in sorted(found, key=_ORDER.index))


_ORDER = ["model", "buffer", "optimizer", "scheduler", "scaler", "generators", "user"]


def words_of(message: str, refused: Refused) -> str:
    """The part of a message that its test asks for, as a cell of a table has room for it."""
    found = re.search(refused.says, message)
    assert found is not None, message
    start = message.rfind(" ", 0, found.start()) + 1
    end = re.compile(r"\.(?:\s|$)").search(message, found.end())
    return _shortened(message[start : end.start() if end else len(message)]).replace("|", "/").replace("*", r"\*")


def _shortened(text: str) -> str:
    """Its beginning and its last sentence."""
    last = text.rfind(". ") + 2
    head = text[: text.rfind(" ", 0, 70)]
    return text if last < 90 or len(text) < 170 else f"{head} ... {text[last:]}"


def says(cell: str, message: str) -> bool:
    """Whether a message has each part of a cell that `words_of` made."""
    plain = cell.strip("*").replace(r"\*", "*")
    return all(part in message.replace("|", "/") for part in plain.split(" ... "))


def _message(refused: Refused, folder: Path) -> str:
    try:
        train(refused.build(), folder, 1)
    except (UnsaveableStateError, ConfigError) as error:
        return str(error)
    raise AssertionError("not refused")


def main() -> None:
    places, words = {}, {}
    with tempfile.TemporaryDirectory(prefix="kinds-") as folder:
        for number, (name, kind) in enumerate([pair for kinds in SECTIONS.values() for pair in kinds.items()]):
            dt.seed_everything(0)
            train(kind.build(), Path(folder) / str(number), 3)
            places[name] = place_of_kind(Path(folder) / str(number))
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        for name, refused in {**REFUSED, **REFUSED_LATER}.items():
            words[name] = words_of(_message(refused, Path(folder) / f"refused-{len(words)}"), refused)
    Path(sys.argv[1]).write_text(page(places, words))


if __name__ == "__main__":
    main()
