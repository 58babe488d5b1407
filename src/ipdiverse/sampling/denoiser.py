"""Levers on a pipeline: one hook around the UNet, outside the one that brings the image tokens.

It decides which branches of guidance the UNet is called with, combines them itself, and lets levers
change what comes out. To the pipeline every branch then says the same, and guiding between equal
branches is the identity, to the bit.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from ipdiverse.adapter.attach.attach import LEVERS_HOOK, inside_offloading
from ipdiverse.adapter.attention import BOTH, NOTHING
from ipdiverse.adapter.model import interpolated
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling import guidance
from ipdiverse.sampling.levers import Moment, latent_levers, token_levers, token_phase
from ipdiverse.sampling.references import embed_change, reference_latents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.attach.attach import Attachment


def steer(
    attachment: Attachment,
    levers: Levers,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
) -> Steering:
    """Put levers on a pipeline, in place of those that are on it; `detach` takes them off too.

    Levers that are refused change nothing: those that are on it stay.

    Args:
        attachment: Of an adapter, its scale and reference set.
        levers: How strongly each acts.
        seeds: One for each item of the next calls; what is random about it depends on that alone.
        prompts: Each item's text, for levers that read it; one text serves all.

    Raises:
        ArgumentError: There are no seeds, or no prompts where a lever reads them.
        ModelError: A lever needs what this base or adapter does not have.
    """
    _check(levers, attachment, len(seeds))
    hook, unet = attachment.hook, attachment.pipe.unet
    change = None
    if levers.noise_level or levers.remove_stated:
        change = embed_change(attachment, levers, tuple(seeds), prompts)
    _take_off(attachment)
    steering = Steering(attachment, levers, tuple(seeds))
    with inside_offloading(unet):
        HookRegistry.check_if_exists_or_initialize(unet).register_hook(steering, LEVERS_HOOK)
    try:
        attachment.set_interpolation(levers.training)
        attachment.change_embeds(change)
    except BaseException:
        release(attachment)
        raise
    for prompt in hook.prompts:
        prompt.fusion_factor, prompt.late_layout = levers.fusion_strength, levers.late_layout
        if token_levers(levers):
            prompt.change = steering.changed_tokens
    hook.changed()
    return steering


def release(attachment: Attachment) -> None:
    """Take levers off again, exactly."""
    _take_off(attachment)
    attachment.set_interpolation(1.0)


def _take_off(attachment: Attachment) -> None:
    """All but the adapter's mixed weights, which the next levers may want too."""
    unet, hook = attachment.pipe.unet, attachment.hook
    registry = HookRegistry.check_if_exists_or_initialize(unet)
    steering = registry.get_hook(LEVERS_HOOK)
    if not isinstance(steering, Steering):
        return
    with inside_offloading(unet):
        registry.remove_hook(LEVERS_HOOK, recurse=False)
    attachment.change_embeds(None)
    for prompt in hook.prompts:
        prompt.fusion_factor, prompt.late_layout, prompt.change = 1.0, 0.0, None
    hook.layout = None
    hook.changed()


