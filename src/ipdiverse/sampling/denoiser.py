"""Levers on a pipeline: one hook around the denoiser, outside the one that brings image tokens.

It decides which branches of guidance the denoiser is called with and combines them itself. It then
gives the pipeline the same prediction for every branch: guidance between equal branches is the
identity, to the bit, so that stock pipelines need no change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.hooks import ModelHook
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from jaxtyping import Float
from torch import Tensor

from ipdiverse.adapter.attach.attach import (
    LEVERS_HOOK,
    Attachment,
    attach,
    detach,
    hook_of,
    set_hook,
)
from ipdiverse.adapter.attach.branches import branch_weights, combine, picked
from ipdiverse.adapter.attach.hook import argument_names
from ipdiverse.adapter.attach.joint import styles_of
from ipdiverse.adapter.attention import BOTH, NOTHING, TEXT
from ipdiverse.adapter.model import ImagePromptAdapter, Joint, interpolated
from ipdiverse.adapter.projection import GivenTokens
from ipdiverse.base.pipelines import denoiser_of
from ipdiverse.errors import ArgumentError, ModelError, check_range
from ipdiverse.levers import StepContext
from ipdiverse.sampling.fast import Fast, level_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ipdiverse.adapter.scale import Scale, ScaleLike
    from ipdiverse.dial import Levers

Latents = Float[Tensor, "items channels h w"]


def steer(
    attachment: Attachment | Any,
    levers: Levers,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
    fast: int = 0,
    *,
    strength: ScaleLike | None = None,
    image_tokens: int = 729,
) -> Steering:
    """Put levers on a pipeline, in place of those that are on it; `detach` takes them off too.

    Example:
        Flux Redux as stock diffusers has it, so that the reference does not drown the text::

            prompt = FluxPriorReduxPipeline.from_pretrained(…)(photo, prompt="in the snow")
            ipdiverse.steer(pipe, Levers(cads=0.3), [7], strength=0.4)
            pipe(**prompt)

    Args:
        attachment: Of an adapter, its scale and reference set; or its pipeline; or one of Flux.1
            whose `prompt_embeds` end with image tokens.
        levers: How strongly each acts.
        seeds: One for each item of the next calls; what is random about it depends on that alone.
        prompts: Each item's text, for levers that read it; one text serves all.
        fast: 0 computes every step; 1 to 3 leave out more and more of them (`fast.LEVELS`).
        strength: A scale, as `set_scale` takes it; None leaves what it is. 0 is the text alone, and
            1 stock, both exactly.
        image_tokens: How many tokens of such `prompt_embeds` are the image's.

    Raises:
        ArgumentError: The number of seeds or prompts does not fit, or a lever reads prompts and
            there are none.
        ModelError: A lever needs something that this base or adapter does not have.
    """
    attachment = _attachment_of(attachment, image_tokens)
    context = _context(attachment, seeds, prompts)
    _check(levers, attachment, len(seeds))
    if strength is not None:
        attachment.set_scale(strength)
    hook, unet = attachment.hook, denoiser_of(attachment.pipe)
    level = level_of(fast) if fast else None
    if level is not None and hook.transformer:
        raise ModelError(
            "is for UNets",
            where="fast",
            found=type(unet).__name__,
            fix="Leave it out; caches of diffusers are for transformers.",
        )
    mode = None if level is None else Fast(unet, level, [one for _, one in hook.processors])
    _take_off(attachment)
    attachment.set_seeds(seeds)  # a fusion that draws reads them too
    steering = Steering(attachment, levers, context, mode)
    set_hook(unet, LEVERS_HOOK, steering)
    try:
        attachment.set_interpolation(levers.change("weights", 1.0, context))
        attachment.change_embeds(_ChangedEmbeds(steering) if levers.acting("embeddings") else None)
    except BaseException:
        release(attachment)
        raise
    # a variation space is of one projection, the first adapter's
    hook.prompts[0].imagine = steering.imagined if levers.acting("projected") else None
    for prompt in hook.prompts:
        prompt.fusion_factor = levers.change("fusion", 1.0, context)
        prompt.change = steering.changed_tokens if levers.acting("tokens") else None
        prompt.change_scale = steering.changed_scale if levers.acting("scale") else None
    hook.changed()
    return steering


def _attachment_of(target: Any, image_tokens: int) -> Attachment:
    """What is steered: for a pipeline, the image tokens that its own prompts hold."""
    if isinstance(target, Attachment):
        return target
    denoiser: Any = denoiser_of(target)
    hook = hook_of(denoiser)
    if hook is not None and hook.prompts[0].given in (0, image_tokens):
        return hook.attachment
    if "redux" not in styles_of(denoiser):
        raise ModelError(
            "reads no image tokens beside its text",
            where=type(target).__name__,
            expected="a pipeline of Flux.1, or what attach returned",
        )
    check_range("image_tokens", image_tokens, 1, 100_000)
    if hook is not None:
        detach(target)
    given = GivenTokens(denoiser.config.joint_attention_dim, image_tokens)
    return attach(target, ImagePromptAdapter(given, {}, joint=Joint("redux")))


def release(attachment: Attachment) -> None:
    """Take levers off again, exactly."""
    _take_off(attachment)
    attachment.set_seeds(None)
    attachment.set_interpolation(1.0)


def _take_off(attachment: Attachment) -> None:
    """All but the adapter's mixed weights, which the next levers may want too."""
    hook = attachment.hook
    if not set_hook(denoiser_of(attachment.pipe), LEVERS_HOOK):
        return
    attachment.change_embeds(None)
    for prompt in hook.prompts:
        prompt.fusion_factor, prompt.change, prompt.change_scale = 1.0, None, None
        prompt.imagine = None
    hook.layout = None
    hook.changed()


