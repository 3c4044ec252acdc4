"""Where the elements of a sharded tensor lie, proved against what torch itself does with a tensor of indices."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dist_train.checkpoint.boxes import Box, Cut, lay, region_of

shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple)
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    """(shape, mesh, placements) of any kind, uneven ones and those without a sense included."""
    shape, mesh = draw(shapes), draw(meshes)
    dims = st.integers(0, len(shape) - 1)
    strided = st.builds(lambda dim, strips: _StridedShard(dim, split_factor=strips), dims, st.integers(1, 5))
    placement = st.one_of(st.builds(Shard, dims), strided, st.just(Replicate()))
    return shape, mesh, tuple(draw(placement) for _ in mesh)


def coordinates(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in torch.unravel_index(torch.tensor(n), mesh)) for n in range(math.prod(mesh))]


def cuts_of(mesh: tuple[int, ...], place: tuple[int, ...], placements: tuple[Placement, ...]) -> tuple[Cut, ...]:
    return tuple(
        Cut(dim=one.dim, count=count, index=index, strips=one.split_factor if isinstance(one, _StridedShard) else 1)
        for count, index, one in zip(mesh, place, placements, strict=True)
        if isinstance(one, (Shard, _StridedShard))
    )


def as_torch_splits(
    whole: torch.Tensor, mesh: tuple[int, ...], place: tuple[int, ...], placements: tuple[Placement, ...]
) -> torch.Tensor:
    """What `distribute_tensor` leaves at a place of the mesh: its own splitting, dimension by dimension."""
    for count, index, one in zip(mesh, place, placements, strict=True):
        if not isinstance(one, Replicate):
            whole = one._split_tensor(whole, count, with_padding=False, contiguous=True)[0][index]
    return whole


def put_together(whole: torch.Tensor, boxes: tuple[Box, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    """The local tensor that the boxes say this is."""
    local = torch.full(lengths, -1)
    for box in boxes:
        region_of(local, box.local_offsets, box.sizes).copy_(region_of(whole, box.offsets, box.sizes))
    return local


@settings(max_examples=60)
@given(layouts())
@example(((7, 3), (2, 3), (_StridedShard(0, split_factor=3), Shard(0))))
@example(((5,), (2,), (_StridedShard(0, split_factor=4),)))
@example(((1,), (4,), (Shard(0),)))
def test_the_boxes_of_a_place_are_what_torch_leaves_there(
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, placements = layout
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for place in coordinates(mesh):
        lengths, boxes = lay(shape, cuts_of(mesh, place, placements))
        expected = as_torch_splits(whole, mesh, place, placements)
        assert lengths == tuple(expected.shape)
        assert torch.equal(put_together(whole, boxes, lengths), expected)
        assert all(math.prod(box.sizes) for box in boxes), "an empty box is no box"
        assert sum(math.prod(box.sizes) for box in boxes) == expected.numel()


@settings(max_examples=40)
@given(layouts())
def test_ranks_that_hold_different_parts_hold_each_element_once(
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, placements = layout
    count = torch.zeros(shape, dtype=torch.int64)
    for place in coordinates(mesh):
        if any(index for index, one in zip(place, placements, strict=True) if isinstance(one, Replicate)):
            continue
        for box in lay(shape, cuts_of(mesh, place, placements))[1]:
            region_of(count, box.offsets, box.sizes).add_(1)
    assert bool((count == 1).all())


@settings(max_examples=40)
@given(layouts())
def test_they_agree_with_what_torch_computes_for_checkpoints_where_that_is_defined(
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    shape, mesh, placements = layout
    for place in coordinates(mesh):
        lengths, boxes = lay(shape, cuts_of(mesh, place, placements))
        local_shape, offset = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        assert lengths == tuple(local_shape)
        if len(boxes) == 1:
            assert boxes[0].offsets == tuple(offset)


def test_pieces_that_continue_each_other_are_one_box() -> None:
    """FSDP2 over tensor parallel: what is written as strided is one piece of rows."""
    mesh, placements = (2, 2), (_StridedShard(0, split_factor=2), Shard(0))
    found = [lay((8, 3), cuts_of(mesh, place, placements))[1] for place in coordinates(mesh)]
    assert [[box.offsets[0] for box in boxes] for boxes in found] == [[0], [4], [2], [6]]


def test_what_lies_apart_is_several_boxes_in_the_order_of_the_local_tensor() -> None:
    _, boxes = lay((5, 2), (Cut(dim=0, count=2, index=0, strips=2),))
    assert boxes == (Box((0, 0), (2, 2), (0, 0)), Box((3, 0), (1, 2), (2, 0)))


def test_a_tensor_without_dimensions_is_one_box() -> None:
    assert lay((), ()) == ((), (Box((), (), ()),))
