"""What stays in a run directory: policies through real small runs, then `dist-train prune`, `pin` and `unpin`."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint import verify
from dist_train.checkpoint.catalog import committed, list_checkpoints
from dist_train.checkpoint.holdings import survey
from dist_train.checkpoint.keeper import Keeper
from dist_train.checkpoint.manifest import Manifest, step_name
from dist_train.checkpoint.ownership import read_owner
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.stripping import strip
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.checkpoint.writer import Pruned
from dist_train.cli import main
from dist_train.errors import StopReason
from dist_train.run import Run
from tests.support.small_run import SmallRun

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., tuple[int, str, str]]
VALUES = [50.0, 40.0, 30.0, 35.0, 45.0, 46.0, 47.0, 48.0, 49.0, 51.0, 52.0, 53.0]
"""The metric of each epoch; the third is best."""


def train(run_dir: Path, epochs: int, resume: str = "auto", **policy: Any) -> SmallRun:
    """Five updates an epoch, saved after each."""
    settings = {"every_epochs": 1, "monitor": "val", **policy}
    small = SmallRun(
        run_dir=run_dir,
        epochs=epochs,
        policy=CheckpointPolicy(**settings),
        resume=resume,
        metrics=lambda run: {"val": VALUES[run.epoch % len(VALUES)]},
    )
    small.train()
    return small


def manifests(run_dir: Path) -> dict[int, Manifest]:
    """By epochs completed."""
    return {one.progress.epochs_completed: one for _, one in committed(list_checkpoints(Store(run_dir)))}


def epochs_kept(run_dir: Path) -> list[int]:
    """Those that verify, which must be all."""
    store = Store(run_dir)
    for path, one in committed(list_checkpoints(store)):
        assert not verify_checkpoint(store, path, one)
    return sorted(manifests(run_dir))


def epoch_folder(run_dir: Path, epoch: int) -> Path:
    return run_dir / "checkpoints" / step_name(5 * epoch)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / "run.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve epochs, all kept."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(run_dir, 12, keep_last=12)
    return run_dir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


# Policies, through real runs


def test_disk_option_1_keeps_the_last_five_epochs(tmp_path: Path) -> None:
    train(tmp_path, 8, keep_last=5, keep_best=0)
    assert epochs_kept(tmp_path) == [4, 5, 6, 7, 8]


def test_disk_option_2_keeps_every_fifth_epoch_and_the_newest(tmp_path: Path) -> None:
    train(tmp_path, 12, keep_last=1, keep_best=0, keep_every_epochs=5)
    assert epochs_kept(tmp_path) == [5, 10, 12]


def test_disk_option_3_keeps_latest_and_best_only(tmp_path: Path) -> None:
    train(tmp_path, 6, keep_last=1, keep_best=1)
    assert epochs_kept(tmp_path) == [3, 6]
    assert os.readlink(tmp_path / "best").endswith(step_name(15))
    assert os.readlink(tmp_path / "latest").endswith(step_name(30))


def test_the_best_k_and_multiples_of_a_step_are_kept(tmp_path: Path) -> None:
    train(tmp_path, 8, keep_last=1, keep_best=2, keep_every_steps=20)
    assert epochs_kept(tmp_path) == [3, 4, 8]


def test_what_was_pruned_and_why_stands_in_the_events(tmp_path: Path) -> None:
    train(tmp_path, 4, keep_last=2, keep_best=0)
    assert [(event["path"][-2:], event["reason"]) for event in events(tmp_path, "pruned")] == [
        ("05", "older than the newest 2"),
        ("10", "older than the newest 2"),
    ]


def test_older_checkpoints_become_weights_only_and_verify(tmp_path: Path) -> None:
    train(tmp_path, 5, keep_last=4, keep_best=1, keep_optimizer=2)
    assert epochs_kept(tmp_path) == [2, 3, 4, 5]
    bare = {epoch for epoch, one in manifests(tmp_path).items() if one.stripped_from}
    assert bare == {2, 3}
    assert all(set(manifests(tmp_path)[epoch].absent) == {"optimizer", "scheduler"} for epoch in bare)
    assert not list(epoch_folder(tmp_path, 2).glob("optimizer-*"))
    assert [event["path"][-2:] for event in events(tmp_path, "stripped")] == ["05", "10", "15"], "the first went later"
    assert all(event["bytes"] > 0 for event in events(tmp_path, "stripped"))


def test_a_weights_only_checkpoint_is_continued_with_its_weights(tmp_path: Path) -> None:
    train(tmp_path, 5, keep_last=5, keep_optimizer=2)
    small = train(tmp_path, 6, resume="epoch:2", keep_last=9)
    assert small.run is not None
    assert small.run.resumed_from == str(epoch_folder(tmp_path, 2))
    assert small.run.reason is StopReason.DONE
    assert small.used[0][0] == 2, "from the third epoch on"


def test_a_branch_whose_origin_was_stripped_since_is_continued(tmp_path: Path) -> None:
    """branch.json names the full manifest's digest."""
    train(tmp_path, 4, keep_last=9)
    train(tmp_path, 5, resume="epoch:2", keep_last=9, keep_optimizer=1)
    assert manifests(tmp_path)[2].stripped_from is not None
    for epoch in (3, 4, 5):
        (epoch_folder(tmp_path, epoch) / "manifest.json").write_text("{")
    small = train(tmp_path, 3, resume="epoch:2", keep_last=9)
    assert small.run is not None
    assert small.run.resumed_from == str(epoch_folder(tmp_path, 2))


