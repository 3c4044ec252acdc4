"""Exports for Hugging Face: by blocks of rows, with what was attached, and an adapter alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_train.checkpoint import weight_files
from dist_train.checkpoint.exchange import export_checkpoint, import_checkpoint
from dist_train.checkpoint.tensor_file import Part
from dist_train.checkpoint.weight_files import blocks
from dist_train.cli import main
from dist_train.errors import ConfigError
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.twins import same_bits

ADAPTER = {"base_model.model.a.lora_A.default.weight": (2, 4), "base_model.model.a.lora_B.default.weight": (4, 2)}


class Holder(nn.Module):
    """A model with the state_dict that is asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        return dict(self.tensors)


def make_run(run_dir: Path, tensors: dict[str, torch.Tensor], attach: dict[str, bytes] | None = None) -> str:
    paths = []
    for name, data in (attach or {}).items():
        paths.append(run_dir.parent / name)
        paths[-1].write_bytes(data)
    with Run(str(run_dir), model=Holder(tensors)) as run:
        run.attach(*paths)
        for _ in run.epochs(1):
            run.step()
    return str(run_dir)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (5, 3), (2, 3, 5), (3, 1, 1, 4), (1, 100)])
@pytest.mark.parametrize("most_bytes", [4, 8, 20, 64, 1000])
def test_blocks_are_the_row_major_bytes_in_order_and_none_is_larger(shape: tuple[int, ...], most_bytes: int) -> None:
    whole = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    part = Part(name="", key="", dtype="I32", sizes=shape, offsets=(0,) * len(shape), whole=True)
    taken = []
    for offsets, sizes in blocks(part, most_bytes):
        block = whole
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            block = block.narrow(dim, offset, size)
        assert block.nbytes <= most_bytes
        taken.append(block.flatten())
    assert torch.equal(torch.cat(taken), whole.flatten())


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_what_goes_out_by_blocks_is_every_tensor_bit_for_bit(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "rows": torch.rand(9, 5),
        "channels": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.rand(7, 3).bfloat16(),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 2),
    }
    run_dir = make_run(tmp_path / "run", tensors)
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", 48)
    done = export_checkpoint(run_dir, "latest", str(tmp_path / "out.safetensors"), form=form)  # type: ignore[arg-type]
    loaded = load_file(tmp_path / "out.safetensors" / "model.safetensors" if form == "hf" else done.path)
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[key], tensors[key].contiguous()) for key in tensors)


def test_what_was_attached_lies_beside_the_weights_and_the_command_says_how_to_load_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", {"a": torch.ones(2)}, {"config.json": b"{}", "merges.txt": b"a b"})
    assert main(["export", run_dir, "--format", "hf", "--to", str(tmp_path / "out")]) == 0
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
    ]
    assert (tmp_path / "out/merges.txt").read_bytes() == b"a b"
    said = capsys.readouterr().out
    assert "as attached to the run: config.json, merges.txt" in said
    assert f"AutoModel.from_pretrained({str(tmp_path / 'out')!r})" in said
    bare = make_run(tmp_path / "bare", {"a": torch.ones(2)})
    assert main(["export", bare, "--format", "hf", "--to", str(tmp_path / "bare-out")]) == 0
    assert "of the model beside it; run.attach(model, tokenizer)" in capsys.readouterr().out
    assert main(["export", run_dir, "--format", "pth", "--to", str(tmp_path / "out.pth"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attached"] == []


def test_an_adapter_comes_beside_the_weights_that_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {key: torch.rand(shape) for key, shape in ADAPTER.items()}
    tensors["base_model.model.a.base_layer.weight"] = torch.rand(4, 4)
    run_dir = make_run(tmp_path / "run", tensors, {"adapter_config.json": b'{"peft_type": "LORA"}'})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"the base")
    assert main(["export", run_dir, "--format", "peft", "--to", str(folder), "--force"]) == 0
    assert (folder / "model.safetensors").read_bytes() == b"the base"
    assert load_file(folder / "adapter_model.safetensors").keys() == {key.replace(".default", "") for key in ADAPTER}
    said = capsys.readouterr().out
    assert "Not in it: the state of the optimizer, scheduler and scaler, the base model" in said
    assert f"PeftModel.from_pretrained(base_model, {str(folder)!r})" in said
    with pytest.raises(ConfigError, match="--format peft"):
        export_checkpoint(run_dir, "latest", str(tmp_path / "hf"), form="hf")
    assert not (tmp_path / "hf").exists()


def test_what_makes_no_adapters_folder_is_refused(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", {"a": torch.ones(2)})
    tensors = {key: torch.rand(shape) for key, shape in ADAPTER.items()}
    broken = make_run(tmp_path / "broken", tensors, {"adapter_config.json": b"{"})
    for run_dir, text in ((plain, "holds no adapter"), (broken, "adapter_config.json")):
        with pytest.raises(ConfigError, match=text):
            export_checkpoint(run_dir, "latest", str(tmp_path / "out"), form="peft")
        assert not (tmp_path / "out").exists()


def test_a_published_folder_comes_in_with_its_config_and_goes_out_with_it(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"[]", "chat_template.jinja": b"x", "spiece.model": b"y"}
    run_dir = make_run(tmp_path / "run", {"a": torch.ones(2)}, files)
    export_checkpoint(run_dir, "latest", str(tmp_path / "out"), form="hf")
    (tmp_path / "out/notes.doc").write_text("not taken")
    adopted = import_checkpoint(str(tmp_path / "out"), str(tmp_path / "again"))
    assert [note for note in adopted.notes if "not taken" in note] == ["not taken: notes.doc"]
    export_checkpoint(str(tmp_path / "again"), "latest", str(tmp_path / "out2"), form="hf")
    for name, data in files.items():
        assert (tmp_path / "out2" / name).read_bytes() == data


@pytest.mark.parametrize("form", ["hf", "safetensors", "pth"])
def test_an_export_says_what_exclude_has_kept_out(form: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with Run(str(tmp_path / "run"), model=model, options=RunOptions(exclude=("0.*",))) as run:
        for _ in run.epochs(1):
            run.step()
    done = export_checkpoint(str(tmp_path / "run"), "latest", str(tmp_path / f"out.{form}"), form=form)  # type: ignore[arg-type]
    kept_out = "2 tensors of the model, which exclude=('0.*',) keeps out of checkpoints (0.bias, 0.weight)"
    assert done.left_out[0] == kept_out
