"""Colours, line styles and markers, the same for a method in all figures."""

from collections.abc import Iterable
from typing import NamedTuple

LineStyle = str | tuple[float, tuple[float, ...]]

# Of Okabe and Ito, without the yellow that vanishes on white: told apart whatever the
# colour vision.
_COLORS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
# Told apart in grey too: dashes, as lengths of strokes and gaps, and a marker.
_STYLES: tuple[tuple[LineStyle, str], ...] = (
    ("-", "o"),
    ((0, (5, 1.5)), "s"),
    ((0, (1, 1.2)), "^"),
    ((0, (6, 1.5, 1, 1.5)), "D"),
    ((0, (10, 3.5)), "v"),
    ((0, (6, 1.5, 1, 1.5, 1, 1.5)), "P"),
    ((0, (2.2, 2.2)), "X"),
    ((0, (10, 1.5, 4, 1.5)), "p"),
)
# A method's place decides its look. The first seven differ in colour and in style.
METHODS = (
    *("sgd", "msam", "sam", "ae_sam", "nag", "adam", "looksam"),
    *("esam", "adamw", "asam", "ss_sam", "ae_looksam", "gsam", "friendly_sam"),
    *("fisher_sam", "gradient_norm_penalty", "wsam", "wsam_decoupled", "adamw_msam"),
    *("sam_renormalized", "le_sam", "spectral_sam", "filter_noise", "sampa", "bsam"),
    *("msam_along_update", "adamw_along_update", "lion", "lion_along_momentum"),
    *("lion_along_update", "muon", "muon_along_momentum", "muon_along_update"),
)


class Look(NamedTuple):
    """How a method is drawn.

    Attributes:
      color: of lines, markers and bands.
      style: of lines, as matplotlib has it.
      marker: of points.
    """

    color: str
    style: LineStyle
    marker: str


# Seven colours and eight styles have no common divisor: stepping in both at once meets
# all 56 pairs, and neighbours differ in both.
_LOOKS = [
    Look(_COLORS[i % len(_COLORS)], *_STYLES[i % len(_STYLES)])
    for i in range(len(_COLORS) * len(_STYLES))
]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How to draw each of the names that one figure shows.

    A method of this library, as ``"msam"``, has its look in all figures; so has the
    first variant of it, as ``"msam ρ=1"``, while further ones keep the colour. Any
    other name gets a look that the figure has not used. All are different, up to 56.

    Args:
      names: labels of the figure's legend.

    Returns:
      A :class:`Look` for each name.

    >>> from msam_optax.plotting import looks
    >>> found = looks(["sgd", "msam ρ=1", "msam ρ=2"])
    >>> found["msam ρ=1"] == looks(["msam"])["msam"]
    True
    >>> found["msam ρ=1"].color == found["msam ρ=2"].color
    True
    """
    names = list(dict.fromkeys(names))
    chosen: dict[str, Look] = {}
    for name in names:
        look = _method_look(name)
        if look is not None and look not in chosen.values():
            chosen[name] = look
    for name in names:
        if name not in chosen:
            chosen[name] = _free_look(list(chosen.values()), _method_look(name))
    return {name: chosen[name] for name in names}


def _method_look(name: str) -> Look | None:
    method = name.partition(" ")[0]
    return _LOOKS[METHODS.index(method)] if method in METHODS else None


def _free_look(used: list[Look], own: Look | None) -> Look:
    """The look of the fewest clashes; in the colour of `own` if there is one left."""

    def clashes(look: Look) -> tuple[bool, int]:
        same = [(look.color == u.color) + (look.style == u.style) for u in used]
        return own is not None and look.color != own.color, sum(same)

    # Those that belong to no method come first.
    ordered = _LOOKS[len(METHODS) :] + _LOOKS[: len(METHODS)]
    return min([look for look in ordered if look not in used] or ordered, key=clashes)
