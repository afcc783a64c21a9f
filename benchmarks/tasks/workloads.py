"""What the cost benchmarks train: the models in three sizes, on random images."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import msam_optax
from benchmarks.tasks import models
from benchmarks.tasks.losses import classified
from msam_optax.flax.linen import linen_loss

# The cost of a step does not depend on what the images show.
BATCHES = 4


class Workload(NamedTuple):
    """A model, its batch, and how long it is measured.

    Attributes:
      model: name of the model.
      overrides: attributes of the model that differ from their defaults.
      image: height, width and channels.
      batch_size: examples in a step.
      num_classes: number of logits.
      rounds: rounds of measurement.
      steps: steps of each optimizer in a round.
    """

    model: str
    overrides: dict[str, Any]
    image: tuple[int, int, int]
    batch_size: int
    num_classes: int = 10
    rounds: int = 20
    steps: int = 2


_DIGIT, _SMALL, _LARGE = (28, 28, 1), (32, 32, 3), (224, 224, 3)
_QUICK = {"rounds": 2, "steps": 2}

SIZES: dict[str, dict[str, Workload]] = {
    "quick": {
        "mlp": Workload("mlp", {"widths": (8,)}, (8, 8, 1), 8, **_QUICK),
        "cnn": Workload("cnn", {"channels": (4,), "width": 8}, (8, 8, 1), 8, **_QUICK),
    },
    # For the two cores of a small machine
    "cpu": {
        "mlp": Workload("mlp", {"widths": (256, 256)}, _DIGIT, 128, rounds=40, steps=5),
        "cnn": Workload(
            "cnn",
            {"channels": (32, 64), "width": 128},
            _DIGIT,
            128,
            rounds=40,
            steps=5,
        ),
        "wrn": Workload("wrn", {}, _SMALL, 16),
        "vit": Workload("vit", {}, _SMALL, 64),
    },
    # For an accelerator
    "full": {
        "wrn": Workload("wrn", {"dtype": "bfloat16"}, _SMALL, 256, rounds=30, steps=5),
        "vit": Workload(
            "vit",
            {
                "patch_size": 16,
                "width": 384,
                "depth": 12,
                "heads": 6,
                "dtype": "bfloat16",
            },
            _LARGE,
            256,
            num_classes=1000,
            rounds=20,
            steps=5,
        ),
    },
}


class Problem(NamedTuple):
    """A workload, ready to be trained.

    Attributes:
      loss_fn: for `make_train_step`, with one loss for each example.
      params: the start.
      model_state: the model's other collections.
      batches: pairs of images and labels.
    """

    loss_fn: msam_optax.LossFn
    params: Any
    model_state: Any
    batches: list[tuple[jax.Array, jax.Array]]

    def start(self, optimizer: optax.GradientTransformation) -> msam_optax.TrainState:
        """A state of its own memory, so that it can be donated."""
        params, model_state = jax.tree.map(jnp.copy, (self.params, self.model_state))
        return msam_optax.TrainState(params, optimizer.init(params), model_state)


def problem(workload: Workload) -> Problem:
    """Initialises the model and draws the batches."""
    model = models.build(workload.model, workload.num_classes, **workload.overrides)

    @jax.jit
    def start(key):
        key, *keys = jax.random.split(key, 1 + BATCHES)
        shape = (workload.batch_size, *workload.image)
        batches = [
            (
                jax.random.normal(key, shape),
                jax.random.randint(key, shape[:1], 0, workload.num_classes),
            )
            for key in keys
        ]
        return dict(model.init(key, batches[0][0], train=False)), batches

    variables, batches = start(jax.random.key(0))
    params = variables.pop("params")
    return Problem(
        linen_loss(model, classified, train=True), params, variables, batches
    )
