"""Every alias against its plain recursion, against its blocks, and on closed forms."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import (
    DECAY,
    DECAYED_SGD,
    MU,
    RHO,
    SGD,
    by_tensor,
    decayed_sgd,
    distance,
    lr,
    on_both,
    ramp,
    recur,
)
from tests.problems import (
    STEPS,
    Problem,
    Run,
    mlp,
    named,
    quadratic,
    quadratic_matrix,
    run,
)
from tests.reference import recursions
from tests.reference.recursions import Tree, norm, unit

pytestmark = pytest.mark.usefixtures("x64")


def late(t: Any) -> Any:
    """A rho schedule that is zero for ten steps."""
    return RHO * (t >= 10)


def eval_params(state: Any, params: Any) -> Any:
    return mo.eval_params(state, params)


def employed(state: Any, params: Any) -> Any:
    return optax.tree_utils.tree_get(state, "EmployState").employed


# --- MSAM: perturbed and clean iterates -----------------------------------------------


class Case(NamedTuple):
    """An optimizer, its recursion, and the recursion's options."""

    tx: Callable[[], optax.GradientTransformation]
    recursion: Callable
    options: dict[str, Any]


MSAM_CASES = {
    "constant": Case(
        lambda: mo.msam(0.05, momentum=MU, rho=RHO),
        recursions.msam,
        dict(lr=0.05, rho=RHO, momentum=MU),
    ),
    "defaults": Case(
        lambda: mo.msam(0.05, rho=0.3), recursions.msam, dict(lr=0.05, rho=0.3)
    ),
    "schedules": Case(
        lambda: mo.msam(lr, momentum=MU, rho=ramp),
        recursions.msam,
        dict(**SGD, rho=ramp),
    ),
    "rho after a warm-up": Case(
        lambda: mo.msam(lr, momentum=MU, rho=late),
        recursions.msam,
        dict(**SGD, rho=late),
    ),
    "negative rho": Case(
        lambda: mo.msam(lr, momentum=MU, rho=-RHO),
        recursions.msam,
        dict(**SGD, rho=-RHO),
    ),
    "no momentum": Case(
        lambda: mo.msam(lr, momentum=0.0, rho=ramp),
        recursions.msam,
        dict(lr=lr, rho=ramp, momentum=0.0),
    ),
    "nesterov": Case(
        lambda: mo.msam(lr, momentum=MU, rho=ramp, nesterov=True),
        recursions.msam,
        dict(**SGD, rho=ramp, nesterov=True),
    ),
    "decay of the perturbed weights": Case(
        lambda: optax.chain(
            optax.add_decayed_weights(DECAY), mo.msam(lr, momentum=MU, rho=ramp)
        ),
        recursions.msam,
        dict(**SGD, rho=ramp, decay_of_perturbed=DECAY),
    ),
    "decay of the clean weights": Case(
        lambda: mo.momentum_perturbation(decayed_sgd(), ramp),
        recursions.msam,
        dict(**SGD, rho=ramp, decay_of_clean=DECAY),
    ),
    "around sgd": Case(
        lambda: mo.momentum_perturbation(optax.sgd(lr, MU, nesterov=True), -RHO),
        recursions.msam,
        dict(**SGD, rho=-RHO, nesterov=True),
    ),
    "adamw constant": Case(
        lambda: mo.adamw_msam(0.02, weight_decay=DECAY, rho=RHO),
        recursions.adamw_msam,
        dict(lr=0.02, weight_decay=DECAY, rho=RHO),
    ),
    "adamw defaults": Case(
        lambda: mo.adamw_msam(0.02, rho=1.0),
        recursions.adamw_msam,
        dict(lr=0.02, rho=1.0),
    ),
    "adamw schedules": Case(
        lambda: mo.adamw_msam(lr, 0.8, 0.95, 1e-3, weight_decay=DECAY, rho=ramp),
        recursions.adamw_msam,
        dict(lr=lr, b1=0.8, b2=0.95, eps=1e-3, weight_decay=DECAY, rho=ramp),
    ),
    "adamw negative rho": Case(
        lambda: mo.adamw_msam(lr, weight_decay=DECAY, rho=-RHO),
        recursions.adamw_msam,
        dict(lr=lr, weight_decay=DECAY, rho=-RHO),
    ),
    "adamw no momentum": Case(
        lambda: mo.adamw_msam(lr, b1=0.0, weight_decay=DECAY, rho=ramp),
        recursions.adamw_msam,
        dict(lr=lr, b1=0.0, weight_decay=DECAY, rho=ramp),
    ),
    "adamw nesterov": Case(
        lambda: mo.adamw_msam(lr, weight_decay=DECAY, nesterov=True, rho=ramp),
        recursions.adamw_msam,
        dict(lr=lr, weight_decay=DECAY, nesterov=True, rho=ramp),
    ),
    "adamw in the authors' order": Case(
        lambda: mo.adamw_msam(
            0.1 * (1 - 0.1 * DECAY), weight_decay=DECAY / (1 - 0.1 * DECAY), rho=ramp
        ),
        recursions.adamw_msam,
        dict(lr=0.1, weight_decay=DECAY, rho=ramp, authors_order=True),
    ),
    "around adamw": Case(
        lambda: mo.momentum_perturbation(optax.adamw(lr, weight_decay=DECAY), ramp),
        recursions.adamw_msam,
        dict(lr=lr, weight_decay=DECAY, rho=ramp),
    ),
}


