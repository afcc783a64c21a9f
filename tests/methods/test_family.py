"""The family behind SAM: each method against its recursion, its cost, and bad input."""

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.methods.test_aliases import (
    DECAY,
    DECAYED_SGD,
    MU,
    RHO,
    by_tensor,
    decayed_sgd,
    distance,
    lr,
    ramp,
    recur,
)
from tests.problems import STEPS, Problem, Run, mlp, named, quadratic, run
from tests.reference import family, recursions
from tests.reference.family import (
    dot,
    each_tensor,
    fisher_direction,
    layerwise_direction,
    p_norm_direction,
    part_direction,
    reject,
    weight_scaled_direction,
)
from tests.reference.recursions import Tree, norm, unit

x64 = pytest.mark.usefixtures("x64")
on_both = pytest.mark.parametrize("problem", [mlp(), quadratic()], ids=repr)

# Decisions with both of these thresholds change often, early and late.
ADAPTIVE: dict[str, Any] = dict(total_steps=40, delta=0.5, lambda_1=-0.2, lambda_2=0.2)
# With these the statistics remember the gradients of a phase for long.
LASTING: dict[str, Any] = dict(total_steps=40, delta=0.97, lambda_1=-0.5, lambda_2=0.1)
RARE: dict[str, Any] = dict(total_steps=40, delta=0.97, lambda_1=0.2, lambda_2=1.5)
GSAM_RHO: dict[str, float] = dict(rho_max=0.3, rho_min=0.05)


def adaptive(**options: Any) -> mo.policies.Policy:
    return mo.policies.adaptive(**(options or ADAPTIVE))


def element(ascent: Any, combine: Any = None, **options: Any) -> Any:
    return mo.sharpness_aware_gradient(ascent, combine, **options)


def composed(policy: mo.policies.Policy, combine: Any = None) -> Any:
    sharpness_aware = element(mo.ascents.normalized(ramp), combine)
    return optax.chain(mo.employ(policy, sharpness_aware), decayed_sgd())


# --- Methods that replace the gradient ------------------------------------------------


class Case(NamedTuple):
    """An optimizer, and its iterates on a problem by a recursion."""

    tx: Callable[[], optax.GradientTransformation]
    expected: Callable[[Problem], list[Tree]]


def by(recursion: Callable, **options: Any) -> Callable[[Problem], list[Tree]]:
    """A recursion over SGD with schedule and weight decay."""
    options = {"rho": ramp, **DECAYED_SGD, **options}
    return lambda problem: recur(recursion, problem, **options)


def looksam(decide: Callable[[], Any], **options: Any) -> Callable[[Problem], Any]:
    """LookSAM; a policy with statistics is made anew for every run."""
    options = {"alpha": 0.7, **options}
    return lambda problem: by(family.looksam, refresh=decide(), **options)(problem)


def decided(decide: Callable[[], Any], **options: Any) -> Callable[[Problem], Any]:
    """GSAM where a policy says so; with alpha = 0 that is SAM."""
    options = {"alpha": 0.0, **options}
    return lambda problem: by(family.gsam, decide=decide(), **options)(problem)


def reference_adaptive(**options: Any) -> Any:
    return family.adaptive(**(options or ADAPTIVE))


def phase(t: int, g: Tree) -> bool:
    return 10 <= t < 40


@functools.cache
def hessian_product(problem: Problem) -> Callable[[Tree, Tree, int], Any]:
    """x -> H x at w, by forward over reverse differentiation."""
    structure = jax.tree.structure(problem.params)

    @jax.jit
    def product(w: Any, x: Any, t: Any) -> Any:
        return jax.jvp(lambda w: problem.grad(w, t), (w,), (x,))[1]

    def of_named(w: Tree, x: Tree, t: int) -> dict[str, np.ndarray]:
        w, x = (jax.tree.unflatten(structure, tree.values()) for tree in (w, x))
        return named(product(w, x, t))

    return of_named


def second_order(problem: Problem, **options: Any) -> list[Tree]:
    product = hessian_product(problem)
    return by(family.second_order_sam, hessian_product=product, **options)(problem)


def p_norm_sam(p: float) -> optax.GradientTransformation:
    return optax.chain(element(mo.ascents.normalized(ramp, p)), decayed_sgd())


CASES: dict[str, Case] = {
    "looksam": Case(
        lambda: mo.looksam(decayed_sgd(), ramp), looksam(lambda: family.every(5))
    ),
    "looksam k=3 alpha=0.2": Case(
        lambda: mo.looksam(decayed_sgd(), RHO, k=3, alpha=0.2),
        looksam(lambda: family.every(3), alpha=0.2, rho=RHO),
    ),
    "looksam per tensor": Case(
        lambda: mo.looksam(decayed_sgd(), ramp, per_tensor=True),
        looksam(lambda: family.every(5), per_tensor=True),
    ),
    "looksam layer-wise": Case(
        lambda: mo.looksam(decayed_sgd(), ramp, layerwise=True),
        looksam(lambda: family.every(5), layerwise=True),
    ),
    "looksam per tensor and layer-wise": Case(
        lambda: mo.looksam(decayed_sgd(), 0.1, per_tensor=True, layerwise=True),
        looksam(lambda: family.every(5), per_tensor=True, layerwise=True, rho=0.1),
    ),
    "ae_looksam": Case(
        lambda: mo.ae_looksam(decayed_sgd(), ramp, **ADAPTIVE),
        looksam(reference_adaptive),
    ),
    "ae_looksam defaults": Case(
        lambda: mo.ae_looksam(decayed_sgd(), ramp, total_steps=25),
        looksam(lambda: family.adaptive(25)),
    ),
    "ae_looksam asked on k-th steps": Case(
        lambda: mo.ae_looksam(decayed_sgd(), ramp, k=2, **ADAPTIVE),
        looksam(lambda: family.both(family.every(2), reference_adaptive())),
    ),
    "ae_looksam per tensor and layer-wise": Case(
        lambda: mo.ae_looksam(
            decayed_sgd(), 0.1, alpha=0.3, per_tensor=True, layerwise=True, **ADAPTIVE
        ),
        looksam(
            reference_adaptive, alpha=0.3, per_tensor=True, layerwise=True, rho=0.1
        ),
    ),
    "gsam": Case(
        lambda: mo.gsam(
            decayed_sgd(),
            mo.rho_like_learning_rate(
                lr, **GSAM_RHO, learning_rate_max=0.1, learning_rate_min=0.01
            ),
        ),
        by(
            family.gsam,
            rho=family.rho_like_learning_rate(lr, **GSAM_RHO, lr_max=0.1, lr_min=0.01),
            alpha=0.4,
        ),
    ),
    "gsam with constants": Case(
        lambda: mo.gsam(
            optax.sgd(0.05, MU),
            mo.rho_like_learning_rate(0.05, **GSAM_RHO, learning_rate_max=0.1),
            alpha=-0.3,
        ),
        by(family.gsam, rho=0.175, alpha=-0.3, lr=0.05, weight_decay=0.0),
    ),
    "gradient_norm_penalty": Case(
        lambda: mo.gradient_norm_penalty(decayed_sgd()),
        by(family.gradient_norm_penalty, rho=0.1, alpha=0.8),
    ),
    "gradient_norm_penalty schedule": Case(
        lambda: mo.gradient_norm_penalty(decayed_sgd(), ramp, alpha=0.3),
        by(family.gradient_norm_penalty, alpha=0.3),
    ),
    "wsam coupled": Case(
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.8),
        by(family.coupled_wsam, gamma=0.8),
    ),
    "wsam decoupled": Case(
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.8, learning_rate=lr),
        by(family.decoupled_wsam, gamma=0.8),
    ),
    "wsam decoupled with constants": Case(
        lambda: mo.wsam(optax.sgd(0.05, MU), RHO, gamma=0.3, learning_rate=0.05),
        by(family.decoupled_wsam, rho=RHO, gamma=0.3, lr=0.05, weight_decay=0.0),
    ),
    "friendly_sam": Case(
        lambda: mo.friendly_sam(decayed_sgd(), ramp, sigma=0.9, decay=0.6),
        by(family.friendly_sam, sigma=0.9, decay=0.6),
    ),
    "friendly_sam defaults": Case(
        lambda: mo.friendly_sam(decayed_sgd()),
        by(family.friendly_sam, rho=0.05, sigma=1.0, decay=0.9),
    ),
    "fisher_sam": Case(
        lambda: mo.fisher_sam(decayed_sgd(), ramp, eta=2.0),
        by(family.fisher_sam, eta=2.0),
    ),
    **{
        f"sam p={p}": Case(functools.partial(p_norm_sam, p), by(family.p_norm_sam, p=p))
        for p in (1, 1.5, 2, 3, math.inf)
    },
    "second order": Case(
        lambda: optax.chain(
            element(mo.ascents.normalized(ramp), second_order=True), decayed_sgd()
        ),
        second_order,
    ),
    # Policies compose with methods and with each other.
    "late and adaptive": Case(
        lambda: composed(mo.policies.between(10, 40) & adaptive(**LASTING)),
        decided(lambda: family.both(phase, reference_adaptive(**LASTING))),
    ),
    "adaptive and late": Case(
        lambda: composed(adaptive(**LASTING) & mo.policies.between(10, 40)),
        decided(lambda: family.both(reference_adaptive(**LASTING), phase)),
    ),
    "every third or adaptive": Case(
        lambda: composed(mo.policies.every(3) | adaptive(**RARE)),
        decided(lambda: family.either(family.every(3), reference_adaptive(**RARE))),
    ),
    "adaptive gsam": Case(
        lambda: composed(adaptive(), mo.combine.surrogate_gap(0.4)),
        decided(reference_adaptive, alpha=0.4),
    ),
}


