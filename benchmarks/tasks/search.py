"""The search that finds every method's hyper-parameters, base optimizers included.

A seeded random search with successive halving over seeds. Values lie on a logarithmic
lattice. Every method gets

1. `first` settings from its range, drawn by the same Halton sequence, with one seed;
2. neighbours on the lattice of the best two so far, with one seed, in rounds. They may
   lie outside of the range;
3. more seeds for the best few, and more again for the best of those;
4. while the best lies at the edge of all that was tried, its neighbours beyond that
   edge, with as many seeds, at most `moves` times.

What is best in the mean over its seeds is chosen. Halving is over seeds and not over
epochs: with wrong labels a short run favours what fits fast.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import qmc

# A setting's place on the lattice: learning rate, weight decay and, if any, rho
Point = tuple[int, ...]


class Hyperparameters(NamedTuple):
    """What is tuned.

    Attributes:
      learning_rate: at the first step.
      rho: radius; None for a method without one.
      weight_decay: lambda.
    """

    learning_rate: float
    rho: float | None
    weight_decay: float


class Axis(NamedTuple):
    """Numbers on a logarithmic lattice, and the range of them that is drawn from.

    Attributes:
      mantissas: one in [1, 10) for each number of a decade.
      low: index of the range's first number; 0 is the first mantissa itself.
      high: index of its last number.
    """

    mantissas: tuple[int, ...]
    low: int
    high: int

    def value(self, index: int) -> float:
        """The number at an index."""
        decade, place = divmod(index, len(self.mantissas))
        return float(f"{self.mantissas[place]}e{decade}")

    def draw(self, uniform: float) -> int:
        """The index in the range that a number in [0, 1) stands for."""
        return self.low + math.floor(uniform * (self.high - self.low + 1))


def axis(low: float, high: float, mantissas: tuple[int, ...] = (1, 2, 5)) -> Axis:
    """The lattice with a range from `low` to `high`, two of its numbers."""
    found = []
    for value in (low, high):
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        place = mantissas.index(int(mantissa))
        found.append(int(exponent) * len(mantissas) + place)
    return Axis(mantissas, *found)


class Space(NamedTuple):
    """What a method's hyper-parameters are drawn from.

    Attributes:
      learning_rate: of all methods.
      weight_decay: of all methods.
      rho: None for a method without one.
    """

    learning_rate: Axis
    weight_decay: Axis
    rho: Axis | None = None

    @property
    def axes(self) -> list[Axis]:
        return [axis for axis in self if axis is not None]

    def setting(self, point: Point) -> Hyperparameters:
        """The hyper-parameters at a place."""
        values = [a.value(i) for a, i in zip(self.axes, point, strict=True)]
        rho = values[2] if self.rho else None
        return Hyperparameters(values[0], rho, values[1])

    def draws(self) -> Iterator[Point]:
        """Distinct places in the range, evenly spread, the same on every call."""
        sequence, seen = qmc.Halton(3, seed=0), set[Point]()
        size = math.prod(a.high - a.low + 1 for a in self.axes)
        while len(seen) < size:
            (uniforms,) = sequence.random(1)
            point = tuple(a.draw(u) for a, u in zip(self.axes, uniforms, strict=False))
            if point not in seen:
                seen.add(point)
                yield point


class Plan(NamedTuple):
    """How much is tried.

    Attributes:
      first: settings drawn from the range.
      near: neighbours of the best two in each round.
      rungs: how many are kept, and how many seeds they then have, one after the other.
      moves: how often a range moves on where the best lies at its edge.
    """

    first: int = 16
    near: tuple[int, ...] = (6, 6)
    rungs: tuple[tuple[int, int], ...] = ((6, 3), (3, 6))
    moves: int = 3

    @property
    def runs(self) -> int:
        """Of a method whose best lies within."""
        seeds, total = 1, self.first + sum(self.near)
        for kept, more in self.rungs:
            total += kept * (more - seeds)
            seeds = more
        return total


class Found(NamedTuple):
    """What came of a search.

    Attributes:
      chosen: the best setting.
      score: its mean over its seeds.
      at_edge: whether it still lies at the edge of what was tried.
      settings: how many were tried.
      runs: in how many runs.
    """

    chosen: Hyperparameters
    score: float
    at_edge: bool
    settings: int
    runs: int


def search(
    space: Space,
    score: Callable[[Hyperparameters, int], float],
    plan: Plan,
) -> Found:
    """Searches; deterministic, so that remembered scores take it on where it was.

    Args:
      space: what is drawn from.
      score: ``score(setting, seed)``; larger is better, NaN is worst.
      plan: how much is tried.
    """
    scores: dict[Point, list[float]] = {}

    def measure(points: Sequence[Point], seeds: int) -> None:
        for point in points:
            own = scores.setdefault(point, [])
            for seed in range(len(own), seeds):
                value = score(space.setting(point), seed)
                own.append(-math.inf if math.isnan(value) else value)

    def ranked() -> list[Point]:
        """Those with the most seeds, the best first."""
        most = max(map(len, scores.values()))
        finalists = [point for point, own in scores.items() if len(own) == most]
        return sorted(finalists, key=lambda p: -float(np.mean(scores[p])))

    draws = space.draws()
    measure([p for p, _ in zip(draws, range(plan.first), strict=False)], 1)
    for count in plan.near:
        measure(_neighbours(ranked()[:2], scores, count), 1)
    seeds = 1
    for kept, seeds in plan.rungs:
        measure(ranked()[:kept], seeds)
    for _ in range(plan.moves):
        measure(_beyond(ranked()[0], scores), seeds)
    best = ranked()[0]
    return Found(
        chosen=space.setting(best),
        score=float(np.mean(scores[best])),
        at_edge=bool(_beyond(best, scores)),
        settings=len(scores),
        runs=sum(map(len, scores.values())),
    )


def _neighbours(
    centres: Sequence[Point], tried: dict[Point, list[float]], count: int
) -> list[Point]:
    """Places one step from a centre, in some of the directions, not tried yet."""
    rng = np.random.default_rng(0)
    found: list[Point] = []
    # More than the neighbours there are, should most of them be tried already.
    for attempt in range(100 * count):
        centre = centres[attempt % len(centres)]
        step = rng.integers(-1, 2, size=len(centre))
        point = tuple(int(i) for i in np.add(centre, step))
        if point not in tried and point not in found:
            found.append(point)
        if len(found) == count:
            break
    return found


def _beyond(best: Point, tried: dict[Point, list[float]]) -> list[Point]:
    """The best's neighbours outside of the range of all that was tried."""
    found = []
    for dimension, index in enumerate(best):
        indices = [point[dimension] for point in tried]
        for edge, step in ((min(indices), -1), (max(indices), 1)):
            if index == edge:
                found.append((*best[:dimension], index + step, *best[dimension + 1 :]))
    return found
