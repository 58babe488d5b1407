"""What stock diffusers knows as an image prompt: adapters it has loaded, arguments, scales, masks.

While ours is attached, scripts that call `pipe(…, ip_adapter_image=…)`, `set_ip_adapter_scale` or
`IPAdapterMaskProcessor` keep working: these methods of the pipeline are shadowed by ours, and come
back with `detach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.adapter.attach.attach import detach
from ipdiverse.adapter.files.checkpoint import adapter_from_tensors
from ipdiverse.adapter.model import attention_layers
from ipdiverse.adapter.reference import Reference, as_reference
from ipdiverse.base.pipelines import denoiser_of
from ipdiverse.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ipdiverse.adapter.model import ImagePromptAdapter

_RENAMED = {
    "ImageProjection": {"image_embeds.": "proj."},
    "IPAdapterFullImageProjection": {
        "ff.net.0.proj.": "proj.0.",
        "ff.net.2.": "proj.2.",
        "norm.": "proj.3.",
    },
    "IPAdapterFaceIDImageProjection": {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2."},
    "IPAdapterPlusImageProjection": {},
    "IPAdapterFaceIDPlusImageProjection": {"proj.net.0.proj.": "proj.0.", "proj.net.2.": "proj.2."},
    "IPAdapterTimeImageProjection": {},
}
"""Stock's projections, and how their keys begin in published files."""
_BLOCK = {
    "ln0.": "0.norm1.",
    "ln1.": "0.norm2.",
    "attn.to_q.": "0.to_q.",
    "attn.to_kv.": "0.to_kv.",
    "attn.to_out.0.": "0.to_out.",
    "adaln_norm.": "1.0.",
    "adaln_proj.": "2.1.",
    "ff.0.": "1.0.",
    "ff.1.net.0.proj.": "1.1.",
    "ff.1.net.2.": "1.3.",
    "ff.net.0.proj.": "1.1.",
    "ff.net.2.": "1.3.",
}
"""The same within one layer of a resampler; `attn.to_k` and `attn.to_v` are one matrix there."""


def projections(denoiser: Any) -> Sequence[Any]:
    """Of each adapter that stock has loaded; SD 3 has one at most, whose projection is alone."""
    home = getattr(denoiser, _home(denoiser), None)
    several = getattr(home, "image_projection_layers", None)
    return list(several or ([home] if type(home).__name__ in _RENAMED else []))


def _home(denoiser: Any) -> str:
    """Where stock keeps them."""
    return "image_proj" if getattr(denoiser, "image_proj", None) else "encoder_hid_proj"


def stock_adapters(denoiser: Any) -> list[tuple[ImagePromptAdapter, dict[int, float]]]:
    """What `load_ip_adapter` has loaded, in its order, with scales by layer number.

    The adapters share memory with the pipeline's.
    """
    layers, found = projections(denoiser), []
    # the resampler's own attention counts in diffusers' list, and in Kolors comes first
    processors = denoiser.attn_processors.items() if layers else ()
    own = enumerate(p for name, p in processors if not name.startswith("encoder_hid_proj."))
    branched = {number: p for number, p in own if hasattr(p, "to_k_ip")}
    for index, layer in enumerate(layers):
        tensors = {f"image_proj.{name}": one for name, one in _published(layer).items()}
        scales, mine = dict[int, float](), f".{index}."
        for number, processor in branched.items():
            # SD 3's has one adapter and one scale, the others a list of each
            several = isinstance(processor.scale, list)
            scales[number] = processor.scale[index] if several else processor.scale
            tensors |= {
                f"ip_adapter.{number}.{name.replace(mine, '.')}": tensor
                for name, tensor in processor.state_dict().items()
                if mine in name or not several
            }
        # FaceID's low-rank changes are LoRAs of the UNet by now, and stay there
        version_2 = bool(getattr(layer, "shortcut", False))
        name = "IP-Adapter of the pipeline"
        found.append((adapter_from_tensors(tensors, name, face_id_plus_v2=version_2), scales))
    return found