def test_the_directory_never_exceeds_its_budget_even_while_a_save_is_in_flight(tmp_path: Path) -> None:
    train(tmp_path / "one", 1)
    size = Store(epoch_folder(tmp_path / "one", 1)).tree_bytes()
    budget = 4 * size + 30_000
    largest = 0

    def watch(operation: Operation) -> None:
        nonlocal largest
        largest = max(largest, Store(run_dir).tree_bytes())

    run_dir = tmp_path / "run"
    small = SmallRun(
        run_dir=run_dir,
        epochs=9,
        policy=CheckpointPolicy(every_epochs=1, keep_last=9, max_bytes=budget),
        metrics=lambda run: {"val": VALUES[run.epoch]},
        open_store=lambda root: Store(root, observer=watch),
    )
    small.train()
    assert 3 * size < largest <= budget
    assert epochs_kept(run_dir) == [3, 8, 9]


def test_a_budget_that_cannot_be_kept_is_told_once_and_yields(tmp_path: Path, capfd: Any) -> None:
    train(tmp_path, 5, keep_last=3, max_bytes=1000)
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("max_bytes=1000 cannot be kept") == 1
    assert "What helps: raise max_bytes; give keep_optimizer=1" in told
    assert epochs_kept(tmp_path) == [3, 4, 5], "the best and the newest two"


def test_a_setting_without_effect_is_warned_of(tmp_path: Path, capfd: Any) -> None:
    train(tmp_path, 1, every_epochs=None, every_steps=5, keep_every_epochs=5)
    assert "keep_every_epochs=5 keeps what was saved at those epochs" in capfd.readouterr().err


def test_a_pinned_checkpoint_outlives_training_and_a_branch(tmp_path: Path, call: Call) -> None:
    train(tmp_path, 3, keep_last=3)
    assert call("pin", tmp_path, "epoch:2")[0] == 0
    train(tmp_path, 8, keep_last=1, keep_best=0, keep_optimizer=1)
    assert epochs_kept(tmp_path) == [2, 8]
    assert (epoch_folder(tmp_path, 2) / "optimizer-00001-of-00001.safetensors").exists()
    train(tmp_path, 4, keep_last=9, resume=str(epoch_folder(tmp_path, 2)))
    call("pin", tmp_path, "latest")
    train(tmp_path, 3, keep_last=9, resume=f"{epoch_folder(tmp_path, 2)}#again")
    left = sorted(path.name for path in (tmp_path / "checkpoints" / "abandoned").glob("*/step-*"))
    code, _, _ = call("prune", tmp_path, "--abandoned", "--yes")
    assert code == 0
    assert len(left) > 1
    assert [path.name for path in (tmp_path / "checkpoints" / "abandoned").glob("*/step-*")] == [step_name(20)]


# prune