class Steering(ModelHook):
    """Calls the UNet with the branches that count, and levers on what goes in and comes out.

    Args:
        attachment: The adapter's.
        levers: How strongly each acts.
        seeds: One for each item.

    With `previews`, the clean-latent guess of each call is kept in `guess`.
    """

    def __init__(self, attachment: Attachment, levers: Levers, seeds: tuple[int, ...]) -> None:
        super().__init__()
        self.attachment, self.levers, self.seeds = attachment, levers, seeds
        self._moment = Moment(0.0, seeds)
        self._subsets: dict[tuple[str, ...], Tensor] = {}
        self._text: Tensor | None = None
        self._protected: Tensor | None = None
        self._names: list[str] = []
        self._phase = token_phase(levers, 0.0)
        self.previews = False
        self.guess: Tensor | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Note the names of the UNet's arguments."""
        inner = getattr(module, "_orig_mod", module)  # torch.compile's own has other arguments
        forward = inspect.signature(type(inner).forward)
        self._names = [name for name in forward.parameters if name != "self"]
        return module

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline: as many passes of the UNet as have a weight."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        text = given["encoder_hidden_states"]
        forward: Any = self.fn_ref.original_forward
        if not isinstance(text, Tensor):
            return forward(*args, **kwargs)
        hook = self.attachment.hook
        layout = hook.layout_of(len(text))
        items = len(text) // len(layout)
        self._check_items(items)
        alpha, weights = self._weights(given["timestep"], layout)
        self._set_moment(given, items)
        if tuple(weights) == layout and not self._combines(weights):
            return forward(*args, **kwargs)
        predicted = self._branches(forward, given, weights, layout, items)
        guided = guidance.combine(weights, predicted)
        rescale = float(getattr(self.attachment.pipe, "guidance_rescale", 0.0) or 0.0)
        if rescale and len(weights) > 1 and BOTH in predicted:
            guided = guidance.rescaled(guided, predicted[BOTH], rescale)
        guided = self._on_latents(guided, given["sample"][-items:], alpha)
        output = torch.cat([guided] * len(layout))
        if given.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=output)
        return (output,)

    def changed_tokens(self, tokens: Tensor) -> Tensor:
        """Token levers on every item's tokens, (items, references, tokens, width)."""
        flat = tokens.flatten(1, 2)
        for lever, strength in token_levers(self.levers):
            flat = lever(flat, strength, self._moment)
        return flat.view_as(tokens)

    def _weights(self, timestep: Any, layout: tuple[str, ...]) -> tuple[float, dict[str, float]]:
        alpha = self._alpha(timestep)
        guides = len(layout) == 2
        if not guides or not guidance.inside(guidance.sigma_of(alpha), self.levers.interval):
            return alpha, {BOTH: 1.0}
        scale = float(self.attachment.pipe.guidance_scale)
        return alpha, guidance.branch_weights(scale, self.levers.image_guidance)

    def _combines(self, weights: dict[str, float]) -> bool:
        """Whether what the pipeline would make of the UNet's output is not all that is wanted."""
        pipeline_does = {NOTHING, BOTH} == weights.keys() or len(weights) == 1
        return bool(latent_levers(self.levers)) or not pipeline_does or self.previews

    def _set_moment(self, given: dict[str, Any], items: int) -> None:
        hook = self.attachment.hook
        progress = hook.progress(given["timestep"])
        text = given["encoder_hidden_states"][-items:]
        protected = self._references_latents(given["sample"]) if self.levers.shield else None
        self._moment = replace(
            self._moment, progress=progress, protected=protected, prompts=text.mean(1)
        )
        phase = token_phase(self.levers, progress)
        if phase != self._phase:
            self._phase = phase
            hook.changed()

    def _branches(
        self,
        forward: Any,
        given: dict[str, Any],
        weights: dict[str, float],
        layout: tuple[str, ...],
        items: int,
    ) -> dict[str, Tensor]:
        """Each branch's prediction, all in one pass of the UNet."""
        wanted, hook = tuple(weights), self.attachment.hook
        full = len(given["encoder_hidden_states"])
        rows = [row for b in wanted for row in self._rows(b, layout, items)]
        arguments = {name: _picked(value, rows, full) for name, value in given.items()}
        arguments["encoder_hidden_states"] = self._text_rows(given, wanted, rows)
        arguments["return_dict"] = False
        hook.layout = wanted
        try:
            output = forward(**arguments)[0]
        finally:
            hook.layout = None
        return dict(zip(wanted, output.chunk(len(wanted)), strict=True))

    @staticmethod
    def _rows(branch: str, layout: tuple[str, ...], items: int) -> range:
        at = 0 if branch == NOTHING else len(layout) - 1
        return range(at * items, (at + 1) * items)

    def _text_rows(self, given: dict[str, Any], wanted: tuple[str, ...], rows: list[int]) -> Tensor:
        """The text of some branches, the same tensor as long as the pipeline's is the same."""
        text = given["encoder_hidden_states"]
        if self._text is not text:
            self._text, self._subsets = text, {}
        if wanted not in self._subsets:
            self._subsets[wanted] = text[rows]
        return self._subsets[wanted]

    def _on_latents(self, guided: Tensor, sample: Tensor, alpha: float) -> Tensor:
        levers = latent_levers(self.levers)
        if not levers and not self.previews:
            return guided
        kind = self.attachment.pipe.scheduler.config.prediction_type
        before = guidance.clean_guess(kind, sample[:, : guided.shape[1]], guided, alpha)
        after = before
        for lever, strength in levers:
            after = lever(after, strength, self._moment)
        self.guess = after if self.previews else None
        if not levers:
            return guided
        return guidance.moved(kind, guided, after - before, alpha)

    def _alpha(self, timestep: Any) -> float:
        """ᾱ at a timestep, between the trained ones where a scheduler goes there."""
        alphas = getattr(self.attachment.pipe.scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise ModelError(
                "does not say how much noise is left",
                where=type(self.attachment.pipe.scheduler).__name__,
                expected="a scheduler with alphas_cumprod",
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        low = min(max(int(t), 0), len(alphas) - 1)
        high = min(low + 1, len(alphas) - 1)
        below, above = alphas[low].cpu(), alphas[high].cpu()  # not every device has float64
        return float(torch.lerp(below.double(), above.double(), t - low))

    @torch.no_grad()
    def _references_latents(self, sample: Tensor) -> Tensor:
        """Latents of the references at the size of the output, encoded once."""
        if self._protected is None or self._protected.shape[-2:] != sample.shape[-2:]:
            self._protected = reference_latents(self.attachment, sample)
        return self._protected

    def _check_items(self, items: int) -> None:
        if items != len(self.seeds):
            raise ArgumentError(
                "differ in number from the images of this call",
                where="seeds of the levers",
                expected=items,
                found=len(self.seeds),
            )


def _check(levers: Levers, attachment: Attachment, seeds: int) -> None:
    if not seeds:
        raise ArgumentError("is empty", where="seeds", expected="one for each image")
    for number in range(len(attachment.adapters)):
        references = len(attachment.references(number))
        if references and seeds % references:
            raise ArgumentError(
                "do not fit the references",
                where="seeds of the levers",
                expected=f"a multiple of {references}",
                found=seeds,
            )
    for adapter in attachment.adapters:
        if not adapter.base_weights:
            interpolated(adapter, levers.training)  # raises before anything is taken off
    if levers.shield and getattr(attachment.pipe.unet, "_hf_hook", None) is not None:
        raise ModelError(
            "needs the VAE while the UNet runs, and models are offloaded",
            where="shield",
            fix="Leave the shield out, or do not offload.",
        )


def _picked(value: Any, rows: list[int], full: int) -> Any:
    """The rows of some branches, of whatever holds one for each of the batch."""
    if isinstance(value, Tensor) and value.ndim and len(value) == full:
        return value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(_picked(part, rows, full) for part in value)
    if isinstance(value, dict):
        return {name: _picked(part, rows, full) for name, part in value.items()}
    return value
