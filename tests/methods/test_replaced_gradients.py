"""Methods that replace the gradient, each against its recursion and wrong ones."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import (
    ADAPTIVE,
    DECAY,
    DECAYED_SGD,
    MU,
    RHO,
    adaptive,
    composed,
    decayed_sgd,
    distance,
    element,
    lr,
    on_both,
    ramp,
    recur,
    x64,
)
from tests.problems import (
    STEPS,
    Problem,
    named,
    run,
)
from tests.reference import family, recursions
from tests.reference.family import (
    dot,
    each_tensor,
    fisher_direction,
    p_norm_direction,
    reject,
)
from tests.reference.recursions import Tree, norm, unit

# With these the statistics remember the gradients of a phase for long.
LASTING: dict[str, Any] = dict(total_steps=40, delta=0.97, lambda_1=-0.5, lambda_2=0.1)
RARE: dict[str, Any] = dict(total_steps=40, delta=0.97, lambda_1=0.2, lambda_2=1.5)
GSAM_RHO: dict[str, float] = dict(rho_max=0.3, rho_min=0.05)


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