@functools.cache
def library(name: str, problem: Problem) -> list[Any]:
    """The library's iterates in one of CASES."""
    return run(CASES[name].tx(), problem).params


@functools.cache
def reference(name: str, problem: Problem) -> list[Tree]:
    """The recursion's iterates in one of CASES."""
    return CASES[name].expected(problem)


@x64
@on_both
@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_recursion(name, problem):
    assert distance(library(name, problem), reference(name, problem)) < 1e-10


@x64
@on_both
def test_the_adaptive_steps_are_some_of_all(problem):
    """Otherwise the cases above would not tell policies apart."""
    for decide in (
        reference_adaptive(),
        family.adaptive(25),
        family.both(phase, reference_adaptive(**LASTING)),
        family.either(family.every(3), reference_adaptive(**RARE)),
    ):
        said: list[bool] = []

        def listen(t: int, g: Tree, decide=decide, said=said) -> bool:
            said.append(decide(t, g))
            return said[-1]

        by(family.gsam, alpha=0.0, decide=listen)(problem)
        assert 5 < sum(said) < STEPS - 5


# --- The plausible wrong versions are far away ----------------------------------------
#
# Each recursion below has one thing wrong; with nothing wrong it is the library's.


def twisted_looksam(
    problem: Problem,
    *,
    decide: Callable[[int, Tree], bool] | None = None,
    remember: Callable[[Tree, Tree, Tree], Tree] = lambda g, s, old: reject(s, g),
    extend: Callable[[Tree, Tree], Tree] = lambda g, v: g + 0.7 * norm(g) * unit(v),
    refresh_with_reused: bool = False,
    decay_first: bool = False,
) -> list[Tree]:
    """LookSAM with schedules and weight decay; old is the gradient of the last step."""
    decide = decide or family.every(5)
    start = Tree(problem.named_params)
    g_v, old = 0.0 * start, 0.0 * start

    def gradient(w: Tree, t: int) -> Tree:
        nonlocal g_v, old
        g = Tree(problem.named_grad(w, t))
        s = Tree(problem.named_grad(w + ramp(t) * unit(g), t))
        refresh = decide(t, g)
        reused = extend(g, g_v)
        if refresh:
            base = g + DECAY * w if decay_first else g
            g_v = remember(base, s, old)
        elif refresh_with_reused:
            g_v = reject(reused, g) * 0.5
        old = g
        return s if refresh else reused

    return recursions.sgd(gradient, start, STEPS, **DECAYED_SGD)


def twisted(
    problem: Problem,
    *,
    epsilon: Callable[[Tree], Tree] = unit,
    combine: Callable[[Tree, Tree], Tree] = lambda g, s: s,
    rho: Any = ramp,
    decide: Callable[[int, Tree], bool] = lambda t, g: True,
) -> list[Tree]:
    """combine(g, s) with s the gradient at w + rho epsilon(g)."""
    return recur(
        family.ascend,
        problem,
        epsilon=lambda g, w, t: rho(t) * epsilon(g),
        combine=combine,
        decide=decide,
        **DECAYED_SGD,
    )


def twisted_wsam(
    problem: Problem,
    *,
    alpha: float = 4.0,
    rate: Callable[[float], float] = lambda eta: eta,
    inside: bool = False,
    with_decay: bool = False,
) -> list[Tree]:
    """Decoupled WSAM with schedules and weight decay."""
    w = Tree(problem.named_params)
    v, iterates = 0.0 * w, []
    for t in range(STEPS):
        g = Tree(problem.named_grad(w, t))
        steering = g + DECAY * w if with_decay else g
        s = Tree(problem.named_grad(w + ramp(t) * unit(steering), t))
        sharpness = alpha * (s - g)
        v = MU * v + (g + DECAY * w) + (sharpness if inside else 0 * g)
        w = w - lr(t) * v - (0.0 if inside else rate(lr(t))) * sharpness
        iterates.append(w)
    return iterates


def twisted_friendly(
    problem: Problem,
    *,
    first: str = "right",
    mean_of_d: bool = False,
    less_new_mean: bool = False,
    along: Callable[[Tree, Tree], Tree] = lambda g, m: g - 0.9 * m,
    decay: float = 0.6,
    rho: Any = ramp,
) -> list[Tree]:
    """Friendly SAM, with sigma 0.9 and decay 0.6 where nothing else is said."""
    zero = 0.0 * Tree(problem.named_params)
    mean, started = zero, False

    def epsilon(g: Tree) -> Tree:
        nonlocal mean, started
        old, seen = mean, g
        if not started and first == "right":
            mean, d = g, g
        else:
            if not started and first == "mean is g":
                old = g
            if mean_of_d:
                seen = along(g, old)
            mean = decay * old + (1 - decay) * seen
            d = along(g, mean if less_new_mean else old)
        started = True
        return unit(d)

    return twisted(problem, epsilon=epsilon, rho=rho)


def shown_some(shown: Callable[[int], bool], unseen: bool, **options: Any) -> Any:
    """adaptive that is shown some gradients only, and says `unseen` for the others."""
    policy = reference_adaptive(**options)
    return lambda t, g: policy(t, g) if shown(t) else unseen


def gsam_rho(t: int) -> float:
    return family.rho_like_learning_rate(lr, **GSAM_RHO, lr_max=0.1, lr_min=0.01)(t)  # type: ignore[operator]


def gap(g: Tree, s: Tree) -> Tree:
    return s - 0.4 * reject(g, s)


FRIENDLY_DEFAULTS: dict[str, Any] = dict(
    along=lambda g, m: g - m, decay=0.9, rho=lambda t: 0.05
)

NOTHING_WRONG: dict[str, Callable[[Problem], list[Tree]]] = {
    "looksam": twisted_looksam,
    "ae_looksam asked on k-th steps": lambda p: twisted_looksam(
        p, decide=family.both(family.every(2), reference_adaptive())
    ),
    "gsam": lambda p: twisted(p, rho=gsam_rho, combine=gap),
    "wsam coupled": lambda p: twisted(p, combine=lambda g, s: -3.0 * g + 4.0 * s),
    "wsam decoupled": twisted_wsam,
    "friendly_sam": twisted_friendly,
    "friendly_sam defaults": lambda p: twisted_friendly(p, **FRIENDLY_DEFAULTS),
    "fisher_sam": lambda p: twisted(p, epsilon=lambda g: fisher_direction(g, 2.0)),
}

SAM_WRONGS: dict[str, Callable[[Problem], list[Tree]]] = {
    "plain SGD": functools.cache(lambda p: recur(recursions.sgd, p, **DECAYED_SGD)),
    "SAM": functools.cache(by(recursions.sam)),
    "SAM downhill": functools.cache(by(recursions.sam, rho=lambda t: -ramp(t))),
}