@functools.cache
def msam_run(name: str, problem: Problem) -> Run:
    """The library's perturbed and clean iterates in one of MSAM_CASES."""
    return run(MSAM_CASES[name].tx(), problem, observe=eval_params)


@on_both
@pytest.mark.parametrize("name", MSAM_CASES)
def test_msam_is_its_recursion(name, problem):
    perturbed, clean = msam_run(name, problem)
    _, recursion, options = MSAM_CASES[name]
    expected_perturbed, expected_clean = recur(recursion, problem, **options)
    assert distance(perturbed, expected_perturbed) < 1e-10
    assert distance(clean, expected_clean) < 1e-10


# --- SAM and its relatives: iterates, and decisions where there are some --------------


class Setting(NamedTuple):
    """A radius, the optimizer to wrap, and that optimizer's options as a recursion."""

    rho: Any
    optimizer: Callable[[], optax.GradientTransformation]
    options: dict[str, Any]


SETTINGS = {
    "constant": Setting(RHO, lambda: optax.sgd(0.05, MU), dict(lr=0.05, momentum=MU)),
    "schedules": Setting(ramp, lambda: optax.sgd(lr, MU), SGD),
    "decay": Setting(RHO, decayed_sgd, DECAYED_SGD),
    "nesterov": Setting(
        ramp, lambda: decayed_sgd(nesterov=True), dict(**DECAYED_SGD, nesterov=True)
    ),
    "no momentum": Setting(
        ramp, lambda: decayed_sgd(momentum=0.0), dict(lr=lr, weight_decay=DECAY)
    ),
    "negative rho": Setting(-RHO, decayed_sgd, DECAYED_SGD),
}

SAM_ALIASES: dict[str, tuple[Callable, Callable]] = {
    "sam": (mo.sam, recursions.sam),
    "asam": (mo.asam, functools.partial(recursions.asam, eta=0.01)),
    "asam without eta": (
        functools.partial(mo.asam, eta=0.0),
        functools.partial(recursions.asam, eta=0.0),
    ),
}

SAM_CASES = [(alias, setting) for alias in ("sam", "asam") for setting in SETTINGS]
SAM_CASES += [("asam without eta", "decay")]


@functools.cache
def sam_run(alias: str, setting: str, problem: Problem) -> Any:
    """The library's iterates in one of SAM_CASES."""
    rho, optimizer, _ = SETTINGS[setting]
    build, _ = SAM_ALIASES[alias]
    return run(build(optimizer(), rho), problem).params


@on_both
@pytest.mark.parametrize("alias, setting", SAM_CASES)
def test_sam_is_its_recursion(alias, setting, problem):
    rho, _, options = SETTINGS[setting]
    _, recursion = SAM_ALIASES[alias]
    expected = recur(recursion, problem, rho=rho, **options)
    assert distance(sam_run(alias, setting, problem), expected) < 1e-10


@functools.cache
def ss_sam_run(setting: str, problem: Problem, probability: float, seed: int) -> Any:
    rho, optimizer, _ = SETTINGS[setting]
    tx = mo.ss_sam(optimizer(), rho, probability=probability, seed=seed)
    return run(tx, problem, observe=employed)


@on_both
@pytest.mark.parametrize(
    "setting, probability, seed", [("decay", 0.5, 0), ("nesterov", 0.3, 7)]
)
def test_ss_sam_is_its_recursion(setting, probability, seed, problem):
    rho, _, options = SETTINGS[setting]
    params, decisions = ss_sam_run(setting, problem, probability, seed)
    expected = recur(
        recursions.ss_sam, problem, rho=rho, decisions=decisions, **options
    )
    assert distance(params, expected) < 1e-10
    four_sigma = 4 * np.sqrt(probability * (1 - probability) / STEPS)
    assert abs(np.mean(decisions) - probability) < four_sigma


