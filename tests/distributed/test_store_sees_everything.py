"""Every change of a save, commit, retention and resume goes through the store: its log equals what strace sees."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support import recorded, system_calls
from tests.support.damage import checkpoint_names, events
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.system_calls import Change

RECORDED = str(ROOT / "tests/support/recorded.py")
SPECIMEN = str(ROOT / "tests/support/specimen.py")
KINDS = {"open": "create", "fsync_dir": "fsync"}


def logged_changes(log: Path, root: Path) -> list[Change]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({line["pid"] for line in lines}) == 2  # both ranks
    changes = [Change(KINDS.get(line["kind"], line["kind"]), line["path"], line["target"]) for line in lines]
    return [one for one in changes if one.path == str(root) or one.path.startswith(f"{root}/")]


def by_path(changes: list[Change]) -> dict[str, list[str]]:
    """What happened to each path, in order; several writes in a row are one."""
    histories: dict[str, list[str]] = {}
    for one in changes:
        history = histories.setdefault(one.path, [])
        step = f"{one.kind} -> {one.target}" if one.target else one.kind
        if not (step == "write" and history[-1:] == ["write"]):
            history.append(step)
    return histories


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")
def test_the_log_of_the_store_is_all_that_happens_on_disk(tmp_path: Path) -> None:
    """Two ranks, saves with retention, and a second run that resumes and saves in the same processes."""
    run_dir, log, trace = tmp_path / "runs" / "run", tmp_path / "store.jsonl", tmp_path / "strace"
    arguments = ["--run-dir", str(run_dir), "--every-steps", "2", "--epochs"]
    script = torchrun(2, RECORDED, SPECIMEN, *arguments, "1", "--then", *arguments, "2")
    extra = {recorded.VARIABLE: str(log)}
    run_command([*system_calls.command(trace), *script], deadline_seconds=200, extra=extra).require_success()
    kinds = Counter(event["event"] for event in events(run_dir))
    assert (kinds["started"], kinds["resumed"]) == (1, 1)
    assert kinds["committed"] >= 6
    assert kinds["pruned"] >= 2

    seen, told = system_calls.changes_below(trace, run_dir), logged_changes(log, run_dir)
    happened, said = by_path(seen), by_path(told)
    assert {path: happened[path] for path in happened.keys() - said.keys()} == {}, "changed behind the store's back"
    assert {path: said[path] for path in said.keys() - happened.keys()} == {}, "told and not done"
    differing = {path: (said[path], happened[path]) for path in happened if happened[path] != said[path]}
    assert differing == {}
    require_committed_bytes(run_dir, seen)


def require_committed_bytes(run_dir: Path, seen: list[Change]) -> None:
    """The bytes that reached each data file are its own: nothing was put there by a way that strace did not see."""
    written: Counter[str] = Counter()
    for one in seen:
        if ".saving-" in one.path and one.kind == "write":
            folder, name = one.path.split("/")[-2:]
            written[f"{folder.removeprefix('.saving-').rsplit('-a', 1)[0]}/{name}"] += one.num_bytes
    for folder in checkpoint_names(run_dir):
        for path in (run_dir / "checkpoints" / folder).iterdir():
            size = path.stat().st_size
            padded = -(-size // 4096) * 4096 if path.suffix == ".safetensors" else size
            assert written[f"{folder}/{path.name}"] in (size, padded), path
