"""`docs/checkpoint-format.md` is enough to write a reader in any language, and leaves out no key."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from dist_train.checkpoint.dcp_writer import StorageWriter
from dist_train.checkpoint.manifest import BRANCH_FILE, FileEntry, Manifest, Progress, TensorEntry
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.tensor_file import Part, lay_out
from dist_train.checkpoint.verify import RunningDigest
from dist_train.data import data_loader
from dist_train.run import Run

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")

# The reader: written from the document alone, with json, struct and numpy.

NUMPY = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "BF16": "<u2"}
NUMPY |= {"U16": "<u2", "U32": "<u4", "U64": "<u8", "F32": "<f4", "F64": "<f8", "C64": "<c8"}


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and every tensor by its name, tied ones included."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert sha256(text.encode()).hexdigest()[:32] == manifest["digest"]
    tensors = {name: np.empty(one["shape"], NUMPY[one["dtype"]]) for name, one in manifest["tensors"].items()}
    missing = {name: tensor.size for name, tensor in tensors.items()}
    for file_name, file in manifest["files"].items():
        data = (folder / file_name).read_bytes()
        assert len(data) == file["size"]
        if file_name.endswith(".safetensors"):
            for name, offsets, values in read_parts(data, file_name.split("-")[0]):
                box = tuple(slice(start, start + size) for start, size in zip(offsets, values.shape, strict=True))
                tensors[name][box] = values
                missing[name] -= values.size
    assert not any(missing.values())
    return manifest, tensors | {name: tensors[stored] for name, stored in manifest["aliases"].items()}


def read_parts(data: bytes, group: str) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Name, beginning and values of every part in a data file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    parts = json.loads(header.pop("__metadata__", {}).get("dist_train.parts", "{}"))
    for key, entry in header.items():
        first, stop = entry["data_offsets"]
        values = np.frombuffer(data[8 + length + first : 8 + length + stop], NUMPY[entry["dtype"]])
        whole = {"name": key if group == "state" else f"{group}/{key}", "offsets": [0] * len(entry["shape"])}
        part = parts.get(key, whole)
        yield part["name"], part["offsets"], values.reshape(entry["shape"])


# A run with everything that the document speaks of


class Net(torch.nn.Module):
    """Tied weights, buffers of both kinds, a channels-last weight, a bfloat16 one and what is in no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.tied = torch.nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(6)
        self.image = torch.nn.Conv2d(2, 3, 3)
        self.image.weight.data = self.image.weight.data.to(memory_format=torch.channels_last)
        self.short = torch.nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.hidden = torch.nn.Buffer(torch.randn(2), persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """A loss that every parameter takes part in."""
        out = self.norm(self.tied(self.first(batch)))
        used = [out, self.image.weight, self.short.float()]
        return torch.stack([one.square().mean() for one in used]).sum()

    def get_extra_state(self) -> Any:
        return {"version": 3, "table": torch.arange(4)}

    def set_extra_state(self, state: Any) -> None:
        assert state["version"] == 3


class Odd:
    """A value of every kind that JSON lacks."""

    def __init__(self) -> None:
        self.state = {
            "tensor": torch.arange(6).reshape(2, 3),
            "array": np.arange(4, dtype=">i2").reshape(2, 2),
            "scalar": np.float32(1.5),
            "tuple": (1, "two", None, True),
            "set": {3, 1},
            "bytes": b"\x00\xff",
            "infinite": [float("inf"), float("nan")],
            "keys": {1: "one", (2, 3): {"$": "dollar"}},
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def train(run_dir: Path, resume: str = "auto") -> tuple[Net, torch.optim.Optimizer]:
    """Two epochs."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = data_loader(torch.utils.data.TensorDataset(torch.randn(8, 6)), global_batch_size=4, seed=0)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    policy = CheckpointPolicy(every_epochs=1)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, Run(str(run_dir), **parts, policy=policy, resume=resume) as run:
        run.register("odd", Odd())
        for _ in run.epochs(2):
            for (batch,) in run.batches(loader):
                loss = model(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.step(loss=loss)
            run.end_epoch(val=float(run.global_step))
    return model, optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, torch.optim.Optimizer]:
    """The run directory, and the live objects as they were last saved."""
    run_dir = tmp_path_factory.mktemp("format") / "run"
    return run_dir, *train(run_dir)


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000004"


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the reader gives it: numpy has no bfloat16."""
    plain = tensor.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


# The document


def test_a_reader_written_from_the_document_gets_every_value(
    trained: tuple[Path, Net, torch.optim.Optimizer],
) -> None:
    run_dir, model, optimizer = trained
    manifest, tensors = read_checkpoint(newest(run_dir))
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            np.testing.assert_array_equal(tensors[f"model/{name}"], as_numpy(value), err_msg=name)
    np.testing.assert_array_equal(tensors["buffer/model/hidden"], as_numpy(model.hidden))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            np.testing.assert_array_equal(tensors[f"optimizer/{name}/{key}"], as_numpy(value), err_msg=name)
    assert manifest["aliases"] == {"model/tied.weight": "model/first.weight"}
    assert manifest["tensors"]["model/image.weight"]["order"] == [0, 2, 3, 1]
    assert manifest["state"]["optimizer"]["groups"][0]["settings"]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_reader_written_from_the_document_joins_parts(tmp_path: Path) -> None:
    whole = torch.arange(20, dtype=torch.float32).reshape(4, 5)
    files = {}
    for rank, (top, rows) in enumerate([(0, 3), (3, 1)]):
        part = Part(name="model/w", key=f"w@{top},0", dtype="F32", sizes=(rows, 5), offsets=(top, 0), whole=False)
        layout = lay_out("model", [part])
        data = layout.header + whole[top : top + rows].numpy().tobytes()
        name = f"model-{rank + 1:05d}-of-00002.safetensors"
        (tmp_path / name).write_bytes(data)
        digest = RunningDigest()
        digest.update(memoryview(data))
        files[name] = digest.entry()
    one = Manifest(
        run_id="r",
        sequence=1,
        attempt=1,
        parent=None,
        committed_at=0.0,
        progress=Progress(),
        files=files,
        tensors={"model/w": TensorEntry(shape=[4, 5], dtype="F32")},
    )
    (tmp_path / "manifest.json").write_text(one.to_json())
    np.testing.assert_array_equal(read_checkpoint(tmp_path)[1]["model/w"], whole.numpy())
    CheckpointReader(Store(tmp_path.parent), tmp_path.name, one).close()


@pytest.mark.filterwarnings("ignore")
def test_the_reader_reads_what_storage_writer_wrote(tmp_path: Path) -> None:
    weight, pair = torch.arange(12.0).reshape(3, 4), (1, torch.ones(2))
    state = {"model": {"w": weight}, "optimizer": {"state": {"w": {"step": torch.tensor(3.0)}}}, "layers.w": weight + 1}
    dcp.save(state | {"model/odd": weight + 2, "pair": pair}, storage_writer=StorageWriter(tmp_path / "a"))
    manifest, tensors = read_checkpoint(tmp_path / "a")
    names = {"model/w": weight, "optimizer/state.w.step": 3, "layers.w": weight + 1, "dcp/model/odd": weight + 2}
    names["dcp/~values/pair/1"] = torch.ones(2)
    assert tensors.keys() == names.keys()
    for name, value in names.items():
        assert np.array_equal(tensors[name], np.asarray(value)), name
    kept = manifest["state"]["dcp"]
    assert kept["values"]["pair"]["items"] == [1, {"$": "tensor", "name": "dcp/~values/pair/1", "device": "cpu"}]
    assert kept["planner_data"]["model.w"] == {"$": "tuple", "items": ["model", "w"]}
    assert manifest["reason"] == "dcp"
    for key in [*kept, *kept["fragments"], *manifest["settings"], "~values", "~fragments", "rank-RRRRR"]:
        assert f"`{key}`" in DOCUMENT or f"/{key}/" in DOCUMENT, key


def test_every_key_of_a_manifest_is_documented(trained: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    manifest = json.loads((newest(trained[0]) / "manifest.json").read_text())
    sections = [manifest, manifest["progress"], manifest["best"], manifest["environment"], manifest["rank_state"][0]]
    sections += [next(iter(manifest[name].values())) for name in ("files", "tensors")]
    sections += [manifest["settings"]["config"], manifest["settings"]["config"]["data"]]
    sections += [manifest["state"]["optimizer"], manifest["state"]["optimizer"]["groups"][0]]
    require_documented(key for section in sections for key in section)
    require_documented(f"rng.{key}" for key in manifest["rank_state"][0]["rng"])


def test_every_tag_is_documented(trained: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    odd = json.loads((newest(trained[0]) / "manifest.json").read_text())["state"]["user/odd"]
    found = list(tagged(odd))
    kinds = {one["$"] for one in found}
    assert {"tensor", "ndarray", "scalar", "tuple", "set", "bytes", "float", "dict", "dtype", "device"} <= kinds
    section = DOCUMENT.partition("## Nested values")[2].partition("\n## ")[0]
    rows = {row.split("|")[1]: row.split("|")[2] for row in section.splitlines() if row.startswith("|")}
    for one in found:
        (keys,) = [keys for tags, keys in rows.items() if f"`{one['$']}`" in tags]
        assert sorted(re.findall(r"`(\w+)`", keys)) == sorted(key for key in one if key != "$")


def tagged(value: Any) -> Iterator[dict[str, Any]]:
    """Every object with a tag inside a nested value."""
    if isinstance(value, dict) and "$" in value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tagged(inner)


def test_every_key_of_the_logs_and_small_files_is_documented(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000002"))
    keys: set[str] = set()
    for name in ("run.json", "status.json", BRANCH_FILE, "attempts/owner.json"):
        keys |= set(json.loads((tmp_path / name).read_text()))
    for name in ("run.jsonl", "metrics.jsonl"):
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        keys |= {key for record in records for key in record} | {record.get("event", "attempt") for record in records}
    require_documented(keys - {"val"})


def require_documented(keys: Any) -> None:
    """Each key appears in backticks."""
    missing = sorted({key for key in keys if f"`{key}`" not in DOCUMENT})
    assert not missing, f"docs/checkpoint-format.md does not name {missing}"


def test_digests_of_files_are_as_documented() -> None:
    block = 8 << 20
    data = bytes(range(256)) * (block * 2 // 256) + b"tail"
    digest = RunningDigest()
    for start in range(0, len(data), 3_000_000):
        digest.update(memoryview(data)[start : start + 3_000_000])
    entry = digest.entry()
    ends = (block, 2 * block)
    assert entry == FileEntry(
        size=len(data),
        digest=xxhash.xxh3_128_hexdigest(data, seed=0),
        blocks=[xxhash.xxh3_128_hexdigest(data[:end])[:16] for end in ends],
    )


def test_numbers_that_json_lacks_are_written_as_documented() -> None:
    one = Manifest(
        run_id="r", sequence=1, attempt=1, parent=None, committed_at=0.0, progress=Progress(), files={}, tensors={}
    )
    text = replace(one, train_loss=float("nan"), metrics={"a": float("-inf")}).to_json()
    body = json.loads(text, parse_constant=pytest.fail)
    assert body["train_loss"] == {"$": "float", "value": "nan"}
    assert body["metrics"] == {"a": {"$": "float", "value": "-inf"}}


def test_keys_that_are_no_strings_do_not_spoil_the_digest(trained: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    one = Manifest.from_json((newest(trained[0]) / "manifest.json").read_bytes())
    odd = replace(one, settings={"config": {"user": {10: "ten", 2: "two", "x": (1, 2)}}})
    again = Manifest.from_json(odd.to_json())
    assert again.digest == odd.digest
    assert again.settings["config"]["user"] == {"10": "ten", "2": "two", "x": [1, 2]}


def test_data_begins_on_a_page_and_files_are_named_as_documented(
    trained: tuple[Path, Net, torch.optim.Optimizer],
) -> None:
    files = sorted(newest(trained[0]).glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"{group}-00001-of-00001.safetensors" for group in ("model", "optimizer", "state")
    ]
    for path in files:
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + length) % 4096 == 0


def test_the_example_is_json() -> None:
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert len(blocks) == 2
    example = json.loads(blocks[0])
    assert set(example) == {"format", "digest", *Manifest.__slots__}
    header = json.loads(blocks[1])
    assert json.loads(header["__metadata__"]["dist_train.parts"])["a.weight@150,0"]["offsets"] == [150, 0]


def test_the_history_folds_as_documented(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000002"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    starts = {line["attempt"]: line for line in lines if line["kind"] == "attempt"}

    def history(attempt: int | None) -> list[dict[str, Any]]:
        if attempt is None:
            return []
        before = history(starts[attempt]["parent_attempt"])
        kept = [record for record in before if record["record"] < starts[attempt]["keep"]]
        return kept + [line for line in lines if line["attempt"] == attempt and line["kind"] != "attempt"]

    assert [(one["attempt"], one["record"], one["epoch"]) for one in history(2)] == [(1, 0, 0), (2, 1, 1)]
    assert len(history(1)) == 2