def test_ss_sam_draws_by_seed_and_not_by_problem():
    drawn = [ss_sam_run("decay", p, 0.5, 0).observed for p in (mlp(), quadratic())]
    np.testing.assert_array_equal(*drawn)
    other = ss_sam_run("decay", quadratic(), 0.5, 1).observed
    assert not np.array_equal(drawn[1], other)


AE_SAM_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": dict(total_steps=25),  # half of the run, so that c_t is seen to stop
    "others": dict(total_steps=40, delta=0.5, lambda_1=-0.2, lambda_2=0.2),
}


@functools.cache
def ae_sam_run(setting: str, thresholds: str, problem: Problem) -> Any:
    rho, optimizer, _ = SETTINGS[setting]
    tx = mo.ae_sam(optimizer(), rho, **AE_SAM_OPTIONS[thresholds])
    return run(tx, problem, observe=employed)


@on_both
@pytest.mark.parametrize("thresholds", AE_SAM_OPTIONS)
@pytest.mark.parametrize("setting", ["decay", "nesterov"])
def test_ae_sam_is_its_recursion(setting, thresholds, problem):
    rho, _, options = SETTINGS[setting]
    params, decisions = ae_sam_run(setting, thresholds, problem)
    expected, expected_decisions = recur(
        recursions.ae_sam, problem, rho=rho, **AE_SAM_OPTIONS[thresholds], **options
    )
    assert 10 < sum(expected_decisions) < STEPS - 5  # both kinds of steps were tested
    np.testing.assert_array_equal(decisions, expected_decisions)
    assert distance(params, expected) < 1e-10


# --- The plausible wrong versions are far away ----------------------------------------
#
# Each recursion below has one thing wrong; with nothing wrong it is the library's.


def twisted_msam(
    problem: Problem,
    *,
    direction: Callable[[Tree, Tree], Tree] = lambda v, w: unit(v),
    rho: Callable[[int], float] = ramp,
    along_old_momentum: bool = False,
    remove_with_new_rho: bool = False,
) -> list[Tree]:
    """MSAM over SGD with schedules and the authors' decay, by w̃ and ε alone."""
    perturbed = Tree(problem.named_params)
    v, epsilon, iterates = 0.0 * perturbed, 0.0 * perturbed, []
    for t in range(STEPS):
        w = perturbed - (-rho(t) * unit(v) if remove_with_new_rho else epsilon)
        g = Tree(problem.named_grad(perturbed, t)) + DECAY * perturbed
        old, v = v, MU * v + g
        w = w - lr(t) * v
        epsilon = -rho(t) * direction(old if along_old_momentum else v, w)
        perturbed = w + epsilon
        iterates.append(perturbed)
    return iterates


def twisted_adamw_msam(
    problem: Problem,
    *,
    normalise: Callable[[Tree], Tree] = unit,
    precondition: bool = False,
    decay_of_perturbed: bool = False,
    remove_with_new_rho: bool = False,
) -> list[Tree]:
    """MSAM over AdamW with schedules, by w̃ and ε alone."""
    perturbed = Tree(problem.named_params)
    m, s, epsilon, iterates = 0.0 * perturbed, 0.0 * perturbed, 0.0 * perturbed, []
    for t in range(STEPS):
        w = perturbed - (-ramp(t) * unit(m) if remove_with_new_rho else epsilon)
        g = Tree(problem.named_grad(perturbed, t))
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        m_hat, s_hat = m / (1 - 0.9 ** (t + 1)), s / (1 - 0.999 ** (t + 1))
        step = m_hat / (s_hat**0.5 + 1e-8)
        w = w - lr(t) * (step + DECAY * (perturbed if decay_of_perturbed else w))
        epsilon = -ramp(t) * normalise(step if precondition else m)
        perturbed = w + epsilon
        iterates.append(perturbed)
    return iterates


def twisted_ascent(
    problem: Problem, epsilon: Callable[[Tree, Tree], Tree], decay: str = "of clean"
) -> list[Tree]:
    """SGD with the gradient at w + epsilon(g, w)."""

    def gradient(w: Tree, t: int) -> Tree:
        there = w + epsilon(Tree(problem.named_grad(w, t)), w)
        g = Tree(problem.named_grad(there, t))
        return g + DECAY * there if decay == "of perturbed" else g

    weight_decay = DECAY if decay == "of clean" else 0.0
    start = problem.named_params
    return recursions.sgd(gradient, start, STEPS, **SGD, weight_decay=weight_decay)