def _published(layer: Any) -> dict[str, Tensor]:
    """A stock projection's tensors under the names of published files."""
    kind = type(layer).__name__
    if kind not in _RENAMED:
        raise ModelError("is of an unknown kind", where="IP-Adapter of the pipeline", found=kind)
    state, ours = layer.state_dict(), dict[str, Tensor]()
    for name, given in state.items():
        if ".attn.to_v." in name:
            continue
        renamed, tensor = name, given
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            if rest.startswith("attn.to_k."):
                values = state[name.replace("to_k", "to_v")]
                tensor, rest = torch.cat([given, values]), "0.to_kv.weight"
            renamed = f"layers.{number}.{_begun_otherwise(rest, _BLOCK)}"
        renamed = _begun_otherwise(renamed, _RENAMED[kind])
        face_plus = kind == "IPAdapterFaceIDPlusImageProjection"
        if face_plus and not renamed.startswith(("proj.", "norm.")):
            renamed = f"perceiver_resampler.{renamed}"
        ours[renamed] = tensor
    return ours


def _begun_otherwise(name: str, renamed: Mapping[str, str]) -> str:
    for theirs, ours in renamed.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def take_off(unet: Any) -> Callable[[], None]:
    """Take stock's adapters off, as `unload_ip_adapter` does; what is returned undoes it.

    The image encoder stays: it is what reads the references.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0

    home, processors, plain = _home(unet), dict(unet.attn_processors), dict[str, Any]()
    text, projection = getattr(unet, "text_encoder_hid_proj", None), getattr(unet, home)
    kind = getattr(unet.config, "encoder_hid_dim_type", None)
    usual = JointAttnProcessor2_0 if home == "image_proj" else AttnProcessor2_0
    for name, processor in processors.items():
        attention = unet.get_submodule(name.removesuffix(".processor"))
        make: Any = getattr(attention, "_default_processor_cls", usual)  # Flux's own names it
        plain[name] = make() if hasattr(processor, "to_k_ip") else processor
    unet.set_attn_processor(plain)
    # Kolors projects its text there, and stock moves that aside while it has an adapter
    setattr(unet, home, text)
    unet.config.encoder_hid_dim_type = None if text is None else "text_proj"
    if text is not None:
        unet.text_encoder_hid_proj = None

    def put_back() -> None:
        setattr(unet, home, projection)
        unet.config.encoder_hid_dim_type = kind
        if text is not None:
            unet.text_encoder_hid_proj = text
        unet.set_attn_processor(dict(processors))

    return put_back


def shadow(pipe: Any, name: str, ours: Any) -> Callable[[], None]:
    """Answer a pipeline's method ourselves; what is returned undoes it, unless others did."""
    own = pipe.__dict__
    there, before = name in own, own.get(name)
    own[name] = ours

    def undo() -> None:
        if own.get(name) is not ours:
            return
        del own[name]
        if there:
            own[name] = before

    return undo


