"""Making the next batch while the present one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, each made in a thread while the one before is in use.

    One item more than is taken may be made, so what makes them must not count what it gave. An
    error in the thread is raised where its item would have come.
    """
    with ThreadPoolExecutor(1, "prefetch") as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item
