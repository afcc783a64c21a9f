"""Timing that compares: every contender has its turn in every round.

What slows the machine down for a while slows all of them alike, so their ratios within
a round hold still where their seconds do not. Needs neither JAX nor PyTorch.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One timed step.

    Attributes:
      seconds: from the call until all its results are there.
      employed: whether it took the extra gradient that some steps do without.
    """

    seconds: float
    employed: bool = False


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float


# What each contender measured in one round
Round = Mapping[str, Sequence[Sample]]


def interleave(
    turns: Mapping[str, Callable[[], Sequence[Sample]]], rounds: int
) -> list[Round]:
    """Gives all contenders a turn in each round, in an order drawn anew.

    Args:
      turns: what a contender does in its turn.
      rounds: how many.

    Returns:
      The samples of each round.
    """
    order = random.Random(0)
    return [
        {name: turns[name]() for name in order.sample(list(turns), len(turns))}
        for _ in range(rounds)
    ]


def ratio(rounds: Sequence[Round], name: str, base: str) -> Spread:
    """The time of a step over the base's in the same round."""
    units = [np.median([s.seconds for s in round_[base]]) for round_ in rounds]
    return _spread(rounds, name, units)


def seconds(rounds: Sequence[Round], name: str) -> Spread:
    """The time of a step."""
    return _spread(rounds, name, [1.0] * len(rounds))


def employed_fraction(rounds: Sequence[Round], name: str) -> float:
    """The share of the timed steps that took the extra gradient."""
    return float(np.mean([s.employed for round_ in rounds for s in round_[name]]))


def _spread(rounds: Sequence[Round], name: str, units: Sequence[float]) -> Spread:
    """Quartiles of each kind of step, combined with the kinds' shares.

    A median over all steps would be that of the more frequent kind alone.
    """
    kinds: dict[bool, list[float]] = {False: [], True: []}
    for round_, unit in zip(rounds, units, strict=True):
        for sample in round_[name]:
            kinds[sample.employed].append(sample.seconds / unit)
    total = sum(map(len, kinds.values()))
    combined = np.sum(
        [
            len(values) / total * np.percentile(values, (25, 50, 75))
            for values in kinds.values()
            if values
        ],
        axis=0,
    )
    return Spread(*map(float, combined))
