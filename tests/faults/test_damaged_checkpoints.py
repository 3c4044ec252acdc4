"""Any file of the newest checkpoint damaged in any way: found, named, the older one used, the same step saved again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.ownership import read_owner
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import CorruptCheckpointError, FormatVersionError, NoCheckpointError, StateMismatchError
from tests.support.damage import DAMAGES, Damage, checkpoint_names, contents, copy_run, events
from tests.support.solo import LeaveError, leave_at, train, train_quietly
from tests.support.specimen import build_model
from tests.support.twins import assert_same_run

FILES = [
    "manifest.json",
    "model.safetensors.index.json",
    "model-00001-of-00001.safetensors",
    "optimizer-00001-of-00001.safetensors",
]
LAST, BEFORE, OLDEST = "step-00000015", "step-00000014", "step-00000012"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever happened to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train_quietly(run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints" / LAST).iterdir()) == sorted(FILES)
    return run_dir


@pytest.fixture
def damaged(twin: Path, tmp_path: Path) -> Path:
    """A copy of the finished twin, to be damaged: resumed from an older checkpoint it must come to the same end."""
    return copy_run(twin, tmp_path / "run")


def require_fallback(run_dir: Path, twin: Path, resumed_from: str, *, lost: list[str]) -> str:
    """Runs again: the older checkpoint is used, the lost steps are committed again, the end is the twin's."""
    attempt = read_owner(Store(run_dir)).attempt + 1  # type: ignore[union-attr]
    ended = train_quietly(run_dir)
    assert ended.run.resumed_from == str(run_dir / "checkpoints" / resumed_from)
    for name in lost:
        (aside,) = (run_dir / "checkpoints").glob(f".corrupt-*-{name}")
        assert aside.name == f".corrupt-a{attempt:06d}-{name}"
        committed = json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())
        assert committed["attempt"] == attempt
        assert f"{run_dir}/checkpoints/{name} cannot be used" in ended.output
    assert_same_run(twin, run_dir)
    return ended.output


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@pytest.mark.parametrize("file", FILES)
def test_damage_to_the_newest_is_named_and_the_older_one_used(
    file: str, damage: Damage, damaged: Path, twin: Path
) -> None:
    damage.apply(damaged / "checkpoints" / LAST / file)
    before = contents(damaged / "checkpoints" / LAST)
    output = require_fallback(damaged, twin, BEFORE, lost=[LAST])
    named = "manifest" if file == "manifest.json" else file
    problems = [event["problem"] for event in events(damaged, "skipped_checkpoint")]
    assert len(problems) == 1
    assert LAST in problems[0]
    assert named in problems[0]
    assert problems[0] in output
    (aside,) = (damaged / "checkpoints").glob(".corrupt-*")
    assert contents(aside) == before  # kept as it is, for whoever wants to look


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", FILES)
def test_a_file_truncated_at_any_length_is_found(file: str, damaged: Path) -> None:
    """By the reading side alone; the rest of the way is the test above."""
    store, path = Store(damaged), f"checkpoints/{LAST}"
    whole = read_checkpoint(store, path).manifest
    assert whole is not None
    assert verify_checkpoint(store, path, whole) == []
    size = store.size(f"{path}/{file}")
    for length in range(size - 1, -1, -1):
        os.truncate(damaged / path / file, length)
        if file == "manifest.json":
            assert read_checkpoint(store, path).manifest is None, length
        else:
            assert [one.file for one in verify_checkpoint(store, path, whole, files=[file])] == [file], length


def test_every_bit_of_a_manifest_counts(twin: Path) -> None:
    """A damaged manifest never parses as another one, and never looks like one of a newer format."""
    data = (twin / "checkpoints" / LAST / "manifest.json").read_bytes()
    whole = Manifest.from_json(data)
    digits = [place for place in range(len(data)) if data[place : place + 1].isdigit()]
    # The whole head, where the format stands last among the short fields, and a sample of the rest.
    places = {data.index(b'"format"') + offset for offset in range(-2, 14)} | set(digits[::97]) | set(range(400))
    for place in sorted(places):
        for bit in range(8):
            broken = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            try:
                found = Manifest.from_json(broken)
            except CorruptCheckpointError:
                continue
            assert found == whole, f"byte {place}, bit {bit}: parsed as another manifest"


def test_a_missing_run_directory_is_a_fresh_start(tmp_path: Path) -> None:
    run = train_quietly(tmp_path / "not" / "yet" / "there", max_steps=2).run
    assert run.resumed_from is None
    assert run.committed_step == 2


def test_an_empty_run_directory_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run = train_quietly(tmp_path / "run", max_steps=2).run
    assert run.resumed_from is None
    assert run.committed_step == 2


