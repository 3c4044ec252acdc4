"""What a `dcp.save` refuses: values that JSON lacks, folders that are not its own; nothing is touched then."""

from __future__ import annotations

import enum
import io
import os
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import dist_train as dt
from dist_train.checkpoint.publication import Publication
from dist_train.checkpoint.store import Store
from tests.support.dcp_saved import NAME, content, load, refusal, save


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch warns of every save without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Opaque:
    """Nothing that JSON knows."""


class Kind(enum.Enum):
    ODD = 1


@pytest.mark.parametrize(
    ("value", "what", "way_out"),
    [
        (Opaque(), "Opaque", "Put what it consists of"),
        (torch.zeros(2, 2).to_sparse(), "layout torch.sparse_coo", "its indices and its values"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128", "Put torch.view_as_real(it)"),
        (nn.functional.relu, "relu", "Put what it consists of"),
        (io.BytesIO(b"a pickle"), "_io.BytesIO", "Put its getvalue() in its place"),
        ((1, Kind.ODD), "Kind", "an enum's value"),
        ((1, slice(3)), "a slice", "Put what it consists of"),
        ((1, deque([1])), "collections.deque", "Put list(it)"),
        (np.array([None]), "ObjectDType", "Put its tolist()"),
        (torch.Generator(), "torch._C.Generator", "Put its get_state()"),
        (Namespace(lr=1), "argparse.Namespace", "Put vars(it)"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_refused_value_is_named_and_the_old_checkpoint_stays(
    tmp_path: Path, value: Any, what: str, way_out: str
) -> None:
    save(tmp_path, 1)
    writer = dt.StorageWriter(tmp_path / NAME)
    text = refusal(lambda: dcp.save({"fine": torch.ones(1), "deep": {"odd": value}}, storage_writer=writer))
    assert "'deep.odd' cannot be saved" in text
    assert what in text
    assert "leave 'deep.odd' out" in text
    assert way_out in text
    assert os.listdir(tmp_path) == [NAME]
    assert load(tmp_path) == 1


def test_no_pickle_is_on_the_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    files = list((tmp_path / NAME).iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    for file in files:
        assert b"\x80\x02" not in file.read_bytes()
        assert b"PK\x03\x04" not in file.read_bytes()


@pytest.mark.parametrize("kind", ["notes", "torch", "run", "file", "extra"])
def test_what_no_writer_put_there_is_not_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / NAME
    if kind == "notes":
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    elif kind == "torch":
        dcp.save({"a": torch.ones(1)}, storage_writer=dcp.FileSystemWriter(target))
    elif kind == "run":
        model = nn.Linear(2, 2)
        with dt.Run(str(tmp_path / "run"), model=model, optimizer=torch.optim.SGD(model.parameters())) as run:
            run.save(wait=True)
        target = next((tmp_path / "run/checkpoints").glob("step-*"))
    elif kind == "file":
        target.write_text("precious")
    else:
        save(tmp_path, 1)
        (target / "notes.txt").write_text("precious")
    before = content(target)
    text = refusal(lambda: dcp.save({"a": torch.ones(1)}, storage_writer=dt.StorageWriter(target)))
    assert str(target) in text
    assert content(target) == before


def test_an_empty_folder_is_a_place_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    save(tmp_path, 1, overwrite=False)
    assert load(tmp_path) == 1


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / NAME).symlink_to("elsewhere")
    for number in (1, 2):
        save(tmp_path, number)
        assert load(tmp_path) == number
    assert (tmp_path / NAME).is_symlink()


def test_a_save_that_another_one_overtakes_fails_and_never_mixes(tmp_path: Path) -> None:
    first, second = Publication(tmp_path / NAME), Publication(tmp_path / NAME)
    first.begin()
    Store(tmp_path).write_new(f"{first.staging}/x", b"first")
    second.begin()
    Store(tmp_path).write_new(f"{second.staging}/x", b"second")
    with pytest.raises(dt.DistTrainError, match="one path takes one save at a time"):
        first.seal()
    assert not (tmp_path / NAME).exists()
    second.publish(second.seal())
    assert content(tmp_path / NAME) == {str(tmp_path / NAME / "x"): b"second"}


def test_a_link_or_address_that_leads_nowhere_is_refused_before_anything(tmp_path: Path) -> None:
    text = refusal(lambda: dcp.save({"a": 1}, storage_writer=dt.StorageWriter("s3://bucket/x")))
    assert "s3://bucket/x is an address" in text
    assert "No path to save to" in refusal(lambda: dcp.save({"a": 1}, storage_writer=dt.StorageWriter()))
    assert "there is no such folder" in refusal(lambda: load(tmp_path))


def test_a_folder_that_cannot_change_its_place_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for path, words in {".": "is the working directory", tmp_path / "here": "or lies above it", "/": "mounted"}.items():
        text = refusal(lambda path=path: dcp.save({"a": 1}, storage_writer=dt.StorageWriter(path)))  # type: ignore[misc]
        assert words in text
    longest = "x" * 228
    dcp.save({"a": 1}, storage_writer=dt.StorageWriter(longest))
    dcp.save({"a": 2}, storage_writer=dt.StorageWriter(longest))
    assert os.listdir() == [longest]
    text = refusal(lambda: dcp.save({"a": 1}, storage_writer=dt.StorageWriter(longest + "x")))
    assert "at most 228 bytes" in text