WRONG: dict[tuple[str, str], Callable[[Problem], list[Tree]]] = {
    **{
        (name, wrong): recursion
        for name in CASES
        for wrong, recursion in SAM_WRONGS.items()
        if (name, wrong) != ("sam p=2", "SAM")
    },
    ("looksam", "g projected off g_s"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: reject(g, s)
    ),
    ("looksam", "not projected"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: s
    ),
    ("looksam", "difference for projection"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: s - g
    ),
    ("looksam", "‖g‖ for ‖g‖² in the projection"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: s - dot(g, s) / norm(g) * g
    ),
    ("looksam", "‖g_s‖ for ‖g‖ in the projection"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: s - dot(g, s) / dot(s, s) * g
    ),
    ("looksam", "projected off the last step's gradient"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: reject(s, old) if norm(old) else s
    ),
    ("looksam", "projected off the decayed gradient"): lambda p: twisted_looksam(
        p, decay_first=True
    ),
    ("looksam", "refreshed from the reused gradient"): lambda p: twisted_looksam(
        p, refresh_with_reused=True
    ),
    ("looksam", "refreshed one step late"): lambda p: twisted_looksam(
        p, decide=lambda t, g: t % 5 == 1
    ),
    ("looksam", "no norms in the reuse"): lambda p: twisted_looksam(
        p, extend=lambda g, v: g + 0.7 * v
    ),
    ("looksam", "unit g_v in the reuse"): lambda p: twisted_looksam(
        p, extend=lambda g, v: g + 0.7 * unit(v)
    ),
    ("looksam", "reuse against g_v"): lambda p: twisted_looksam(
        p, extend=lambda g, v: g - 0.7 * norm(g) * unit(v)
    ),
    ("looksam", "plain gradient in the reuse"): lambda p: twisted_looksam(
        p, extend=lambda g, v: g
    ),
    ("looksam", "norm per tensor"): lambda p: twisted_looksam(
        p,
        extend=lambda g, v: each_tensor(lambda g, v: g + 0.7 * norm(g) * unit(v), g, v),
    ),
    ("looksam", "projection per tensor"): lambda p: twisted_looksam(
        p, remember=lambda g, s, old: each_tensor(reject, s, g)
    ),
    ("looksam per tensor", "global"): looksam(lambda: family.every(5)),
    ("looksam per tensor", "perturbation per tensor"): looksam(
        lambda: family.every(5), per_tensor=True, layerwise=True
    ),
    ("looksam layer-wise", "global"): looksam(lambda: family.every(5)),
    ("looksam layer-wise", "projected per tensor"): looksam(
        lambda: family.every(5), layerwise=True, per_tensor=True
    ),
    ("ae_looksam", "refresh without reuse"): decided(reference_adaptive),
    ("ae_looksam", "asked on every second step"): looksam(
        lambda: family.both(family.every(2), reference_adaptive())
    ),
    ("ae_looksam asked on k-th steps", "asked on every step"): looksam(
        reference_adaptive
    ),
    ("ae_looksam asked on k-th steps", "statistics of k-th steps only"): looksam(
        lambda: shown_some(lambda t: t % 2 == 0, unseen=False)
    ),
    ("gsam", "sign"): lambda p: twisted(
        p, rho=gsam_rho, combine=lambda g, s: s + 0.4 * reject(g, s)
    ),
    ("gsam", "the wrong one projected"): lambda p: twisted(
        p, rho=gsam_rho, combine=lambda g, s: s - 0.4 * reject(s, g)
    ),
    ("gsam", "the parallel part"): lambda p: twisted(
        p, rho=gsam_rho, combine=lambda g, s: s - 0.4 * (g - reject(g, s))
    ),
    ("gsam", "off the clean gradient"): lambda p: twisted(
        p, rho=gsam_rho, combine=lambda g, s: g - 0.4 * reject(g, s)
    ),
    ("gsam", "projected per tensor"): lambda p: twisted(
        p,
        rho=gsam_rho,
        combine=lambda g, s: s - 0.4 * each_tensor(reject, g, s),
    ),
    ("gsam", "constant rho"): lambda p: twisted(p, rho=lambda t: 0.3, combine=gap),
    ("gsam", "the next step's rho"): lambda p: twisted(
        p, rho=lambda t: gsam_rho(t + 1), combine=gap
    ),
    ("gsam", "rho from zero"): lambda p: twisted(
        p, rho=lambda t: 3.0 * lr(t), combine=gap
    ),
    ("gradient_norm_penalty", "alpha swapped"): by(
        family.gradient_norm_penalty, rho=0.1, alpha=0.2
    ),
    ("wsam coupled", "alpha = gamma"): by(family.gradient_norm_penalty, alpha=0.8),
    ("wsam coupled", "alpha = 1/(1 - gamma)"): by(
        family.gradient_norm_penalty, alpha=5.0
    ),
    ("wsam coupled", "added to the whole"): lambda p: twisted(
        p, combine=lambda g, s: g + 4.0 * s
    ),
    ("wsam coupled", "decoupled"): twisted_wsam,
    ("wsam decoupled", "coupled"): by(family.coupled_wsam, gamma=0.8),
    ("wsam decoupled", "inside the momentum"): lambda p: twisted_wsam(p, inside=True),
    ("wsam decoupled", "alpha = gamma"): lambda p: twisted_wsam(p, alpha=0.8),
    ("wsam decoupled", "sign"): lambda p: twisted_wsam(p, alpha=-4.0),
    ("wsam decoupled", "without the learning rate"): lambda p: twisted_wsam(
        p, rate=lambda eta: 0.1
    ),
    ("wsam decoupled", "decay steers the ascent"): lambda p: twisted_wsam(
        p, with_decay=True
    ),
    ("friendly_sam", "the mean takes d"): lambda p: twisted_friendly(p, mean_of_d=True),
    ("friendly_sam", "the mean starts at zero"): lambda p: twisted_friendly(
        p, first="mean is zero"
    ),
    ("friendly_sam defaults", "the first ascent along g less g"): functools.partial(
        twisted_friendly, first="mean is g", **FRIENDLY_DEFAULTS
    ),
    ("friendly_sam", "less the new mean"): lambda p: twisted_friendly(
        p, less_new_mean=True
    ),
    ("friendly_sam", "plus the mean"): lambda p: twisted_friendly(
        p, along=lambda g, m: g + 0.9 * m
    ),
    ("friendly_sam", "sigma 1"): lambda p: twisted_friendly(
        p, along=lambda g, m: g - m
    ),
    ("friendly_sam", "decay and its rest swapped"): lambda p: twisted_friendly(
        p, decay=0.4
    ),
    ("friendly_sam", "along the mean"): lambda p: twisted_friendly(
        p, along=lambda g, m: m if norm(m) else g
    ),
    ("fisher_sam", "no root"): lambda p: twisted(
        p, epsilon=lambda g: g / (2.0 * g**2 + 1.0) / dot(g, g / (2.0 * g**2 + 1.0))
    ),
    ("fisher_sam", "unit length"): lambda p: twisted(
        p, epsilon=lambda g: unit(g / (2.0 * g**2 + 1.0))
    ),
    ("fisher_sam", "F for its inverse"): lambda p: twisted(
        p, epsilon=lambda g: g * (2.0 * g**2 + 1.0) / dot(g, g + 2.0 * g**3) ** 0.5
    ),
    ("fisher_sam", "gradient not squared in F"): lambda p: twisted(
        p,
        epsilon=lambda g: (
            g
            / (2.0 * (g**2) ** 0.5 + 1.0)
            / dot(g, g / (2.0 * (g**2) ** 0.5 + 1.0)) ** 0.5
        ),
    ),
    ("fisher_sam", "eta 1"): by(family.fisher_sam, eta=1.0),
    ("sam p=1.5", "p and q swapped"): by(family.p_norm_sam, p=3),
    ("sam p=3", "p and q swapped"): by(family.p_norm_sam, p=1.5),
    ("sam p=1", "p and q swapped"): by(family.p_norm_sam, p=math.inf),
    ("sam p=inf", "p and q swapped"): by(family.p_norm_sam, p=1),
    ("sam p=3", "norm not of the dual"): lambda p: twisted(
        p, epsilon=lambda g: unit(p_norm_direction(g, 3))
    ),
    ("sam p=1", "largest of each tensor"): lambda p: twisted(
        p,
        epsilon=lambda g: each_tensor(lambda g: p_norm_direction(g, 1), g),
    ),
    ("second order", "sign of the Hessian"): lambda p: by(
        family.second_order_sam,
        hessian_product=lambda w, x, t: -1.0 * Tree(hessian_product(p)(w, x, t)),
    )(p),
    **{
        (name, "statistics of the phase only"): decided(
            lambda: shown_some(lambda t: 10 <= t < 40, unseen=False, **LASTING)
        )
        for name in ("late and adaptive", "adaptive and late")
    },
    ("late and adaptive", "adaptive alone"): decided(
        lambda: reference_adaptive(**LASTING)
    ),
    ("every third or adaptive", "statistics of the other steps only"): decided(
        lambda: shown_some(lambda t: t % 3 != 0, unseen=True, **RARE)
    ),
    ("every third or adaptive", "and"): decided(
        lambda: family.both(family.every(3), reference_adaptive(**RARE))
    ),
    ("adaptive gsam", "gsam"): by(family.gsam, alpha=0.4),
    ("adaptive gsam", "adaptive sam"): decided(reference_adaptive),
}


