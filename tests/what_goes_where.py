"""What goes where: Optax's wrappers inside, before, behind and around our methods.

Each row is a program and what comes of it; ``tests/contract/test_what_goes_where.py``
executes them, and ``markdown`` renders them for the documentation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import msam_optax as mo

RHO = 0.3
STEPS = 4
PARAMS = {"a": jnp.array([0.7, -1.2]), "b": jnp.array([0.4, 1.1, -0.6])}

RIGHT = "right"
FILLED = "right in `make_train_step`; elsewhere it asks for `all_params`"
REFUSED = "refused"
SEEN = "refused in `make_train_step`; wrong in a step of your own"
WRONG = "wrong"

PLACES = ("inside", "before", "behind", "around")


class Row(NamedTuple):
    """A wrapper in one place of one method.

    Attributes:
      method: "SAM" or "MSAM".
      wrapper: Optax's name.
      place: one of PLACES.
      outcome: one of the five above.
      build: the program, an optimizer.
      meant: what one wants of it, an optimizer: for SAM it is handed the perturbed
        gradient, for MSAM it is the one inside.
      why: a sentence for the table.
      loop: how it is trained.
    """

    method: str
    wrapper: str
    place: str
    outcome: str
    build: Callable[[], Any]
    meant: Callable[[], Any]
    why: str
    loop: "Loop"


class Loop(NamedTuple):
    """How a row is trained.

    Attributes:
      nan_at: the step on which the second gradient alone is not finite.
      visible: the parameters that SAM perturbs, all by default.
      employed: whether a step is SAM's.
      before: what MSAM's gradient goes through first.
      synced: whether the parameters are a pair of fast and slow ones.
      searches: whether value_fn is handed in, in the place of grad_fn.
    """

    nan_at: int | None = None
    visible: tuple[str, ...] = ("a", "b")
    employed: Callable[[int], bool] = lambda t: True
    before: Any = None
    synced: bool = False
    searches: bool = False


def loss(p: Any, t: Any) -> jax.Array:
    return jnp.sum(jnp.cos(p["a"] + 0.3 * t)) * jnp.sum(p["b"] ** 2) + jnp.sum(p["b"])


gradient = jax.grad(loss)


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def element() -> optax.GradientTransformationExtraArgs:
    return mo.sharpness_aware_gradient(mo.ascents.normalized(RHO))


def sam(inner: Any) -> Any:
    return mo.sam(inner, RHO)


def msam(inner: Any) -> Any:
    return mo.momentum_perturbation(inner, RHO)


def micro(inner: Any) -> Any:
    steps = optax.MultiSteps(inner, 2)
    # Its gradient_transformation() would hand no extra arguments on.
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def accumulating(inner: Any) -> Any:
    return optax.MultiSteps(inner, 2).gradient_transformation()


def guarded(inner: Any) -> Any:
    return optax.apply_if_finite(inner, 5)


def groups(first: Any, second: Any) -> Any:
    return optax.partition({"1": first, "2": second}, {"a": "1", "b": "2"})


def even(step: Any) -> Any:
    return step % 2 == 0


def scaled(inner: Any) -> Any:
    return optax.contrib.mechanize(inner, s_init=0.5)


def search(inner: Any) -> Any:
    # A step that is too long, so that there is something to search.
    shorter = optax.scale_by_backtracking_linesearch(8)
    return optax.chain(inner, optax.scale(20.0), shorter)


CLIP = optax.clip_by_global_norm(0.5)
DECAY = optax.add_decayed_weights(0.1)
EMA = optax.ema(0.5)
FREEZE = optax.transforms.freeze({"a": False, "b": True})
ONLY_A = {"a": True, "b": False}
FROZEN = {"a": False, "b": True}


def decayed(inner: Any) -> Any:
    return optax.chain(optax.masked(DECAY, ONLY_A), inner)


def free(inner: Any) -> Any:
    return optax.contrib.schedule_free(inner, 0.1, b1=0.9)


STEERS = "It would steer the ascent and be lost from the step."
AS_ANY = "As behind any optimizer."
UNSEEN = "It does not see the gradient that is taken inside."
MOVES = "It changes updates in which the perturbation's own move stands."
NO_EXTRAS = "It hands no extra arguments on."
HIDES = "The loss needs all parameters, of which it hides some."
RAW = (
    "What it hides gets the raw gradient as its update, as around any optimizer: "
    "freeze it, or take `partition`."
)

Built = Callable[[], Any]


def row(
    method: str,
    wrapper: str,
    place: str,
    outcome: str,
    build: Built,
    meant: Built = sgd,
    why: str = "",
    **options: Any,
) -> Row:
    return Row(method, wrapper, place, outcome, build, meant, why, Loop(**options))


def chained(*parts: Any) -> Built:
    return lambda: optax.chain(*parts)


clipped = chained(CLIP, sgd())
SAM = [
    row("SAM", "clip", "inside", RIGHT, lambda: sam(clipped()), clipped),
    row("SAM", "clip", "before", SEEN, chained(CLIP, sam(sgd())), clipped, STEERS),
    row(
        "SAM",
        "clip",
        "behind",
        RIGHT,
        chained(sam(sgd()), CLIP),
        chained(sgd(), CLIP),
        AS_ANY,
    ),
    row(
        "SAM",
        "weight decay",
        "inside",
        RIGHT,
        lambda: sam(optax.chain(DECAY, sgd())),
        chained(DECAY, sgd()),
    ),
    row(
        "SAM",
        "weight decay",
        "before",
        SEEN,
        chained(DECAY, sam(sgd())),
        chained(DECAY, sgd()),
        STEERS,
    ),
    row(
        "SAM",
        "weight decay",
        "behind",
        WRONG,
        chained(sam(sgd()), DECAY),
        chained(DECAY, sgd()),
        "As behind any optimizer: the weights grow.",
    ),
    row(
        "SAM",
        "masked",
        "inside",
        RIGHT,
        lambda: sam(decayed(sgd())),
        lambda: decayed(sgd()),
    ),
    row(
        "SAM",
        "masked",
        "around",
        FILLED,
        lambda: optax.chain(optax.masked(sam(sgd()), ONLY_A), FREEZE),
        chained(sgd(), FREEZE),
        HIDES + " " + RAW,
        visible=("a",),
    ),
    row(
        "SAM",
        "partition",
        "inside",
        RIGHT,
        lambda: sam(groups(sgd(), optax.adam(0.1))),
        lambda: groups(sgd(), optax.adam(0.1)),
    ),
    row(
        "SAM",
        "partition",
        "around",
        FILLED,
        lambda: groups(sam(sgd()), optax.set_to_zero()),
        lambda: groups(sgd(), optax.set_to_zero()),
        HIDES,
        visible=("a",),
    ),
    row(
        "SAM",
        "selective_transform",
        "around",
        FILLED,
        lambda: optax.transforms.selective_transform(sam(sgd()), freeze_mask=FROZEN),
        lambda: optax.transforms.selective_transform(sgd(), freeze_mask=FROZEN),
        HIDES,
        visible=("a",),
    ),
    row(
        "SAM",
        "freeze",
        "inside",
        RIGHT,
        lambda: sam(optax.chain(sgd(), FREEZE)),
        chained(sgd(), FREEZE),
        "The frozen parameters are perturbed; `selective_transform` leaves them.",
    ),
    row(
        "SAM",
        "freeze",
        "before",
        SEEN,
        chained(FREEZE, sam(sgd())),
        chained(sgd(), FREEZE),
        "The second gradient trains what was frozen.",
    ),
    row(
        "SAM",
        "freeze",
        "behind",
        RIGHT,
        chained(sam(sgd()), FREEZE),
        chained(sgd(), FREEZE),
        AS_ANY,
    ),
    row(
        "SAM",
        "MultiSteps",
        "inside",
        RIGHT,
        lambda: sam(accumulating(sgd())),
        lambda: accumulating(sgd()),
        "The mean of the micro-batches' SAM gradients.",
    ),
    row(
        "SAM",
        "MultiSteps",
        "around",
        SEEN,
        lambda: micro(sam(sgd())),
        lambda: accumulating(sgd()),
        UNSEEN,
    ),
    row(
        "SAM",
        "apply_if_finite",
        "inside",
        RIGHT,
        lambda: sam(guarded(sgd())),
        lambda: guarded(sgd()),
        nan_at=1,
    ),
    row(
        "SAM",
        "apply_if_finite",
        "around",
        SEEN,
        lambda: guarded(sam(sgd())),
        lambda: guarded(sgd()),
        UNSEEN,
        nan_at=1,
    ),
    row(
        "SAM",
        "inject_hyperparams",
        "inside",
        RIGHT,
        lambda: sam(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)),
    ),
    row(
        "SAM",
        "inject_hyperparams",
        "around",
        RIGHT,
        lambda: optax.inject_hyperparams(lambda rho: mo.sam(sgd(), rho))(rho=RHO),
    ),
    row(
        "SAM",
        "lookahead",
        "around",
        REFUSED,
        lambda: optax.lookahead(sam(sgd()), 2, 0.5),
        why=NO_EXTRAS,
        synced=True,
    ),
    row(
        "SAM",
        "ema",
        "inside",
        RIGHT,
        lambda: sam(optax.chain(EMA, sgd())),
        chained(EMA, sgd()),
    ),
    row("SAM", "ema", "before", SEEN, chained(EMA, sam(sgd())), why=STEERS),
    row(
        "SAM",
        "ema",
        "behind",
        RIGHT,
        chained(sam(sgd()), EMA),
        chained(sgd(), EMA),
        AS_ANY,
    ),
    row(
        "SAM",
        "schedule_free",
        "inside",
        RIGHT,
        lambda: sam(free(sgd())),
        lambda: free(sgd()),
    ),
    row(
        "SAM",
        "schedule_free",
        "around",
        RIGHT,
        lambda: free(sam(sgd())),
        lambda: free(sgd()),
    ),
    row(
        "SAM",
        "mechanize",
        "inside",
        RIGHT,
        lambda: sam(scaled(sgd())),
        lambda: scaled(sgd()),
    ),
    row(
        "SAM",
        "mechanize",
        "around",
        WRONG,
        lambda: scaled(sam(sgd())),
        lambda: scaled(sgd()),
        "It finds its scale from the clean gradient.",
    ),
    row(
        "SAM",
        "line searches",
        "inside",
        RIGHT,
        lambda: sam(search(sgd())),
        lambda: search(sgd()),
        "Along SAM's step, on the clean loss. Hand in `value_fn` in the place of "
        "`grad_fn`, which a line search does not let pass.",
        searches=True,
    ),
    row(
        "SAM",
        "line searches",
        "behind",
        RIGHT,
        lambda: search(sam(sgd())),
        lambda: search(sgd()),
        "As inside.",
        searches=True,
    ),
    row(
        "SAM",
        "contrib.split_real_and_imaginary",
        "inside",
        RIGHT,
        lambda: sam(optax.contrib.split_real_and_imaginary(sgd())),
        why="For real parameters; complex ones are refused.",
    ),
    row(
        "SAM",
        "contrib.split_real_and_imaginary",
        "around",
        REFUSED,
        lambda: optax.contrib.split_real_and_imaginary(sam(sgd())),
        why=NO_EXTRAS,
    ),
    row("SAM", "flatten", "inside", RIGHT, lambda: sam(optax.flatten(sgd()))),
    row(
        "SAM",
        "flatten",
        "around",
        SEEN,
        lambda: optax.flatten(sam(sgd())),
        why="The loss is asked for a vector.",
    ),
    row(
        "SAM",
        "named_chain",
        "inside",
        RIGHT,
        lambda: sam(optax.named_chain(("clip", CLIP), ("sgd", sgd()))),
        clipped,
    ),
    row(
        "SAM",
        "named_chain",
        "around",
        RIGHT,
        lambda: optax.named_chain(("sam", element()), ("sgd", clipped())),
        clipped,
    ),
    row(
        "SAM",
        "conditionally_mask",
        "inside",
        RIGHT,
        lambda: sam(optax.conditionally_mask(sgd(), even)),
        lambda: optax.conditionally_mask(sgd(), even),
        "The second gradient is taken on every step.",
    ),
    row(
        "SAM",
        "conditionally_mask",
        "around",
        RIGHT,
        lambda: optax.conditionally_mask(sam(sgd()), even),
        lambda: optax.conditionally_mask(sgd(), even),
    ),
    row(
        "SAM",
        "conditionally_transform",
        "inside",
        RIGHT,
        lambda: sam(optax.chain(optax.conditionally_transform(CLIP, even), sgd())),
        chained(optax.conditionally_transform(CLIP, even), sgd()),
    ),
    row(
        "SAM",
        "conditionally_transform",
        "around",
        WRONG,
        lambda: optax.conditionally_transform(sam(sgd()), even),
        lambda: optax.conditionally_mask(sgd(), even),
        "The raw gradient is the update elsewhere; around "
        "`sharpness_aware_gradient` alone it is right.",
    ),
    row(
        "SAM",
        "conditionally_transform",
        "before",
        RIGHT,
        chained(optax.conditionally_transform(element(), even), sgd()),
        why="Around `sharpness_aware_gradient` alone: SAM on some steps.",
        employed=even,
    ),
]

MSAM = [
    row("MSAM", "clip", "inside", RIGHT, lambda: msam(clipped()), clipped),
    row("MSAM", "clip", "before", RIGHT, chained(CLIP, msam(sgd())), before=CLIP),
    row(
        "MSAM",
        "clip",
        "behind",
        REFUSED,
        chained(msam(sgd()), CLIP),
        chained(sgd(), CLIP),
        MOVES,
    ),
    row(
        "MSAM",
        "weight decay",
        "inside",
        RIGHT,
        lambda: msam(optax.chain(DECAY, sgd())),
        chained(DECAY, sgd()),
    ),
    row(
        "MSAM",
        "weight decay",
        "before",
        RIGHT,
        chained(DECAY, msam(sgd())),
        why="It decays the perturbed parameters, as the authors' SGD code does.",
        before=DECAY,
    ),
    row(
        "MSAM",
        "weight decay",
        "behind",
        REFUSED,
        chained(msam(sgd()), optax.add_decayed_weights(-0.01)),
        chained(sgd(), optax.add_decayed_weights(-0.01)),
        "It sees the perturbed parameters.",
    ),
    row(
        "MSAM",
        "masked",
        "inside",
        RIGHT,
        lambda: msam(decayed(sgd())),
        lambda: decayed(sgd()),
    ),
    row(
        "MSAM",
        "masked",
        "around",
        RIGHT,
        lambda: optax.masked(msam(sgd()), ONLY_A),
        lambda: optax.masked(sgd(), ONLY_A),
        "Perturbs what it shows. " + RAW,
    ),
    row(
        "MSAM",
        "partition",
        "inside",
        RIGHT,
        lambda: msam(groups(sgd(), optax.adam(0.1))),
        lambda: groups(sgd(), optax.adam(0.1)),
        "One norm over all groups.",
    ),
    row(
        "MSAM",
        "partition",
        "around",
        RIGHT,
        lambda: groups(msam(sgd()), optax.set_to_zero()),
        lambda: groups(sgd(), optax.set_to_zero()),
        "A norm for each group.",
    ),
    row(
        "MSAM",
        "selective_transform",
        "around",
        RIGHT,
        lambda: optax.transforms.selective_transform(msam(sgd()), freeze_mask=FROZEN),
        lambda: optax.transforms.selective_transform(sgd(), freeze_mask=FROZEN),
    ),
    row(
        "MSAM",
        "freeze",
        "inside",
        RIGHT,
        lambda: msam(optax.chain(FREEZE, sgd())),
        chained(FREEZE, sgd()),
        "Before the optimizer, else the momentum of what is frozen is perturbed along.",
    ),
    row("MSAM", "freeze", "before", RIGHT, chained(FREEZE, msam(sgd())), before=FREEZE),
    row(
        "MSAM",
        "freeze",
        "behind",
        REFUSED,
        chained(msam(sgd()), FREEZE),
        chained(FREEZE, sgd()),
        MOVES,
    ),
    row(
        "MSAM",
        "MultiSteps",
        "inside",
        RIGHT,
        lambda: msam(accumulating(sgd())),
        lambda: accumulating(sgd()),
    ),
    row(
        "MSAM",
        "MultiSteps",
        "around",
        RIGHT,
        lambda: accumulating(msam(sgd())),
        lambda: accumulating(sgd()),
    ),
    row(
        "MSAM",
        "apply_if_finite",
        "inside",
        RIGHT,
        lambda: msam(guarded(sgd())),
        lambda: guarded(sgd()),
    ),
    row(
        "MSAM",
        "apply_if_finite",
        "around",
        RIGHT,
        lambda: guarded(msam(sgd())),
        lambda: guarded(sgd()),
    ),
    row(
        "MSAM",
        "inject_hyperparams",
        "inside",
        RIGHT,
        lambda: msam(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)),
    ),
    row(
        "MSAM",
        "inject_hyperparams",
        "around",
        RIGHT,
        lambda: optax.inject_hyperparams(
            lambda rho: mo.momentum_perturbation(sgd(), rho)
        )(rho=RHO),
    ),
    row(
        "MSAM",
        "lookahead",
        "around",
        REFUSED,
        lambda: optax.lookahead(msam(sgd()), 2, 0.5),
        why="It moves the parameters itself.",
        synced=True,
    ),
    row(
        "MSAM",
        "ema",
        "inside",
        RIGHT,
        lambda: msam(optax.chain(EMA, sgd())),
        chained(EMA, sgd()),
    ),
    row("MSAM", "ema", "before", RIGHT, chained(EMA, msam(sgd())), before=EMA),
    row(
        "MSAM",
        "ema",
        "behind",
        REFUSED,
        chained(msam(sgd()), EMA),
        chained(sgd(), EMA),
        MOVES,
    ),
    row(
        "MSAM",
        "schedule_free",
        "inside",
        RIGHT,
        lambda: msam(free(sgd())),
        lambda: free(sgd()),
        "Of `eval_params` take `schedule_free_eval_params`.",
    ),
    row(
        "MSAM",
        "schedule_free",
        "around",
        REFUSED,
        lambda: free(msam(sgd())),
        lambda: free(sgd()),
        MOVES,
    ),
    row(
        "MSAM",
        "mechanize",
        "inside",
        RIGHT,
        lambda: msam(scaled(sgd())),
        lambda: scaled(sgd()),
    ),
    row(
        "MSAM",
        "mechanize",
        "around",
        REFUSED,
        lambda: scaled(msam(sgd())),
        lambda: scaled(sgd()),
        MOVES,
    ),
    row(
        "MSAM",
        "line searches",
        "inside",
        WRONG,
        lambda: msam(search(sgd())),
        lambda: search(sgd()),
        "Loss and gradient are those of the perturbed parameters, the step is not.",
        searches=True,
    ),
    row(
        "MSAM",
        "line searches",
        "behind",
        REFUSED,
        lambda: search(msam(sgd())),
        lambda: search(sgd()),
        MOVES,
        searches=True,
    ),
    row(
        "MSAM",
        "contrib.split_real_and_imaginary",
        "inside",
        RIGHT,
        lambda: msam(optax.contrib.split_real_and_imaginary(sgd())),
        why="For real parameters.",
    ),
    row(
        "MSAM",
        "contrib.split_real_and_imaginary",
        "around",
        RIGHT,
        lambda: optax.contrib.split_real_and_imaginary(msam(sgd())),
        why="For real parameters.",
    ),
    row(
        "MSAM",
        "flatten",
        "inside",
        REFUSED,
        lambda: msam(optax.flatten(sgd())),
        why="The momentum has another form than the parameters.",
    ),
    row(
        "MSAM",
        "flatten",
        "around",
        RIGHT,
        lambda: optax.flatten(msam(sgd())),
    ),
    row(
        "MSAM",
        "named_chain",
        "inside",
        RIGHT,
        lambda: msam(optax.named_chain(("clip", CLIP), ("sgd", sgd()))),
        clipped,
    ),
    row(
        "MSAM",
        "named_chain",
        "around",
        RIGHT,
        lambda: optax.named_chain(("clip", CLIP), ("msam", msam(sgd()))),
        before=CLIP,
    ),
    row(
        "MSAM",
        "conditionally_mask",
        "inside",
        RIGHT,
        lambda: msam(optax.conditionally_mask(sgd(), even)),
        lambda: optax.conditionally_mask(sgd(), even),
    ),
    row(
        "MSAM",
        "conditionally_mask",
        "around",
        RIGHT,
        lambda: optax.conditionally_mask(msam(sgd()), even),
        lambda: optax.conditionally_mask(sgd(), even),
    ),
    row(
        "MSAM",
        "conditionally_transform",
        "inside",
        RIGHT,
        lambda: msam(optax.chain(optax.conditionally_transform(CLIP, even), sgd())),
        chained(optax.conditionally_transform(CLIP, even), sgd()),
    ),
    row(
        "MSAM",
        "conditionally_transform",
        "around",
        SEEN,
        lambda: optax.conditionally_transform(msam(sgd()), even),
        lambda: optax.conditionally_mask(sgd(), even),
        "The raw gradient is the update elsewhere.",
    ),
]

ROWS = [*SAM, *MSAM]


def markdown(method: str) -> str:
    """The rows of a method as a table, each wrapper's places one under the other."""
    lines = ["| Wrapper | Where | What comes of it |", "|---|---|---|"]
    rows = [row for row in ROWS if row.method == method]
    for wrapper in dict.fromkeys(row.wrapper for row in rows):
        name = f"`{wrapper}`"
        found = [row for row in rows if row.wrapper == wrapper]
        for row in sorted(found, key=lambda row: PLACES.index(row.place)):
            outcome = f"**{row.outcome}**. {row.why}".strip()
            lines.append(f"| {name} | {row.place} | {outcome} |")
            name = ""
    return "\n".join(lines)