def t_of(w: Tree, eta: float = 0.01, smallest_rank: int = 2) -> Tree:
    """ASAM's T."""
    return Tree(
        {k: abs(x) + eta if x.ndim >= smallest_rank else x**0 for k, x in w.items()}
    )


def twisted_ae_sam_run(
    problem: Problem,
    *,
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    power: int = 2,
    first_step: int = 0,
    test_first: bool = False,
    deviation_from_old_mean: bool = False,
    start_at_first: bool = False,
    norm_with_decay: bool = False,
    frozen_when_employed: bool = False,
    swapped: bool = False,
    flipped: bool = False,
    at_perturbed: bool = False,
) -> list[Tree]:
    """AE-SAM with the weight decay behind it."""
    mean = variance = 0.0

    def gradient(w: Tree, t: int) -> Tree:
        nonlocal mean, variance
        g = Tree(problem.named_grad(w, t))
        sharp = Tree(problem.named_grad(w + RHO * unit(g), t))
        measured = sharp if at_perturbed else g + DECAY * w if norm_with_decay else g
        n = norm(measured) ** power
        if start_at_first and t == 0:
            mean = n
        new_mean = delta * mean + (1 - delta) * n
        deviation = n - (mean if deviation_from_old_mean else new_mean)
        new = new_mean, delta * variance + (1 - delta) * deviation**2
        tested = (mean, variance) if test_first else new
        progress = min((t + first_step) / total_steps, 1.0)
        late, early = (lambda_2, lambda_1) if swapped else (lambda_1, lambda_2)
        c = progress * late + (1 - progress) * early
        employ = (n >= tested[0] + c * np.sqrt(tested[1])) != flipped
        if not (frozen_when_employed and employ):
            mean, variance = new
        return sharp if employ else g

    start = problem.named_params
    return recursions.sgd(gradient, start, STEPS, **DECAYED_SGD)


def twisted_ae_sam(problem: Problem, **twist: Any) -> list[Tree]:
    """AE-SAM with all thresholds, one run behind the other.

    Decisions are coarse: what is wrong shows with these thresholds or with those.
    """
    return [
        w
        for thresholds in AE_SAM_OPTIONS.values()
        for w in twisted_ae_sam_run(problem, **thresholds, **twist)
    ]


def twisted_ss_sam(problem: Problem, twist: Callable[[Any], Any]) -> list[Tree]:
    """SS-SAM with other decisions than the library's."""
    decisions = twist(np.array(ss_sam_run("decay", problem, 0.5, 0).observed))
    return recur(
        recursions.ss_sam, problem, rho=RHO, decisions=decisions, **DECAYED_SGD
    )


# The library's runs: everything varies that can.
RIGHT: dict[str, Callable[[Problem], Any]] = {
    "msam": lambda p: msam_run("decay of the perturbed weights", p)[0],
    "adamw_msam": lambda p: msam_run("around adamw", p)[0],
    "sam": lambda p: sam_run("sam", "decay", p),
    "asam": lambda p: sam_run("asam", "decay", p),
    "ss_sam": lambda p: ss_sam_run("decay", p, 0.5, 0)[0],
    "ae_sam": lambda p: [
        w for name in AE_SAM_OPTIONS for w in ae_sam_run("decay", name, p)[0]
    ],
}

NOTHING_WRONG: dict[str, Callable[[Problem], Any]] = {
    "msam": twisted_msam,
    "adamw_msam": twisted_adamw_msam,
    "sam": lambda p: twisted_ascent(p, lambda g, w: RHO * unit(g)),
    "asam": lambda p: twisted_ascent(p, lambda g, w: RHO * t_of(w) * unit(t_of(w) * g)),
    "ss_sam": lambda p: twisted_ss_sam(p, lambda drawn: drawn),
    "ae_sam": twisted_ae_sam,
}

MSAM_SGD: dict[str, Any] = dict(**SGD, rho=ramp)
MSAM_ADAMW: dict[str, Any] = dict(lr=lr, weight_decay=DECAY, rho=ramp)

