"""Two real ranks: damage that only one of them sees, what lies on disk, and a directory that is not shared."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.world import World
from tests.support.damage import DAMAGES, Damage, checkpoint_names, contents, copy_run, events
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.threads import on_ranks
from tests.support.twins import assert_same_run

SPECIMEN = str(ROOT / "tests/support/specimen.py")
SPLIT = str(ROOT / "tests/support/split_directories.py")
LIFE_SECONDS = 120.0
FILES = [
    "manifest.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors",
]
OLDEST, BEFORE, LAST = "step-00000009", "step-00000012", "step-00000014"

pytestmark = pytest.mark.distributed


def command(run_dir: Path) -> list[str]:
    return torchrun(2, SPECIMEN, "--run-dir", str(run_dir), "--epochs", "2")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks to which nothing ever happened."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_command(command(run_dir), deadline_seconds=LIFE_SECONDS).require_success()
    assert checkpoint_names(run_dir) == [OLDEST, BEFORE, LAST]
    assert sorted(path.name for path in (run_dir / "checkpoints" / LAST).iterdir()) == FILES
    return run_dir


@pytest.fixture
def damaged(twin: Path, tmp_path: Path) -> Path:
    return copy_run(twin, tmp_path / "run")


def test_damage_that_only_rank_1_reads_makes_all_ranks_use_the_older_one(damaged: Path, twin: Path) -> None:
    """The files are split over the ranks: rank 1 reads this one. The next older one is damaged for rank 0."""
    found_by_rank_1 = FILES[1:][1::2]
    assert FILES[4] in found_by_rank_1
    Damage("flip", 5).apply(damaged / "checkpoints" / LAST / FILES[4])
    Damage("truncate", 0.3).apply(damaged / "checkpoints" / BEFORE / FILES[1])
    ended = run_command(command(damaged), deadline_seconds=LIFE_SECONDS).require_success()
    (resumed,) = events(damaged, "resumed")
    assert resumed["path"] == f"{damaged}/checkpoints/{OLDEST}"
    for name, file in ((LAST, FILES[4]), (BEFORE, FILES[1])):
        assert re.search(rf"{name} cannot be used: {re.escape(file)}: ", ended.output)
        assert (damaged / "checkpoints" / f".corrupt-a000002-{name}" / file).exists()
        assert json.loads((damaged / "checkpoints" / name / "manifest.json").read_text())["attempt"] == 2
    assert_same_run(twin, damaged)


def restore(run_dir: Path, world: World) -> tuple[str, list[str]]:
    """What one rank would continue from, and what it says of the others."""
    checkpointer = Checkpointer(Store(run_dir), world, CheckpointPolicy(every_steps=1))
    checkpointer.open()
    opened = checkpointer.restore("auto")
    assert opened is not None
    opened.reader.close()
    checkpointer.close()
    return opened.path, checkpointer.problems


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_is_found_by_the_ranks_together(file: str, damage: Damage, damaged: Path) -> None:
    """The ranks are threads here, the checkpoint is that of two processes."""
    damage.apply(damaged / "checkpoints" / LAST / file)
    before = contents(damaged / "checkpoints" / LAST)
    (path, problems), other = on_ranks(2, lambda world: restore(damaged, world))
    assert path == other[0] == f"{damaged}/checkpoints/{BEFORE}"
    assert len(problems) == 1
    assert LAST in problems[0]
    assert ("manifest" if file == "manifest.json" else file) in problems[0]
    assert contents(damaged / "checkpoints" / f".corrupt-a000002-{LAST}") == before


KNOWN = re.compile(
    r"run\.json|run\.jsonl|metrics\.jsonl|status\.json|attempts/(\d{6}|owner\.json)|"
    r"checkpoints/step-\d{8}/(manifest\.json|model\.safetensors\.index\.json|[a-z]+-\d{5}-of-\d{5}\.safetensors)"
)


def test_nothing_on_disk_is_a_pickle_or_a_zip(twin: Path) -> None:
    files = [path for path in sorted(twin.rglob("*")) if path.is_file() and "latest" not in str(path)]
    files = [path for path in files if not any(part.is_symlink() for part in (path, *path.parents))]
    assert len(files) > 20
    for path in files:
        name, data = str(path.relative_to(twin)), path.read_bytes()
        assert KNOWN.fullmatch(name), f"{name} is not among the names that a run directory holds"
        # A zip, a pickle of protocol 2 to 5, gzip, bzip2, xz, zstd: none of them may ever be read.
        assert not data.startswith((b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")), name
        assert not re.match(rb"\x80[\x02-\x05]", data), name
        if name.endswith(".safetensors"):
            require_only_tensors(data)
        elif name.endswith(".jsonl"):
            assert all(isinstance(json.loads(line), dict) for line in data.splitlines()), name
        elif name.endswith(".json"):
            assert isinstance(json.loads(data), dict), name
        else:
            assert data == b"", name


def require_only_tensors(data: bytes) -> None:
    """The header is JSON, and the tensors that it lists fill the rest of the file without a gap."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert spans[0][0] == 0
    assert all(one[1] == following[0] for one, following in pairwise(spans))
    assert spans[-1][1] == len(data) - 8 - length


def test_a_directory_that_the_nodes_do_not_share_is_refused_by_name(tmp_path: Path) -> None:
    arguments = [SPLIT, "--run-dir", str(tmp_path), "--epochs", "1"]
    ended = run_command(torchrun(2, *arguments), deadline_seconds=LIFE_SECONDS)
    assert ended.returncode != 0
    assert "StorageError: The run directory" in ended.output
    assert "is not one directory for all nodes: what node-1 writes there cannot be read on node-0" in ended.output
    assert [path for path in tmp_path.rglob("*") if "step-" in path.name or "nonce" in path.name] == []
