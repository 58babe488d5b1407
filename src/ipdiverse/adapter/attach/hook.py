"""The hook at the denoiser's boundary: prepares image tokens, once for each text, at every call."""

from __future__ import annotations

import inspect
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor

from ipdiverse.adapter.attach.branches import KEPT_PROMPTS, GivenWords, Told, tell_branches
from ipdiverse.adapter.attach.joint import is_transformer, latent_grid, with_image_tokens
from ipdiverse.adapter.attention import BOTH, NOTHING, Slot, TokenGroup, opposed_tokens
from ipdiverse.adapter.model import interpolated, placed, state_of
from ipdiverse.adapter.reference import ReferenceTokens, RegionMask
from ipdiverse.adapter.scale import for_batch
from ipdiverse.base.pipelines import check_caches, denoiser_of
from ipdiverse.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ipdiverse.adapter.attach.branches import EncodedPrompt, Layout
    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.scale import Layer, Scale

MASKS = "ip_adapter_masks"
"""Where stock pipelines expect masks, in `cross_attention_kwargs`."""
EMBEDS = "ip_adapter_image_embeds"
"""Where pipelines of transformers put what `prepare_ip_adapter_image_embeds` gave."""
_KEPT = 4
"""Texts whose tokens are kept: pipelines and levers may call the UNet with as many in turn."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Each prompt's groups of tokens for one text, recognised by identity."""

    text: Tensor
    version: int
    wanted: Layout | None
    layout: Layout
    time: float | None  # of tokens that differ at every step
    groups: list[list[TokenGroup]]


@dataclass(eq=False)
class ActiveAdapter:
    """An attached adapter: its references, its scale, and what levers make of them."""

    adapter: ImagePromptAdapter  # never changed; `acting` is what draws
    slot: Slot
    scale: Scale
    references: list[ReferenceTokens] = field(default_factory=list)
    fusion_strength: float = 1.0
    # for a fusion that draws: one for each item of the next calls; None numbers them
    seeds: tuple[int, ...] | None = None
    # set by levers; they get tokens, (items, references, tokens, width), before fusion and after it
    imagine: Callable[[Tensor], Tensor] | None = None
    change: Callable[[Tensor], Tensor] | None = None
    change_scale: Callable[[Scale], Scale] | None = None
    fusion_factor: float = 1.0
    interpolation: float = 1.0  # share of its own weights; the rest are its base weights
    acting: ImagePromptAdapter = field(init=False)  # itself, or what the methods make of it
    _mixed: ImagePromptAdapter = field(init=False)
    _placed: object = None

    def __post_init__(self) -> None:
        self.acting = self._mixed = self.adapter

    def interpolate(self, share: float) -> None:
        """Act with weights between the base weights and its own (`model.interpolated`)."""
        self._mixed, self.interpolation = interpolated(self.adapter, share), share
        self.refresh()

    def refresh(self) -> None:
        """Act with the weights as they are now, where it acted before."""
        parameter = next(self.acting.parameters())
        self.place(parameter.device, parameter.dtype)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Act on that device and in that type, with a copy unless the weights are so already."""
        wanted = (device, dtype, state_of(self._mixed))  # it may have been trained, or loaded anew
        if wanted != self._placed:
            self._act_with(placed(self._mixed, device, dtype), wanted)

    def act_as_is(self) -> None:
        """Act with the weights themselves, wherever they are: they are being trained."""
        if self.acting is not self._mixed:
            self._act_with(self._mixed, None)

    def _act_with(self, adapter: ImagePromptAdapter, place: object) -> None:
        self.acting, self._placed = adapter, place
        self.slot.weights = adapter.layers()

    @property
    def strength(self) -> float:
        """Of the fusion, levers included; interpolation scales what fusion adds by its share."""
        return self.fusion_strength * self.fusion_factor * self.interpolation

    @property
    def timed(self) -> bool:
        """Whether its tokens differ with the timestep, so that references are kept as states."""
        return self.adapter.kind == "time-resampler"

    def at_this_step(self, tokens: Tensor) -> Tensor:
        """Tokens of kept states, (items, references, …), where they differ with the timestep."""
        if not self.timed:
            return tokens
        projection: Any = self.acting.image_proj
        projected = projection.at(tokens.flatten(0, 1), self.slot.time)
        return projected.unflatten(0, tokens.shape[:2])

    @property
    def given(self) -> int:
        """How many of a prompt's last tokens are its image tokens (`steer` on a pipeline)."""
        projection = self.adapter.image_proj
        return 0 if projection.reads else projection.num_tokens or 0

    @property
    def items(self) -> int:
        """How many items the references are for."""
        return len(self.references[0].positive)