AE_SAM_TWISTS: dict[str, dict[str, Any]] = {
    "test before the statistics": {"test_first": True},
    "deviation from the old mean": {"deviation_from_old_mean": True},
    "mean starts at the first": {"start_at_first": True},
    "norm not squared": {"power": 1},
    "norm with the decay": {"norm_with_decay": True},
    "norm at the perturbed weights": {"at_perturbed": True},
    "statistics of plain steps only": {"frozen_when_employed": True},
    "first step is 1": {"first_step": 1},
    "lambdas swapped": {"swapped": True},
    "the other steps": {"flipped": True},
}

WRONG: dict[tuple[str, str], Callable[[Problem], Any]] = {
    ("msam", "plain SGD"): lambda p: recur(recursions.sgd, p, **DECAYED_SGD),
    ("msam", "Nesterov"): lambda p: recur(
        recursions.sgd, p, **DECAYED_SGD, nesterov=True
    ),
    ("msam", "SAM"): lambda p: recur(recursions.sam, p, rho=ramp, **DECAYED_SGD),
    ("msam", "sign"): lambda p: twisted_msam(p, direction=lambda v, w: -1.0 * unit(v)),
    ("msam", "decay of the clean weights"): lambda p: recur(
        recursions.msam, p, **MSAM_SGD, decay_of_clean=DECAY
    )[0],
    ("msam", "clean weights shown"): lambda p: recur(
        recursions.msam, p, **MSAM_SGD, decay_of_perturbed=DECAY
    )[1],
    ("msam", "norm per tensor"): lambda p: twisted_msam(
        p, direction=lambda v, w: by_tensor(v)
    ),
    ("msam", "not normalised"): lambda p: twisted_msam(p, direction=lambda v, w: v),
    ("msam", "along the old momentum"): lambda p: twisted_msam(
        p, along_old_momentum=True
    ),
    ("msam", "rho of the next step"): lambda p: twisted_msam(
        p, rho=lambda t: ramp(t + 1)
    ),
    ("msam", "removed with the new rho"): lambda p: twisted_msam(
        p, remove_with_new_rho=True
    ),
    ("adamw_msam", "plain AdamW"): lambda p: recur(
        recursions.adamw, p, lr=lr, weight_decay=DECAY
    ),
    ("adamw_msam", "sign"): lambda p: twisted_adamw_msam(
        p, normalise=lambda m: -1.0 * unit(m)
    ),
    ("adamw_msam", "the authors' order"): lambda p: recur(
        recursions.adamw_msam, p, **MSAM_ADAMW, authors_order=True
    )[0],
    ("adamw_msam", "decay of the perturbed weights"): lambda p: twisted_adamw_msam(
        p, decay_of_perturbed=True
    ),
    ("adamw_msam", "preconditioned"): lambda p: twisted_adamw_msam(
        p, precondition=True
    ),
    ("adamw_msam", "norm per tensor"): lambda p: twisted_adamw_msam(
        p, normalise=by_tensor
    ),
    ("adamw_msam", "not normalised"): lambda p: twisted_adamw_msam(
        p, normalise=lambda m: m
    ),
    ("adamw_msam", "removed with the new rho"): lambda p: twisted_adamw_msam(
        p, remove_with_new_rho=True
    ),
    ("sam", "plain SGD"): lambda p: recur(recursions.sgd, p, **DECAYED_SGD),
    ("sam", "sign"): lambda p: twisted_ascent(p, lambda g, w: -RHO * unit(g)),
    ("sam", "norm per tensor"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * by_tensor(g)
    ),
    ("sam", "not normalised"): lambda p: twisted_ascent(p, lambda g, w: RHO * g),
    ("sam", "decay steers the ascent too"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * unit(g + DECAY * w)
    ),
    ("sam", "decay steers the ascent only"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * unit(g + DECAY * w), decay="none"
    ),
    ("sam", "decay of the perturbed weights"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * unit(g), decay="of perturbed"
    ),
    ("asam", "SAM"): lambda p: twisted_ascent(p, lambda g, w: RHO * unit(g)),
    ("asam", "sign"): lambda p: twisted_ascent(
        p, lambda g, w: -RHO * t_of(w) * unit(t_of(w) * g)
    ),
    ("asam", "norm per tensor"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * t_of(w) * by_tensor(t_of(w) * g)
    ),
    ("asam", "T once"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * unit(t_of(w) * g)
    ),
    ("asam", "norm of T²g"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * unit(t_of(w) * t_of(w) * g)
    ),
    ("asam", "norm of g"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * t_of(w) * t_of(w) * unit(g)
    ),
    ("asam", "no eta"): lambda p: twisted_ascent(
        p, lambda g, w: RHO * t_of(w, eta=0.0) * unit(t_of(w, eta=0.0) * g)
    ),
    ("asam", "biases scaled too"): lambda p: twisted_ascent(
        p,
        lambda g, w: (
            RHO * t_of(w, smallest_rank=1) * unit(t_of(w, smallest_rank=1) * g)
        ),
    ),
    ("ss_sam", "never"): lambda p: twisted_ss_sam(p, lambda drawn: 0 * drawn),
    ("ss_sam", "always"): lambda p: twisted_ss_sam(p, lambda drawn: drawn**0),
    ("ss_sam", "the other steps"): lambda p: twisted_ss_sam(p, np.logical_not),
    ("ss_sam", "one step late"): lambda p: twisted_ss_sam(
        p, lambda drawn: np.roll(drawn, 1)
    ),
    ("ae_sam", "plain SGD"): lambda p: (
        2 * recur(recursions.sgd, p, **DECAYED_SGD)  # one run for each thresholds
    ),
    ("ae_sam", "SAM"): lambda p: 2 * recur(recursions.sam, p, rho=RHO, **DECAYED_SGD),
    **{
        ("ae_sam", wrong): functools.partial(twisted_ae_sam, **twist)
        for wrong, twist in AE_SAM_TWISTS.items()
    },
}


