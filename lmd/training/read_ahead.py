"""The next batch is read while a step computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next one while the caller has this one.

    The thread ends with the iterator: when that is exhausted, closed or let go of.

    Raises:
        Exception: what making an item raised, when that item is asked for.
    """
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item