class ImagePromptHook(ModelHook):
    """Hands each layer its image tokens and scale; the text passes through untouched.

    A call's rows are (branches × items); which branches they are is told from their text
    (`branches`), and `layout` says it for calls that levers make. Text that arrives as
    `(text, [image_tokens, …])` brings its own tokens, as in training, and is left alone.

    Args:
        pipe: Tells whether it guides and at which step it is.
        processors: Each attention module's processor of ours, to notice when one was replaced.
        before: The processors to put back.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: list[ActiveAdapter],
        layers: Sequence[Layer],
        processors: Sequence[tuple[Any, Any]],
        before: dict[str, Any],
    ) -> None:
        super().__init__()
        self.pipe, self.prompts, self.layers = pipe, prompts, layers
        self.processors, self.before = processors, before
        self.encoded: deque[EncodedPrompt] = deque(maxlen=KEPT_PROMPTS)
        self.words = GivenWords()
        self.on_detach: list[Callable[[], object]] = []
        self.layout: Layout | None = None
        self.attachment: Any = None
        self._told: tuple[Tensor, Told] | None = None
        self._newest: EncodedPrompt | None = None
        self._prepared: list[_Prepared] = []
        self._masks: Any = None  # of this call, as stock pipelines pass them
        self._names: list[str] = []
        self._ids: tuple[Any, tuple[int, int]] = (None, (1, 1))
        self.transformer = False

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Note the names of the denoiser's arguments."""
        self._names, self.transformer = argument_names(module), is_transformer(module)
        return module

    # not compiled: what is known is recognised by identity, which would be a guard for each call
    @torch.compiler.disable
    def pre_forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        module: torch.nn.Module,  # noqa: ARG002 - diffusers' interface
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Prepare this call's tokens and scales."""
        self._check_processors()
        given = dict(zip(self._names, args, strict=False)) | kwargs
        text, timestep = given["encoder_hidden_states"], given["timestep"]
        if isinstance(text, Tensor):
            self._tell_sizes(given, text)
            given = self._take_stock(given)
            layout = self._prepare_tokens(text, timestep)
        else:  # the UNet may pool the text itself, so it must not get the image tokens with it
            text, references = text
            layout = (BOTH,)
            for prompt, tokens in zip(self.prompts, references, strict=True):
                prompt.act_as_is()
                prompt.slot.groups = [
                    TokenGroup(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)
                ]
            given = {**given, "encoder_hidden_states": text}
        self._set_scales(timestep, len(text), layout)
        added = [p.slot for p in self.prompts if p.adapter.kind == "redux"]
        if added:
            own = 0 if layout == (NOTHING,) else sum(prompt.given for prompt in self.prompts)
            given = with_image_tokens(given, added, layout, own)
            for prompt in self.prompts:
                prompt.slot.text_length = given["encoder_hidden_states"].shape[1]
        return (), given

    def _tell_sizes(self, given: dict[str, Any], text: Tensor) -> None:
        """Tell the layers how many latents and words there are."""
        sample = given["sample"] if "sample" in given else given["hidden_states"]
        grid = (sample.shape[-2], sample.shape[-1])
        ids = given.get("img_ids")
        if ids is not None:  # Flux packs its latents; the same tensor at every step
            if self._ids[0] is not ids:
                self._ids = ids, latent_grid(ids)
            grid = self._ids[1]
        for prompt in self.prompts:
            prompt.slot.latents, prompt.slot.text_length = grid, text.shape[1]

    def layout_of(self, text: Tensor) -> Layout:
        """The branches of a call of the pipeline's own."""
        self._forget_last_call()
        if self._told is None or self._told[0] is not text:
            self._told = text, tell_branches(self.pipe, text, self.encoded)
            self._take_given(text, self._told[1].layout)
        layout = self._told[1].layout
        self._check_references(len(text), layout)
        return layout

    def _take_given(self, text: Tensor, layout: Layout) -> None:
        """Take as references what of a prompt is image tokens; Flux' calls are one branch each."""
        for prompt in self.prompts:
            if prompt.given and layout == (BOTH,):
                if prompt.given >= text.shape[1]:
                    fix = "Give what stock's prior pipeline gives, or steer what attach returned."
                    what = f"holds no text before {prompt.given} image tokens"
                    found = f"{text.shape[1]} tokens"
                    raise ArgumentError(what, where="prompt_embeds", found=found, fix=fix)
                tokens = text[:, None, -prompt.given :]
                prompt.references = [ReferenceTokens(tokens, torch.zeros_like(tokens[:1]))]

    @property
    def alone(self) -> bool:
        """Whether each call of the denoiser is one branch alone, as with Flux."""
        return bool(self.encoded) and self.encoded[-1].alone

    def _forget_last_call(self) -> None:
        """A text that comes again in another call may be on the other side: Flux takes any."""
        newest = self.encoded[-1] if self.encoded else None
        if newest is not self._newest:
            self._newest = newest
            self.changed()

    def forget_unread(self) -> None:
        """Drop prompts of a call that ended before the denoiser read them."""
        for prompt in [one for one in self.encoded if one.alone and one.branch is None]:
            self.encoded.remove(prompt)

    def changed(self) -> None:
        """A reference or the fusion changed: prepare again at the next call."""
        self._prepared, self._told = [], None

    def _take_stock(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keep the masks that a stock call brings; only stock's processors could read its rest."""
        name = "joint_attention_kwargs" if self.transformer else "cross_attention_kwargs"
        given = kwargs.get(name) or {}
        masks = given.get(MASKS)
        # by their tensors: levers hand them on in another list at every step
        if _identities(masks) != _identities(self._masks):
            self._prepared = []
        self._masks = masks
        rest = {key: value for key, value in given.items() if key not in (MASKS, EMBEDS)}
        return kwargs if len(rest) == len(given) else {**kwargs, name: rest or None}

    def _parts(self, number: int) -> list[ReferenceTokens]:
        """An adapter's references, each with a mask of its own where the call brings some."""
        parts = self.prompts[number].references
        if self._masks is None:
            return parts
        regions = self._masks[number] if len(self._masks) == len(self.prompts) else None
        count = sum(part.positive.shape[1] for part in parts)
        if not isinstance(regions, Tensor) or regions.ndim != 4 or regions.shape[:2] != (1, count):
            raise ArgumentError(
                "do not fit the references",
                where=MASKS,
                expected=f"for each of {len(self.prompts)} adapters a tensor "
                "(1, images, height, width), as IPAdapterMaskProcessor makes them",
                found=tuple(getattr(regions, "shape", ())) or type(self._masks).__name__,
            )
        each = [(part, i) for part in parts for i in range(part.positive.shape[1])]
        return [
            ReferenceTokens(
                part.positive[:, i : i + 1],
                part.negative[:, i : i + 1],
                RegionMask(region[None], mode="bicubic"),  # as stock shrinks them
            )
            for region, (part, i) in zip(regions[0], each, strict=True)
        ]

    def _check_references(self, batch: int, layout: Layout) -> None:
        if not all(prompt.references for prompt in self.prompts):
            raise ArgumentError(
                "no reference was set",
                where="adapter",
                fix="Call set_reference, or give the pipeline an ip_adapter_image.",
            )
        items = next((p.items for p in self.prompts if batch % (len(layout) * p.items)), None)
        if items is not None:
            raise ArgumentError(
                "the number of references does not fit the batch",
                where="adapter",
                expected=f"{items} outputs, or a multiple",
                found=batch // len(layout),
                fix="Give one reference, one per prompt, or one per output; several images of one "
                "item are one Reference([...]).",
            )

    def _check_processors(self) -> None:
        for attention, mine in self.processors:
            if attention.processor is not mine:
                raise ModelError(
                    "an attention processor was replaced while an adapter is attached",
                    where="pipeline",
                    found=type(attention.processor).__name__,
                    fix="Attention slicing, fused projections and load_ip_adapter on another "
                    "pipeline with this UNet do not go with image prompts: undo them, detach and "
                    "attach again.",
                )

    def _prepare_tokens(self, text: Tensor, timestep: Any) -> Layout:
        self._forget_last_call()
        time = self._set_time(timestep)
        version = 0 if text.is_inference() else text._version  # inference tensors count no changes
        # while gradients are recorded, each call needs a graph of its own
        for known in () if torch.is_grad_enabled() else self._prepared:
            same = known.text is text and known.version == version
            if same and (known.wanted, known.time) == (self.layout, time):
                for prompt, groups in zip(self.prompts, known.groups, strict=True):
                    prompt.slot.groups = groups
                return known.layout
        check_caches(denoiser_of(self.pipe))  # once a text, not at every step
        layout = self.layout or self.layout_of(text)
        for number, prompt in enumerate(self.prompts):
            prompt.place(text.device, text.dtype)
            parts = self._parts(number)
            prompt.slot.groups = [self._group(prompt, part, text, layout) for part in parts]
        groups = [prompt.slot.groups for prompt in self.prompts]
        prepared = _Prepared(text, version, self.layout, layout, time, groups)
        self._prepared = [prepared, *self._prepared[: _KEPT - 1]]
        return layout

    def _set_time(self, timestep: Any) -> float | None:
        """Embed the time for adapters whose tokens differ with it; None if there are none."""
        timed = [prompt for prompt in self.prompts if prompt.timed]
        if not timed:
            return None
        now = torch.as_tensor(timestep).flatten()[:1]
        for prompt in timed:
            own: Any = prompt.acting.image_proj
            prompt.slot.time = own.time_embedding(now)
        return float(now)

    def _group(
        self, prompt: ActiveAdapter, part: ReferenceTokens, text: Tensor, layout: Layout
    ) -> TokenGroup:
        branches = len(layout)
        items = len(text) // branches
        repeats = items // len(part.positive)
        positive = part.positive.to(text).repeat_interleave(repeats, 0)
        negative = part.negative.to(text).expand_as(part.positive).repeat_interleave(repeats, 0)
        if prompt.imagine is not None:  # "no image" stays no image
            positive = prompt.imagine(positive)
        positive, negative = prompt.at_this_step(positive), prompt.at_this_step(negative)
        tokens = torch.cat([positive if branch == BOTH else negative for branch in layout])
        if prompt.acting.fusion is not None and prompt.strength:
            if prompt.acting.draws:
                tokens = self._drawn(prompt, part, tokens, text, layout)
            else:
                tokens = self._fused(prompt, tokens, text, layout)
        if prompt.change is not None and BOTH in layout:
            parts = zip(layout, tokens.chunk(branches), strict=True)
            tokens = torch.cat([prompt.change(t) if b == BOTH else t for b, t in parts])
        mask = None if part.mask is None else part.mask.repeated(branches, repeats)
        tokens = tokens.flatten(1, 2)
        return TokenGroup(tokens, mask, opposed_tokens(tokens, layout))

    def _drawn(
        self,
        prompt: ActiveAdapter,
        part: ReferenceTokens,
        tokens: Tensor,
        text: Tensor,
        layout: Layout,
    ) -> Tensor:
        """As `_fused`, but "no image" stays what it is, and nothing is drawn twice."""
        branches = list(tokens.chunk(len(layout)))
        if BOTH not in layout:
            return tokens
        at = layout.index(BOTH)
        rows, given = text.chunk(len(layout))[at], branches[at]
        if prompt.seeds is not None and len(prompt.seeds) != len(rows):
            raise ArgumentError(
                "differ in number from the images of this call",
                where="seeds of the fusion",
                expected=len(rows),
                found=len(prompt.seeds),
            )
        # by values: levers hand on the same text and the same tokens in several tensors
        of = (prompt.acting, prompt.strength, prompt.seeds)
        known = part.drawn
        if known is None or known[0] != of or not all(map(torch.equal, known[1], (rows, given))):
            drawn = self._fused(prompt, given, rows, (BOTH,))
            known = part.drawn = (of, (rows, given), drawn)
        parts = zip(layout, branches, strict=True)
        return torch.cat([known[2] if branch == BOTH else t for branch, t in parts])

    def _fused(self, prompt: ActiveAdapter, tokens: Tensor, text: Tensor, layout: Layout) -> Tensor:
        """Fuse each reference of each item with that item's text."""
        references, narrowed = tokens.shape[1], self._text_projection()
        if narrowed is not None:
            text = narrowed(text)
        told = self._told[1] if self._told else Told(layout)
        words = told.words_of(layout, len(text) // len(layout), text.shape[1])
        seeds = prompt.seeds if prompt.seeds is not None else range(len(text))
        fused = prompt.acting.fuse(
            tokens.flatten(0, 1),
            text.repeat_interleave(references, 0),
            None if words is None else words.to(text.device).repeat_interleave(references, 0),
            prompt.strength,
            [seed for seed in seeds for _ in range(references)],  # one scene for all of an item's
        )
        return fused.unflatten(0, (-1, references))

    def _text_projection(self) -> torch.nn.Module | None:
        """What a UNet does to the text before its layers read it; Kolors alone has one."""
        unet: Any = getattr(self.pipe, "unet", None)
        kind = getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None)
        return unet.encoder_hid_proj if kind == "text_proj" else None

    def _set_scales(self, timestep: Any, batch: int, layout: Layout) -> None:
        scales = [
            p.scale if p.change_scale is None else p.change_scale(p.scale) for p in self.prompts
        ]
        progress = self.progress(timestep) if any(scale.by_step for scale in scales) else 0.0
        branches = len(layout)
        for prompt, scale in zip(self.prompts, scales, strict=True):
            prompt.slot.opposed = scale.opposed
            prompt.slot.scales = {
                layer.number: for_batch(scale.at(layer, progress), batch // branches, branches)
                for layer in self.layers
            }

    def progress(self, timestep: Any) -> float:
        """Share of the steps of this call that are done: 0 at its first."""
        first, count = self._steps_of_this_call(len(self.pipe.scheduler.timesteps))
        return max(self.step(timestep) - first, 0) / count

    def step(self, timestep: Any) -> int:
        """Which of the scheduler's steps this is."""
        scheduler = self.pipe.scheduler
        if self.transformer:  # Flux' pipelines round the timestep, and divide it by 1000
            index = getattr(scheduler, "step_index", None)
            return int(getattr(scheduler, "begin_index", None) or 0 if index is None else index)
        now = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps.device)
        return int((scheduler.timesteps - now).abs().argmin())

    def _steps_of_this_call(self, scheduled: int) -> tuple[int, int]:
        """First and number: image-to-image takes the schedule's end, `denoising_end` its start."""
        count = min(getattr(self.pipe, "_num_timesteps", None) or scheduled, scheduled)
        first = getattr(self.pipe.scheduler, "begin_index", None)
        if first is None:
            first = 0 if getattr(self.pipe, "denoising_end", None) else scheduled - count
        return first, count


def argument_names(module: torch.nn.Module) -> list[str]:
    """Names of a denoiser's arguments in order."""
    inner = getattr(module, "_orig_mod", module)  # torch.compile's own has other arguments
    return [name for name in inspect.signature(type(inner).forward).parameters if name != "self"]


def _identities(masks: Any) -> list[int]:
    return [id(one) for one in (masks if isinstance(masks, (list, tuple)) else [masks])]
