"""Prefetched items are the same items, and an error keeps its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest

from rwkvtune.data.prefetch import prefetched


def test_all_items_come_once_and_in_order() -> None:
    assert list(prefetched(iter(range(1, 100)))) == list(range(1, 100))
    assert list(prefetched(iter(()))) == []


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    made = threading.Event()

    def items() -> Iterator[str]:
        yield "first"
        made.set()
        yield "second"

    coming = prefetched(items())
    assert next(coming) == "first"
    assert made.wait(timeout=600), "nothing was made ahead"
    assert next(coming) == "second"


def test_an_error_comes_where_its_item_would_have() -> None:
    coming = prefetched(map((8).__floordiv__, (4, 2, 0, 1)))
    assert [next(coming), next(coming)] == [2, 4]
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_an_endless_source_ends_with_its_reader() -> None:
    coming = prefetched(count(1))
    assert next(coming) == 1
    coming.close()  # type: ignore[attr-defined]
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())