@pytest.mark.parametrize("inside", [[], ["notes.txt"]], ids=["empty", "without-manifest"])
def test_a_committed_name_without_a_manifest_is_set_aside(inside: list[str], damaged: Path, twin: Path) -> None:
    folder = damaged / "checkpoints" / LAST
    shutil.rmtree(folder)
    folder.mkdir()
    for name in inside:
        (folder / name).write_text("not a checkpoint")
    output = require_fallback(damaged, twin, BEFORE, lost=[LAST])
    assert "there is no manifest.json; it was never committed" in output


def test_a_torn_newest_is_thrown_away_and_said(damaged: Path, twin: Path) -> None:
    checkpoints = damaged / "checkpoints"
    (checkpoints / LAST).rename(checkpoints / f".saving-{LAST}-a000001")
    (checkpoints / f".saving-{LAST}-a000001" / "manifest.json").unlink()
    output = require_fallback(damaged, twin, BEFORE, lost=[])
    assert f".saving-{LAST}-a000001 is torn" in output
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []


def test_several_damaged_ones_are_all_named(damaged: Path, twin: Path) -> None:
    Damage("flip", 1).apply(damaged / "checkpoints" / LAST / FILES[2])
    Damage("truncate", 0.5).apply(damaged / "checkpoints" / BEFORE / "manifest.json")
    output = require_fallback(damaged, twin, OLDEST, lost=[LAST, BEFORE])
    assert FILES[2] in output


def test_all_damaged_is_a_fresh_start_that_comes_to_the_same_end(damaged: Path, twin: Path) -> None:
    names = checkpoint_names(damaged)
    for name in names:
        Damage("truncate", 0).apply(damaged / "checkpoints" / name / FILES[3])
    ended = train_quietly(damaged)
    assert ended.run.resumed_from is None
    assert all(name in ended.output for name in names)
    assert len(list((damaged / "checkpoints").glob(".corrupt-*"))) == len(names)
    assert_same_run(twin, damaged)


def test_all_damaged_is_an_error_when_a_checkpoint_was_required(damaged: Path) -> None:
    for name in checkpoint_names(damaged):
        Damage("flip", 0).apply(damaged / "checkpoints" / name / FILES[3])
    with pytest.raises(NoCheckpointError, match=f"resume='must'.*{FILES[3]}"):
        train_quietly(damaged, resume="must")


def write_format_two(folder: Path) -> None:
    body = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**body, "format": 2, "digest": "of another kind", "new": 1}))


@pytest.mark.parametrize("spoil_another", [False, True])
def test_an_unknown_format_is_an_error_and_nothing_is_renamed(spoil_another: bool, damaged: Path) -> None:
    write_format_two(damaged / "checkpoints" / LAST)
    if spoil_another:
        Damage("delete").apply(damaged / "checkpoints" / BEFORE / "manifest.json")
    before = contents(damaged / "checkpoints")
    with pytest.raises(FormatVersionError, match=rf"{LAST}.*format 2.*reads 1.*Upgrade"):
        train_quietly(damaged)
    assert contents(damaged / "checkpoints") == before


def larger_model() -> torch.nn.Module:
    model: Any = build_model()
    model[-1] = torch.nn.Linear(32, 3)
    return torch.nn.Sequential(*model, torch.nn.Linear(3, 1))


def test_another_model_is_refused_with_what_differs_and_nothing_is_changed(damaged: Path) -> None:
    model = larger_model()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    kept = unaccounted(damaged)
    told = (damaged / "run.jsonl").read_text()
    with pytest.raises(StateMismatchError, match="Nothing was changed") as caught:
        train_quietly(damaged, model=model)
    message = str(caught.value)
    assert "model/7.weight is in the model and not in the checkpoint" in message
    assert "model/6.weight is [1, 32] torch.float32 in the checkpoint and [3, 32] torch.float32 in the model" in message
    assert LAST in message
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert unaccounted(damaged) == kept
    more = (damaged / "run.jsonl").read_text().removeprefix(told).splitlines()
    assert [json.loads(line)["event"] for line in more] == ["time"]  # what the attempt cost


def unaccounted(run_dir: Path) -> dict[str, str]:
    """All but what every attempt leaves: its number, and its line in the account of time."""
    return {
        name: digest for name, digest in contents(run_dir).items() if not name.startswith(("attempts", "run.jsonl"))
    }


@pytest.mark.parametrize("lose", [leave_at(9), leave_at(11)], ids=["after-a-save", "between-saves"])
def test_an_error_in_the_loop_loses_nothing_that_was_committed(
    lose: Callable[[Any], None], tmp_path: Path, twin: Path
) -> None:
    with pytest.raises(LeaveError):
        train(tmp_path / "run", on_step=lose)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "error"
    assert "LeaveError: left at step" in status["error"]
    train_quietly(tmp_path / "run", resume="must")
    assert_same_run(twin, tmp_path / "run")
