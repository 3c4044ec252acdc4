"""`dist-train ls`, `show` and `verify` on run directories that the library wrote."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoint import verify
from dist_train.checkpoint.listing import list_lines
from dist_train.checkpoint.manifest import FileEntry, Manifest, step_name
from dist_train.checkpoint.overview import describe_checkpoint, list_rows
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.cli import main
from dist_train.data import data_loader
from dist_train.run import Run

ROOT = Path(__file__).resolve().parents[2]
SMAPE = {1: 30.0, 2: 20.0, 3: 25.0, 4: 40.0}
MODEL_FILE = "model-00001-of-00001.safetensors"
OPTIMIZER_FILE = "optimizer-00001-of-00001.safetensors"
STATE_FILE = "state-00001-of-00001.safetensors"
Call = Callable[..., tuple[int, str, str]]


class Ema:
    """Something with tensors of its own, for the group `state`."""

    def __init__(self) -> None:
        self.state = {"shadow": torch.ones(3)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def train(run_dir: Path, epochs: int = 4, resume: str = "auto") -> None:
    """Four updates an epoch; a checkpoint after each epoch and at step 6, in the middle of the second."""
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    loader = data_loader(torch.utils.data.TensorDataset(torch.ones(16, 40)), global_batch_size=4, seed=0)
    policy = CheckpointPolicy(every_steps=6, every_epochs=1, keep_last=9, monitor="val_smape")
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, Run(str(run_dir), **parts, policy=policy, resume=resume) as run:
        run.register("ema", Ema())
        for _ in run.epochs(epochs):
            for (batch,) in run.batches(loader):
                loss = model(batch).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.step(loss=loss)
            run.end_epoch(val_smape=SMAPE.get(run.epochs_completed + 1, 50.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended well: steps 4, 6, 8, 12, 16; nothing may change it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(run_dir)
    return run_dir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged."""
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


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def tree(root: Path) -> dict[str, Any]:
    """Everything that a command might change by mistake."""
    return {
        str(path): (path.lstat().st_mtime_ns, os.path.islink(path) or path.is_dir() or path.read_bytes())
        for path in sorted(root.rglob("*"))
    }


# ls


def test_ls_shows_the_checkpoints_oldest_first_with_marks(trained: Path, call: Call) -> None:
    code, out, err = call("ls", trained)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["step", "epochs", "seq", "size", "val_smape", "loss", "committed"]
    assert [line.split()[0] for line in lines[1:6]] == ["4", "6", "8", "12", "16"]
    assert [line.split()[-1] for line in lines[1:6]] == ["ago", "ago", "best", "ago", "latest"]
    assert "20.00%" in lines[3]
    assert " - " in lines[2], "step 6 lies within an epoch and has no metric"
    assert lines[7].startswith("5 checkpoints, ")


def test_ls_columns_are_aligned(trained: Path, call: Call) -> None:
    _, out, _ = call("ls", trained)
    table = out.splitlines()[:6]
    end_of_size = table[0].index("size") + len("size")
    assert all(line[end_of_size - 1] in "Be" and line[end_of_size] == " " for line in table)


