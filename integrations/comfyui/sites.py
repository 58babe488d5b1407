"""The cross-attention layers of ComfyUI's UNet, numbered as in adapter files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ipdiverse.adapter.scale import Layer

_FILE_ORDER = {"input": 0, "output": 1, "middle": 2}


@dataclass(frozen=True)
class Site:
    """A cross-attention layer of ComfyUI's UNet.

    Args:
        block: ComfyUI's name for its block: `("input", 4)`.
        index: Its place in the block's transformer.
        layer: Its number and place in diffusers.
        widths: Widths of its tokens and of its queries.
        path: Of its transformer block in ComfyUI's UNet, with the self-attention beside it.
        alone: Whether its block has no other.
    """

    block: tuple[str, int]
    index: int
    layer: Layer
    widths: tuple[int, int]
    path: str
    alone: bool = False


def sites_of(model: Any) -> list[Site]:
    """The cross-attention layers of a MODEL, in the order in which the UNet runs them.

    Checkpoints number them as diffusers does: two attentions for each transformer block, down, up,
    and the middle last. Sizes and places are read from the model itself.

    Raises:
        ModelError: It has no such layers.
    """
    from ipdiverse.adapter.scale import Layer
    from ipdiverse.errors import ModelError

    unet = getattr(model.model, "diffusion_model", None)
    if not hasattr(unet, "input_blocks"):
        raise ModelError(
            "has no UNet with cross-attention",
            where="model",
            expected="Stable Diffusion 1.x, 2.x or XL",
            found=type(unet).__name__,
            fix="These nodes are for models with a UNet; Flux.1 and SD 3.5 are drawn by "
            "`ipdiverse generate --base flux-dev` or sd35-large.",
        )
    found = list(_transformers(unet))
    blocks = [
        (at, index) for at, (_, _, _, blocks) in enumerate(found) for index in range(len(blocks))
    ]
    by_file = sorted(blocks, key=lambda one: _FILE_ORDER[found[one[0]][0][0]])
    numbers = {one: 2 * place + 1 for place, one in enumerate(by_file)}
    sites = []
    for at, index in blocks:
        block, name, path, inner = found[at]
        attention = inner[index].attn2
        widths = (attention.to_k.weight.shape[1], attention.to_q.weight.shape[0])
        layer = Layer(numbers[at, index], name, at, len(found))
        sites.append(Site(block, index, layer, widths, f"{path}.{index}", len(inner) == 1))
    return sites


def _transformers(unet: Any) -> Iterator[tuple[tuple[str, int], str, str, Any]]:
    """Each transformer: its block in ComfyUI and in diffusers, its path, its own blocks."""
    for name, part, blocks, turn in (
        ("input", "down", unet.input_blocks, "Downsample"),
        ("middle", "mid", [unet.middle_block], ""),
        ("output", "up", unet.output_blocks, "Upsample"),
    ):
        level = 0
        for number, block in enumerate(blocks):
            for at, module in enumerate(block):
                if hasattr(module, "transformer_blocks"):
                    place = part if part == "mid" else f"{part}.{level}"
                    home = "middle_block" if part == "mid" else f"{name}_blocks.{number}"
                    path = f"{home}.{at}.transformer_blocks"
                    yield (name, number), place, path, module.transformer_blocks
            level += any(type(module).__name__ == turn for module in block)
