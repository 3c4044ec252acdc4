"""Files that go along with checkpoints: what was attached lies in each folder, verified, and goes where it goes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.checkpoint import attached
from dist_train.checkpoint.archive import pack
from dist_train.checkpoint.attached import read_attached
from dist_train.checkpoint.catalog import committed, list_checkpoints
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.stripping import strip
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.cli import main
from dist_train.errors import ConfigError
from dist_train.options import RunOptions
from dist_train.run import Run
from dist_train.trainer import TrainConfig, Trainer

CONFIG = b'{"model_type": "small"}'


class Settings:
    """Stands for a config of transformers: it can save itself, into one file and a hidden one of no interest."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "config.json").write_text(json.dumps(vars(self), sort_keys=True))


class Small(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.config = Settings(width=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(CONFIG)
    return path


def train(
    run_dir: Path, *items: Any, epochs: int = 1, policy: CheckpointPolicy | None = None, **options: Any
) -> list[str]:
    """One update an epoch; what the resume noted."""
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    told = RunOptions(**options)
    with Run(str(run_dir), model=model, optimizer=optimizer, policy=policy, options=told) as run:
        run.attach(*items)
        for _ in run.epochs(epochs):
            model(torch.ones(2)).backward()
            optimizer.step()
            run.step()
    events = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
    return [note for event in events if event["event"] == "resumed" for note in event["notes"]]


def checkpoints(run_dir: Path) -> list[tuple[str, Manifest]]:
    return list(committed(list_checkpoints(Store(str(run_dir)))))


def test_every_checkpoint_holds_them_and_verifies_them(config: Path, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("a b")
    train(tmp_path / "run", config, str(tmp_path / "merges.txt"), epochs=2)
    found = checkpoints(tmp_path / "run")
    assert len(found) == 2
    for path, manifest in found:
        assert (tmp_path / "run" / path / "config.json").read_bytes() == CONFIG
        assert manifest.attached == ["config.json", "merges.txt"]
        assert manifest.files["config.json"].size == len(CONFIG)
    path, manifest = found[-1]
    (tmp_path / "run" / path / "config.json").write_bytes(CONFIG.replace(b"small", b"smalL"))
    (damage,) = verify_checkpoint(Store(str(tmp_path / "run")), path, manifest)
    assert damage.file == "config.json"
    assert main(["verify", str(tmp_path / "run")]) != 0


def test_what_was_attached_counts_whatever_becomes_of_the_file(config: Path, tmp_path: Path) -> None:
    model = Small()
    with Run(str(tmp_path / "run"), model=model) as run:
        run.attach(config)
        config.unlink()
        for _ in run.epochs(1):
            run.step()
    assert (tmp_path / "run/latest/config.json").read_bytes() == CONFIG


def test_an_object_that_saves_itself_and_a_model_with_a_config(tmp_path: Path) -> None:
    assert json.loads(read_attached([Settings(width=3)])["config.json"].data) == {"values": {"width": 3}}
    said = json.loads(read_attached([nn.DataParallel(Small().bfloat16())])["config.json"].data)
    assert said == {"values": {"width": 2}, "architectures": ["Small"], "dtype": "bfloat16"}
    assert "architectures" not in vars(Small().config)


def test_a_set_has_one_order_whatever_the_process(tmp_path: Path) -> None:
    class Adapter(Settings):
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(list(vars(self)["targets"])))

    item = Adapter()
    item.targets = {"c_proj", "c_attn", "c_fc", "wte"}  # type: ignore[attr-defined]
    assert json.loads(read_attached([item])["adapter_config.json"].data) == ["c_attn", "c_fc", "c_proj", "wte"]
    assert isinstance(item.targets, set)  # type: ignore[attr-defined]


def test_the_trainer_attaches(config: Path, tmp_path: Path) -> None:
    model = Small()
    Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=torch.utils.data.TensorDataset(torch.ones(4, 2)),
        loss=lambda model, batch: model(batch[0]).mean(),
        attach=[config],
        config=TrainConfig(run_dir=str(tmp_path / "run"), epochs=1, global_batch_size=2, cpu=True),
    ).fit()
    assert (tmp_path / "run/latest/config.json").read_bytes() == CONFIG


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "model.safetensors.index.json",
        "adapter.safetensors",
        "Optimizer-notes.txt",
        "model-00001",
        ".x",
    ],
)
def test_names_of_a_checkpoint_itself_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match="itself"):
        read_attached([tmp_path / name])


