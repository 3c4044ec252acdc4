"""Which rank writes what: every element once, bytes spread evenly, what cannot be saved refused by name."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.capture import Capture
from dist_train.checkpoint.joint_plan import plan_together
from dist_train.checkpoint.plan import PLACES, Plan, full_name, group_of, key_in_file, make_plan, own_name, signature_of
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.errors import CorruptCheckpointError, StateMismatchError, UnsaveableStateError
from dist_train.world import SoloWorld
from tests.support.cycle import open_checkpoint, sample_tensor, write_checkpoint

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=12)
places = st.sampled_from(["model/", "optimizer/", "user/", "buffer/model/"])
worlds = st.integers(1, 9)


def capture_of(shapes: list[tuple[int, ...]], *, main: int = 0, own: int = 0) -> Capture:
    """Tensors of several groups and dtypes; the first `main` are the main rank's, the last `own` differ by rank."""
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    heads = ["model/", "optimizer/", "user/", "buffer/model/"]
    named = {f"{heads[i % 4]}t{i}": sample_tensor(dtypes[i // 4 % 4], shape) for i, shape in enumerate(shapes)}
    names = list(named)
    return Capture(
        tensors=named, main_only=set(names[:main]), per_rank={name: named[name] for name in names[len(names) - own :]}
    )


def plans_of(capture: Capture, world_size: int) -> list[Plan]:
    return [make_plan(capture, rank, world_size) for rank in range(world_size)]


@given(shapes, worlds, st.integers(0, 12), st.integers(0, 3))
def test_every_element_is_written_exactly_once(
    shapes: list[tuple[int, ...]], world_size: int, main: int, own: int
) -> None:
    plans = plans_of(capture_of(shapes, main=main, own=own), world_size)
    written = [sum(column) for column in zip(*(plan.written() for plan in plans), strict=True)]
    assert written[::2] == [math.prod(entry.shape) for entry in plans[0].tensors.values()]
    assert [written[::2], [one % PLACES for one in written[1::2]]] == [
        plans[0].to_be_written()[::2],
        plans[0].to_be_written()[1::2],
    ]
    parts = Counter(part.name for plan in plans for layout in plan.files.values() for part in layout.parts)
    assert parts == dict.fromkeys(plans[0].tensors, 1), "empty tensors are written once, too"


@given(shapes, worlds)
def test_bytes_are_balanced_within_the_largest_tensor(shapes: list[tuple[int, ...]], world_size: int) -> None:
    capture = capture_of(shapes)
    loads = [
        sum(part.num_bytes for f in plan.files.values() for part in f.parts) for plan in plans_of(capture, world_size)
    ]
    assert sum(loads) == sum(tensor.nbytes for tensor in capture.tensors.values())
    assert max(loads) - min(loads) <= max(tensor.nbytes for tensor in capture.tensors.values())


@given(shapes, worlds, st.integers(0, 12))
def test_all_ranks_compute_the_same_table_files_and_index_alone(
    shapes: list[tuple[int, ...]], world_size: int, main: int
) -> None:
    plans = plans_of(capture_of(shapes, main=main), world_size)
    assert len({plan.digest for plan in plans}) == 1
    assert all(plan.tensors == plans[0].tensors for plan in plans)
    names = [name for plan in plans for name in plan.files]
    assert len(names) == len(set(names)), "two ranks would write one file"
    assert plans[0].weight_map is not None or not any(name.startswith("model/") for name in plans[0].tensors)
    for plan in plans:
        assert plan.weight_map == plans[0].weight_map
    for key, name in (plans[0].weight_map or {}).items():
        assert key in {part.key for plan in plans for f in plan.files if f == name for part in plan.files[f].parts}


def test_what_is_the_main_rank_s_is_written_by_it() -> None:
    capture = capture_of([(100,), (2,), (3,), (4,), (5,)], main=2)
    written = {part.name for layout in plans_of(capture, 3)[0].files.values() for part in layout.parts}
    assert capture.main_only <= written


def test_the_main_rank_gets_less_where_it_has_buffers_of_its_own() -> None:
    tensors = {f"model/t{i}": torch.zeros(100) for i in range(9)}
    plans = plans_of(Capture(tensors=tensors, main_only={"model/t0", "model/t1", "model/t2"}), 3)
    assert [plan.num_bytes for plan in plans] == [plans[0].num_bytes] * 3


def test_each_rank_writes_its_own_values_under_its_own_name(tmp_path: Path) -> None:
    captures = []
    for rank in range(3):
        mean = torch.full((2,), float(rank))
        captures.append(
            Capture(tensors={"model/mean": mean}, main_only={"model/mean"}, per_rank={"model/mean": mean}, state={})
        )
    write_checkpoint(tmp_path, captures)
    for rank in range(3):
        _, reader = open_checkpoint(tmp_path, rank)
        assert reader.own_name("model/mean") == own_name("model/mean", rank)
        assert reader.create(own_name("model/mean", rank), torch.device("cpu")).tolist() == [rank, rank]
        assert reader.create("model/mean", torch.device("cpu")).tolist() == [0, 0]
        assert reader.names("model/") == ["model/mean"]
        reader.close()


@given(
    st.sampled_from(
        ["model/a.b", "optimizer/a.b/exp_avg", "user/x/0", "buffer/model/h", "rank-00001/model/m", "model/g/w"]
    )
)
def test_names_in_files_lead_back(name: str) -> None:
    assert full_name(group_of(name), key_in_file(name)) == name


def test_the_model_s_names_in_files_are_those_of_its_state_dict() -> None:
    (layout,) = make_plan(Capture(tensors={"model/0.weight": torch.zeros(2)}), 0, 1).files.values()
    assert [part.key for part in layout.parts] == ["0.weight"]


def test_the_plan_holds_until_the_structure_changes() -> None:
    one = signature_of(Capture(tensors={"model/a": torch.zeros(2, 3)}))
    assert one == signature_of(Capture(tensors={"model/a": torch.ones(2, 3)}))
    for other in (
        {"model/b": torch.zeros(2, 3)},
        {"model/a": torch.zeros(3, 2)},
        {"model/a": torch.zeros(2, 3).double()},
        {"model/a": torch.zeros(3, 2).t()},
        {"model/a": torch.zeros(2, 3), "model/b": torch.zeros(1)},
    ):
        assert one != signature_of(Capture(tensors=other))
    assert one != signature_of(Capture(tensors={"model/a": torch.zeros(2, 3)}, per_rank={"model/a": torch.zeros(2, 3)}))


class Wrapped(torch.Tensor):
    """Says nothing of what else there is to it."""


UNSAVEABLE = {
    "sparse_coo": (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "sparse_csr": (torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    "meta": (torch.empty(2, device="meta"), "on the meta device"),
    "complex128": (torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128"),
    "subclass": (torch.zeros(2).as_subclass(Wrapped), "Wrapped"),
    "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dtype torch.qint8"),
}


@pytest.mark.parametrize("kind", UNSAVEABLE)
def test_what_has_no_plain_bytes_is_refused_by_name(kind: str) -> None:
    tensor, why = UNSAVEABLE[kind]
    capture = Capture(tensors={"model/good": torch.zeros(2), "user/odd/x": tensor})
    with pytest.raises(UnsaveableStateError, match="user/odd/x") as caught:
        make_plan(capture, 0, 2)
    assert why in str(caught.value)


# Reading back


def reader_of(folder: Path, world_size: int = 3) -> tuple[Capture, CheckpointReader]:
    capture = capture_of([(4, 3), (2,), (0, 3), (), (5, 2, 2), (3,)])
    capture.aliases["model/tied"] = "model/t0"
    write_checkpoint(folder, [capture] * world_size)
    return capture, open_checkpoint(folder)[1]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_tensors_come_back_whatever_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    capture, reader = reader_of(tmp_path, world_size)
    for name, tensor in capture.tensors.items():
        assert reader.describe(name) == (tuple(tensor.shape), tensor.dtype)
        back = reader.create(name, torch.device("cpu"))
        assert back.dtype == tensor.dtype
        assert torch.equal(back.contiguous().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert torch.equal(reader.create("model/tied", torch.device("cpu")), capture.tensors["model/t0"])
    reader.close()


def test_another_shape_or_dtype_is_refused_and_named(tmp_path: Path) -> None:
    _, reader = reader_of(tmp_path)
    for target in (torch.zeros(3, 4), torch.zeros(4, 3).double()):
        with pytest.raises(StateMismatchError, match=r"model/t0 is \[4, 3\] torch.float32 in .* here"):
            reader.fill("model/t0", target)
    reader.close()


def test_a_file_without_a_tensor_of_the_table_is_corrupt(tmp_path: Path) -> None:
    capture = Capture(tensors={"model/a": torch.zeros(2), "model/b": torch.zeros(2)})
    short = Capture(tensors={"model/a": torch.zeros(2)})
    manifest = write_checkpoint(tmp_path, [short])
    manifest.tensors.update(make_plan(capture, 0, 1).tensors)
    from dist_train.checkpoint.store import Store

    with pytest.raises(CorruptCheckpointError, match="0 elements of model/b, expected 2 of F32"):
        CheckpointReader(Store(tmp_path), "checkpoints/step-00000001", manifest)


def test_an_empty_file_is_corrupt_and_named(tmp_path: Path) -> None:
    from dist_train.checkpoint.store import Store

    manifest = write_checkpoint(tmp_path, [Capture(tensors={"model/a": torch.zeros(2)})])
    path = tmp_path / "checkpoints/step-00000001/model-00001-of-00001.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match="model-00001-of-00001"):
        CheckpointReader(Store(tmp_path), "checkpoints/step-00000001", manifest)


@pytest.mark.parametrize("kind", ["tensors", "per_rank"])
def test_a_dtype_that_cannot_be_kept_is_named_whether_ranks_share_it_or_not(kind: str) -> None:
    capture = Capture(**{kind: {"optimizer/a/state": torch.zeros(2, dtype=torch.complex128)}})
    with pytest.raises(UnsaveableStateError, match=r"optimizer/a/state has dtype torch\.complex128"):
        plan_together(capture, SoloWorld())