@on_both
@pytest.mark.parametrize("alias", NOTHING_WRONG)
def test_nothing_wrong(alias, problem):
    assert distance(RIGHT[alias](problem), NOTHING_WRONG[alias](problem)) < 1e-10


@on_both
def test_msam_with_an_adaptive_ascent_scales_with_the_clean_weights(problem):
    tx = optax.chain(
        optax.add_decayed_weights(DECAY),
        mo.momentum_perturbation(
            optax.sgd(lr, MU), ascent=mo.ascents.adaptive(ramp, eta=0.01)
        ),
    )
    expected = twisted_msam(problem, direction=lambda v, w: t_of(w) * unit(t_of(w) * v))
    assert distance(run(tx, problem).params, expected) < 1e-10


@on_both
@pytest.mark.parametrize("alias, wrong", WRONG)
def test_wrong_versions_are_far_away(alias, wrong, problem):
    assert distance(RIGHT[alias](problem), WRONG[alias, wrong](problem)) > 1e-6


# --- Each alias is its blocks, and does nothing for rho = 0 ---------------------------


def sam_blocks(ascent: Any, policy: Any = None) -> optax.GradientTransformation:
    element = mo.sharpness_aware_gradient(ascent)
    if policy is not None:
        element = mo.employ(policy, element)
    return optax.chain(element, decayed_sgd())


BLOCKS: dict[str, Callable[[], Any]] = {
    "sam": lambda: sam_blocks(mo.ascents.normalized(RHO)),
    "asam": lambda: sam_blocks(mo.ascents.adaptive(RHO, 0.01)),
    "ss_sam": lambda: sam_blocks(
        mo.ascents.normalized(RHO), mo.policies.bernoulli(0.5, 0)
    ),
    "ae_sam": lambda: sam_blocks(
        mo.ascents.normalized(RHO), mo.policies.adaptive(40, 0.5, -0.2, 0.2)
    ),
}

ALIASES: dict[str, Callable[[Problem], Any]] = {
    "sam": lambda p: sam_run("sam", "decay", p),
    "asam": lambda p: sam_run("asam", "decay", p),
    "ss_sam": lambda p: ss_sam_run("decay", p, 0.5, 0).params,
    "ae_sam": lambda p: ae_sam_run("decay", "others", p).params,
}


@on_both
@pytest.mark.parametrize("name", BLOCKS)
def test_alias_is_its_blocks_bit_for_bit(name, problem):
    chex.assert_trees_all_equal(
        ALIASES[name](problem), run(BLOCKS[name](), problem).params
    )


# The aliases compute the old momentum from the new one, hence equal up to rounding.
MSAM_BLOCKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "msam": (
        "nesterov",
        lambda: mo.momentum_perturbation(optax.sgd(lr, MU, nesterov=True), ramp),
    ),
    "msam by an ascent": (
        "schedules",
        lambda: mo.momentum_perturbation(
            optax.sgd(lr, MU), ascent=mo.ascents.normalized(ramp)
        ),
    ),
    "adamw_msam": (
        "adamw schedules",
        lambda: mo.momentum_perturbation(
            optax.adamw(lr, 0.8, 0.95, 1e-3, weight_decay=DECAY), ramp
        ),
    ),
}