def test_what_cannot_go_along_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def save_pretrained(self, folder: str) -> None:
            raise ValueError("no vocabulary")

    class WithFolder:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "templates").mkdir()

    refusals: list[tuple[Any, str]] = [
        (tmp_path / "gpt2", "no such file"),
        (tmp_path, "no plain file"),
        (WithFolder(), "templates, of the WithFolder, cannot be attached: it is no plain file"),
        (Failing(), "failed with ValueError: no vocabulary"),
        ({"a": 1}, "A dict cannot be attached"),
        (nn.Linear(1, 1), "The Linear cannot be attached: it has no config"),
    ]
    for item, text in refusals:
        with pytest.raises(ConfigError, match=text):
            read_attached([item])
    with pytest.raises(ConfigError, match=r"are called config\.json, and differ"):
        read_attached([Settings(width=3)], read_attached([config]))
    assert read_attached([config], read_attached([config])).keys() == {"config.json"}
    monkeypatch.setattr(attached, "MOST_BYTES", 30)
    (tmp_path / "a.txt").write_text("x" * 20)
    with pytest.raises(ConfigError, match=r"are 43 B, of which config\.json"):
        read_attached([config, tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("x" * 31)
    with pytest.raises(ConfigError, match="may be"):
        read_attached([tmp_path / "a.txt"])


def test_after_the_loop_has_begun_it_is_too_late(config: Path, tmp_path: Path) -> None:
    with Run(str(tmp_path / "run"), model=Small()) as run:
        for _ in run.epochs(1):
            run.step()
        with pytest.raises(ConfigError, match="before the loop"):
            run.attach(config)


def test_a_resume_with_other_files_says_so_and_the_new_ones_win(config: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", config)
    assert train(tmp_path / "run", config, epochs=2) == []
    config.write_bytes(b"{}")
    (tmp_path / "new.txt").write_text("new")
    (note,) = train(tmp_path / "run", config, tmp_path / "new.txt", epochs=3)
    assert "config.json has changed, new.txt is new" in note
    assert (tmp_path / "run/latest/config.json").read_bytes() == b"{}"
    assert "config.json is there no more" in train(tmp_path / "run", tmp_path / "new.txt", epochs=4)[-1]
    assert sorted(checkpoints(tmp_path / "run")[-1][1].attached) == ["new.txt"]


def test_a_file_that_cannot_be_written_fails_the_save_and_not_the_training(config: Path, tmp_path: Path) -> None:
    failed = []

    def fail(operation: Operation) -> None:
        if operation.path.endswith("config.json") and not failed:
            failed.append(operation.path)
            raise OSError(errno.EIO, "Input/output error", operation.path)

    train(tmp_path / "run", config, epochs=2, open_store=lambda root: Store(root, observer=fail))
    assert len(failed) == 1
    (only,) = checkpoints(tmp_path / "run")
    assert only[1].progress.global_step == 2
    assert only[1].attached == ["config.json"]
    events = [json.loads(line)["event"] for line in (tmp_path / "run/run.jsonl").read_text().splitlines()]
    assert events.count("failed") == 1


def test_a_weights_only_checkpoint_and_a_pack_keep_them(config: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", config, epochs=2)
    store = Store(str(tmp_path / "run"))
    path, manifest = checkpoints(tmp_path / "run")[0]
    assert strip(store, path, manifest)
    stripped = checkpoints(tmp_path / "run")[0][1]
    assert stripped.attached == ["config.json"]
    assert not verify_checkpoint(store, path, stripped)
    done = pack(str(tmp_path / "run"), str(tmp_path / "run.zip"), weights_only=True)
    names = zipfile.ZipFile(done.path).namelist()
    assert sum(name.endswith("/config.json") for name in names) == 1
