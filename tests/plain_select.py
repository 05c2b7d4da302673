"""The selection of coordinates as it is said: ranks are bisected, every cost is computed anew."""

import torch


def select_within(structure, costs, score, limit, budget, limits):
    """What :func:`sfpk_kernels.structure.select.select_within` keeps."""
    ranking = Ranking(structure, score.detach().cpu().double(), limits)
    low, high = 0, len(ranking.order)
    while low < high:
        middle = (low + high + 1) // 2
        if costs.cost(ranking.keep(middle), budget) <= limit:
            low = middle
        else:
            high = middle - 1
    return filled(ranking, costs, ranking.keep(low), budget, limit)


def most(structure, costs, budget, limits):
    """What the most cost that may stay."""
    ranking = Ranking(structure, torch.zeros(structure.size), limits)
    return costs.cost(ranking.keep(structure.size), budget)


class Ranking:
    """Coordinates that may stay, from the best to the worst, what must stay first."""

    def __init__(self, structure, score, limits):
        self.structure, self.limits = structure, limits
        order = score.argsort(descending=True, stable=True)
        self.place = torch.empty_like(order)
        self.place[order] = torch.arange(structure.size)
        self.by_group = [self.sorted(torch.arange(g.first, g.first + g.size)) for g in structure.groups]
        self.floor = torch.zeros(structure.size, dtype=torch.bool)
        for best, least in zip(self.by_group, limits.least, strict=True):
            self.floor[best[:least]] = True
        for layer in structure.layers:
            if not self.floor[layer].any():
                self.floor[self.sorted(layer)[0]] = True
        self.replaced = 0  # coordinates that were in the floor for the sake of a layer
        self.by_group = [self.below(best, most) for best, most in zip(self.by_group, limits.most, strict=True)]
        may_stay = torch.zeros(structure.size, dtype=torch.bool)
        may_stay[torch.cat(self.by_group)] = True
        self.order = order[may_stay[order]]

    def sorted(self, coordinates):
        return coordinates[self.place[coordinates].argsort()]

    def below(self, best, most):
        if most == len(best):
            return best
        before = int(self.floor[best].sum())
        for coordinate in best.flip(0).tolist():
            if int(self.floor[best].sum()) <= most:
                break
            self.floor[coordinate] = False
            if not all(self.floor[layer].any() for layer in self.structure.layers):
                self.floor[coordinate] = True
        self.replaced += before - int(self.floor[best].sum())
        others = best[~self.floor[best]][: most - int(self.floor[best].sum())]
        return self.sorted(torch.cat([best[self.floor[best]], others]))

    def keep(self, rank):
        keep = self.floor.clone()
        keep[self.order[:rank]] = True
        if self.limits.round_to > 1:
            for number, group in enumerate(self.structure.groups):
                self.fill(keep, number, int(keep[group.span].sum()))
        return keep

    def fill(self, keep, number, count):
        best = self.by_group[number]
        missing = best[~keep[best]]
        keep[missing[: self.limits.allowed(number, count) - (len(best) - len(missing))]] = True


def filled(ranking, costs, keep, budget, limit):
    alike, closed = costs.alike, set()
    for coordinate in ranking.order.tolist():
        if keep[coordinate] or int(alike[coordinate]) in closed:
            continue
        group = ranking.structure.group_of(coordinate)
        more = keep.clone()
        more[coordinate] = True
        ranking.fill(more, ranking.structure.groups.index(group), int(more[group.span].sum()))
        if costs.cost(more, budget) <= limit:
            keep = more
        else:
            closed.add(int(alike[coordinate]))
    return keep
