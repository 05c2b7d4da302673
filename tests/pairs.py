"""Few rows of a product of choices: every two values of different factors meet in one of them."""

import itertools


def pairwise(*factors):
    """Rows, tuples of one value of each factor, chosen greedily: the same ones each time."""
    rows = list(itertools.product(*(range(len(factor)) for factor in factors)))
    open_pairs = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while open_pairs:
        best = max(rows, key=lambda row: len(open_pairs & _pairs(row)))
        open_pairs -= _pairs(best)
        chosen.append(tuple(factor[i] for factor, i in zip(factors, best, strict=True)))
    return chosen


def _pairs(row):
    return set(itertools.combinations(enumerate(row), 2))