def test_prune_shows_what_and_why_and_changes_nothing(copy: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    code, out, err = call("prune", copy, "--keep-last", 3, "--keep-every-epochs", 5, "--keep-optimizer", 2)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "Policy: keep_last=3, keep_best=1 (val, lower is better), keep_every_epochs=5, keep_optimizer=2" in text
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("step-")}
    assert "delete" in lines[step_name(5)]
    assert "older than the newest 3" in lines[step_name(5)]
    assert "weights only  best val; older than" in lines[step_name(15)]
    assert "weights only  every 5th epoch;" in lines[step_name(25)]
    assert "keep          the newest" in lines[step_name(60)]
    assert "7 checkpoints would be deleted, 3 would become weights-only" in text
    assert "Nothing was changed. This does it, once 2 checkpoints" in text
    last = f"  dist-train prune {copy} --keep-last 3 --keep-every-epochs 5 --keep-optimizer 2 --yes"
    assert out.splitlines()[-1] == last
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_the_line_that_prune_ends_in_does_what_it_showed(copy: Path, call: Call) -> None:
    shown = json.loads(call("prune", copy, "--keep-last", 2, "--keep-optimizer", 1, "--json")[1])
    command = call("prune", copy, "--keep-last", 2, "--keep-optimizer", 1)[1].splitlines()[-1].split()
    code, out, err = call(*command[1:])
    assert (code, err) == (0, "")
    assert "9 checkpoints deleted, 2 made weights-only" in " ".join(out.split())
    expected = {one["path"] for one in shown["checkpoints"] if one["action"] != "delete"}
    assert {str(path) for path in (copy / "checkpoints").glob("step-*")} == expected
    assert epochs_kept(copy) == [3, 11, 12]
    assert {epoch for epoch, one in manifests(copy).items() if one.stripped_from} == {3, 11}
    assert abs(Store(copy).tree_bytes() - shown["bytes_after"]) < 10_000, "but for the events and the manifests"
    assert len(events(copy, "pruned")) == 9
    assert {event["by"] for event in events(copy, "pruned") + events(copy, "stripped")} == {"dist-train prune"}
    assert "Nothing was pruned: 3 checkpoints stay" in call(*command[1:])[1]


def test_prune_takes_the_recorded_policy_by_default(copy: Path, call: Call) -> None:
    code, out, _ = call("prune", copy)
    assert code == 0
    assert "keep_last=12" in out
    assert "Nothing is to be pruned: 12 checkpoints stay" in out
    assert "--yes" not in out


def test_zero_takes_a_recorded_setting_away(tmp_path: Path, call: Call) -> None:
    train(tmp_path, 4, keep_last=4, keep_every_epochs=2, keep_optimizer=4, max_bytes="1GB")
    zero = ["--keep-every-epochs", 0, "--keep-optimizer", 0, "--max-bytes", 0]
    policy = json.loads(call("prune", tmp_path, *zero, "--json")[1])["policy"]
    assert (policy["keep_every_epochs"], policy["keep_optimizer"], policy["max_bytes"]) == (None, None, None)


def test_prune_within_a_budget_says_when_it_cannot_be_kept(copy: Path, call: Call) -> None:
    facts = json.loads(call("prune", copy, "--max-bytes", "1kB", "--json")[1])
    assert facts["shortfall"] == facts["bytes_after"] - 1000
    assert sum(one["action"] == "keep" for one in facts["checkpoints"]) == 3
    code, out, _ = call("prune", copy, "--max-bytes", "1kB", "--yes")
    assert code == 0
    assert "max_bytes=1kB cannot be kept" in " ".join(out.split())
    assert epochs_kept(copy) == [3, 11, 12]


