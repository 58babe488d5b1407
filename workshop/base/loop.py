"""One training loop for every stage: resumable, with averaged weights and a progress estimate.

The step number decides the seed of everything random in that step, so a resumed run sees the same
data and noise as one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ipdiverse.provenance import derived_seed
from workshop.base.optimizer import MuonAdamW

if TYPE_CHECKING:
    from pathlib import Path


class Objective(Protocol):
    """A stage's module, which has every trained weight, and its loss."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""
        ...

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss, and figures for the log."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Steps, learning rate and optimizer of a stage.

    Args:
        steps: Optimizer steps.
        learning_rate: Constant after warm-up; falls linearly to a twentieth over the last quarter,
            so a longer schedule can resume from any point before that.
        warmup: Steps of linear warm-up.
        weight_decay: The optimizer's.
        muon: Muon for the hidden matrices, else AdamW for all.
        ema: Decay of the averaged weights; the average is what is saved and shipped.
        save_every: Steps between resume points.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    save_every: int = 500
    muon: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup)
        left = (self.steps - step) / max(1.0, 0.25 * self.steps)
        return self.learning_rate * warm * max(0.05, min(1.0, left))


def _optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.AdamW | MuonAdamW:
    rate, decay = schedule.learning_rate, schedule.weight_decay
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if schedule.muon:
        return MuonAdamW(trained, rate, decay)
    parameters = [parameter for _, parameter in trained]
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, betas=(0.9, 0.99), fused=True)


class StageRun:
    """State of one stage's training: weights, their average, optimizer, step."""

    def __init__(self, objective: Objective, schedule: Schedule, folder: Path, seed: int) -> None:
        self.objective, self.schedule, self.folder, self.seed = objective, schedule, folder, seed
        self.parameters = [p for p in objective.module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = _optimizer(objective.module, schedule)
        self.step = 0
        self._resume()

    @property
    def _state_file(self) -> Path:
        return self.folder / "resume.pt"

    def _resume(self) -> None:
        if not self._state_file.exists():
            return
        state = torch.load(self._state_file, weights_only=True)  # runs no pickled code
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write a resume point; the previous one stays whole until the new one is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._state_file.with_suffix(".partial")
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state_file)

    def train(self) -> None:
        """Run to the last step, then put the averaged weights into the module."""
        self.objective.module.train()
        started, first = time.monotonic(), self.step
        while self.step < self.schedule.steps:
            loss, details = self._one_step()
            self._report(loss, details, first, started)
            if self.step % self.schedule.save_every == 0 or self.step == self.schedule.steps:
                self.save()
        self.use_average()

    def use_average(self) -> None:
        """Put the averaged weights into the module."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)
        self.objective.module.eval()

    def _one_step(self) -> tuple[float, dict[str, float]]:
        rng = torch.Generator("cpu").manual_seed(derived_seed(self.seed, "step", self.step))
        torch.manual_seed(derived_seed(self.seed, "layers", self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        loss, details = self.objective.loss(rng)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        # a batch that overflowed changes no weights, but counts: seeds follow the step number
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # a shorter average at first, or the random weights would stay in it for long
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(loss.detach()), details

    def _report(self, loss: float, details: dict[str, float], first: int, started: float) -> None:
        if self.step % 50 and self.step != self.schedule.steps:
            return
        pace = (time.monotonic() - started) / (self.step - first)
        line = {
            "stage": self.folder.name,
            "step": self.step,
            "of": self.schedule.steps,
            "loss": round(loss, 5),
            **{name: round(value, 4) for name, value in details.items()},
            "minutes_left": round(pace * (self.schedule.steps - self.step) / 60, 1),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)  # noqa: T201 - the stage's progress line
