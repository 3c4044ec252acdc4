"""docs/what-is-saved.md and the tests' lists of kinds tell of the same things."""

from __future__ import annotations

import re

import pytest

from tests.support.kinds import KINDS
from tests.support.kinds_page import HEADS, OTHERS, cells, kind_row
from tests.support.kinds_refused import REFUSED
from tests.support.kinds_refused_later import REFUSED_LATER
from tests.support.kinds_sharded import SHARDED
from tests.support.kinds_torch_refuses import TORCH_REFUSES
from tests.support.launch import ROOT

TEXT = (ROOT / "docs/what-is-saved.md").read_text()
ROWS = cells(TEXT)
ANEW = "write it anew: python -m tests.support.kinds_page docs/what-is-saved.md"


def test_each_row_is_a_case_and_each_case_a_row() -> None:
    names = [*KINDS, *(name for name in SHARDED if name not in KINDS), *OTHERS, *REFUSED, *REFUSED_LATER]
    assert len(set(names)) == len(names), "a name that two lists have would hide one of them"
    heads = {head.strip("| ").split(" | ")[0] for head in HEADS.values()}
    assert ROWS.keys() - heads == set(names), ANEW


def test_what_it_says_of_a_kind_is_what_the_case_says() -> None:
    for name, kind in KINDS.items():
        assert kind_row(name, kind, {name: ROWS[name][1]}) in TEXT, ANEW
    for name, refused in {**REFUSED, **REFUSED_LATER}.items():
        assert ROWS[name][1] == refused.instead, ANEW
    for name, told in OTHERS.items():
        assert ROWS[name] == [told[0], f"`{told[1]}`"], ANEW


def test_what_torch_refuses_sharded_is_a_kind_and_has_no_case_that_it_can() -> None:
    assert KINDS.keys() >= TORCH_REFUSES.keys()
    assert not TORCH_REFUSES.keys() & SHARDED.keys()


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", TEXT))))
def test_the_tests_that_it_names_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_parts_of_other_pages_that_it_links_to_exist() -> None:
    for target, anchor in re.findall(r"\]\(([\w-]+\.md)#([\w-]+)\)", TEXT):
        titles = re.findall(r"^#+ (.+)$", (ROOT / "docs" / target).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
