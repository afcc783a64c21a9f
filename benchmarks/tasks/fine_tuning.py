"""Fine-tuning: a network for MNIST's digits learns those of another source from few.

The MLP of 784-256-256-10 is trained on the 4,000 clean training digits of MNIST-5k, and
then on 100 of scikit-learn's digits (8x8, by other writers), enlarged to 28x28 and
drawn anew for each seed.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.tasks import data, models, optimizers, problems, runs
from msam_optax.training import TrainState

# Networks that the seeds take their start from in turn.
_STARTS = 3
_EXAMPLES = 100
_BATCH = 50


@cache
def _start(number: int, epochs: int) -> Any:
    """A network trained on MNIST's digits; 95% of its test part, without tuning."""
    problem = problems.digits(epochs, label_noise=0.0)
    run = runs.compiled(problem, optimizers.sgd)
    setting = runs.Traced(*map(np.float32, (0.03, 0.0, 1e-3)))
    _, params = run(setting, problem.inputs(1000 + number, False))
    return jax.tree.map(np.asarray, params)


def _enlarged(images: np.ndarray) -> np.ndarray:
    large = images.repeat(3, axis=1).repeat(3, axis=2)
    padded = np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None]
    return ((padded - padded.mean()) / padded.std()).astype(np.float32)


def fine_tuning(epochs: int = 40, start_epochs: int = 10) -> runs.Problem:
    """100 examples of a pool of 600, and 400 to validate and 797 to test."""
    digits = load_digits()
    images, labels = _enlarged(digits.images), digits.target.astype(np.int32)
    pool, rest = train_test_split(
        np.arange(len(labels)), train_size=600, random_state=0, stratify=labels
    )
    validation_part, test_part = train_test_split(
        rest, train_size=400, random_state=0, stratify=labels[rest]
    )
    model = models.build("mlp", 10)

    def inputs(seed: int, validation: bool) -> runs.Inputs:
        few, _ = train_test_split(
            pool, train_size=_EXAMPLES, random_state=seed, stratify=labels[pool]
        )
        rng = np.random.default_rng([seed, 1])
        order = [list(data.batches(_EXAMPLES, _BATCH, rng)) for _ in range(epochs)]
        part = validation_part if validation else test_part
        return runs.Inputs(
            seed=np.int32(seed),
            order=np.concatenate(order).astype(np.int32),
            train=(images[few], labels[few], _start(seed % _STARTS, start_epochs)),
            held_out=(images[part], labels[part]),
        )

    def init(optimizer: Any, key: Any, train: Any) -> TrainState:
        del key
        return TrainState(train[2], optimizer.init(train[2]), {})

    return problems.classification(
        model, inputs, total_steps=epochs * (_EXAMPLES // _BATCH), init=init
    )
