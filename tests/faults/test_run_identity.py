"""What a run directory says of itself: missing or damaged, it is made again from what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dist_train as dt
from dist_train.checkpoint.overview import describe_run
from dist_train.checkpoint.store import Store


def train(run_dir: Path, steps: int, resume: str = "auto") -> dt.Run:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = dt.CheckpointPolicy(every_steps=1, keep_last=2)
    options = dt.RunOptions(max_steps=steps)
    with dt.Run(str(run_dir), model=model, optimizer=optimizer, policy=policy, options=options, resume=resume) as run:
        for _ in run.epochs(99):
            while not run.should_stop:
                run.step()
    return run


@pytest.mark.parametrize("damage", [None, b"", b"{]", b"[]", b'{"run_id": null'], ids=str)
def test_a_damaged_run_json_takes_the_id_of_the_newest_checkpoint(tmp_path: Path, damage: bytes | None) -> None:
    train(tmp_path, 3)
    path = tmp_path / "run.json"
    identity = json.loads(path.read_text())["run_id"]
    path.unlink() if damage is None else path.write_bytes(damage)
    run = train(tmp_path, 6)
    assert run.resumed_from is not None
    assert json.loads(path.read_text())["run_id"] == identity
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*"))
    assert [name[:13] for name in kept] == ["step-00000005", "step-00000006"]


def test_starting_a_branch_is_an_event_and_going_on_with_it_is_none(tmp_path: Path) -> None:
    train(tmp_path, 3)
    origin = str(tmp_path / "checkpoints" / "step-00000002")
    for steps in (4, 5):
        train(tmp_path, steps, resume=origin)
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    branched = [event for event in events if event["event"] == "branched"]
    assert [(event["attempt"], event["path"], event["global_step"]) for event in branched] == [(2, origin, 2)]


def test_what_a_killed_heartbeat_left_is_cleared(tmp_path: Path) -> None:
    train(tmp_path, 1)
    leftover = tmp_path / "attempts" / "owner.json.1-2.tmp"
    leftover.write_text("{")
    train(tmp_path, 2)
    assert not leftover.exists()


def test_a_killed_run_is_shown_as_killed_at_its_newest_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 3)
    status = {
        "status": "running",
        "exit_code": None,
        "global_step": 0,
        "epochs_completed": 0,
        "attempt": 1,
        "error": "",
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    owner = json.loads((tmp_path / "attempts" / "owner.json").read_text())
    gone = {**owner, "pid": 2**22 + 1, "pid_started": "1", "released": False}
    (tmp_path / "attempts" / "owner.json").write_text(json.dumps(gone))
    shown = describe_run(Store(tmp_path))["status"]
    assert (shown["status"], shown["global_step"]) == ("killed", 3)
    (tmp_path / "attempts" / "owner.json").write_text(json.dumps({**gone, "host": "another"}))
    assert describe_run(Store(tmp_path))["status"]["status"] == "running"
