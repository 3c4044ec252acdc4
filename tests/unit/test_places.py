"""Who takes which samples, and whose random numbers a rank goes on with; meshes of real ranks: see
`tests/distributed/test_tensor_parallel.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.differences import compare_config
from dist_train.errors import ConfigError
from dist_train.places import Place, describe_ranks, find_place, require_shared_out, row_like, row_of


def rows(*places: tuple[int, int] | None) -> list[dict[str, Any]]:
    return [{} if place is None else {"place": list(place)} for place in places]


def test_a_place_outside_of_their_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 2 is outside a world of 2"):
        Place(2, 2)
    with pytest.raises(ConfigError, match="belong together"):
        find_place(0, None)
    with pytest.raises(ConfigError, match="give mesh="):
        find_place(None, None, data_dims="dp")


def test_a_checkpoint_notes_a_place_only_where_ranks_share_one() -> None:
    assert Place(1, 2).to_json() == {}
    assert Place(1, 2, ranks=(1,)).to_json() == {}
    assert Place(1, 2, ranks=(2, 3)).to_json() == {"place": [1, 2]}


def test_a_rank_is_itself_again_only_where_all_stand_as_before() -> None:
    alone, shared = Place(1, 2), Place(0, 2, ranks=(0, 1))
    assert row_of(rows(None, None), 1, 2, alone) == 1
    assert row_of(rows(None, None, None), 1, 2, alone) is None
    assert row_of(rows((0, 2), (0, 2), (1, 2), (1, 2)), 1, 4, shared) == 1
    assert row_of(rows((0, 1), (0, 1), (0, 1), (0, 1)), 1, 4, shared) is None
    assert row_of(rows(None, None, None, None), 1, 4, shared) is None


def test_ranks_of_one_place_go_on_with_the_same_random_numbers() -> None:
    on_mesh = rows((0, 2), (0, 2), (1, 2), (1, 2))
    assert [row_like(on_mesh, Place(index, 4)) for index in range(4)] == [0, 2, 2, 2]
    assert [row_like(rows(None, None, None, None), Place(index, 2)) for index in range(2)] == [0, 1]
    assert [row_like(rows(None, None), Place(index, 4)) for index in range(4)] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "places",
    [
        [(0, 2, True), (0, 2, True), (1, 2, True), (1, 2, True)],
        [(0, 2, True), (0, 2, False)],
        [(0, 2, True), (1, 3, True)],
        [(0, 2, False), (1, 2, True)],
    ],
)
def test_samples_that_nobody_counts_or_two_do_are_refused(places: list[tuple[int, int, bool]]) -> None:
    with pytest.raises(ConfigError, match=r"does not give each sample to one rank: .* take the parts 0 of 2"):
        require_shared_out(places, len(places))


def test_each_part_has_one_rank_that_counts_it() -> None:
    require_shared_out([(0, 2, True), (0, 2, False), (1, 2, False), (1, 2, True)], 4)
    require_shared_out([(0, 1, True)], 1)


def test_accumulation_follows_from_the_places_and_not_from_the_ranks() -> None:
    data = {"global_batch_size": 16, "micro_batch_size": 4}
    ranks, mesh = {"data": data}, {"data": {**data, "places": 2}}
    assert compare_config(mesh, ranks, (4, 2)) == {}
    assert compare_config(ranks, mesh, (4, 4)) == {"data.accumulation_steps": (1, 2)}


def test_ranks_are_told_with_their_places() -> None:
    assert (describe_ranks(4, None), describe_ranks(4, (0, 2)), describe_ranks(2, (0, 1))) == (
        "4 ranks",
        "4 ranks in 2 places",
        "2 ranks in 1 place",
    )
    assert describe_ranks(1, None) == "1 rank"
