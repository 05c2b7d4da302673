"""The selection of coordinates as it is said: ranks are bisected, every cost is computed anew."""

import torch


def select_within(structure, costs, score, limit, budget, min_keep=1, round_to=1):
    """What :func:`sfpk_kernels.structure.select.select_within` keeps."""
    ranking = Ranking(structure, score.detach().cpu().double(), min_keep, round_to)
    low, high = 0, structure.size
    while low < high:
        middle = (low + high + 1) // 2
        if costs.cost(ranking.keep(middle), budget) <= limit:
            low = middle
        else:
            high = middle - 1
    return filled(ranking, costs, ranking.keep(low), budget, limit)


class Ranking:
    """Coordinates from the best to the worst, what must stay first."""

    def __init__(self, structure, score, min_keep, round_to):
        self.structure, self.round_to = structure, round_to
        self.order = score.argsort(descending=True, stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(structure.size)
        self.by_group = [self.sorted(torch.arange(g.first, g.first + g.size)) for g in structure.groups]
        self.floor = torch.zeros(structure.size, dtype=torch.bool)
        for best in self.by_group:
            self.floor[best[:min_keep]] = True
        for layer in structure.layers:
            if not self.floor[layer].any():
                self.floor[self.sorted(layer)[0]] = True

    def sorted(self, coordinates):
        return coordinates[self.place[coordinates].argsort()]

    def keep(self, rank):
        keep = self.floor.clone()
        keep[self.order[:rank]] = True
        if self.round_to > 1:
            for group, best in zip(self.structure.groups, self.by_group, strict=True):
                add_best(keep, best, self.allowed(group, int(keep[group.span].sum())))
        return keep

    def allowed(self, group, count):
        return min(-(-count // self.round_to) * self.round_to, group.size)


def add_best(keep, best, count):
    missing = best[~keep[best]]
    keep[missing[: count - (len(best) - len(missing))]] = True


def filled(ranking, costs, keep, budget, limit):
    alike, closed = costs.alike, set()
    for coordinate in ranking.order.tolist():
        if keep[coordinate] or int(alike[coordinate]) in closed:
            continue
        group = ranking.structure.group_of(coordinate)
        more = keep.clone()
        more[coordinate] = True
        best = ranking.by_group[ranking.structure.groups.index(group)]
        add_best(more, best, ranking.allowed(group, int(more[group.span].sum())))
        if costs.cost(more, budget) <= limit:
            keep = more
        else:
            closed.add(int(alike[coordinate]))
    return keep
