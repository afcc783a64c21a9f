"""Flax's TrainState, whose optimizer may ask for the gradient anew."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from msam_optax.flax._slow_cond import warn_of_a_slow_cond
from msam_optax.transforms._eval_params import eval_params
from msam_optax.transforms._placement import check_wrappers


class LinenTrainState(train_state.TrainState):
    """Flax's TrainState, whose optimizer may ask for the gradient anew.

    In the place of :class:`flax.training.train_state.TrainState` in a trainer of your
    own, also as the base of a subclass with further fields; with
    :func:`msam_optax.make_train_step` you need none. Batch statistics are yours to keep
    apart: take them from the clean gradient, and let ``grad_fn`` drop its own.
    :func:`msam_optax.step_metrics` of ``(state.opt_state, state.params)`` tells about
    the step.

    *Under* ``pmap`` what is done to ``grads`` must be done inside ``grad_fn``, too:
    ``jax.lax.pmean(jax.grad(loss)(params), "batch")``. If only ``grads`` are the mean,
    each device perturbs, or finishes, its step by its own batch, and the replicas drift
    apart. Nothing tells this from an ensemble, whose replicas are meant to differ.

    *With Flax's* ``DynamicScale`` take both gradients by it, at one scale, and look at
    what comes out of the step: its ``is_finite`` is of the clean gradient alone, and
    the second one may overflow where that did not::

        dynamic_scale, is_finite, _, grads = scale.value_and_grad(loss)(state.params)
        new = state.apply_gradients(
            grads=grads, grad_fn=lambda p: scale.value_and_grad(loss)(p)[-1]
        )
        finite = is_finite & jnp.isfinite(optax.tree.norm(new.params))
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

    >>> import flax.linen as nn, jax, jax.numpy as jnp, msam_optax, optax
    >>> from msam_optax.flax.linen import LinenTrainState
    >>> model, x, y = nn.Dense(1), jnp.ones((8, 3)), jnp.zeros((8, 1))
    >>> state = LinenTrainState.create(
    ...     apply_fn=model.apply,
    ...     params=model.init(jax.random.key(0), x)["params"],
    ...     tx=msam_optax.sam(optax.sgd(0.1)),
    ... )
    >>> @jax.jit
    ... def step(state):
    ...     def loss(params):
    ...         return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
    ...     grad_fn = jax.grad(loss)
    ...     return state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)
    >>> state = step(state)
    >>> logits = model.apply({"params": state.eval_params}, x)
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        grad_fn: Callable[[Any], Any] | None = None,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> "LinenTrainState":
        """Updates step, params and opt_state.

        Args:
          grads: clean gradients, a tree like the parameters.
          grad_fn: ``grad_fn(params) -> grads`` of the same batch with the same random
            key; needed by all methods that take a second gradient.
          extra_args: what else the optimizer's ``update`` needs, for instance
            ``{"value": loss}``, or :func:`msam_optax.esam`'s per-example losses.
          **kwargs: other fields to replace, for instance ``batch_stats=...``.

        Raises:
          ValueError: by the optimizer, if it needs ``grad_fn`` and there is none, or if
            it holds something before its second gradient.
        """
        given = dict(extra_args)
        if grad_fn is not None:
            warn_of_a_slow_cond(
                self.opt_state, grad_fn, self.params, "linen_loss(model, loss)"
            )
            if OVERWRITE_WITH_GRADIENT in grads:
                # The optimizer sees the trained part of them alone.
                grad_fn = _of_trained(grad_fn, self.params)
            given["grad_fn"] = grad_fn
        check_wrappers(self.opt_state)
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            also = {"clean_grad": updates, "all_params": params, **given}
            return tx.update(updates, state, params, **also)

        handing_on = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(LinenTrainState, handing_on).apply_gradients(
            grads=grads, **kwargs
        )
        return stepped.replace(tx=self.tx)

    @property
    def eval_params(self) -> Any:
        """The unperturbed parameters: those to evaluate and to publish."""
        if isinstance(self.params, Mapping) and OVERWRITE_WITH_GRADIENT in self.params:
            trained = eval_params(self.opt_state, self.params["params"])
            return {**self.params, "params": trained}
        return eval_params(self.opt_state, self.params)


def _of_trained(grad_fn: Callable[[Any], Any], whole: Any) -> Callable[[Any], Any]:
    """A gradient as a function of the parameters that have an optimizer."""
    return lambda params: grad_fn({**whole, "params": params})["params"]