@x64
@on_both
@pytest.mark.parametrize("name", NOTHING_WRONG)
def test_nothing_wrong(name, problem):
    assert distance(library(name, problem), NOTHING_WRONG[name](problem)) < 1e-10


@x64
@on_both
@pytest.mark.parametrize("name, wrong", WRONG)
def test_wrong_versions_are_far_away(name, wrong, problem):
    assert distance(library(name, problem), WRONG[name, wrong](problem)) > 1e-6


# --- MSAM's variants ------------------------------------------------------------------

Direction = Callable[[Tree, Tree, Tree, int], Tree]


class Variant(NamedTuple):
    """A variant of MSAM over SGD, and its perturbation of v, w, g and t."""

    tx: Callable[[], optax.GradientTransformation]
    epsilon: Callable[[Problem], Direction]


def around_sgd(ascent: Any, **options: Any) -> optax.GradientTransformation:
    return mo.momentum_perturbation(optax.sgd(lr, MU), ascent=ascent, **options)


def along_last_gradient(rho: float) -> optax.GradientTransformation:
    inner = optax.chain(optax.trace(0.0), optax.sgd(lr, MU))
    return mo.momentum_perturbation(
        inner, rho, momentum_fn=lambda state: state[0].trace
    )


def small(name: str) -> bool:
    """Stands for the normalisation layers: the vectors."""
    return "bias" in name or "vector" in name


def vectors(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim < 2, params)


@functools.cache
def gaussian_draws(problem: Problem, seed: int) -> list[Tree]:
    """The unit vectors that the library draws, whatever the direction is."""
    ascent = mo.ascents.gaussian(1.0, seed)
    state, draws = ascent.init(problem.params), []
    update = jax.jit(ascent.update)
    for _ in range(STEPS):
        drawn, state = update(problem.params, state)
        draws.append(Tree(named(drawn)))
    return draws


VARIANTS: dict[str, Variant] = {
    "unnormalised": Variant(
        lambda: around_sgd(mo.ascents.unnormalized(0.03)),
        lambda p: lambda v, w, g, t: -0.03 * v,
    ),
    "scaled by the learning rate": Variant(
        lambda: around_sgd(mo.ascents.unnormalized(lambda t: 0.3 * lr(t))),
        lambda p: lambda v, w, g, t: -0.3 * lr(t) * v,
    ),
    "layer-wise": Variant(
        lambda: around_sgd(mo.ascents.layerwise(ramp)),
        lambda p: lambda v, w, g, t: -ramp(t) * layerwise_direction(v, w),
    ),
    "weight-scaled": Variant(
        lambda: around_sgd(mo.ascents.weight_scaled(ramp)),
        lambda p: lambda v, w, g, t: -ramp(t) * weight_scaled_direction(v, w),
    ),
    "normalisation layers only": Variant(
        lambda: around_sgd(optax.masked(mo.ascents.normalized(ramp), vectors)),
        lambda p: lambda v, w, g, t: -ramp(t) * part_direction(v, small),
    ),
    "against the last gradient": Variant(
        lambda: along_last_gradient(RHO), lambda p: lambda v, w, g, t: -RHO * unit(g)
    ),
    "along the last gradient": Variant(
        lambda: along_last_gradient(-RHO), lambda p: lambda v, w, g, t: RHO * unit(g)
    ),
    "gaussian": Variant(
        lambda: around_sgd(mo.ascents.gaussian(ramp, seed=3)),
        lambda p: lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 3)[t],
    ),
}


@functools.cache
def variant(name: str, problem: Problem) -> Run:
    """The library's perturbed and clean iterates in one of VARIANTS."""
    return run(VARIANTS[name].tx(), problem, observe=mo.eval_params)


def along(epsilon: Direction, problem: Problem) -> tuple[list[Tree], list[Tree]]:
    return recur(family.msam_along, problem, lr=lr, momentum=MU, epsilon=epsilon)


@x64
@on_both
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_msam_is_its_recursion(name, problem):
    ours = variant(name, problem)
    perturbed, clean = along(VARIANTS[name].epsilon(problem), problem)
    assert distance(ours.params, perturbed) < 1e-10
    assert distance(ours.observed, clean) < 1e-10


def abs_of(w: Tree) -> Tree:
    return (w**2) ** 0.5


class LastStep:
    """Remembers what it was given one step before, and zero before the first."""

    def __init__(self) -> None:
        self.kept: Tree | None = None

    def __call__(self, x: Tree) -> Tree:
        last, self.kept = self.kept, x
        return 0.0 * x if last is None else last


def with_last(rule: Callable[..., Tree]) -> Direction:
    last = LastStep()
    return lambda v, w, g, t: rule(v, w, g, t, last)


def other_way(name: str, problem: Problem) -> Direction:
    epsilon = VARIANTS[name].epsilon(problem)
    return lambda v, w, g, t: -1.0 * epsilon(v, w, g, t)


WRONG_VARIANTS: dict[tuple[str, str], Callable[[Problem], Direction]] = {
    **{
        (name, wrong): epsilon
        for name in VARIANTS
        for wrong, epsilon in {
            "SGD": lambda p: lambda v, w, g, t: 0.0 * v,
            "MSAM": lambda p: lambda v, w, g, t: -ramp(t) * unit(v),
        }.items()
    },
    **{(name, "sign"): functools.partial(other_way, name) for name in VARIANTS},
    ("unnormalised", "along the gradient"): lambda p: lambda v, w, g, t: -0.03 * g,
    ("scaled by the learning rate", "constant"): lambda p: (
        lambda v, w, g, t: -0.3 * lr(0) * v
    ),
    ("scaled by the learning rate", "the next step's"): lambda p: (
        lambda v, w, g, t: -0.3 * lr(t + 1) * v
    ),
    ("layer-wise", "norm per tensor alone"): lambda p: (
        lambda v, w, g, t: -ramp(t) * by_tensor(v)
    ),
    ("layer-wise", "global"): lambda p: lambda v, w, g, t: -ramp(t) * norm(w) * unit(v),
    ("layer-wise", "the old weights' norms"): lambda p: with_last(
        lambda v, w, g, t, last: -ramp(t) * layerwise_direction(v, last(w))
    ),
    ("weight-scaled", "twice, as in ASAM"): lambda p: (
        lambda v, w, g, t: -ramp(t) * abs_of(w) * weight_scaled_direction(v, w)
    ),
    ("weight-scaled", "after normalising"): lambda p: (
        lambda v, w, g, t: -ramp(t) * abs_of(w) * unit(v)
    ),
    ("weight-scaled", "signed"): lambda p: lambda v, w, g, t: -ramp(t) * unit(w * v),
    ("weight-scaled", "the old weights"): lambda p: with_last(
        lambda v, w, g, t, last: -ramp(t) * weight_scaled_direction(v, last(w))
    ),
    ("normalisation layers only", "norm over all"): lambda p: (
        lambda v, w, g, t: (
            norm(part_direction(unit(v), small))
            * norm(Tree({k: x for k, x in unit(v).items() if small(k)}))
            * -ramp(t)
            * part_direction(v, small)
        )
    ),
    ("normalisation layers only", "the others only"): lambda p: (
        lambda v, w, g, t: -ramp(t) * part_direction(v, lambda name: not small(name))
    ),
    ("normalisation layers only", "the others by their momentum"): lambda p: (
        lambda v, w, g, t: (
            -ramp(t) * part_direction(v, small)
            + Tree({k: 0 * x if small(k) else -x for k, x in v.items()})
        )
    ),
    ("against the last gradient", "the one before"): lambda p: with_last(
        lambda v, w, g, t, last: -RHO * unit(last(g))
    ),
    ("gaussian", "one draw for all steps"): lambda p: (
        lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 3)[0]
    ),
    ("gaussian", "another seed"): lambda p: (
        lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 4)[t]
    ),
}


@x64
@on_both
@pytest.mark.parametrize("name, wrong", WRONG_VARIANTS)
def test_wrong_variants_of_msam_are_far_away(name, wrong, problem):
    perturbed, _ = along(WRONG_VARIANTS[name, wrong](problem), problem)
    assert distance(variant(name, problem).params, perturbed) > 1e-6


@x64
@on_both
def test_msam_scaled_by_learning_rate_and_momentum_is_nesterov(problem):
    nesterov = run(optax.sgd(0.05, MU, nesterov=True), problem).params
    tx = mo.momentum_perturbation(
        optax.sgd(0.05, MU), ascent=mo.ascents.unnormalized(lambda t: MU * 0.05)
    )
    assert distance(run(tx, problem).params, nesterov) < 1e-12