def test_ls_json_has_a_row_for_each_checkpoint(trained: Path, call: Call) -> None:
    code, out, _ = call("ls", trained, "--json")
    rows = json.loads(out)
    wanted = {"step", "epochs_completed", "sequence", "bytes", "metrics", "committed_at", "best", "path"}
    assert code == 0
    assert [row["step"] for row in rows] == [4, 6, 8, 12, 16]
    assert all(wanted <= set(row) and "problem" not in row for row in rows)
    assert [row["sequence"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if row["best"]] == [8]
    assert [row["metrics"] for row in rows] == [{"val_smape": 30.0}, {}, *({"val_smape": SMAPE[i]} for i in (2, 3, 4))]
    assert [Path(row["path"]) for row in rows] == [folder(trained, step) for step in (4, 6, 8, 12, 16)]
    assert (
        rows[0]["bytes"]
        == sum(path.stat().st_size for path in folder(trained, 4).iterdir())
        - (folder(trained, 4) / "manifest.json").stat().st_size
    )


def test_ls_lists_what_cannot_be_used_with_the_reason(copy: Path, call: Call) -> None:
    flip(folder(copy, 12) / "manifest.json", 200)
    (folder(copy, 4) / "manifest.json").unlink()
    code, out, _ = call("ls", copy)
    rows = json.loads(call("ls", copy, "--json")[1])
    problems = {row["step"]: row["problem"] for row in rows if "problem" in row}
    assert code == 0
    assert out.count(" corrupt") == 2
    assert "3 checkpoints, " in out
    assert out.count("never committed") == 1
    assert set(problems) == {4, 12}
    assert "manifest" in problems[12]
    assert [row["step"] for row in rows if row["best"]] == [8]


def test_ls_says_why_an_earlier_attempt_set_a_checkpoint_aside(copy: Path, call: Call) -> None:
    flip(folder(copy, 16) / MODEL_FILE, 5000)
    train(copy, epochs=4)
    code, out, _ = call("ls", copy)
    assert code == 0
    assert ".corrupt-a000002-step-00000016\n" in out
    assert f"set aside by attempt 2: {MODEL_FILE}: has digest" in " ".join(out.split())
    row = next(row for row in list_rows(Store(copy)) if "problem" in row)
    assert (row["step"], row["sequence"], row["best"], row["latest"]) == (16, 5, False, False)


def test_ls_counts_what_is_left_over(copy: Path, call: Call) -> None:
    train(copy, epochs=4, resume=str(folder(copy, 8)))
    torn = copy / "checkpoints" / ".saving-step-00000099-a000009"
    torn.mkdir()
    (torn / MODEL_FILE).write_bytes(b"x" * 1500)
    _, out, _ = call("ls", copy)
    assert "2 left behind by a branch in checkpoints/abandoned/" in out
    assert "1 being written, or torn (.saving-), 1.5 kB" in out


def test_ls_shows_a_second_checkpoint_of_a_step_with_its_number(copy: Path, call: Call) -> None:
    shutil.copytree(folder(copy, 16), copy / "checkpoints" / "step-00000016.1")
    assert "16.1" in call("ls", copy)[1]


def test_a_run_that_has_not_saved_yet_has_an_empty_list(tmp_path: Path, call: Call) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert call("ls", tmp_path, "--json")[:2] == (0, "[]\n")
    code, out, _ = call("ls", tmp_path)
    assert (code, out) == (0, f"{tmp_path} holds no checkpoint yet.\n")


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_problem(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(copy)
    monkeypatch.setattr(store, "read", lambda path: _prune_and_read(copy, store, path))
    assert [row["step"] for row in list_rows(store)] == [6, 8, 12, 16]


def _prune_and_read(run_dir: Path, store: Store, path: str) -> bytes:
    shutil.rmtree(folder(run_dir, 4), ignore_errors=True)
    return (store.root / path).read_bytes()


def test_a_thousand_checkpoints_are_listed(trained: Path, tmp_path: Path, record_property: Any) -> None:
    one = Manifest.from_json((folder(trained, 16) / "manifest.json").read_bytes())
    for step in range(1, 1001):
        path = folder(tmp_path, step)
        path.mkdir(parents=True)
        progress = replace(one.progress, global_step=step)
        (path / "manifest.json").write_text(replace(one, sequence=step, progress=progress).to_json())
    started = time.perf_counter()
    rows = list_rows(Store(tmp_path))
    lines = list_lines(rows, {})
    record_property("seconds", time.perf_counter() - started)
    assert [row["step"] for row in rows] == list(range(1, 1001))
    assert lines[-1].startswith("1,000 checkpoints, ")


# show


def test_show_tells_how_the_run_stands_and_all_about_the_newest_checkpoint(trained: Path, call: Call) -> None:
    code, out, err = call("show", trained)
    assert (code, err) == (0, "")
    for text in (
        "done (exit code 0) at step 16, 4 epochs completed",
        "every_epochs, attempt 1, sequence 5",
        "val_smape 40.00%",
        "val_smape 20.00% at step 8, epoch 2 (lower is better)",
        "0.00625 (0.1 at construction)",
        "keep_last=9",
        "optimizer-00001-of-00001.safetensors",
        "of host memory for a save",
    ):
        assert text in out, text


def test_show_json_agrees_with_the_manifest(trained: Path, call: Call) -> None:
    facts = json.loads(call("show", trained, "--json")[1])
    run, one = facts["run"], facts["checkpoint"]
    manifest = Manifest.from_json((folder(trained, 16) / "manifest.json").read_bytes())
    assert run["run_id"] == manifest.run_id == one["run_id"]
    assert (run["attempts"], run["checkpoints"], run["status"]["status"]) == (1, 5, "done")
    assert (Path(run["newest"]), Path(run["best"])) == (folder(trained, 16), folder(trained, 8))
    assert one["digest"] == manifest.digest
    assert one["progress"]["global_step"] == 16
    assert one["best"]["value"] == 20.0
    rate = {"optimizer": "optimizer", "group": 0, "at_construction": 0.1, "now": 0.00625}
    assert one["learning_rates"] == [rate]
    assert one["data"]["global_batch_size"] == 4
    assert one["policy"]["every_steps"] == 6
    assert one["environment"]["torch"] == torch.__version__
    assert one["files"] == {name: entry.size for name, entry in manifest.files.items()}
    assert one["bytes"] == sum(one["files"].values())


def test_show_counts_tensors_and_elements_by_group(trained: Path, call: Call) -> None:
    groups = json.loads(call("show", trained, "--json")[1])["checkpoint"]["groups"]
    elements = 40 * 40 + 40
    assert {k: v for k, v in groups["model"].items() if k != "file_bytes"} == {
        "files": 1,
        "tensors": 2,
        "elements": elements,
        "bytes": 4 * elements,
    }
    assert (groups["optimizer"]["tensors"], groups["optimizer"]["elements"]) == (6, 2 * elements + 2)
    assert (groups["state"]["tensors"], groups["state"]["elements"]) == (1, 3)


def test_memory_of_a_save_is_each_ranks_files_in_whole_pages(trained: Path) -> None:
    one = Manifest.from_json((folder(trained, 16) / "manifest.json").read_bytes())
    sizes = {
        "model-00001-of-00003.safetensors": 4097,
        "model-00002-of-00003.safetensors": 4096,
        "optimizer-00001-of-00003.safetensors": 1,
        "model.safetensors.index.json": 9999,
    }
    files = {name: FileEntry(size=size, digest="") for name, size in sizes.items()}
    facts = describe_checkpoint(Store(trained), "x", replace(one, files=files, world_size=3))
    assert facts["image_bytes_by_rank"] == [3 * 4096, 4096, 4096]


@pytest.mark.parametrize(
    ("selector", "step"),
    [("latest", 16), ("best", 8), ("step:6", 6), ("step-00000012", 12), ("checkpoints/step-00000004", 4)],
)
def test_a_checkpoint_is_chosen_by_name(trained: Path, call: Call, selector: str, step: int) -> None:
    facts = json.loads(call("show", trained, "--json", "--checkpoint", selector)[1])
    assert facts["checkpoint"]["progress"]["global_step"] == step


def test_a_checkpoint_is_chosen_by_path_or_link(trained: Path, call: Call) -> None:
    for path, step in ((folder(trained, 12), 12), (trained / "best", 8)):
        facts = json.loads(call("show", trained, "--json", "--checkpoint", path)[1])
        assert facts["checkpoint"]["path"] == str(folder(trained, step))


def test_the_newest_of_several_checkpoints_of_a_step_is_chosen(copy: Path, call: Call) -> None:
    again = Path(shutil.copytree(folder(copy, 16), copy / "checkpoints" / "step-00000016.1")) / "manifest.json"
    again.write_text(replace(Manifest.from_json(again.read_bytes()), sequence=9).to_json())
    facts = json.loads(call("show", copy, "--json", "--checkpoint", "step:16")[1])
    assert facts["checkpoint"]["sequence"] == 9


def test_a_diverged_run_gives_valid_json(copy: Path, call: Call) -> None:
    path = folder(copy, 16) / "manifest.json"
    one = Manifest.from_json(path.read_bytes())
    path.write_text(replace(one, train_loss=float("nan"), metrics={"val_smape": float("inf")}).to_json())
    for command in ("ls", "show"):
        code, out, _ = call(command, copy, "--json")
        assert code == 0
        json.loads(out, parse_constant=pytest.fail)
    assert "nan" in call("show", copy)[1]


# verify


def test_a_whole_run_verifies(trained: Path, call: Call) -> None:
    code, out, err = call("verify", trained)
    assert (code, err) == (0, "")
    assert out.count("ok       step-") == 5
    assert "5 checkpoints verified: every byte is as committed" in out


def test_verify_reads_every_byte(trained: Path, call: Call) -> None:
    facts = json.loads(call("verify", trained, "--json")[1])
    assert facts["ok"]
    assert facts["bytes"] == sum(row["bytes"] for row in list_rows(Store(trained)))


def test_a_flipped_byte_is_found_with_its_range_and_tensors(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "DIGEST_BLOCK_BYTES", 4096)
    train(tmp_path, epochs=1)
    path = folder(tmp_path, 4) / OPTIMIZER_FILE
    entry = json.loads(_header(path))["weight/exp_avg"]
    at = 8 + len(_header(path)) + entry["data_offsets"][0] + 3000
    flip(path, at)
    code, out, _ = call("verify", tmp_path, "--json")
    facts = json.loads(out)
    (damage,) = facts["checkpoints"][0]["damages"]
    assert (code, facts["ok"], damage["file"]) == (1, False, OPTIMIZER_FILE)
    assert damage["start"] <= at < damage["stop"] <= damage["start"] + 4096
    assert "optimizer/weight/exp_avg" in damage["tensors"]
    assert len(damage["tensors"]) < 6, "only those in the block"
    _, text, _ = call("verify", tmp_path)
    assert "DAMAGED  step-00000004" in text
    assert f"{OPTIMIZER_FILE}, bytes {damage['start']} to {damage['stop'] - 1}" in text
    assert "tensors there: optimizer/" in text
    assert "1 of 1 checkpoint is damaged" in text


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_tensors_of_the_group_state_keep_their_names(copy: Path, call: Call) -> None:
    flip(folder(copy, 16) / STATE_FILE, 4096)
    facts = json.loads(call("verify", copy, "--checkpoint", "latest", "--json")[1])
    assert facts["checkpoints"][0]["damages"][0]["tensors"] == ["user/ema/shadow"]


@pytest.mark.parametrize("position", [7, 8, 15, 60], ids=["length", "brace", "key", "later"])
def test_a_damaged_header_is_not_trusted_to_name_tensors(copy: Path, call: Call, position: int) -> None:
    flip(folder(copy, 16) / MODEL_FILE, position)
    code, out, _ = call("verify", copy, "--checkpoint", "latest")
    assert code == 1
    assert f"{MODEL_FILE}, bytes 0 to" in out
    if position != 15:  # the key "__metadata__" is not a tensor's
        assert "its header cannot be read" in out


def test_missing_and_truncated_files_are_found(copy: Path, call: Call) -> None:
    (folder(copy, 8) / MODEL_FILE).unlink()
    os.truncate(folder(copy, 12) / OPTIMIZER_FILE, 8000)
    code, out, _ = call("verify", copy)
    assert code == 1
    assert f"{MODEL_FILE}: is missing" in out
    assert f"{OPTIMIZER_FILE}, bytes 8000 to" in out
    assert "is 8000 bytes long, expected" in " ".join(out.split())
    assert "2 of 5 checkpoints are damaged" in out


def test_every_flipped_bit_in_a_manifest_is_found(copy: Path, call: Call) -> None:
    path = folder(copy, 16) / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 40):
        flip(path, position, bit=1 << position % 7)
        code, out, _ = call("verify", copy, "--checkpoint", "step:16")
        assert code == 1, f"byte {position}"
        assert "manifest.json: " in out
        path.write_bytes(whole)


def test_verify_of_one_checkpoint_reads_no_other(copy: Path, call: Call) -> None:
    flip(folder(copy, 8) / MODEL_FILE, 5000)
    assert call("verify", copy, "--checkpoint", "latest")[0] == 0
    assert call("verify", copy, "--checkpoint", "best")[0] == 1
    assert call("verify", copy)[0] == 1


def test_verify_all_reads_abandoned_checkpoints_too(copy: Path, call: Call) -> None:
    train(copy, epochs=2, resume=str(folder(copy, 8)))
    (left,) = (copy / "checkpoints" / "abandoned").glob("*/step-00000016")
    flip(left / MODEL_FILE, 5000)
    assert call("verify", copy)[0] == 0
    code, out, _ = call("verify", copy, "--all")
    assert code == 1
    assert "DAMAGED  abandoned/a000002/step-00000016" in out


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_no_damage(
    copy: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verify.verify_checkpoint

    def prune_first(store: Store, path: str, *rest: Any, **more: Any) -> Any:
        if path.endswith(step_name(4)):
            shutil.rmtree(store.path(path))
        return original(store, path, *rest, **more)

    monkeypatch.setattr(verify, "verify_checkpoint", prune_first)
    code, out, _ = call("verify", copy)
    assert code == 0
    assert "4 checkpoints verified" in out


def test_progress_is_shown_on_a_terminal_only(trained: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("verify", trained)[2] == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("dist_train.console.METER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert call("verify", trained)[0] == 0
    assert "step-00000004: " in terminal.getvalue()
    assert "/s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the live line is taken away"


# Mistakes


def test_users_mistakes_are_one_paragraph_on_stderr(trained: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for mistake, expected in (
        (["ls", tmp_path / "nowhere"], "there is no such directory"),
        (["ls", tmp_path / "file" / "below"], "there is no such directory"),
        (["verify", tmp_path / "file"], "is a file, expected a directory"),
        (["show", tmp_path / "empty"], "is not a run directory"),
        (["ls", folder(trained, 16)], f"which is {trained}"),
        (["show", trained, "--checkpoint", "step:7"], "it holds those of step 4, 6, 8, 12, 16"),
        (["verify", trained, "--checkpoint", "last"], "there is no such folder"),
        (["show", trained, "--checkpoint", trained], "there is no manifest.json"),
    ):
        for extra in ([], ["--json"]):
            code, out, err = call(*mistake, *extra)
            assert (code, out) == (1, ""), mistake
            assert expected in err
            assert err.startswith("dist-train: ")
            assert err.count("\n") == 1
            assert "Traceback" not in err


def test_a_run_without_a_checkpoint_can_neither_be_shown_nor_verified(tmp_path: Path, call: Call) -> None:
    (tmp_path / "run.json").write_text("{}")
    for command in ("show", "verify"):
        code, out, err = call(command, tmp_path)
        assert (code, out) == (1, "")
        assert "holds no checkpoint yet" in err


def test_no_metric_means_no_best_checkpoint(copy: Path, call: Call) -> None:
    for path in copy.glob("checkpoints/step-*/manifest.json"):
        one = Manifest.from_json(path.read_bytes())
        path.write_text(replace(one, best=None, metrics={}).to_json())
    code, _, err = call("show", copy, "--checkpoint", "best")
    assert code == 1
    assert "no monitored metric" in err


def test_an_unreadable_manifest_is_a_message(copy: Path, call: Call) -> None:
    (folder(copy, 16) / "manifest.json").write_text("{")
    code, out, err = call("show", copy, "--checkpoint", "step:16")
    assert (code, out) == (1, "")
    assert "the manifest is not JSON" in err
    assert call("show", copy)[0] == 0, "the newest one that can be used"


def test_a_directory_that_may_not_be_read_is_a_message(
    trained: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dist_train.checkpoint.store.os.listdir", refuse)
    for command in ("ls", "show", "verify"):
        code, out, err = call(command, trained)
        assert (code, out) == (1, "")
        assert err.startswith(f"dist-train: {trained} cannot be read: Permission denied.")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ls"],
        ["fly", "x"],
        ["show", "x", "--checkpoint", "step:x"],
        ["show", "x", "--checkpoint", ""],
        ["verify", "x", "--all", "--checkpoint", "best"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [[], ["ls"], ["show"], ["verify"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "-h"])
    assert stopped.value.code == 0
    assert "dist-train verify runs/ultra" in capsys.readouterr().out


# All commands


def test_nothing_is_changed_by_looking(trained: Path, call: Call) -> None:
    before = tree(trained)
    for command in ("ls", "show", "verify"):
        call(command, trained)
        call(command, trained, "--json")
    assert tree(trained) == before


def test_every_line_fits_80_columns(copy: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder(copy, 12) / OPTIMIZER_FILE, 5000)
    monkeypatch.chdir(copy.parent)
    for command in ("ls", "show", "verify"):
        _, out, _ = call(command, "run")
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
    ("command", "hidden"),
    [
        ("ls", "torch,numpy,accelerate,safetensors,xxhash"),
        ("show", "torch,numpy,accelerate,safetensors,xxhash"),
        ("verify", "torch,numpy,accelerate,safetensors"),
    ],
)
def test_commands_work_where_torch_is_missing(trained: Path, command: str, hidden: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDE_AND_RUN, hidden, command, str(trained), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    json.loads(done.stdout)


def test_a_reader_that_has_seen_enough_is_no_error(trained: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dist_train.cli", "ls", str(trained)],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
