"""Random selections for the selection tests, and their check by counting, without any code of the package."""

import itertools
import random

import torch

INF = float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scores_like(kind, d, generator):
    """(d,) values of one kind: where radix digits, ties and samples go wrong."""
    if kind == "random":
        return torch.randn(d, generator=generator)
    if kind == "few":
        return torch.randint(-2, 3, (d,), generator=generator).float()
    if kind == "equal":
        return torch.full((d,), 0.75)
    if kind == "near one":
        return 1.0 - 1e-3 * torch.rand(d, generator=generator)
    if kind == "sorted":
        return torch.randn(d, generator=generator).sort().values
    if kind == "special":
        table = torch.tensor([INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 3e38, -3e38])
        return table[torch.randint(len(table), (d,), generator=generator)]
    raise ValueError(kind)


KINDS = ("random", "few", "equal", "near one", "sorted", "special")


def constrained(seed):
    """One small instance: values (d,), k and options that some selection satisfies."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    group = draw.choice([1, 2, 4])
    d = group * draw.randint(1, 12)
    values = scores_like(draw.choice(["random", "few", "equal", "special"]), d, generator)
    options = {}
    status = [draw.choices("fpr", (6, 1, 1))[0] if seed % 2 else "f" for _ in range(d)]
    if draw.random() < 0.4 and group > 1:
        keep = draw.randint(1, group)
        options["pattern"] = (keep, group)
        for start in range(0, d, group):
            for e in [e for e in range(start, start + group) if status[e] == "p"][keep:]:
                status[e] = "f"
    if "p" in status:
        options["protected"] = torch.tensor([s == "p" for s in status])
    if "r" in status:
        options["removed"] = torch.tensor([s == "r" for s in status])
    ranked = candidates(values.tolist(), status, options.get("pattern"))
    usable = [e in ranked or s == "p" for e, s in enumerate(status)]
    borders, low, high = [0, d], [0], [d]
    if draw.random() < 0.7:
        inner = sorted(draw.randint(0, d) for _ in range(draw.randint(1, 4)))
        borders, low, high = [0, *inner, d], [], []
        for a, b in itertools.pairwise(borders):
            least, most = sum(s == "p" for s in status[a:b]), sum(usable[a:b])
            low.append(draw.randint(0, most) if draw.random() < 0.5 else 0)
            high.append(draw.randint(max(low[-1], least), most) if draw.random() < 0.5 else d)
        options |= {"segments": borders, "min_keep": low, "max_keep": high}
    least = most = 0
    for s, (a, b) in enumerate(itertools.pairwise(borders)):
        least += max(low[s], sum(x == "p" for x in status[a:b]))
        most += min(high[s], sum(usable[a:b]))
    return values, draw.randint(least, most), options


def candidates(values, status, pattern):
    """Entries that may be chosen freely: neither protected nor removed, and among the N best of their group."""
    keep, group = pattern or (1, 1)
    found = set()
    for start in range(0, len(values), group):
        members = range(start, start + group)
        places = keep - sum(status[e] == "p" for e in members)
        free = sorted((e for e in members if status[e] == "f"), key=lambda e: (-values[e], e))
        found.update(free[: max(places, 0)])
    return found


def best_selection(values, k, options):
    """The kept set by integer counting: the largest first candidates, one by one, while a solution remains.

    Going through the ranking, an entry is taken if its segment is below its ceiling and the places left after it
    still cover the floors that are not yet met. That greedy is exact for floors and ceilings of disjoint segments.
    """
    d = len(values)
    values = values.tolist()
    flags = {name: options.get(name) for name in ("protected", "removed")}
    status = ["f"] * d
    for name, letter in (("protected", "p"), ("removed", "r")):
        if flags[name] is not None:
            status = [letter if flag else s for s, flag in zip(status, flags[name].tolist(), strict=True)]
    borders = options.get("segments", [0, d])
    low, high = options.get("min_keep", [0]), options.get("max_keep", [d])
    owner = [max(s for s in range(len(borders) - 1) if borders[s] <= e < borders[s + 1]) for e in range(d)]
    kept = {e for e in range(d) if status[e] == "p"}
    counts = [sum(owner[e] == s for e in kept) for s in range(len(borders) - 1)]
    for e in sorted(candidates(values, status, options.get("pattern")), key=lambda e: (-values[e], e)):
        if counts[owner[e]] >= high[owner[e]] or len(kept) == k:
            continue
        counts[owner[e]] += 1
        missing = sum(max(floor - count, 0) for floor, count in zip(low, counts, strict=True))
        if len(kept) + 1 + missing > k:
            counts[owner[e]] -= 1
        else:
            kept.add(e)
    return kept