@x64
def test_gaussian_draws_are_unit_vectors_without_a_preferred_direction():
    draws = [
        np.concatenate([x.ravel() for x in draw.values()])
        for seed in range(4)
        for draw in gaussian_draws(mlp(), seed)
    ]
    np.testing.assert_allclose([np.linalg.norm(d) for d in draws], 1.0, atol=1e-12)
    count, size = np.shape(draws)
    products = np.abs(np.array(draws) @ np.array(draws).T - np.eye(count))
    assert np.max(products) < 5.5 / np.sqrt(size)  # no draw comes twice
    assert np.max(np.abs(np.mean(draws, axis=0))) < 5 / np.sqrt(count * size)
    # Gaussian: the mean fourth power over the sphere is 3/(n(n + 2)).
    kurtosis = np.mean(np.array(draws) ** 4) * size * (size + 2)
    assert kurtosis == pytest.approx(3, abs=0.3)


# --- ESAM: some of the weights, and some of the samples -------------------------------


class Samples:
    """A problem whose loss is a mean over the samples of a batch.

    Attributes:
      params: the start, a tree of numpy arrays.
      losses: ``losses(params, batch)``, one loss for each sample.
      batches: a pair of arrays whose first axis is the step.
    """

    def __init__(self, name: str, params: Any, losses: Any, batches: Any):
        self.name, self.params, self.losses = name, params, losses
        self.batches = batches

        def mean_loss(params: Any, batch: Any) -> jax.Array:
            return jnp.mean(losses(params, batch))

        self._losses = jax.jit(losses)
        self._grad = jax.jit(jax.grad(mean_loss))

    def __repr__(self) -> str:
        return self.name

    def batch(self, t: int) -> Any:
        return jax.tree.map(lambda x: x[t], self.batches)

    def tree(self, weights: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.params), weights.values())

    def named_losses(self, weights: Any, t: int) -> np.ndarray:
        return np.asarray(self._losses(self.tree(weights), self.batch(t)))

    def named_grad(self, weights: Any, t: int, samples: Any) -> dict[str, np.ndarray]:
        batch = jax.tree.map(lambda x: x[samples], self.batch(t))
        return named(self._grad(self.tree(weights), batch))


BATCH = 10


@functools.cache
def classes() -> Samples:
    """The network of ``mlp`` with the loss of each sample."""
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(STEPS, BATCH, 5))
    labels = np.argmax(np.sin(inputs @ rng.normal(size=(5, 3))), axis=-1)

    def losses(params: Any, batch: Any) -> jax.Array:
        inputs, labels = batch
        hidden, output = params["hidden"], params["output"]
        features = jnp.tanh(inputs @ hidden["kernel"] + hidden["bias"])
        logits = features @ output["kernel"] + output["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return Samples("classes", mlp().params, losses, (inputs, labels))


@functools.cache
def squares() -> Samples:
    """Least squares in a matrix and a vector."""
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(STEPS, BATCH, 17)) / np.sqrt(17)
    targets = rng.normal(size=(STEPS, BATCH))

    def losses(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        w = jnp.concatenate([jnp.ravel(params["matrix"]), params["vector"]])
        return 0.5 * (inputs @ w - targets) ** 2

    return Samples("squares", quadratic().params, losses, (inputs, targets))


on_both_samples = pytest.mark.parametrize("samples", [classes(), squares()], ids=repr)


def train(tx: Any, samples: Samples, steps: int = STEPS) -> list[Any]:
    """The params after each step of ``make_train_step``."""

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return samples.losses(params, batch), (model_state, ())

    step = mo.make_train_step(loss_fn, tx, donate=False)
    params = jax.tree.map(jnp.asarray, samples.params)
    state = mo.TrainState(params, tx.init(params))
    trajectory = []
    for t in range(steps):
        state, _ = step(state, samples.batch(t), None)
        trajectory.append(state.params)
    return jax.device_get(trajectory)


@functools.cache
def drawn_masks(
    samples: Samples, beta: float, seed: int, by_coordinate: bool, steps: int = STEPS
) -> list[Tree]:
    """What takes part in the library's ascent, step by step."""
    ascent = mo.ascents.stochastic(1.0, beta, seed, by_coordinate)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), samples.params)
    state, masks = ascent.init(ones), []
    update = jax.jit(ascent.update)
    for _ in range(steps):
        epsilon, state = update(ones, state)
        masks.append(Tree({k: 1.0 * (x != 0) for k, x in named(epsilon).items()}))
    return masks


ESAM_CASES: dict[str, dict[str, Any]] = {
    "by tensor": dict(rho=ramp, beta=0.6, gamma=0.5, seed=0, by_coordinate=False),
    "by coordinate": dict(rho=ramp, beta=0.5, gamma=0.5, seed=1, by_coordinate=True),
    "uneven": dict(rho=RHO, beta=0.8, gamma=0.37, seed=2, by_coordinate=True),
    "weights only": dict(rho=ramp, beta=0.5, gamma=1.0, seed=1, by_coordinate=True),
    "samples only": dict(rho=ramp, beta=1.0, gamma=0.2, seed=0, by_coordinate=False),
}


@functools.cache
def esam(name: str, samples: Samples) -> list[Any]:
    """The library's iterates in one of ESAM_CASES."""
    return train(mo.esam(decayed_sgd(), **ESAM_CASES[name]), samples)


@x64
@on_both_samples
@pytest.mark.parametrize("name", ESAM_CASES)
def test_esam_is_its_recursion(name, samples):
    options = dict(ESAM_CASES[name])
    draw = options.pop("seed"), options.pop("by_coordinate")
    expected = family.esam(
        samples.named_losses,
        samples.named_grad,
        named(samples.params),
        STEPS,
        masks=drawn_masks(samples, options["beta"], *draw),
        **options,
        **DECAYED_SGD,
    )
    assert distance(esam(name, samples), expected) < 1e-10


def twisted_esam(
    samples: Samples,
    name: str = "by coordinate",
    *,
    fewer: int = 0,
    order: Callable[[Any, Any], Any] = lambda clean, there: clean - there,
    grad_at: str = "there",
    of_all: bool = False,
    scale: float = 1.0,
    expected_rho: bool = True,
    norm_of_all: bool = False,
    flip_masks: bool = False,
) -> list[Tree]:
    """ESAM with schedules and weight decay; samples are kept in `order`."""
    options = ESAM_CASES[name]
    beta, by_coordinate = options["beta"], options["by_coordinate"]
    masks = drawn_masks(samples, beta, options["seed"], by_coordinate)

    def gradient(w: Tree, t: int) -> Tree:
        everything = np.arange(BATCH)
        g = Tree(samples.named_grad(w, t, everything))
        chosen = (masks[t] * -1.0 + 1.0 if flip_masks else masks[t]) * g
        epsilon = chosen / (norm(g if norm_of_all else chosen) or 1.0)
        there = w + ramp(t) / (beta if expected_rho else 1.0) * epsilon
        losses = samples.named_losses(w, t), samples.named_losses(there, t)
        count = math.floor(options["gamma"] * BATCH) - fewer
        kept = np.argsort(order(*losses))[:count]
        at = w if grad_at == "here" else there
        mean = samples.named_grad(at, t, everything if of_all else kept)
        return scale * Tree(mean)

    return recursions.sgd(gradient, named(samples.params), STEPS, **DECAYED_SGD)


WRONG_ESAM: dict[str, dict[str, Any]] = {
    "one sample fewer": dict(fewer=1),
    "one sample more": dict(fewer=-1),
    "by loss": dict(order=lambda clean, there: -there),
    "by clean loss": dict(order=lambda clean, there: -clean),
    "smallest rise": dict(order=lambda clean, there: there - clean),
    "by relative rise": dict(order=lambda clean, there: -there / clean),
    "first samples": dict(order=lambda clean, there: np.arange(BATCH)),
    "at the clean weights": dict(grad_at="here"),
    "all samples": dict(of_all=True),
    "mean over the batch": dict(scale=0.5),
    "no 1/beta": dict(expected_rho=False),
    "norm of all": dict(norm_of_all=True),
    "the other weights": dict(flip_masks=True),
}


@x64
@on_both_samples
@pytest.mark.parametrize("name", ["by tensor", "by coordinate"])
def test_nothing_wrong_with_esam(name, samples):
    assert distance(esam(name, samples), twisted_esam(samples, name)) < 1e-10


@x64
@on_both_samples
@pytest.mark.parametrize("wrong", WRONG_ESAM)
def test_wrong_esam_is_far_away(wrong, samples):
    others = twisted_esam(samples, **WRONG_ESAM[wrong])
    assert distance(esam("by coordinate", samples), others) > 1e-6


