"""Measures PyTorch's optimizers on the models of `step_cost.py`, which runs this.

It is a process of its own, for an interpreter with torch and pytorch_optimizer and
without JAX: two runtimes in one process would share threads. Workloads are read as JSON
from the standard input, and the costs written so to the standard output.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import pytorch_optimizer
import torch
from torch import nn

from benchmarks.costs import timing

_LEARNING_RATE = 0.01
_MOMENTUM = 0.9
_ADAM_LEARNING_RATE = 1e-4
_RHO = 0.05
_WARM_UP_STEPS = 5

# step(gradient): one training step, where gradient() clears the gradients, computes
# those of the batch at the parameters as they are, and returns the loss
Step = Callable[[Callable[[], torch.Tensor]], Any]
_SGD = {"lr": _LEARNING_RATE, "momentum": _MOMENTUM}


def _plain(make: Callable[..., torch.optim.Optimizer], model: nn.Module) -> Step:
    return make(model.parameters()).step


def _two_passes(make: Callable[..., torch.optim.Optimizer], model: nn.Module) -> Step:
    """As the documentation of these classes has it: one pass before `step`, one in it.

    LookSAM's `step` takes its gradient on every step, whether it ascended or not.
    """
    optimizer = make(model.parameters(), torch.optim.SGD, rho=_RHO, **_SGD)

    def step(gradient):
        gradient()
        optimizer.step(gradient)

    return step


def _gsam(model: nn.Module) -> Step:
    base = torch.optim.SGD(model.parameters(), **_SGD)
    constant = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
    rho = pytorch_optimizer.ProportionScheduler(
        constant, max_lr=1.0, max_value=_RHO, min_value=_RHO
    )
    optimizer = pytorch_optimizer.GSAM(model.parameters(), base, model, rho)

    def step(gradient):
        optimizer.step(lambda: (None, gradient()))

    return step


# name: (base, what makes a step of a model)
PEERS: dict[str, tuple[str, Callable[[nn.Module], Step]]] = {
    "sgd": ("sgd", partial(_plain, partial(torch.optim.SGD, **_SGD))),
    "sam": ("sgd", partial(_two_passes, pytorch_optimizer.SAM)),
    "gsam": ("sgd", _gsam),
    "looksam, k=5": (
        "sgd",
        partial(_two_passes, partial(pytorch_optimizer.LookSAM, k=5)),
    ),
    "friendly_sam": ("sgd", partial(_two_passes, pytorch_optimizer.FriendlySAM)),
    "adamw": (
        "adamw",
        partial(_plain, partial(torch.optim.AdamW, lr=_ADAM_LEARNING_RATE)),
    ),
}


def build(workload: Mapping[str, Any]) -> nn.Module:
    """The MLP or CNN of `models.py`."""
    height, width, channels = workload["image"]
    overrides, layers = workload["overrides"], []
    if workload["model"] == "mlp":
        size, widths = height * width * channels, overrides["widths"]
        layers.append(nn.Flatten())
    else:
        for outputs in overrides["channels"]:
            layers += [nn.Conv2d(channels, outputs, 3, stride=2, padding=1), nn.ReLU()]
            channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
        size, widths = height * width * channels, [overrides["width"]]
        layers.append(nn.Flatten())
    for outputs in widths:
        layers += [nn.Linear(size, outputs), nn.ReLU()]
        size = outputs
    return nn.Sequential(*layers, nn.Linear(size, workload["num_classes"]))


class Trial:
    """One optimizer in training; `gradients` counts those it has taken."""

    def __init__(
        self,
        workload: Mapping[str, Any],
        make_step: Callable[[nn.Module], Step],
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> None:
        torch.manual_seed(0)
        self.gradients = 0
        self._model = build(workload)
        self._step = make_step(self._model)
        self._images, self._labels = images, labels

    def _gradient(self) -> torch.Tensor:
        self.gradients += 1
        self._model.zero_grad()
        with torch.enable_grad():
            logits = self._model(self._images)
            loss = nn.functional.cross_entropy(logits, self._labels)
            loss.backward()
        return loss

    def run(self, steps: int) -> list[timing.Sample]:
        """Takes training steps."""
        samples = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step(self._gradient)
            samples.append(timing.Sample(time.perf_counter() - start))
        return samples


def measure(workload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Times all peers on a workload."""
    height, width, channels = workload["image"]
    images = torch.randn(workload["batch_size"], channels, height, width)
    labels = torch.randint(workload["num_classes"], (workload["batch_size"],))
    trials = {
        name: Trial(workload, make_step, images, labels)
        for name, (_, make_step) in PEERS.items()
    }
    for trial in trials.values():
        trial.run(_WARM_UP_STEPS)
        trial.gradients = 0
    turns = {
        name: partial(trial.run, workload["steps"]) for name, trial in trials.items()
    }
    rounds = timing.interleave(turns, workload["rounds"])
    return [
        {
            "model": workload["model"],
            "name": name,
            "base": base,
            "time_ratio": timing.ratio(rounds, name, base),
            "seconds": timing.seconds(rounds, name),
            "gradients": trials[name].gradients
            / (workload["rounds"] * workload["steps"]),
        }
        for name, (base, _) in PEERS.items()
    ]


def main() -> int:
    """Reads workloads, measures and writes; returns the exit code."""
    costs = [cost for workload in json.load(sys.stdin) for cost in measure(workload)]
    versions = {name: version(name) for name in ("torch", "pytorch_optimizer")}
    json.dump({"costs": costs, "versions": versions}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
