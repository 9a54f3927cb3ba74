"""Names in one line of a report."""

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are.

    >>> shortened(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