class Steering(ModelHook):
    """Calls the UNet with the branches that count, and lets levers change what it reads.

    With `previews`, the clean-latent guess of each call is kept in `guess`.
    """

    def __init__(
        self,
        attachment: Attachment,
        levers: Levers,
        context: StepContext,
        fast: Fast | None = None,
    ) -> None:
        super().__init__()
        self._fast = fast
        self.attachment, self.levers, self.context = attachment, levers, context
        self._subsets: dict[tuple[str, ...], Tensor] = {}
        self._text: Tensor | None = None
        self._names: list[str] = []
        self._phase = self._phase_now()
        self.previews = False
        self.guess: Tensor | None = None
        # of the prompt's own call, for the negative prompt's that follows (`_negative_call`)
        self._unguided = False
        self._positive: Tensor | None = None
        self._image_part: Tensor | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Note the names of the denoiser's arguments."""
        self._names = argument_names(module)
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
        layout = hook.layout_of(text)
        items = len(text) // len(layout)
        self._check_call(layout, items)
        noise = self._noise(given["timestep"])
        self._set_context(given["timestep"], noise.sigma)
        if layout == (NOTHING,):
            return self._negative_call(forward, args, kwargs)
        self._positive = self._image_part = None
        weights = self._weights(layout)
        if self._fast is None and not self.previews and tuple(weights) == layout:
            # the pipeline's own guidance will do
            output = forward(*args, **kwargs)
            self._positive = output[0] if self._unguided else None
            return output
        predicted = self._predicted(forward, given, weights, items)
        guided = combine(weights, predicted)
        rescale = float(getattr(self.attachment.pipe, "guidance_rescale", 0.0) or 0.0)
        if rescale and len(weights) > 1 and BOTH in predicted:
            # here, as a pipeline that rescales finds equal halves and changes nothing
            guided = rescale_noise_cfg(guided, predicted[BOTH], rescale)
        if hook.alone:
            self._positive = guided if self._unguided else None
            self._image_part = guided - predicted[TEXT] if TEXT in predicted else None
        if self.previews:
            clean = noise.clean(_sample(given, items, guided), guided)
            if clean.ndim == 3:  # Flux' tokens hold two by two latents each
                size = [2 * side for side in hook.prompts[0].slot.latents]
                clean = self.attachment.pipe._unpack_latents(clean, *size, 1)
            self.guess = clean
        return self._returned(torch.cat([guided] * len(layout)), given)

    def _negative_call(self, forward: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The second of two calls for one step (Flux' true guidance, of a weight w not told).

        The pipeline gives v(∅,∅) + w [v − v(∅,∅)]. With the first call's v here too, that is v;
        and what is added to both is not multiplied by w.
        """
        if self._positive is not None:
            return self._returned(self._positive, kwargs)
        output = forward(*args, **kwargs)
        if self._image_part is None:
            return output
        return self._returned(output[0] + self._image_part, kwargs)

    def _returned(self, output: Tensor, given: dict[str, Any]) -> Any:
        if not given.get("return_dict", True):
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)  # a UNet's has the same fields

    def imagined(self, tokens: Tensor) -> Tensor:
        """Every item's tokens before fusion, (items, references, tokens, width)."""
        return self.levers.change("projected", tokens, self.context)

    def changed_tokens(self, tokens: Tensor) -> Tensor:
        """Every item's tokens, (items, references, tokens, width), as levers change them."""
        flat = tokens.flatten(1, 2)  # a lever sees an item's references as one row of tokens
        return self.levers.change("tokens", flat, self.context).view_as(tokens)

    def changed_scale(self, scale: Scale) -> Scale:
        """The image prompt's scale as levers change it."""
        return self.levers.change("scale", scale, self.context)

    def _weights(self, layout: tuple[str, ...]) -> dict[str, float]:
        if self.attachment.hook.alone:
            return self._untold_weights()
        if len(layout) != 2:
            return {BOTH: 1.0}
        scale = float(self.attachment.pipe.guidance_scale)
        return branch_weights(*self.levers.change("guidance", (scale, scale), self.context))

    def _untold_weights(self) -> dict[str, float]:
        """Weights of the prompt's own call, where no pipeline says what it guides with."""
        text, image = self.levers.change("guidance", (_UNTOLD, _UNTOLD), self.context)
        self._unguided = (text, image) == (1.0, 1.0)
        if text == image and (self._unguided or text == _UNTOLD):
            return {BOTH: 1.0}
        if text != _UNTOLD:
            raise ModelError(
                "does not say how strongly it guides, which a lever on guidance changes",
                where=type(self.attachment.pipe).__name__,
                fix="Leave the lever out; image_guidance and interval act here.",
            )
        return branch_weights(1.0, image)

    def _set_context(self, timestep: Any, sigma: float) -> None:
        hook = self.attachment.hook
        self.context = replace(self.context, progress=hook.progress(timestep), sigma=sigma)
        if (phase := self._phase_now()) != self._phase:
            self._phase = phase
            hook.changed()
            if self._fast is not None:
                self._fast.tokens_changed()

    def _phase_now(self) -> list[Hashable]:
        """While this is equal, levers make the same tokens, and they need not be made again."""
        levers = [lever for lever, _ in self.levers.acting("tokens")]
        return [lever.phase(self.context) for lever in levers if lever.phase is not None]

    def _predicted(
        self, forward: Any, given: dict[str, Any], weights: dict[str, float], items: int
    ) -> dict[str, Tensor]:
        """Each branch's prediction; in fast mode some are made of what was computed before."""
        fast = self._fast
        if fast is None:
            return self._branches(forward, given, tuple(weights), items)
        wanted = fast.plan(self.context.progress, weights, given["sample"].shape)
        with fast.acting():
            computed = self._branches(forward, given, wanted, items)
        return fast.completed(weights, computed)

    def _branches(
        self, forward: Any, given: dict[str, Any], wanted: tuple[str, ...], items: int
    ) -> dict[str, Tensor]:
        """Each wanted branch's prediction, all in one pass of the UNet."""
        hook = self.attachment.hook
        full = len(given["encoder_hidden_states"])
        first = {branch: 0 if branch == NOTHING else full - items for branch in wanted}
        rows = [first[branch] + item for branch in wanted for item in range(items)]
        arguments = {
            # positions have no batch, but may be as many as it has rows
            name: value if name.endswith("_ids") else picked(value, rows, full)
            for name, value in given.items()
        }
        arguments["encoder_hidden_states"] = self._text_rows(given, wanted, rows)
        arguments["return_dict"] = False
        hook.layout = wanted
        try:
            output = forward(**arguments)[0]
        finally:
            hook.layout = None  # also after an error: the next call tells its branches itself
        return dict(zip(wanted, output.chunk(len(wanted)), strict=True))

    def _text_rows(self, given: dict[str, Any], wanted: tuple[str, ...], rows: list[int]) -> Tensor:
        """The text of some branches, the same tensor as long as the pipeline's is the same."""
        text = given["encoder_hidden_states"]
        # the hook and the layers keep what they made of a text for as long as it is the same tensor
        if self._text is not text:
            self._text, self._subsets = text, {}
        if wanted not in self._subsets:
            self._subsets[wanted] = text[rows]
        return self._subsets[wanted]

    def _noise(self, timestep: Any) -> Noise:
        """How much noise is left at a timestep, between the trained ones where it lies there."""
        scheduler = self.attachment.pipe.scheduler
        if self.attachment.hook.transformer:
            return FlowNoise(float(scheduler.sigmas[self.attachment.hook.step(timestep)]))
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise ModelError(
                "does not say how much noise is left",
                where=type(scheduler).__name__,
                expected="a scheduler with alphas_cumprod",
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        alpha = float(np.interp(t, np.arange(len(alphas)), alphas.float().cpu().numpy()))
        return DiffusionNoise(alpha, scheduler.config.prediction_type)

    def _check_call(self, layout: tuple[str, ...], items: int) -> None:
        alone = (NOTHING,) if self.attachment.hook.alone else (BOTH,)
        if layout not in ((NOTHING, BOTH), (BOTH,), alone):
            raise ModelError(
                "has guidance of its own, which levers do not know",
                where=type(self.attachment.pipe).__name__,
                found=f"a call of the UNet with the branches {', '.join(layout)}",
                fix="Call `release(attachment)`, or use a pipeline without it.",
            )
        if items != len(self.context.seeds):
            raise ArgumentError(
                "differ in number from the images of this call",
                where="seeds of the levers",
                expected=items,
                found=len(self.context.seeds),
            )


class _ChangedEmbeds:
    """Each item's embeddings as levers change them (`encoding.EmbedChange`)."""

    def __init__(self, steering: Steering) -> None:
        self._levers, context = steering.levers, steering.context
        self._contexts = [
            replace(context, seeds=(seed,), prompts=context.prompts[item : item + 1])
            for item, seed in enumerate(context.seeds)
        ]
        self.items = len(self._contexts)

    def __call__(self, item: int, name: str, embeds: Tensor) -> Tensor:
        context = replace(self._contexts[item], embedding=name)
        return self._levers.change("embeddings", embeds, context)


def _context(
    attachment: Attachment, seeds: Sequence[int], prompts: Sequence[str] | None
) -> StepContext:
    if not seeds:
        raise ArgumentError("is empty", where="seeds", expected="one for each image")
    prompts = tuple(prompts or ())
    if len(prompts) not in (0, 1, len(seeds)):
        raise ArgumentError(
            "differ in number from the seeds",
            where="prompts",
            expected=f"1 or {len(seeds)}",
            found=len(prompts),
        )
    return StepContext(
        tuple(seeds),
        prompts=prompts * len(seeds) if len(prompts) == 1 else prompts,
        layers=attachment.hook.layers,
        attachment=attachment,
    )


def _check(levers: Levers, attachment: Attachment, seeds: int) -> None:
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
            interpolated(adapter, levers.interpolation)  # raises before anything is taken off
        if not adapter.reads and (unread := levers.acting("embeddings")):
            raise ModelError(
                "changes an image's embeddings, and the prompt holds its tokens",
                where=unread[0][0].name,
            )


def _sample(given: dict[str, Any], items: int, predicted: Tensor) -> Tensor:
    """The noisy latents, without the channels or pictures that stand beside them."""
    if "sample" in given:
        return given["sample"][-items:, : predicted.shape[1]]  # inpainting adds channels
    sample = given["hidden_states"][-items:]
    return sample[..., : predicted.shape[-1]] if sample.ndim == 3 else sample


@dataclass(frozen=True)
class DiffusionNoise:
    """Noise of a schedule of ᾱ, and what a prediction of that kind means."""

    alpha: float
    kind: str = "epsilon"

    @property
    def sigma(self) -> float:
        """σ = √((1 − ᾱ) / ᾱ): noise over signal; infinite where no signal is left."""
        return math.inf if self.alpha <= 0 else math.sqrt((1 - self.alpha) / self.alpha)

    def clean(self, sample: Latents, predicted: Latents) -> Latents:
        """x̂ from a prediction."""
        return clean_guess(self.kind, sample, predicted, self.alpha)


@dataclass(frozen=True)
class FlowNoise:
    """Noise of flow matching: x = (1 − s) x₀ + s ε, and v = ε − x₀ (arXiv:2210.02747)."""

    share: float

    @property
    def sigma(self) -> float:
        """Noise over signal, as in diffusion, so that levers mean the same: s / (1 − s)."""
        return math.inf if self.share >= 1 else self.share / (1 - self.share)

    def clean(self, sample: Latents, predicted: Latents) -> Latents:
        """x̂ = x − s v."""
        return sample - self.share * predicted


Noise = DiffusionNoise | FlowNoise
_UNTOLD = 7.0710678
"""Stands for a guidance scale that a pipeline does not tell."""


def clean_guess(kind: str, sample: Latents, predicted: Latents, alpha: float) -> Latents:
    """x̂ from a prediction."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "epsilon":
        return (sample - noise * predicted) / max(signal, 1e-3)
    if kind == "v_prediction":
        return signal * sample - noise * predicted
    if kind == "sample":
        return predicted
    raise ValueError(f"prediction type {kind!r}; expected epsilon, v_prediction or sample")