class StockCalls:
    """The pipeline's own methods for image prompts, answered by what is attached.

    Args:
        attachment: An `Attachment` of one adapter or several.
    """

    shadowed = (
        "check_inputs",
        "prepare_ip_adapter_image_embeds",
        "set_ip_adapter_scale",
        "load_ip_adapter",
        "unload_ip_adapter",
    )

    def __init__(self, attachment: Any) -> None:
        self.attachment, pipe = attachment, attachment.pipe
        known = [name for name in self.shadowed if hasattr(pipe, name)]
        self._check_inputs: Any = getattr(pipe, "check_inputs", None)
        self._undo = [shadow(pipe, name, getattr(self, name)) for name in known]
        self._undo += [_active(pipe)] if hasattr(pipe, "is_ip_adapter_active") else []
        self._denoiser: Any = denoiser_of(pipe)
        if getattr(self._denoiser, "encoder_hid_proj", None) is None:
            self._denoiser.encoder_hid_proj = _Elsewhere(len(attachment.adapters))
        self._called: Sequence[Reference] = ()  # what the call that runs has brought

    @classmethod
    def of(cls, pipe: Any) -> StockCalls | None:
        """What answers a pipeline's methods, if something is attached to it."""
        answers = getattr(getattr(pipe, "__dict__", {}).get("set_ip_adapter_scale"), "__self__", 0)
        return answers if isinstance(answers, cls) else None

    def release(self) -> None:
        """Give the pipeline its own methods back."""
        for undo in self._undo:
            undo()
        if isinstance(self._denoiser.encoder_hid_proj, _Elsewhere):
            self._denoiser.encoder_hid_proj = None

    def check_inputs(self, *given: Any, **named: Any) -> Any:
        """What every call of the pipeline begins with: references of the one before are over."""
        self._called = ()
        self.attachment.set_call(())
        self.attachment.hook.forget_unread()
        return self._check_inputs(*given, **named)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor] | Tensor:
        """Take the references of a call. The UNet gets them from our hook, not from this list.

        The list is for scripts that encode once, and bring embeddings to many calls.
        """
        hook, count = self.attachment.hook, len(self.attachment.adapters)
        bare = hook.prompts[0].timed  # SD 3's embeddings have no axis of images
        if ip_adapter_image_embeds is None:
            # a list has an entry for each adapter, as in stock; one image serves all of them
            many = isinstance(ip_adapter_image, list)
            given = ip_adapter_image if many else [ip_adapter_image] * count
        else:
            alone = isinstance(ip_adapter_image_embeds, Tensor)
            each = [ip_adapter_image_embeds] if alone else ip_adapter_image_embeds
            given = [Reference(embeds=[one[:, None] if bare else one]) for one in each]
        if len(given) != count:
            raise ArgumentError(
                "does not fit the attached adapters",
                where="ip_adapter_image",
                expected=f"one entry for each of {count}; several images of one are a list in it",
                found=len(given),
            )
        references = [self._reference(one, number) for number, one in enumerate(given)]
        if hook.alone and self._called:  # Flux asks for those of its negative prompt next
            black = [isinstance(one, np.ndarray) and not one.any() for one in given]
            # which is what it gives where nobody gave one, and what ours is without
            negatives = [None if b else one for b, one in zip(black, references, strict=True)]
            self.attachment.set_call(self._called, negatives)
        else:
            self._called = references
            self.attachment.set_call(references)
        if ip_adapter_image_embeds is not None:
            return ip_adapter_image_embeds
        guided = do_classifier_free_guidance and (bare or not hook.transformer)
        embeds = [
            self._embeds(one, number, guided, num_images_per_prompt).to(device)
            for number, one in enumerate(references)
        ]
        return embeds[0][:, 0] if bare else embeds

    def _embeds(self, reference: Reference, number: int, guided: bool, items: int) -> Tensor:
        """A reference as stock encodes it, (2 · items, count, …), the negative ones first."""
        name, encoding = self.attachment.adapters[number].reads[0], self.attachment.encoding
        seen = reference.embeds[0] if reference.embeds else reference.faces
        if seen is None:
            seen = torch.cat([encoding.image(one)[name] for one in reference.images])
        black = name == "hidden" and not self.attachment.hook.transformer
        none = encoding.zero_image() if black else torch.zeros_like(seen)
        sides = [none.expand_as(seen), seen] if guided else [seen]
        return torch.cat([side[None].expand(items, *side.shape) for side in sides])

    def _reference(self, given: Any, number: int) -> Reference:
        """One adapter's images or embeddings, as stock reads them."""
        adapter = self.attachment.adapters[number]
        if _prepared(given):  # stock hands tensors to the encoder as they are
            hidden = "hidden" in adapter.reads
            embeds, _ = self.attachment.pipe.encode_image(given, given.device, 1, hidden)
            return Reference(embeds=[embeds])
        if isinstance(given, Reference) and len(adapter.reads) > 1 and given.embeds is not None:
            # FaceID Plus: stock's users put the image's states on the projection itself
            layers = self.attachment.stock_layers
            states = getattr(layers[number], "clip_embeds", None) if layers else None
            if states is not None:
                return Reference(embeds=[*given.embeds, states])
        return as_reference(given)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Numbers, or dicts by block, for all adapters or one for each, as in stock."""
        count, joint = len(self.attachment.adapters), self.attachment.hook.transformer
        given = scale if isinstance(scale, list) else [scale]
        several = len(given) == count > 1 or any(isinstance(one, list) for one in given)
        if joint and not several:  # a number for each layer, if it is a list
            given = [scale]
        if len(given) not in (1, count):
            raise ArgumentError(
                "does not fit the attached adapters",
                where="set_ip_adapter_scale",
                expected=f"one scale for all, or one for each of {count}",
                found=len(given),
            )
        given = given if joint else self._by_layer(given)
        for number in range(count):
            self.attachment.set_scale(given[number % len(given)], adapter=number)

    def _by_layer(self, scales: list[Any]) -> list[Any]:
        """Scales of a UNet, with dicts by block as a number for each layer."""
        from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

        unet, layers = self.attachment.pipe.unet, self.attachment.hook.layers
        try:
            expanded: list[Any] = _maybe_expand_lora_scales(unet, scales, default_scale=0.0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                "names a block that this UNet does not have, or not its layers",
                where="set_ip_adapter_scale",
                found=error,
            ) from error
        for number, one in enumerate(expanded):
            if isinstance(one, dict):
                names = [attention_layers(unet)[layer.number] for layer in layers]
                begins = [[s for at, s in one.items() if name.startswith(at)] for name in names]
                expanded[number] = [float(found[0]) if found else 0.0 for found in begins]
        return expanded

    def load_ip_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse: stock's processors would take the place of ours."""
        raise ModelError(
            "an adapter of ipdiverse is attached",
            where="load_ip_adapter",
            fix="Call ipdiverse.detach(pipe) first, or load first and then ipdiverse.diversify.",
        )

    def unload_ip_adapter(self) -> None:
        """Take ours off too; where stock had loaded none, there is nothing to unload."""
        pipe = self.attachment.pipe
        if not self.attachment.stock_layers:
            raise ModelError(
                "an adapter of ipdiverse is attached, and none of stock diffusers is loaded",
                where="unload_ip_adapter",
                fix="Call ipdiverse.detach(pipe).",
            )
        detach(pipe)
        pipe.unload_ip_adapter()


