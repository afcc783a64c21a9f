"""A training step for any model: one batch and one key for both gradients."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_integer, check_transformation
from msam_optax.training._checks import check_state, diagnose
from msam_optax.training._dispatch import Dispatch, Dispatcher
from msam_optax.training._gradients import CleanPass, Gradients, LossFn, used_again
from msam_optax.training._loss_scaling import LossScaling, all_finite, stay_finite
from msam_optax.training._metrics import StepMetrics, metrics_of
from msam_optax.training._state import TrainState
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._find_momentum import find_states
from msam_optax.transforms._placement import check_wrappers


class TrainStep:
    """The jitted training step of a loss and an optimizer.

    What :func:`make_train_step` makes. Called as ``step(state, batch, key) -> (state,
    metrics)``, with a :class:`TrainState` and :class:`StepMetrics`.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):
    ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
    >>> tx = msam_optax.ae_sam(optax.sgd(0.1), rho=0.1, total_steps=10)
    >>> step = msam_optax.make_train_step(loss_fn, tx, donate=False)
    >>> state = msam_optax.TrainState(jnp.ones(3), tx.init(jnp.ones(3)))
    >>> step.dispatch(state, jnp.eye(3), None)
    Dispatch(where='in_graph', reason='on CPU, the loss holds no convolution')
    >>> compiled = step.lower(state, jnp.eye(3), None).compile()
    >>> state, metrics = compiled(state, jnp.eye(3), None)
    """

    def __init__(
        self,
        gradients: Gradients,
        optimizer: optax.GradientTransformationExtraArgs,
        dispatch: Literal["auto", "in_graph", "host"],
        donate: bool,
        loss_scaling: LossScaling | None,
    ) -> None:
        """Takes what `make_train_step` has checked."""
        self._gradients = gradients
        self._optimizer = optimizer
        self._donate = donate
        self._loss_scaling = loss_scaling
        donated = (0,) if donate else ()
        self._in_graph = jax.jit(self._whole, donate_argnums=donated)
        self._decide = jax.jit(self._decided, static_argnames="foreseen")
        self._finish = jax.jit(
            self._finished, static_argnames="employed", donate_argnums=donated
        )
        self._dispatcher = Dispatcher(dispatch, gradients.jaxpr, self._decision)

    def __call__(
        self, state: TrainState, batch: Any, key: Any
    ) -> tuple[TrainState, StepMetrics]:
        """Takes one step.

        Args:
          state: the train state; donated unless told otherwise.
          batch: a tree of arrays.
          key: random key, or None where the loss draws nothing.

        Returns:
          The next state, and what the step tells.
        """
        try:
            if self.dispatch(state, batch, key).where == "in_graph":
                return self._in_graph(state, batch, key)
            foreseen = self._dispatcher.foreseen(state, batch, key)
            clean, employed = self._decide(state, batch, key, foreseen=foreseen)
            # Else it would only take time.
            if jax.config.jax_debug_key_reuse:  # type: ignore[attr-defined]
                key = used_again(key)
            return self._finish(state, clean, batch, key, employed=bool(employed))
        except Exception as error:
            self._dispatcher.forget()
            check_state(self._loss_scaling, state)
            why = diagnose(self._optimizer, self._donate, state, batch, key)
            if why is None:
                raise
            raise ValueError(why) from error

    def dispatch(self, state: TrainState, batch: Any, key: Any) -> Dispatch:
        """How a step with these arguments is dispatched, and why.

        Args:
          state: of arrays or of ``jax.ShapeDtypeStruct``, as batch and key.
          batch: as for a step.
          key: as for a step.

        Returns:
          A :class:`Dispatch`: "in_graph" for one program, "host" for two of which the
          second is chosen by what the first decides; and the reason.
        """
        check_state(self._loss_scaling, state)
        return self._dispatcher(state, batch, key)

    def lower(self, state: TrainState, batch: Any, key: Any) -> "LoweredStep":
        """Lowers the step for compiling ahead of time.

        Args:
          state: of arrays or of ``jax.ShapeDtypeStruct``, as batch and key.
          batch: as for a step.
          key: as for a step.

        Returns:
          A :class:`LoweredStep`, by whose ``programs`` the step can also be looked at.
        """
        if self.dispatch(state, batch, key).where == "in_graph":
            return LoweredStep({"step": self._in_graph.lower(state, batch, key)})
        foreseen = self._dispatcher.foreseen(state, batch, key)
        decide = partial(self._decide, foreseen=foreseen)
        clean, _ = jax.eval_shape(decide, state, batch, key)
        plain, employed = (
            self._finish.lower(state, clean, batch, key, employed=choice)
            for choice in (False, True)
        )
        first = self._decide.lower(state, batch, key, foreseen=foreseen)
        return LoweredStep({"decide": first, "plain": plain, "employed": employed})

    def _whole(self, state: TrainState, batch: Any, key: Any) -> Any:
        return self._finished(state, None, batch, key)

    def _decided(self, state: TrainState, batch: Any, key: Any, foreseen: bool) -> Any:
        clean = self._gradients.clean_pass(state, batch, key)
        # Of this update only the decision is returned: XLA drops all else, and where
        # that is foreseen the gradient, too.
        _, opt_state = self._update(state, clean, batch, key, employed=False)
        (employ_state,) = find_states(opt_state, EmployState)
        return None if foreseen else clean, employ_state.employed

    def _decision(self, state: TrainState, batch: Any, key: Any) -> Any:
        """The decision alone, as JAX traced it."""
        return self._decide.trace(state, batch, key, foreseen=True).jaxpr.jaxpr

    def _update(
        self,
        state: TrainState,
        clean: CleanPass,
        batch: Any,
        key: Any,
        employed: bool | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_wrappers(state.opt_state, skips=self._loss_scaling is not None)
        extra_args = self._gradients.extra_args(state, clean, batch, key)
        if employed is not None:
            extra_args["employed"] = employed
        return self._optimizer.update(
            clean.grads, state.opt_state, state.params, **extra_args
        )

    def _finished(
        self,
        state: TrainState,
        clean: CleanPass | None,
        batch: Any,
        key: Any,
        employed: bool | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        if clean is None:
            clean = self._gradients.clean_pass(state, batch, key)
        updates, opt_state = self._update(state, clean, batch, key, employed)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(params, opt_state, clean.model_state, state.loss_scale)
        finite = jnp.asarray(True)
        if self._loss_scaling is not None:
            finite = all_finite((clean.loss, clean.grads, updates)) & stay_finite(
                opt_state, state.opt_state
            )
            kept = jax.tree.map(partial(jnp.where, finite), new_state, state)
            loss_scale = self._loss_scaling.adjust(state.loss_scale, finite)
            new_state = kept._replace(loss_scale=loss_scale)
        return new_state, metrics_of(new_state, clean, skipped=~finite)


class LoweredStep(NamedTuple):
    """A training step before XLA compiles it.

    Attributes:
      programs: by name. In graph there is one, "step". From the host there are three:
        "decide" runs first, and then "plain" or "employed".
    """

    programs: dict[str, jax.stages.Lowered]

    def compile(self) -> "CompiledStep":
        """The step, compiled for arguments like those that it was lowered for."""
        return CompiledStep(
            {name: program.compile() for name, program in self.programs.items()}
        )


class CompiledStep(NamedTuple):
    """A compiled training step, called as the step itself.

    Attributes:
      programs: by the names of :class:`LoweredStep`; each tells its
        ``memory_analysis()``, ``cost_analysis()`` and ``as_text()``.
    """

    programs: dict[str, jax.stages.Compiled]

    def __call__(
        self, state: TrainState, batch: Any, key: Any
    ) -> tuple[TrainState, StepMetrics]:
        """Takes one step."""
        if "step" in self.programs:
            return self.programs["step"](state, batch, key)
        clean, employed = self.programs["decide"](state, batch, key)
        second = self.programs["employed" if employed else "plain"]
        return second(state, clean, batch, key)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    dispatch: Literal["auto", "in_graph", "host"] = "auto",
    donate: bool = True,
    loss_scaling: LossScaling | None = None,
    microbatches: int = 1,
) -> TrainStep:
    """Builds the jitted training step of a loss and an optimizer.

    Both gradients see the same batch and the same random key. The model's own state is
    taken from the clean pass alone, and so are the loss and the auxiliary outputs.

    An optimizer that employs its extra gradient on some steps only
    (:func:`msam_optax.employ`) must really skip it on the others. *In graph*,
    ``lax.cond`` does, which is needed inside ``jit`` or ``scan``. But XLA for CPU runs
    a convolution's gradient many times slower inside a ``cond``. From the *host*, the
    step is two programs: the clean gradient with the policy's decision, and, once that
    is read, an update compiled with or without the extra gradient. A decision that
    hangs on the optimizer's state alone, as every k-th step's, is read first, and all
    else is the second program. Every way costs 1 + f gradients for a fraction f of
    employed steps.

    Args:
      loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        aux))``; aux is any tree of arrays. The loss is a scalar; an array of one loss
        for each example, whose mean is trained on; or a :class:`WeightedMean`, which
        aux may hold as well. Methods that select samples (:func:`msam_optax.esam`) need
        one for each example, and the examples along the first axis of all of the batch.
        ``msam_optax.flax.linen.linen_loss`` makes a loss function of a Linen module.
      optimizer: any Optax optimizer. It receives ``grad_fn``, ``value_and_grad_fn``,
        ``value``, ``clean_grad``, ``all_params`` and, for methods that select samples,
        ``per_example_losses`` and ``per_example_loss_fn`` as extra arguments.
      dispatch: "in_graph", "host", or "auto": from the host where the parameters are
        on CPU, the loss holds a convolution and the step is not itself traced; in graph
        elsewhere. :meth:`TrainStep.dispatch` tells which it is.
      donate: hand the state's memory to the new state. The state passed in, and the
        parameters in it, can't be used afterwards.
      loss_scaling: skips steps that are not finite, and scales the loss for float16;
        the first state then holds ``loss_scale=loss_scaling.init()``. Float32 and
        bfloat16 training needs none.
      microbatches: takes each gradient of the batch in so many parts, one after the
        other: activations need the memory of one part, and a tree like the parameters
        more. **There is one epsilon for the whole batch**, and the step equals that of
        the large batch, **if the parts' means count alike**: a mean over what a batch
        holds unequally many of, tokens that are not padding for instance, must be
        returned as a :class:`WeightedMean`. Batch norm normalises within each part. The
        loss is averaged, so methods that select samples can't be used. XLA for CPU
        runs a convolution's gradient many times slower in a loop, as this is. For one
        epsilon for each part (m-sharpness), hand the step one micro-batch after the
        other instead, and let Optax accumulate behind the ascent:
        ``optax.chain(sharpness_aware_gradient(ascent), optax.MultiSteps(optimizer,
        k).gradient_transformation())``.

    Returns:
      A :class:`TrainStep`, ``step(state, batch, key) -> (state, metrics)`` with a
      :class:`TrainState` and :class:`StepMetrics`. The key may be None where the loss
      draws nothing.

    Raises:
      ValueError: if dispatch is none of the three, or is "host" where the step is
        traced or the optimizer employs in several places; if microbatches is not a
        positive integer that divides the batch; by the step, if its state was given
        before, holds an array twice or is not that of the optimizer, if something
        stands before or accumulates around a second gradient, or
        ``optax.apply_if_finite`` around one without ``loss_scaling``.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):
    ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
    >>> tx = msam_optax.ae_sam(optax.sgd(0.1, momentum=0.9), rho=0.1, total_steps=10)
    >>> step = msam_optax.make_train_step(loss_fn, tx)
    >>> params = jnp.ones(3)
    >>> state = msam_optax.TrainState(params, tx.init(params))
    >>> for _ in range(10):
    ...     state, metrics = step(state, jnp.eye(3), None)
    >>> print(f"{metrics.loss:.4f}, SAM on {metrics.employed_fraction:.0%}")
    0.1927, SAM on 60%
    """
    if dispatch not in ("auto", "in_graph", "host"):
        raise ValueError(
            f'dispatch must be "auto", "in_graph" or "host", not {dispatch!r}.'
        )
    if isinstance(loss_fn, optax.GradientTransformation) and callable(optimizer):
        raise ValueError(
            "make_train_step(loss_fn, optimizer) was given the optimizer first."
        )
    optimizer = check_transformation("optimizer", optimizer)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, but {loss_fn!r} was given.")
    if not (loss_scaling is None or isinstance(loss_scaling, LossScaling)):
        raise ValueError(
            f"loss_scaling must be a LossScaling, but {loss_scaling!r} was given."
        )
    check_integer("microbatches", microbatches, 1)
    gradients = Gradients(loss_fn, loss_scaling, microbatches)
    return TrainStep(gradients, optimizer, dispatch, donate, loss_scaling)
