"""Whether a pipeline, an adapter and an image encoder fit together, before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipdiverse.adapter.model import attention_layers
from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter


def checked_unet(pipe: Any) -> Any:
    """The UNet of a pipeline, of a kind that adapters can be attached to.

    Args:
        pipe: A pipeline of diffusers.

    Raises:
        ModelError: It has none, or one that another image prompt, offloading or an attention of
            another kind keeps from it.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "attn_processors"):
        raise ModelError(
            "has no UNet with attention processors",
            where=type(pipe).__name__,
            expected="a Stable Diffusion 1.x, 2.x or XL pipeline of diffusers",
        )
    # load_ip_adapter sets it to ip_image_proj, and the UNet then asks for image_embeds at each call
    if unet.config.get("encoder_hid_dim_type") is not None:
        raise ModelError(
            "already projects another prompt",
            where="UNet",
            found=f"encoder_hid_dim_type {unet.config.encoder_hid_dim_type!r}",
            fix="If load_ip_adapter was called, call unload_ip_adapter first.",
        )
    if unet.device.type == "meta":
        raise ModelError(
            "is offloaded layer by layer",
            where="UNet",
            fix="Call enable_model_cpu_offload in place of enable_sequential_cpu_offload.",
        )
    for name in attention_layers(unet).values():
        _check_attention(unet.get_submodule(name), name)
    return unet


def check_layers(
    adapter: ImagePromptAdapter, theirs: Mapping[int, tuple[int, int]], named: str = "this UNet"
) -> None:
    """Refuse an adapter whose layers have other sizes than a model's.

    Args:
        adapter: The adapter.
        theirs: Widths of tokens and states of each of the model's layers, by its number.
        named: What the model is called.

    Raises:
        ModelError: They differ.
    """
    mine = adapter.widths()
    if mine == theirs:
        return
    first = min(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    raise ModelError(
        f"layer {first} does not fit {named}",
        where="adapter",
        expected=f"(tokens, hidden) {theirs.get(first, 'no such layer')}",
        found=mine.get(first, "no such layer"),
        fix="It was trained for another base model.",
    )


def check_embeddings(
    adapter: ImagePromptAdapter, width: int, named: str = "this image encoder"
) -> None:
    """Refuse an adapter that reads embeddings of another width.

    Args:
        adapter: The adapter.
        width: Of what the encoder gives.
        named: What the encoder is called.

    Raises:
        ModelError: They differ.
    """
    if adapter.clip_dim != width:
        raise ModelError(
            f"does not fit {named}",
            where="adapter",
            expected=f"embeddings of width {width}",
            found=adapter.clip_dim,
            fix="It was trained for another image encoder.",
        )


def check_encoder(adapter: ImagePromptAdapter, encoder: Any) -> None:
    """Refuse an image encoder whose embeddings have not the adapter's width; None always fits.

    Raises:
        ModelError: They differ.
    """
    if encoder is None or adapter.clip_dim is None:
        return
    pooled = "pooled" in adapter.reads
    check_embeddings(
        adapter, encoder.config.projection_dim if pooled else encoder.config.hidden_size
    )


def _check_attention(attention: Any, name: str) -> None:
    if "Sliced" in type(attention.processor).__name__:  # ours cannot slice: it would be lost
        raise ModelError(
            "attention is sliced",
            where=name,
            fix="Call pipe.disable_attention_slicing(), then attach.",
        )
    if getattr(attention, "fused_projections", False):
        raise ModelError(
            "query, key and value are fused", where=name, fix="Call unet.unfuse_qkv_projections()."
        )
    # stock processors handle these; ours would silently leave them out
    unusual = [
        part
        for part in ("added_kv_proj_dim", "norm_cross", "group_norm", "spatial_norm", "norm_q")
        if getattr(attention, part, None)
    ]
    if unusual or not hasattr(attention, "to_q"):
        raise ModelError(
            "attention of a kind that image prompts do not support",
            where=name,
            found=", ".join(unusual) or type(attention).__name__,
        )