@on_both
@pytest.mark.parametrize("name", MSAM_BLOCKS)
def test_msam_alias_is_its_blocks(name, problem):
    case, blocks = MSAM_BLOCKS[name]
    ours = msam_run(case, problem)
    theirs = run(blocks(), problem, observe=eval_params)
    assert distance(ours.params, theirs.params) < 1e-12
    assert distance(ours.observed, theirs.observed) < 1e-12


def plain_sgd() -> optax.GradientTransformation:
    return optax.sgd(lr, MU)


def plain_adamw() -> optax.GradientTransformation:
    return optax.adamw(lr, weight_decay=DECAY)


@functools.cache
def base_run(base: Callable[[], Any], problem: Problem) -> Any:
    return run(base(), problem).params


WITHOUT_RHO: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sam": (lambda: mo.sam(decayed_sgd(), 0.0), decayed_sgd),
    "asam": (lambda: mo.asam(decayed_sgd(), 0.0), decayed_sgd),
    "ss_sam": (lambda: mo.ss_sam(decayed_sgd(), 0.0), decayed_sgd),
    "ae_sam": (lambda: mo.ae_sam(decayed_sgd(), 0.0, total_steps=40), decayed_sgd),
    "msam": (lambda: mo.msam(lr, MU, rho=0.0), plain_sgd),
    "adamw_msam": (
        lambda: mo.adamw_msam(lr, weight_decay=DECAY, rho=0.0),
        plain_adamw,
    ),
}


@on_both
@pytest.mark.parametrize("name", WITHOUT_RHO)
def test_without_rho_the_base_optimizer_remains_bit_for_bit(name, problem):
    tx, base = WITHOUT_RHO[name]
    # Operation by operation: XLA rounds two programs alike only if it fuses them alike.
    with jax.disable_jit():
        one, other = (run(t, problem, steps=4).params for t in (tx(), base()))
    chex.assert_trees_all_equal(one, other)


@on_both
def test_with_a_schedule_of_zeros_the_base_optimizer_remains(problem):
    # Up to rounding: nobody knows beforehand that there is nothing to add.
    tx = mo.msam(lr, MU, rho=lambda t: 0.0 * t)
    perturbed, clean = run(tx, problem, observe=eval_params)
    assert distance(perturbed, base_run(plain_sgd, problem)) < 1e-12
    assert distance(clean, base_run(plain_sgd, problem)) < 1e-12


@on_both
def test_policies_that_always_agree_do(problem):
    def with_policy(policy: Any) -> Any:
        return run(sam_blocks(mo.ascents.normalized(RHO), policy), problem).params

    always = with_policy(mo.policies.always())
    chex.assert_trees_all_equal(always, with_policy(mo.policies.every(1)))
    chex.assert_trees_all_equal(always, with_policy(mo.policies.bernoulli(1.0, 0)))
    assert distance(always, sam_run("sam", "decay", problem)) < 1e-12
    assert (
        distance(with_policy(mo.policies.never()), base_run(decayed_sgd, problem))
        < 1e-12
    )


# --- Identities and closed forms ------------------------------------------------------


@on_both
@pytest.mark.parametrize("name", ["schedules", "nesterov", "adamw constant"])
def test_msam_starts_unperturbed(name, problem):
    state = MSAM_CASES[name].tx().init(problem.params)
    chex.assert_trees_all_equal(mo.eval_params(state, problem.params), problem.params)


@on_both
def test_msam_unnormalised_and_scaled_by_the_learning_rate_is_nesterov(problem):
    tx = mo.momentum_perturbation(
        optax.sgd(0.05, MU), ascent=mo.ascents.unnormalized(0.05 * MU)
    )
    nesterov = run(optax.sgd(0.05, MU, nesterov=True), problem).params
    assert distance(run(tx, problem).params, nesterov) < 1e-12