@x64
@pytest.mark.parametrize("by_coordinate, draws", [(False, 4), (True, 75)])
def test_each_weight_takes_part_with_probability_beta(by_coordinate, draws):
    masks = drawn_masks(classes(), 0.3, 7, by_coordinate, steps=400)
    shares = np.array([[np.mean(x) for x in mask.values()] for mask in masks])
    if not by_coordinate:
        assert set(np.unique(shares)) == {0.0, 1.0}  # a tensor as a whole or not at all
    else:
        assert np.mean((shares > 0) & (shares < 1)) > 0.5
    sizes = [x.size if by_coordinate else 1 for x in masks[0].values()]
    assert sum(sizes) == draws
    assert np.average(np.mean(shares, axis=0), weights=sizes) == pytest.approx(
        0.3, abs=4 * np.sqrt(0.3 * 0.7 / (400 * draws))
    )
    # Tensors, and steps, are drawn independently.
    correlations = np.corrcoef(shares.T) - np.eye(len(sizes))
    assert np.max(np.abs(correlations)) < 4.5 / np.sqrt(400)
    assert abs(np.corrcoef(shares[1:, 0], shares[:-1, 0])[0, 1]) < 4.5 / np.sqrt(400)


# --- Identities -----------------------------------------------------------------------


def sam(rho: Any = ramp) -> Any:
    return optax.chain(element(mo.ascents.normalized(rho)), decayed_sgd())


def looking(policy: mo.policies.Policy, alpha: float = 0.7) -> Any:
    """LookSAM with a policy of one's own."""
    remembered = mo.remembered_gradient(mo.ascents.normalized(ramp))
    return optax.chain(
        mo.employ(policy, remembered, mo.reuse_remembered(alpha)), decayed_sgd()
    )


IDENTITIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "looksam alpha=0 is SAM on every k-th step": (
        lambda: mo.looksam(decayed_sgd(), ramp, k=4, alpha=0.0),
        lambda: composed(mo.policies.every(4)),
    ),
    "looksam k=1 is SAM": (lambda: mo.looksam(decayed_sgd(), ramp, k=1), sam),
    "looksam is its blocks": (
        lambda: mo.looksam(decayed_sgd(), ramp),
        lambda: looking(mo.policies.every(5)),
    ),
    "ae_looksam is its blocks": (
        lambda: mo.ae_looksam(decayed_sgd(), ramp, **ADAPTIVE),
        lambda: looking(adaptive()),
    ),
    "ae_looksam k=1 asks on every step": (
        lambda: mo.ae_looksam(decayed_sgd(), ramp, k=1, **ADAPTIVE),
        lambda: mo.ae_looksam(decayed_sgd(), ramp, **ADAPTIVE),
    ),
    "before the first refresh reuse is the plain gradient": (
        lambda: looking(mo.policies.between(25)),
        lambda: composed(mo.policies.between(25)),
    ),
    "gsam alpha=0 is SAM": (lambda: mo.gsam(decayed_sgd(), ramp, alpha=0.0), sam),
    "gradient_norm_penalty alpha=1 is SAM": (
        lambda: mo.gradient_norm_penalty(decayed_sgd(), ramp, alpha=1.0),
        sam,
    ),
    "gradient_norm_penalty alpha=0 is SGD": (
        lambda: mo.gradient_norm_penalty(decayed_sgd(), ramp, alpha=0.0),
        decayed_sgd,
    ),
    "wsam gamma=0.5 is SAM": (lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.5), sam),
    "wsam gamma=0 is SGD": (
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.0),
        decayed_sgd,
    ),
    "wsam decoupled gamma=0 is SGD": (
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.0, learning_rate=lr),
        decayed_sgd,
    ),
    "wsam decoupled is coupled without a momentum": (
        lambda: mo.wsam(decayed_sgd(momentum=None), ramp, gamma=0.8, learning_rate=lr),
        lambda: mo.wsam(decayed_sgd(momentum=None), ramp, gamma=0.8),
    ),
    "friendly_sam sigma=0 is SAM": (
        lambda: mo.friendly_sam(decayed_sgd(), ramp, sigma=0.0),
        sam,
    ),
    "fisher_sam eta=0 is SAM": (
        lambda: mo.fisher_sam(decayed_sgd(), ramp, eta=0.0),
        sam,
    ),
    "second order without rho is SGD": (
        lambda: optax.chain(
            element(mo.ascents.normalized(0.0), second_order=True), decayed_sgd()
        ),
        decayed_sgd,
    ),
    "employ(always(), gsam) is gsam": (
        lambda: composed(mo.policies.always(), mo.combine.surrogate_gap(0.4)),
        lambda: mo.gsam(decayed_sgd(), ramp, alpha=0.4),
    ),
}


@functools.cache
def small_run(build: Callable[[], Any]) -> list[Any]:
    # What is equal is equal everywhere, so the smaller problem does.
    return run(build(), quadratic()).params


@x64
@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    one, other = IDENTITIES[name]
    assert distance(small_run(one), small_run(other)) < 1e-12


@x64
@on_both_samples
def test_esam_of_all_weights_and_all_samples_is_sam(samples):
    everything = mo.esam(decayed_sgd(), ramp, beta=1.0, gamma=1.0)
    assert distance(train(everything, samples), train(sam(), samples)) < 1e-12


@x64
def test_the_radius_of_a_p_norm_is_rho():
    direction = quadratic().params
    for p in (1, 1.5, 2, 3, math.inf):
        ascent = mo.ascents.normalized(0.3, p)
        epsilon = jax.jit(ascent.update)(direction, ascent.init(direction))[0]
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(epsilon)])
        assert np.linalg.norm(flat, p) == pytest.approx(0.3, rel=1e-12)


def test_p_1_finds_the_largest_entry_of_any_direction_under_jit():
    ascent = mo.ascents.normalized(0.5, p=1)
    update = jax.jit(lambda g: ascent.update(g, ascent.init(g))[0])
    directions = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    directions[:, 0] += 4 * np.sign(directions[:, 0])
    for direction in directions:
        epsilon = update(direction)
        expected = [0.5 * np.sign(direction[0]), 0, 0, 0, 0, 0, 0]
        np.testing.assert_allclose(epsilon, expected, rtol=1e-6)


# --- What the methods cost ------------------------------------------------------------