def test_prune_reads_back_what_must_stay_and_falls_back_on_older_ones(copy: Path, call: Call) -> None:
    shard = next(epoch_folder(copy, 12).glob("model-*"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    code, out, _ = call("prune", copy, "--keep-last", 2, "--keep-best", 0, "--yes")
    assert code == 1, "damage was found"
    assert "step-00000060 is damaged: model-00001-of-00001.safetensors" in " ".join(out.split())
    assert sorted(manifests(copy)) == [10, 11, 12], "two that verify, and the damaged one as it was"


def test_prune_gives_up_abandoned_and_corrupt_ones_on_request_only(copy: Path, call: Call) -> None:
    train(copy, 9, resume="epoch:9", keep_last=12)
    broken = epoch_folder(copy, 4)
    broken.rename(broken.with_name(".corrupt-a000009-step-00000020"))
    out = call("prune", copy)[1]
    assert "checkpoints/abandoned/a000002:" in out
    assert "set aside:" in out
    assert "goes with --abandoned and --corrupt" in out
    assert call("prune", copy, "--abandoned", "--corrupt", "--yes")[0] == 0
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
        "abandoned",
        *(step_name(5 * epoch) for epoch in (1, 2, 3, 5, 6, 7, 8, 9)),
    ]
    assert list((copy / "checkpoints" / "abandoned").iterdir()) == []


def die(run: Run) -> None:
    raise KeyError("as by a kill: nothing is saved")


@pytest.fixture
def unsaved_branch(copy: Path) -> Path:
    """A run that went on from epoch 2, then from epoch 3 of what that left behind, and died; gives this origin."""
    train(copy, 5, resume="epoch:2", keep_last=12)
    (origin,) = (copy / "checkpoints" / "abandoned").glob(f"*/{step_name(15)}")
    with pytest.raises(KeyError):
        SmallRun(run_dir=copy, epochs=9, resume=str(origin), at_step=die).train()
    return origin


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("options", [["--abandoned"], ["--max-bytes", "1kB"]], ids=["abandoned", "budget"])
def test_the_origin_of_a_branch_stays_until_the_branch_has_saved(
    options: list[str], weights_only: bool, copy: Path, unsaved_branch: Path, call: Call
) -> None:
    if weights_only:
        path = str(unsaved_branch.relative_to(copy))
        (one,) = (one for one in survey(Store(copy)) if one.path == path)
        assert one.manifest is not None
        assert strip(Store(copy), path, one.manifest)
    code, out, _ = call("prune", copy, *options, "--yes")
    assert code == 0
    assert "step-00000060" in out, "others that were left behind went"
    assert [one.name for one in (copy / "checkpoints" / "abandoned").glob("*/step-*")] == [step_name(15)]
    told = json.loads(call("prune", copy, *options, "--json")[1])["checkpoints"]
    reasons = {one["path"]: one["reason"] for one in told}
    assert reasons[str(unsaved_branch)] == "a branch starts from it that has saved nothing yet"
    small = train(copy, 4, resume=str(unsaved_branch), keep_last=12)
    assert small.run is not None
    assert small.run.resumed_from == str(unsaved_branch)
    assert call("prune", copy, *options, "--yes")[0] == 0
    assert not unsaved_branch.exists(), "the branch has saved: its origin is like any other"


def test_a_training_within_a_budget_spares_the_origin_of_a_branch_that_has_saved_nothing(unsaved_branch: Path) -> None:
    run_dir = unsaved_branch.parents[3]
    store = Store(run_dir)
    keeper = Keeper(store, CheckpointPolicy(keep_last=1, keep_best=0, max_bytes=1), is_lost=lambda: False)
    gone = [one.path for one in keeper.make_room(manifests(run_dir)[1].run_id, None) if isinstance(one, Pruned)]
    assert len(gone) > 3
    assert unsaved_branch.exists()


def test_prune_of_a_killed_run_needs_no_owner(copy: Path, call: Call) -> None:
    owner = copy / "attempts" / "owner.json"
    body = json.loads(owner.read_text())
    owner.write_text(json.dumps({**body, "released": False, "pid": 2**22 + 1}))
    assert not json.loads(call("prune", copy, "--json")[1])["is_training"]
    owner.write_text(json.dumps({**body, "released": False, "host": "elsewhere"}))
    assert read_owner(Store(copy)) is not None
    facts = json.loads(call("prune", copy, "--keep-last", 1, "--keep-best", 0, "--json")[1])
    assert facts["is_training"]
    assert [one["action"] for one in facts["checkpoints"][-2:]] == ["keep", "keep"]


def test_prune_of_nothing_is_an_error(tmp_path: Path, call: Call) -> None:
    (tmp_path / "run.json").write_text("{}")
    code, out, err = call("prune", tmp_path)
    assert (code, out) == (1, "")
    assert "there is nothing to prune" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "x", "--yes", "--dry-run"],
        ["prune", "x", "--keep-last", "many"],
        ["prune", "x", "--max-bytes", "lots"],
        ["pin", "x"],
        ["pin", "x", "step:x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_policy_that_cannot_work_is_a_message(copy: Path, call: Call) -> None:
    code, out, err = call("prune", copy, "--keep-last", 0)
    assert (code, out) == (1, "")
    assert "keep_last is 0; it must be a whole number of at least 1" in err


def test_progress_is_shown_on_a_terminal_only(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("dist_train.console.METER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["prune", str(copy), "--keep-last", "2", "--yes"]) == 0
    assert "verify step-00000060: " in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the live line is taken away"


def test_what_is_stripped_while_it_is_verified_is_no_damage(
    copy: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verify.verify_checkpoint

    def strip_first(store: Store, path: str, one: Manifest, **more: Any) -> Any:
        if path.endswith(step_name(55)) and one.stripped_from is None:
            strip(store, path, one)
        return original(store, path, one, **more)

    monkeypatch.setattr(verify, "verify_checkpoint", strip_first)
    assert call("verify", copy)[0] == 0
    assert manifests(copy)[11].stripped_from is not None
    assert call("prune", copy, "--keep-last", 2, "--keep-best", 0, "--yes")[0] == 0
    assert epochs_kept(copy) == [11, 12]


# pin, unpin


def test_pins_are_shown_and_taken_away(copy: Path, call: Call) -> None:
    code, out, err = call("pin", copy, "epoch:2", "best")
    assert (code, err) == (0, "")
    assert out.count("is pinned: it is neither deleted nor made weights-only") == 2
    rows = json.loads(call("ls", copy, "--json")[1])
    assert [row["epochs_completed"] for row in rows if row["pinned"]] == [2, 3]
    assert "best, pinned" in call("ls", copy)[1]
    assert "kept           pinned" in call("show", copy, "--checkpoint", "best")[1]
    (pin_file,) = (path for path in (copy / "pins").iterdir() if path.name == manifests(copy)[2].digest)
    assert pin_file.read_text() == f"checkpoints/{step_name(10)}\n"
    assert call("unpin", copy, "epoch:2", "epoch:4", "--json")[1].count('"was_pinned": true') == 1
    assert [row["epochs_completed"] for row in json.loads(call("ls", copy, "--json")[1]) if row["pinned"]] == [3]
    assert "was not pinned" in call("unpin", copy, "epoch:2")[1]


def test_weights_only_ones_are_shown_as_such(copy: Path, call: Call) -> None:
    call("prune", copy, "--keep-last", 3, "--keep-optimizer", 2, "--yes")
    assert "best, weights only" in call("ls", copy)[1]
    text = " ".join(call("show", copy, "--checkpoint", "best")[1].split())
    assert "weights-only (a resume starts fresh: optimizer, scheduler)" in text
    facts = json.loads(call("show", copy, "--checkpoint", "best", "--json")[1])["checkpoint"]
    assert facts["weights_only"]
    assert facts["stripped_from"]
    assert "optimizer" not in "".join(facts["files"])


def test_what_cannot_be_pinned_is_told(copy: Path, tmp_path: Path, call: Call) -> None:
    other = Path(shutil.copytree(epoch_folder(copy, 1), tmp_path / "elsewhere"))
    assert "lies outside of" in call("pin", copy, other)[2]
    assert "it holds those after epoch" in call("pin", copy, "epoch:99")[2]
    (epoch_folder(copy, 2) / "manifest.json").write_text("{")
    assert "the manifest is not JSON" in call("pin", copy, step_name(10))[2]
    (copy / "pins").write_text("in the way")
    code, out, err = call("pin", copy, "latest")
    assert (code, out) == (1, "")
    assert "was not pinned: " in err
    assert err.count("\n") == 1


def test_every_line_fits_80_columns(copy: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    train(copy, 9, resume="epoch:9", keep_last=12)
    monkeypatch.chdir(copy.parent)
    for more in ([], ["--max-bytes", "1kB"], ["--keep-last", 2, "--keep-optimizer", 1, "--abandoned", "--yes"]):
        out = call("prune", "run", *more)[1]
        assert [line for line in out.splitlines() if len(line) > 80] == []


HIDE_AND_RUN = """
import sys
hidden = sys.argv[1].split(",")
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hider())
from dist_train.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        (["prune", "--keep-last", "1"], "torch,numpy,accelerate,safetensors,xxhash"),
        (["prune", "--keep-last", "1", "--yes"], "torch,numpy,accelerate,safetensors"),
        (["pin", "latest"], "torch,numpy,accelerate,safetensors,xxhash"),
    ],
    ids=["dry run", "prune", "pin"],
)
def test_commands_work_where_torch_is_missing(copy: Path, arguments: list[str], hidden: str) -> None:
    command, *more = arguments
    done = subprocess.run(
        [sys.executable, "-c", HIDE_AND_RUN, hidden, command, str(copy), *more, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    json.loads(done.stdout)
