"""A branch.json that cannot be used: one clear error, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.branch import read_record
from dist_train.checkpoint.store import Store
from dist_train.errors import StorageError
from tests.support.small_run import SmallRun

SOUND: dict[str, Any] = {
    "requested": "epoch:1",
    "origin": ["", "checkpoints/step-00000005", "digest"],
    "origin_sequence": 1,
    "first_sequence": 4,
    "attempt": 2,
}


def damaged() -> list[Any]:
    cases: list[Any] = [[1], None, {}]
    for name in SOUND:
        cases += [{**SOUND, name: wrong} for wrong in (None, ["", "x"], {}, 1.5)]
        cases.append({key: value for key, value in SOUND.items() if key != name})
    return [*cases, {**SOUND, "skip": None}, {**SOUND, "branch_sequence": "4"}]


def test_a_sound_record_is_read_and_none_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert read_record([store]) is None
    store.replace("branch.json", json.dumps(SOUND).encode())
    assert read_record([store]) == {**SOUND, "origin": [str(store.root), *SOUND["origin"][1:]]}


def test_whatever_is_wrong_with_it_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for content in [b"{", b"\xff", *(json.dumps(one).encode() for one in damaged())]:
        store.replace("branch.json", content, durable=False)
        with pytest.raises(StorageError, match=r"branch\.json is damaged: .* Put it back from a copy; or delete it"):
            read_record([store])


def test_a_run_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    SmallRun(run_dir=run_dir, epochs=1).train()
    (run_dir / "branch.json").write_text('{"requested":"","origin":["","x","y"]}')
    with pytest.raises(StorageError, match="expected `origin_sequence` to be a whole number, found None"):
        SmallRun(run_dir=run_dir, epochs=2).train()