class Counter:
    """Counts how often the gradient of a loss is executed, not traced."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self, *_: Any) -> None:
        self.count += 1

    def loss_fn(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        loss = jnp.sum(jnp.cos(params["w"] * batch))
        jax.debug.callback(self.tick, loss)
        return loss, (model_state, ())


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
@pytest.mark.parametrize(
    "build, gradients",
    [
        (lambda: mo.looksam(optax.sgd(0.1), 0.1, k=5), 60),
        (lambda: mo.looksam(optax.sgd(0.1), 0.1, k=2), 75),
        (lambda: mo.ae_looksam(optax.sgd(0.1), 0.1, total_steps=50), None),
        (lambda: mo.ae_looksam(optax.sgd(0.1), 0.1, total_steps=50, k=3), None),
    ],
    ids=["looksam k=5", "looksam k=2", "ae_looksam", "ae_looksam k=3"],
)
def test_looksam_runs_the_gradients_of_its_refreshes_alone(build, gradients, dispatch):
    tx, counter, params = build(), Counter(), {"w": jnp.linspace(-1.0, 2.0, 6)}
    step = mo.make_train_step(counter.loss_fn, tx, dispatch=dispatch, donate=False)
    state = mo.TrainState(params, tx.init(params))
    for t in range(50):
        state, _ = step(state, jnp.float32(1 + 0.1 * (t % 7)), None)
    jax.effects_barrier()
    refreshes = int(state.opt_state[0].employed_steps)
    assert counter.count == 50 + refreshes
    if gradients is None:
        assert 0 < refreshes < 50
    else:
        assert counter.count == gradients  # at k = 5, 1.2 a step


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


# Trees like the parameters, and scalars, beyond the base optimizer's, as documented.
STATES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "looksam": (lambda: mo.looksam(sgd(), 0.1), 1, 5),
    "looksam, rho schedule": (lambda: mo.looksam(sgd(), ramp), 1, 6),
    "ae_looksam": (lambda: mo.ae_looksam(sgd(), 0.1, 9), 1, 8),
    "ae_looksam, k": (lambda: mo.ae_looksam(sgd(), 0.1, 9, k=2), 1, 8),
    "ae_looksam, rho schedule": (lambda: mo.ae_looksam(sgd(), ramp, 9), 1, 9),
    "esam": (lambda: mo.esam(sgd()), 0, 3),
    "gsam": (lambda: mo.gsam(sgd()), 0, 2),
    "gsam, rho schedule": (lambda: mo.gsam(sgd(), ramp), 0, 3),
    "gradient_norm_penalty": (lambda: mo.gradient_norm_penalty(sgd()), 0, 2),
    "wsam": (lambda: mo.wsam(sgd()), 0, 2),
    "wsam decoupled": (lambda: mo.wsam(sgd(), learning_rate=0.1), 0, 2),
    "wsam, schedules": (lambda: mo.wsam(sgd(), ramp, learning_rate=lr), 0, 4),
    "friendly_sam": (lambda: mo.friendly_sam(sgd()), 1, 3),
    "friendly_sam, rho schedule": (lambda: mo.friendly_sam(sgd(), ramp), 1, 4),
    "fisher_sam": (lambda: mo.fisher_sam(sgd()), 0, 2),
    "msam, unnormalised": (lambda: around_sgd(mo.ascents.unnormalized(0.1)), 1, 1),
    "msam, last gradient": (lambda: along_last_gradient(0.1), 2, 1),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_as_large_as_documented(name):
    build, trees, scalars = STATES[name]
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4, jnp.bfloat16)}

    def sizes(tx: Any) -> tuple[int, int]:
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        arrays = sum(x.size * x.dtype.itemsize for x in leaves if x.ndim)
        return arrays, sum(x.ndim == 0 for x in leaves)

    # The variants of MSAM stand around SGD with a schedule, which has a counter.
    base = optax.sgd(lr, MU) if "msam," in name else sgd()
    ours, theirs = sizes(build()), sizes(base)
    assert ours[0] - theirs[0] == trees * (12 * 4 + 4 * 2)
    assert ours[1] - theirs[1] == (scalars if "msam," not in name else 0)


def deep_losses(seen: list[int], params: Any, model_state: Any, batch: Any, key: Any):
    seen.append(batch.shape[0])
    features = batch
    for kernel in params[:-1]:
        features = jnp.tanh(features @ kernel)
    return jnp.sum((features @ params[-1]) ** 2, axis=-1), (model_state, ())


def train_step_of(tx: Any, batch: int) -> tuple[Any, list[int]]:
    """A compiled step of a deep network, and the batches that its loss was given."""
    seen: list[int] = []
    step = mo.make_train_step(functools.partial(deep_losses, seen), tx)
    params = [jnp.ones((64, 64))] * 5
    state = jax.eval_shape(lambda: mo.TrainState(params, tx.init(params)))
    inputs = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    return jax.jit(step).lower(state, inputs, None), seen


@pytest.mark.parametrize(
    "batch, gamma, kept", [(64, 0.5, 32), (10, 0.37, 3), (100, 0.29, 29), (7, 1.0, 7)]
)
def test_esam_runs_its_second_gradient_on_the_samples_kept(batch, gamma, kept):
    _, seen = train_step_of(mo.esam(sgd(), gamma=gamma), batch)
    assert seen == [batch, batch, kept]


def test_esam_costs_less_than_sam():
    def flops(tx: Any) -> float:
        lowered, _ = train_step_of(tx, 256)
        return lowered.compile().cost_analysis()["flops"]

    base, whole = flops(sgd()), flops(mo.sam(sgd()))
    half, fifth = (flops(mo.esam(sgd(), gamma=gamma)) for gamma in (0.5, 0.2))
    assert whole / base == pytest.approx(2, abs=0.05)
    # A gradient is a forward pass and about two backward: of SAM's 3 + 3, ESAM leaves
    # 3 + 1 + 3 gamma.
    assert half / whole < 0.95
    assert half / whole == pytest.approx(5.5 / 6, abs=0.03)
    assert fifth / whole == pytest.approx(4.6 / 6, abs=0.03)
    print(
        f"ESAM's step in units of SAM's: {half / whole:.3f} at gamma=0.5, "
        f"{fifth / whole:.3f} at 0.2; SAM's of SGD's: {whole / base:.3f}"
    )


# --- m-sharpness: every shard of the batch has its own ascent -------------------------

M_TRANSFORMS: dict[str, Callable[[], Any]] = {
    "sam": lambda: element(mo.ascents.normalized(0.3)),
    "gsam, rho schedule": lambda: element(
        mo.ascents.normalized(ramp), mo.combine.surrogate_gap(0.4)
    ),
    "friendly": lambda: element(mo.ascents.friendly(0.3, decay=0.6)),
}


def batch_grad(samples: Samples) -> Callable[[Any, Any], Any]:
    return jax.grad(lambda params, batch: jnp.mean(samples.losses(params, batch)))


def m_sharp_gradients(
    transform: Any, samples: Samples, shards: int, steps: int = 4, **options: Any
) -> list[Any]:
    """Gradients of some steps at the start."""
    sharded = mo.m_sharpness(transform, shards, **options)
    params = jax.tree.map(jnp.asarray, samples.params)
    state, gradients = sharded.init(params), []

    @jax.jit
    def gradient(state: Any, batch: Any) -> Any:
        return sharded.gradient(batch_grad(samples), state, params, batch)

    for t in range(steps):
        g, state = gradient(state, samples.batch(t))
        gradients.append(g)
    return jax.device_get(gradients)


@x64
@pytest.mark.parametrize("name", M_TRANSFORMS)
def test_m_sharpness_at_once_is_in_sequence_and_a_plain_loop(name):
    samples, transform = classes(), M_TRANSFORMS[name]()
    at_once = m_sharp_gradients(transform, samples, 5)
    in_sequence = m_sharp_gradients(transform, samples, 5, sequential=True)

    params = jax.tree.map(jnp.asarray, samples.params)
    states = [transform.init(params) for _ in range(5)]

    @jax.jit
    def alone(state: Any, batch: Any) -> Any:
        def grad_fn(params: Any) -> Any:
            return batch_grad(samples)(params, batch)

        return transform.update(grad_fn(params), state, params, grad_fn=grad_fn)

    loop = []
    for t in range(4):
        gradients = []
        for i in range(5):
            part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], samples.batch(t))
            g, states[i] = alone(states[i], part)
            gradients.append(g)
        loop.append(jax.tree.map(lambda *g: sum(g) / 5, *gradients))
    assert distance(at_once, jax.device_get(loop)) < 1e-12
    assert distance(in_sequence, jax.device_get(loop)) < 1e-12


@x64
@on_both_samples
def test_m_sharpness_of_sam_is_its_formula_and_not_that_of_the_whole_batch(samples):
    w = Tree(named(samples.params))

    def sharp(t: int, part: np.ndarray) -> Tree:
        epsilon = 0.3 * unit(Tree(samples.named_grad(w, t, part)))
        return Tree(samples.named_grad(w + epsilon, t, part))

    def mean(t: int, parts: list[np.ndarray]) -> Tree:
        total = sharp(t, parts[0])
        for part in parts[1:]:
            total = total + sharp(t, part)
        return total / len(parts)

    everything = np.arange(BATCH)
    transform = element(mo.ascents.normalized(0.3))
    whole = [mean(t, [everything]) for t in range(4)]
    fifths = [mean(t, np.split(everything, 5)) for t in range(4)]
    interleaved = [mean(t, [everything[i::5] for i in range(5)]) for t in range(4)]
    ours = m_sharp_gradients(transform, samples, 5)
    assert distance(ours, fifths) < 1e-12
    assert distance(ours, whole) > 1e-3
    assert distance(ours, interleaved) > 1e-6
    assert distance(m_sharp_gradients(transform, samples, 1), whole) < 1e-12


M_SHARPNESS_ON_DEVICES = """
import re
import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import msam_optax as mo
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
params = {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "bias": jnp.arange(4.0)}
batch = jax.random.normal(jax.random.key(0), (16, 3))
grad = jax.grad(
    lambda p, x: jnp.mean(jnp.cos(x @ p["kernel"] + p["bias"]) ** 2)
)
sam = mo.sharpness_aware_gradient(mo.ascents.normalized(0.3))
state = sam.init(params)


def on_each_device(params, state, batch):
    # Parameters that all devices share have one gradient for all of them: a device's
    # own needs parameters of its own.
    params = jax.lax.pcast(params, "data", to="varying")
    grad_fn = lambda p: grad(p, batch)
    gradient, state = sam.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return jax.lax.pmean(gradient, "data"), state.perturbation_norm[None]


step = jax.jit(
    jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P("data")),
    )
)
gradient, norms = step(params, state, batch)
sharded = mo.m_sharpness(sam, shards=4)
expected, _ = sharded.gradient(grad, sharded.init(params), params, batch)
whole, _ = sam.update(
    grad(params, batch), state, params, grad_fn=lambda p: grad(p, batch)
)


def distance(a, b):
    return max(float(jnp.max(jnp.abs(a[k] - b[k]))) for k in a)


