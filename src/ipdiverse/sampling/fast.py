"""Fast mode: most steps take deep features of the UNet, and guidance, from a step before.

Nothing stays on the UNet between its calls, so that it is stock again after each of them, also
after an error. What is kept serves one call of the pipeline.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.adapter.attach.stock import shadow
from ipdiverse.adapter.attention import BOTH
from ipdiverse.base.downloads import fetch
from ipdiverse.base.pipelines import denoiser_of
from ipdiverse.errors import ModelError, check_range, check_whole
from ipdiverse.loading import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ipdiverse.base.presets import FewSteps


@dataclass(frozen=True)
class Level:
    """How much is taken from steps before.

    Args:
        every: Deep features are computed at one step in so many, at most at each.
        guide_every: So are the branches that guidance needs besides text with image.
        attention_from: Fraction of the steps after which outputs of cross-attention are kept.
        power: Where these steps are: evenly at 1; at 2 the i-th is at i² / N, as the image changes
            most early (arXiv:2312.00858, section 3.3). Late, even 1 in 1 then leaves some out.
    """

    every: int
    guide_every: int = 1
    attention_from: float = 1.0
    power: float = 1.0

    def computed(self, step: int, steps: float, every: int) -> bool:
        """Whether one of so many steps is among the one in `every` that compute."""
        # a count that grows as progress^(1/power), and reaches steps / every at the end
        before, now = (
            int(one ** (1 / self.power) * steps ** (1 - 1 / self.power) / every)
            for one in (max(step - 1, 0), step)
        )
        return step == 0 or now > before


LEVELS = (None, Level(2, power=2), Level(3, power=2), Level(4, 2, 0.5, power=2))
"""By the number that `--fast` takes; 0 is off. `docs/inference.md` has what each loses."""


def level_of(number: int) -> Level | None:
    """The level of a number (`ArgumentError` where there is none)."""
    check_whole("fast", number)
    check_range("fast", number, 0, len(LEVELS) - 1)
    return LEVELS[number]


_NAME = "ipdiverse"


@contextmanager
def few_steps(pipe: Any, chosen: FewSteps, base: str) -> Iterator[dict[str, Any]]:
    """A distilled LoRA with its scheduler on a pipeline, and off again exactly.

    Args:
        pipe: Without a LoRA.
        chosen: What to put on.
        base: Its name, for errors.

    Yields:
        What the pipeline is called with.

    Raises:
        ModelError: The pipeline has a LoRA already, or the file is of another base.
    """
    if getattr(denoiser_of(pipe), "peft_config", None):
        fix = "Call pipe.unload_lora_weights(), or leave few_steps out."
        raise ModelError("has a LoRA already, which was made for many steps", where=base, fix=fix)
    import diffusers

    [file] = fetch([chosen.lora], base)
    before = pipe.scheduler
    try:
        with one_line("cannot be put on this base", chosen.lora.name):
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=_NAME, local_files_only=True
            )
            pipe.set_adapters(_NAME, chosen.weight)
            kind = getattr(diffusers, chosen.scheduler)
            pipe.scheduler = kind.from_config(before.config, **chosen.settings)
        yield chosen.call
    finally:
        pipe.scheduler = before
        pipe.unload_lora_weights()


class Kept:
    """Outputs of calls of the UNet, each with the branches of guidance that its rows are of."""

    def __init__(self) -> None:
        self.branches: tuple[str, ...] = ()  # of the call that runs now
        self._known: dict[Any, tuple[tuple[str, ...], Any, Tensor]] = {}

    def put(self, key: Any, output: Tensor, stamp: Any = None) -> Tensor:
        """Keep an output of this call."""
        self._known[key] = self.branches, stamp, output
        return output

    def find(self, key: Any, stamp: Any = None) -> Tensor | None:
        """The rows of this call's branches; None where they are missing or the stamp changed."""
        if key not in self._known:
            return None
        branches, known, output = self._known[key]
        if known != stamp or not set(self.branches) <= set(branches):
            return None
        if branches == self.branches:
            return output
        parts = dict(zip(branches, output.chunk(len(branches)), strict=True))
        return torch.cat([parts[branch] for branch in self.branches])

    def get(self, key: Any, stamp: Any, compute: Callable[[], Tensor]) -> Tensor:
        """What is kept, or else what `compute` gives."""
        found = self.find(key, stamp)
        return self.put(key, compute(), stamp) if found is None else found

    def clear(self) -> None:
        """Forget all of it."""
        self._known.clear()