class _Elsewhere(torch.nn.Module):
    """Stands where stock looks for its projections, so that it says what is the matter.

    The pipeline that ours is attached to only counts; another that shares its UNet looks.
    """

    def __init__(self, num_ip_adapters: int) -> None:
        super().__init__()
        self.num_ip_adapters = num_ip_adapters

    @property
    def image_projection_layers(self) -> None:
        raise ModelError(
            "an adapter of ipdiverse is attached to another pipeline with this UNet",
            where="ip_adapter_image",
            fix="Call that pipeline, or ipdiverse.detach(it) first.",
        )


def _active(pipe: Any) -> Callable[[], None]:
    """Let SD 3's pipeline take an image, which it ignores unless stock's processors are on."""
    kind = type(pipe)
    own = {"is_ip_adapter_active": True, "__module__": kind.__module__}
    pipe.__class__ = type(kind.__name__, (kind,), own)  # a property: no attribute can hide it

    def undo() -> None:
        pipe.__class__ = kind

    return undo


def _prepared(given: Any) -> bool:
    """Whether a tensor is what the image encoder reads, and not a picture in 0..1 or 0..255.

    Stock takes every tensor for the former, and draws nonsense of a picture.
    """
    if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point():
        return False
    return bool(given.min() < 0 or 1 < given.max() <= 3)
