"""Our layout against the safetensors library, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_train.capture import Capture
from dist_train.checkpoint.plan import make_plan
from dist_train.checkpoint.snapshot import Image
from dist_train.checkpoint.tensor_file import ALIGNMENT, DTYPE_NAMES, lay_out, read_layout
from dist_train.errors import CorruptCheckpointError
from tests.support.cycle import sample_tensor

SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3), (4, 1, 3, 2)]
EVERY_KIND = {
    f"{name}.{'x'.join(map(str, shape))}": sample_tensor(dtype, shape)
    for dtype, name in DTYPE_NAMES.items()
    for shape in SHAPES
}


def file_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    capture = Capture(tensors={f"model/{name}": tensor for name, tensor in tensors.items()})
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    (name,) = plan.files
    data, length = image.file(name)
    path = folder / name
    path.write_bytes(data[:length])
    del data
    image.close()
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def test_safetensors_loads_every_kind_bit_for_bit(tmp_path: Path) -> None:
    path = file_of(EVERY_KIND, tmp_path)
    assert_same(load_file(path), EVERY_KIND)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same({name: file.get_tensor(name) for name in file.keys()}, EVERY_KIND)  # noqa: SIM118 - no mapping


def test_non_contiguous_tensors_are_laid_out_row_by_row(tmp_path: Path) -> None:
    image = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tensors = {
        "channels_last": image.to(memory_format=torch.channels_last),
        "transposed": image.permute(3, 1, 0, 2),
        "gaps": image[:, :, ::2],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    expected = {name: tensor.contiguous().resolve_conj() for name, tensor in tensors.items()}
    assert_same(load_file(file_of(tensors, tmp_path)), expected)


@given(st.dictionaries(st.text(min_size=1, max_size=600), st.sampled_from(SHAPES), min_size=1, max_size=6))
@example({"x" * 4000: (3,), "y" * 4000: ()})
def test_data_start_on_a_page_and_every_tensor_is_aligned(shapes: dict[str, tuple[int, ...]]) -> None:
    kinds = [torch.float64, torch.int8, torch.bfloat16]
    tensors = {
        f"model/{name}": torch.zeros(shape, dtype=kinds[i % 3]) for i, (name, shape) in enumerate(shapes.items())
    }
    (layout,) = make_plan(Capture(tensors=tensors), 0, 1).files.values()
    assert len(layout.header) % ALIGNMENT == 0
    assert int.from_bytes(layout.header[:8], "little") == len(layout.header) - 8
    for part in layout.parts:
        assert part.start % tensors[part.name].element_size() == 0
    assert layout.num_bytes == len(layout.header) + sum(part.num_bytes for part in layout.parts)


def test_a_layout_is_read_back_as_it_was_laid(tmp_path: Path) -> None:
    data = file_of(EVERY_KIND, tmp_path).read_bytes()
    parts = dict(read_layout(data, "x"))
    assert {key: part.sizes for key, part in parts.items()} == {k: tuple(t.shape) for k, t in EVERY_KIND.items()}


def test_files_of_the_safetensors_library_can_be_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3), "b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    parts = dict(read_layout((tmp_path / "x.safetensors").read_bytes(), "x"))
    assert parts["a"].sizes == (3,)
    assert parts["b"].dtype == "F32"


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x03",
        b"\xff" * 64,
        bytes(4096),
        (50).to_bytes(8, "little") + b"not json",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        header([]),
        header(3),
        header({"a": 3}),
        header({"a": {}}),
        header({"__metadata__": {"dist_train.parts": "{"}, "a": GOOD}),
        header({"__metadata__": 3, "a": GOOD}),
        header({"a": {**GOOD, "dtype": "F31"}}) + bytes(8),
        header({"a": {**GOOD, "dtype": []}}) + bytes(8),
        header({"a": {**GOOD, "shape": 2}}) + bytes(8),
        header({"a": {**GOOD, "shape": ["2"]}}) + bytes(8),
        header({"a": {**GOOD, "shape": [-2]}}) + bytes(8),
        header({"a": {**GOOD, "data_offsets": [-8, 0]}}) + bytes(8),
        header({"a": {**GOOD, "data_offsets": [0, 4]}}) + bytes(8),
        header({"a": {**GOOD, "data_offsets": ["0", "8"]}}) + bytes(8),
        header({"a": GOOD}) + bytes(7),
        header({"a": {**GOOD, "shape": [10**30]}}) + bytes(8),
    ],
    ids=range(22),
)
def test_a_header_that_lies_is_corrupt_and_the_file_is_named(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"runs/x/model\.safetensors"):
        read_layout(data, "runs/x/model.safetensors")


@given(st.binary(max_size=200))
def test_random_bytes_are_corrupt_or_hold_nothing(data: bytes) -> None:
    try:
        found = read_layout(data, "x")
    except CorruptCheckpointError:
        return
    assert found == []


@given(st.data())
def test_every_truncation_is_noticed(data: st.DataObject) -> None:
    layout = lay_out("model", [part for _, part in read_layout(header({"a": GOOD}) + bytes(8), "x")])
    whole = layout.header + bytes(8)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(CorruptCheckpointError):
        read_layout(whole[:length], "x")