class Fast:
    """What is kept of one call of a pipeline, and the steps that use it.

    Features deep in the UNet hardly change between neighbouring steps: a shallow step computes its
    first convolution and its last layer alone (DeepCache, arXiv:2312.00858, section 3.2). What
    guidance adds is kept in the same way (FasterCache, arXiv:2410.19355), and the outputs of
    cross-attention, text and images together, once the layout is decided (T-GATE,
    arXiv:2404.02747).

    Args:
        unet: With an adapter on it.
        level: Of `LEVELS`.
        processors: The adapter's, which can keep their outputs.

    Raises:
        ModelError: The UNet is compiled as a whole.
    """

    def __init__(self, unet: Any, level: Level, processors: Sequence[Any]) -> None:
        if hasattr(unet, "_orig_mod"):
            raise ModelError(
                "would have the UNet compiled again at its steps, as it is compiled as a whole",
                where="fast",
                fix="Call pipe.unet.compile_repeated_blocks() in place of torch.compile.",
            )
        self.level, self._processors = level, processors
        self._modules = _deep_modules(unet)
        self._features, self._outputs = Kept(), Kept()
        self._forms: dict[Any, Any] = {}  # of outputs that no computed layer uses: no memory
        self._differences: dict[str, Tensor] = {}
        self._step, self._progress, self._shape = 0, 0.0, torch.Size()
        self.deep = True  # whether this step computes all of the UNet

    def plan(
        self, progress: float, weights: dict[str, float], shape: torch.Size
    ) -> tuple[str, ...]:
        """Begin a step, and say which branches it computes.

        Args:
            progress: Fraction of the steps that are done.
            weights: Of the branches that guidance needs.
            shape: Of the latents.
        """
        # schedulers of second order call twice at one step, so it may stay where it is
        if progress == 0 or progress < self._progress or shape != self._shape:
            self._forget()
        step, self._progress, self._shape = self._step, progress, shape
        self._step += 1
        known = BOTH in weights and weights.keys() <= {*self._differences, BOTH}
        steps = (
            step / progress if progress else 1.0
        )  # calls, which schedulers may make twice a step
        guided = self.level.computed(step, steps, self.level.guide_every)
        wanted = (BOTH,) if known and not guided else tuple(weights)
        self._features.branches = self._outputs.branches = wanted
        due = self.level.computed(step, steps, self.level.every)
        self.deep = due or self._features.find("deep") is None
        return wanted

    def completed(
        self, weights: dict[str, float], predicted: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each branch's prediction; those left out differ from text with image as they did."""
        if BOTH not in predicted:
            return predicted
        both = predicted[BOTH]
        self._differences |= {branch: one - both for branch, one in predicted.items()}
        return {
            branch: predicted[branch] if branch in predicted else both + self._differences[branch]
            for branch in weights
        }

    def tokens_changed(self) -> None:
        """Layers read other tokens from now on."""
        self._outputs.clear()

    def _forget(self) -> None:
        """Another call of the pipeline begins."""
        self._step, self._differences = 0, {}
        self._features.clear()
        self._outputs.clear()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The UNet as this step needs it, for the length of a `with` block."""
        with ExitStack() as undo:
            for module in self._modules:
                answer = self._computed if self.deep else self._repeated
                ours = functools.partial(answer, module, module.forward)
                undo.callback(shadow(module, "forward", ours))
            if self._progress >= self.level.attention_from:
                for processor in self._processors:
                    processor.outputs = self._outputs
                    undo.callback(setattr, processor, "outputs", None)
            yield

    def _computed(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        self._forms[module] = _each(output, lambda one: one.to("meta"))
        if module is self._modules[-1]:  # all that a shallow step reads of the deep ones
            _each(output, functools.partial(self._features.put, "deep"))
        return output

    def _repeated(self, module: Any, *_: Any, **__: Any) -> Any:
        kept: Any = self._features.find("deep")
        if module is self._modules[-1]:
            return _each(self._forms[module], lambda _: kept)
        # computed on by nothing, but the UNet and its blocks join and add them by their shapes
        return _each(self._forms[module], lambda form: kept.new_zeros(len(kept), *form.shape[1:]))


def _deep_modules(unet: Any) -> list[Any]:
    """All that a shallow step leaves out, in order: all but `conv_in` and the last layer."""
    last = unet.up_blocks[-1]
    attentions = getattr(last, "attentions", None) or [None] * len(last.resnets)
    layers = zip(last.resnets[:-1], attentions[:-1], strict=True)
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks[:-1]]
    return [
        one for one in (*blocks, *(part for layer in layers for part in layer)) if one is not None
    ]


def _each(output: Any, change: Callable[[Tensor], Any]) -> Any:
    """The tensors of a block's output, each changed."""
    if isinstance(output, tuple):
        return tuple(_each(one, change) for one in output)
    return change(output)
