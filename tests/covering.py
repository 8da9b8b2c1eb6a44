"""Covering arrays: few combinations of which every pair of values is part."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, each with one value per factor, in which each pair of values of two factors occurs.

    Greedy: a row begins with a pair that is missing, and each further factor takes the value that
    adds most of the missing ones.
    """
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for i, name in enumerate(names):
            if i not in row:
                gains = [
                    sum(tuple(sorted([(i, value), other])) in missing for other in row.items())
                    for value in range(len(factors[name]))
                ]
                row[i] = gains.index(max(gains))
        missing -= set(itertools.combinations(sorted(row.items()), 2))
        rows.append({name: factors[name][row[i]] for i, name in enumerate(names)})
    return rows
