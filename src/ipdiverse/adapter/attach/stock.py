"""What stock diffusers knows as an image prompt: adapters it has loaded, arguments, scales, masks.

While ours is attached, scripts that call `pipe(…, ip_adapter_image=…)`, `set_ip_adapter_scale` or
`IPAdapterMaskProcessor` keep working: these methods of the pipeline are shadowed by ours, and come
back with `detach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.adapter.attach.attach import detach
from ipdiverse.adapter.files.checkpoint import adapter_from_tensors
from ipdiverse.adapter.model import attention_layers
from ipdiverse.adapter.reference import Reference, as_reference
from ipdiverse.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
}
"""Stock's projections, and how their keys begin in published files."""
_BLOCK = {
    "ln0.": "0.norm1.",
    "ln1.": "0.norm2.",
    "attn.to_q.": "0.to_q.",
    "attn.to_out.0.": "0.to_out.",
    "ff.0.": "1.0.",
    "ff.1.net.0.proj.": "1.1.",
    "ff.1.net.2.": "1.3.",
}
"""The same within one layer of a resampler; `attn.to_k` and `attn.to_v` are one matrix there."""


def stock_adapters(unet: Any) -> list[tuple[ImagePromptAdapter, dict[int, float]]]:
    """What `load_ip_adapter` has loaded into a UNet, in its order, with scales by layer number.

    The adapters share memory with the pipeline's.
    """
    layers = getattr(unet.encoder_hid_proj, "image_projection_layers", None)
    if layers is None:
        return []
    # the resampler's own attention counts in diffusers' list, and in Kolors comes first
    own = (p for n, p in unet.attn_processors.items() if not n.startswith("encoder_hid_proj."))
    processors = dict(enumerate(own))
    branched = {n: p for n, p in processors.items() if hasattr(p, "to_k_ip")}
    found = []
    for index, layer in enumerate(layers):
        tensors = {f"image_proj.{name}": one for name, one in _published(layer).items()}
        for number, processor in branched.items():
            for part in ("to_k_ip", "to_v_ip"):
                name = f"ip_adapter.{number}.{part}.weight"
                tensors[name] = getattr(processor, part)[index].weight
        scales = {number: processor.scale[index] for number, processor in branched.items()}
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
    """Take stock's adapters off a UNet, as `unload_ip_adapter` does; what is returned undoes it.

    The image encoder stays: it is what reads the references.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    text, processors = getattr(unet, "text_encoder_hid_proj", None), dict(unet.attn_processors)
    projection, kind = unet.encoder_hid_proj, getattr(unet.config, "encoder_hid_dim_type", None)
    plain = {n: AttnProcessor2_0() if hasattr(p, "to_k_ip") else p for n, p in processors.items()}
    unet.set_attn_processor(plain)
    # Kolors projects its text there, and stock moves that aside while it has an adapter
    unet.encoder_hid_proj = text
    unet.config.encoder_hid_dim_type = None if text is None else "text_proj"
    if text is not None:
        unet.text_encoder_hid_proj = None

    def put_back() -> None:
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = projection, kind
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
        unet = getattr(pipe, "unet", None)  # a transformer has no such place
        if unet is not None and unet.encoder_hid_proj is None:
            unet.encoder_hid_proj = _Elsewhere()

    @classmethod
    def of(cls, pipe: Any) -> StockCalls | None:
        """What answers a pipeline's methods, if something is attached to it."""
        answers = getattr(getattr(pipe, "__dict__", {}).get("set_ip_adapter_scale"), "__self__", 0)
        return answers if isinstance(answers, cls) else None

    def release(self) -> None:
        """Give the pipeline its own methods back."""
        for undo in self._undo:
            undo()
        unet = getattr(self.attachment.pipe, "unet", None)
        if unet is not None and isinstance(unet.encoder_hid_proj, _Elsewhere):
            unet.encoder_hid_proj = None

    def check_inputs(self, *given: Any, **named: Any) -> Any:
        """What every call of the pipeline begins with: references of the one before are over."""
        self.attachment.set_call(())
        return self._check_inputs(*given, **named)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """Take the references of a call. The UNet gets them from our hook, not from this list.

        The list is for scripts that encode once, and bring embeddings to many calls.
        """
        if self.attachment.hook.transformer:
            # Flux asks for the negative ones by the same call, SD 3 only where stock has loaded one
            raise ArgumentError(
                "is not taken from a call of this pipeline",
                where="ip_adapter_image",
                fix="Call set_reference on what attach returned.",
            )
        count = len(self.attachment.adapters)
        if ip_adapter_image_embeds is None:
            # a list has an entry for each adapter, as in stock; one image serves all of them
            many = isinstance(ip_adapter_image, list)
            given = ip_adapter_image if many else [ip_adapter_image] * count
        else:
            given = [Reference(embeds=[one]) for one in ip_adapter_image_embeds]
        if len(given) != count:
            raise ArgumentError(
                "does not fit the attached adapters",
                where="ip_adapter_image",
                expected=f"one entry for each of {count}; several images of one are a list in it",
                found=len(given),
            )
        references = [self._reference(one, number) for number, one in enumerate(given)]
        self.attachment.set_call(references)
        if ip_adapter_image_embeds is not None:
            return list(ip_adapter_image_embeds)
        guided = do_classifier_free_guidance
        return [
            self._embeds(one, number, guided, num_images_per_prompt).to(device)
            for number, one in enumerate(references)
        ]

    def _embeds(self, reference: Reference, number: int, guided: bool, items: int) -> Tensor:
        """A reference as stock encodes it, (2 · items, count, …), the negative ones first."""
        name, encoding = self.attachment.adapters[number].reads[0], self.attachment.encoding
        seen = reference.embeds[0] if reference.embeds else reference.faces
        if seen is None:
            seen = torch.cat([encoding.image(one)[name] for one in reference.images])
        none = encoding.zero_image() if name == "hidden" else torch.zeros_like(seen)
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

    The pipeline that ours is attached to never looks; another that shares its UNet does.
    """

    @property
    def image_projection_layers(self) -> None:
        raise ModelError(
            "an adapter of ipdiverse is attached to another pipeline with this UNet",
            where="ip_adapter_image",
            fix="Call that pipeline, or ipdiverse.detach(it) first.",
        )


def _prepared(given: Any) -> bool:
    """Whether a tensor is what the image encoder reads, and not a picture in 0..1 or 0..255.

    Stock takes every tensor for the former, and draws nonsense of a picture.
    """
    if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point():
        return False
    return bool(given.min() < 0 or 1 < given.max() <= 3)