reduced = 0
for line in step.lower(params, state, batch).compile().as_text().splitlines():
    # %name = (f64[4]{0}, f64[3,4]{1,0}) all-reduce(...)
    if found := re.search(r"= (.*) all-reduce(-start)?\\(", line):
        for shape in re.findall(r"f64\\[([\\d,]*)\\]", found[1]):
            reduced += eval("*".join(shape.split(",")) or "1")
print(distance(gradient, expected), distance(gradient, whole), reduced, norms.shape)
"""


def test_m_sharpness_on_four_devices_needs_one_all_reduce():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", M_SHARPNESS_ON_DEVICES],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    to_shards, to_whole, reduced, *_ = done.stdout.split()
    assert float(to_shards) < 1e-14
    assert float(to_whole) > 1e-4
    assert int(reduced) == 12 + 4  # numbers summed over devices: one gradient's


# --- Bad input ------------------------------------------------------------------------

P, B = {"w": jnp.ones(3)}, 6


def per_example(params: Any, indices: Any = None) -> jax.Array:
    x = jnp.ones((B, 3)) if indices is None else jnp.ones((B, 3))[indices]
    return (x @ params["w"]) ** 2


def select(gamma: float = 0.5, **given: Any) -> Any:
    """An update of ESAM's element with some of its arguments replaced."""
    tx = mo.selected_gradient(mo.ascents.normalized(0.1), gamma)
    arguments = {
        "per_example_losses": per_example(P),
        "per_example_loss_fn": per_example,
        "params": P,
        **given,
    }
    return tx.update(P, tx.init(P), **arguments)


def scalar_step() -> Any:
    """ESAM in a train step whose loss is a scalar."""
    tx = mo.esam(optax.sgd(0.1))
    step = mo.make_train_step(
        lambda params, model_state, batch, key: (
            jnp.mean(batch @ params["w"]),
            (model_state, ()),
        ),
        tx,
    )
    return step(mo.TrainState(P, tx.init(P)), jnp.ones((B, 3)), None)


def sharded(shards: Any) -> Any:
    sharded = mo.m_sharpness(element(mo.ascents.normalized(0.1)), shards)
    return sharded.gradient(
        jax.grad(lambda p, x: jnp.mean(x @ p["w"])),
        sharded.init(P),
        P,
        jnp.ones((B, 3)),
    )


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"esam {name}={value}": (
            functools.partial(mo.esam, sgd(), **{name: value}),  # type: ignore[arg-type]
            rf"{name} must be one finite real number in \(0, 1\], but {value}",
        )
        for name in ("beta", "gamma")
        for value in (0.0, -0.5, 1.1, math.nan, math.inf)
    },
    "gamma is text": (
        lambda: mo.selected_gradient(mo.ascents.normalized(0.1), "half"),  # type: ignore[arg-type]
        "gamma must be one finite real number .* but 'half' was given",
    ),
    "looksam k=0": (
        lambda: mo.looksam(sgd(), k=0),
        r"k must be one finite real number in \[1, inf\], but 0 was given",
    ),
    "looksam k=-3": (lambda: mo.looksam(sgd(), k=-3), "k must be .* -3 was given"),
    "looksam k=2.5": (
        lambda: mo.looksam(sgd(), k=2.5),  # type: ignore[arg-type]
        "k must be an integer, but 2.5 was given",
    ),
    "looksam alpha": (
        lambda: mo.looksam(sgd(), alpha=math.nan),
        "alpha must be one finite real number, but nan",
    ),
    "ae_looksam k=0": (
        lambda: mo.ae_looksam(sgd(), 0.1, total_steps=10, k=0),
        "k must be .* 0 was given",
    ),
    "ae_looksam total_steps=0": (
        lambda: mo.ae_looksam(sgd(), 0.1, total_steps=0),
        "total_steps must be .* 0 was given",
    ),
    "wsam gamma=1": (
        lambda: mo.wsam(sgd(), gamma=1.0),
        r"gamma must be one finite real number in \[0, 1\), but 1.0 was given",
    ),
    "wsam gamma=-0.1": (lambda: mo.wsam(sgd(), gamma=-0.1), "gamma must be .* -0.1"),
    "wsam learning_rate": (
        lambda: mo.wsam(sgd(), learning_rate="fast"),  # type: ignore[arg-type]
        "learning_rate .* must be one finite real number, but 'fast'",
    ),
    "gsam alpha": (lambda: mo.gsam(sgd(), alpha=math.inf), "alpha must be .* inf"),
    "gradient_norm_penalty alpha": (
        lambda: mo.gradient_norm_penalty(sgd(), alpha=math.nan),
        "alpha must be .* nan",
    ),
    "friendly decay": (
        lambda: mo.friendly_sam(sgd(), decay=1.5),
        r"decay must be one finite real number in \[0, 1\], but 1.5",
    ),
    "friendly sigma": (
        lambda: mo.friendly_sam(sgd(), sigma=math.nan),
        "sigma must be .* nan",
    ),
    "fisher eta": (lambda: mo.fisher_sam(sgd(), eta=-1.0), "eta must be .* -1.0"),
    **{
        f"p={p}": (
            functools.partial(mo.ascents.normalized, 0.1, p),
            rf"p must be a Python number in \[1, inf\], but {p} was given",
        )
        for p in (0.9, 0, -2, math.nan)
    },
    "rho_max": (
        lambda: mo.rho_like_learning_rate(lr, math.nan, 0.0, 0.1),
        "rho_max must be .* nan",
    ),
    "learning rates": (
        lambda: mo.rho_like_learning_rate(lr, 0.2, 0.1, 0.1, 0.1),
        "learning_rate_max must be above learning_rate_min, but 0.1 and 0.1",
    ),
    "batch smaller than 1/gamma": (
        lambda: select(0.15),
        "gamma=0.15 keeps none of a batch of 6: it needs at least 7 examples",
    ),
    "scalar loss in a train step": (
        scalar_step,
        r"must have shape \[batch\], one loss for each example, but has shape \(\)",
    ),
    "scalar losses": (
        lambda: select(per_example_losses=jnp.ones([])),
        r"must have shape \[batch\], one loss for each example, but has shape \(\)",
    ),
    "losses of two axes": (
        lambda: select(per_example_losses=jnp.ones((B, 1))),
        r"must have shape \[batch\].* but has shape \(6, 1\)",
    ),
    "loss function that returns the mean": (
        lambda: select(per_example_loss_fn=lambda p, i: jnp.mean(per_example(p, i))),
        r"per_example_loss_fn must .*\(6,\).*\(\)",
    ),
    "loss function that returns two axes": (
        lambda: select(per_example_loss_fn=lambda p, i: per_example(p, i)[:, None]),
        r"per_example_loss_fn must .*\(6,\).*\(6, 1\)",
    ),
    "loss function that ignores the choice": (
        lambda: select(per_example_loss_fn=lambda p, i: per_example(p)),
        r"per_example_loss_fn must .*\(3,\).*\(6,\)",
    ),
    "no losses": (
        lambda: select(per_example_losses=None),
        "needs the keywords per_example_losses and per_example_loss_fn",
    ),
    "no loss function": (
        lambda: select(per_example_loss_fn=None),
        "needs the keywords per_example_losses and per_example_loss_fn",
    ),
    "no params": (lambda: select(params=None), "params were None"),
    "shards that do not divide": (
        lambda: sharded(4),
        r"shards must divide the first axis .* shape \[6, 3\] and shards=4 were given",
    ),
    "no shards": (lambda: sharded(0), "shards must be .* 0 was given"),
    "half a shard": (lambda: sharded(1.5), "shards must be an integer, but 1.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_what_is_needed(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_smallest_batch_that_gamma_needs_is_enough():
    _, state = select(1 / 6)
    assert float(state.perturbation_norm) == pytest.approx(0.1)


def test_a_sequence_of_shards_forms_the_mean_in_float32():
    # Four gradients of 3e4 add up to more than float16 holds.
    sharded = mo.m_sharpness(optax.identity(), shards=4, sequential=True)
    params, batch = jnp.ones(2, jnp.float16), jnp.zeros(8)

    def grad_fn(params: Any, batch: Any) -> Any:
        return jnp.full(2, 3e4, params.dtype)

    gradient, _ = sharded.gradient(grad_fn, sharded.init(params), params, batch)
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient, 3e4, rtol=1e-3)


def test_shards_in_sequence_take_gradients_of_another_dtype():
    sharded = mo.m_sharpness(optax.identity(), shards=2, sequential=True)
    params, batch = jnp.ones(2, jnp.bfloat16), jnp.arange(4.0)

    def grad_fn(params: Any, batch: Any) -> Any:
        return jnp.full(2, jnp.mean(batch))

    gradient, _ = sharded.gradient(grad_fn, sharded.init(params), params, batch)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, 1.5)