@pytest.mark.parametrize(
    "tx, base, tolerance",
    [
        (lambda: mo.momentum_perturbation(plain_sgd(), RHO), plain_sgd, 1e-12),
        (lambda: mo.momentum_perturbation(plain_adamw(), RHO), plain_adamw, 1e-12),
        # The aliases lose digits in proportion to |g| / |v|, which is 0.9**-200 here:
        # their docstring names the bound eps rho |g| / (mu |v|).
        (lambda: mo.msam(lr, MU, rho=RHO), plain_sgd, 1e-5),
        (
            lambda: mo.adamw_msam(lr, weight_decay=DECAY, rho=RHO),
            plain_adamw,
            1e-5,
        ),
    ],
    ids=["around sgd", "around adamw", "msam", "adamw_msam"],
)
def test_msam_takes_its_perturbation_back_when_gradients_return(tx, base, tolerance):
    # The gradients do not depend on the weights: the clean ones are the base's.
    gradients = np.random.default_rng(4).normal(size=(240, 8))
    gradients[20:220] = 0.0

    def clean_weights(tx: optax.GradientTransformationExtraArgs) -> jax.Array:
        def step(carry: Any, g: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.ones(8)
        (params, state), _ = jax.lax.scan(
            step, (start, tx.init(start)), jnp.asarray(gradients)
        )
        return mo.eval_params(state, params)

    np.testing.assert_allclose(
        clean_weights(tx()), clean_weights(base()), rtol=0, atol=tolerance
    )


def replaced_gradient(ascent: Any, grad_fn: Callable, params: Any) -> Any:
    """The gradient that sharpness_aware_gradient hands on."""
    tx = mo.sharpness_aware_gradient(ascent)
    state = tx.init(params)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]


@pytest.mark.parametrize("rho", [0.01, 0.5, -0.5, 3.0])
def test_sam_gradient_of_a_quadratic(rho):
    a, w = jnp.asarray(quadratic_matrix()), jnp.linspace(-1.0, 2.0, 17)
    gradient = replaced_gradient(mo.ascents.normalized(rho), lambda w: a @ w, w)
    expected = a @ w + rho * a @ a @ w / jnp.linalg.norm(a @ w)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-13)


def test_sam_gradient_is_a_curvature_along_the_gradient_as_rho_vanishes():
    problem = mlp()
    params = jax.tree.map(jnp.asarray, problem.params)

    def grad_fn(p: Any) -> Any:
        return problem.grad(p, 0)

    g = grad_fn(params)
    _, hessian_times_g = jax.jvp(grad_fn, (params,), (g,))
    curvature = Tree(named(hessian_times_g)) / norm(Tree(named(g)))

    def error(rho: float) -> float:
        sam = Tree(
            named(replaced_gradient(mo.ascents.normalized(rho), grad_fn, params))
        )
        return norm((sam - Tree(named(g))) / rho - curvature)

    assert error(1e-5) < 1e-4 * norm(curvature)
    assert error(1e-3) / error(1e-4) == pytest.approx(10, rel=0.05)  # of first order


@on_both
@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e8])
def test_sam_ascent_ignores_the_scale_of_the_loss(factor, problem):
    params = jax.tree.map(jnp.asarray, problem.params)
    g = problem.grad(params, 0)
    scaled = jax.tree.map(lambda x: factor * x, g)
    for ascent in mo.ascents.normalized(RHO), mo.ascents.adaptive(RHO, 0.01):
        state = ascent.init(params)
        chex.assert_trees_all_close(
            ascent.update(scaled, state, params)[0],
            ascent.update(g, state, params)[0],
            rtol=1e-13,
        )


def test_asam_is_invariant_to_node_rescaling_and_sam_is_not():
    rng = np.random.default_rng(3)
    inputs, targets = rng.normal(size=(32, 5)), rng.normal(size=(32, 3))
    first, second = rng.normal(size=(5, 8)), rng.normal(size=(8, 3))
    factors = np.exp(rng.normal(size=8))

    def predict(params: Any) -> jax.Array:
        return jax.nn.relu(inputs @ params["first"]) @ params["second"]

    def predict_perturbed(ascent: Any, params: Any) -> jax.Array:
        g = jax.grad(lambda p: jnp.mean((predict(p) - targets) ** 2))(params)
        epsilon, _ = ascent.update(g, ascent.init(params), params)
        return predict(optax.apply_updates(params, epsilon))

    params = {"first": jnp.asarray(first), "second": jnp.asarray(second)}
    rescaled = {
        "first": jnp.asarray(first * factors),
        "second": jnp.asarray(second / factors[:, None]),
    }

    def change(function: Callable) -> float:
        return float(jnp.max(jnp.abs(function(params) - function(rescaled))))

    asam = functools.partial(predict_perturbed, mo.ascents.adaptive(0.5, eta=0.0))
    sam = functools.partial(predict_perturbed, mo.ascents.normalized(0.5))
    assert change(predict) < 1e-12
    assert change(asam) < 1e-12
    assert change(sam) > 1e-2
