"""The adapter: a projection, perhaps a fusion, and keys and values for each layer of one UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ipdiverse.adapter.faces import FaceIDPlusProjection, FaceIDProjection, FullFaceProjection
from ipdiverse.adapter.fusion import Fusion
from ipdiverse.adapter.noise import NoiseConditioning
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionModelWithProjection

Kind = Literal["base", "plus"]

Projection = (
    LinearProjection
    | ResamplerProjection
    | FullFaceProjection
    | FaceIDProjection
    | FaceIDPlusProjection
)

LoraShapes = dict[str, tuple[int, int, int]]
"""Projection name (`to_q_lora`, …) to its (input width, rank, output width)."""


class LowRank(nn.Module):
    """A low-rank change of a projection: up(down(x)) (LoRA, arXiv:2106.09685), of weight 1.

    Args:
        width_in: Input width.
        rank: Of the change.
        width_out: Output width.
    """

    def __init__(self, width_in: int, rank: int, width_out: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """What to add to the projection of these states."""
        return self.up(self.down(states))


class LayerWeights(nn.Module):
    """What an adapter adds to one attention layer.

    Args:
        widths: Width of image tokens and of queries; None in self-attention, which has no image
            branch.
        lora: Low-rank changes of the layer's own projections (FaceID).
    """

    to_k_ip: nn.Linear | None
    to_v_ip: nn.Linear | None
    to_q_lora: LowRank | None
    to_k_lora: LowRank | None
    to_v_lora: LowRank | None
    to_out_lora: LowRank | None

    def __init__(self, widths: tuple[int, int] | None, lora: LoraShapes | None = None) -> None:
        super().__init__()
        self.to_k_ip = None if widths is None else nn.Linear(*widths, bias=False)
        self.to_v_ip = None if widths is None else nn.Linear(*widths, bias=False)
        for name in ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"):
            shape = (lora or {}).get(name)
            setattr(self, name, None if shape is None else LowRank(*shape))


class ImagePromptAdapter(nn.Module):
    """An image prompt for a pretrained text-to-image model (IP-Adapter, arXiv:2308.06721).

    Args:
        projection: Image embeddings to image tokens.
        widths: For each cross-attention layer, by its number in `unet.attn_processors`: the width
            of its tokens and of its queries.
        fusion: Lets image tokens attend to the text; None is plain IP-Adapter.
        lora: Low-rank changes by layer number, self-attention included (FaceID).
        noise: Noise on the first of the embeddings, and its level; None reads them as they are.
    """

    def __init__(
        self,
        projection: Projection,
        widths: dict[int, tuple[int, int]],
        fusion: Fusion | None = None,
        lora: Mapping[int, LoraShapes] | None = None,
        noise: NoiseConditioning | None = None,
    ) -> None:
        super().__init__()
        changes = lora or {}
        self.image_proj = projection
        self.ip_adapter = nn.ModuleDict(
            {
                str(number): LayerWeights(widths.get(number), changes.get(number))
                for number in sorted(widths.keys() | changes.keys())
            }
        )
        self.fusion = fusion
        self.noise = noise
        self.spec: dict[str, Any] = {}
        self.plain: dict[str, Tensor] = {}  # what it went on from (`mixing`); empty if not known

    def layers(self) -> dict[int, LayerWeights]:
        """Each layer's weights by its number in `unet.attn_processors`."""
        return {
            int(number): layer
            for number, layer in self.ip_adapter.items()
            if isinstance(layer, LayerWeights)
        }

    def widths(self) -> dict[int, tuple[int, int]]:
        """Token and query width of each layer with an image branch."""
        return {
            number: (layer.to_k_ip.in_features, layer.to_k_ip.out_features)
            for number, layer in self.layers().items()
            if layer.to_k_ip is not None
        }

    @property
    def kind(self) -> str:
        """`base`, `plus`, `full-face`, `faceid` (Portrait too) or `faceid-plus`."""
        return self.image_proj.kind

    @property
    def reads(self) -> tuple[str, ...]:
        """What the projection takes, in order: `pooled`, `hidden`, `face`."""
        return self.image_proj.reads

    @property
    def token_width(self) -> int:
        """Width of the image tokens: the UNet's `cross_attention_dim`."""
        return next(iter(self.widths().values()))[0]

    @property
    def clip_dim(self) -> int | None:
        """Width of the image encoder's output that it reads; None when it reads faces alone."""
        projection = self.image_proj
        if isinstance(projection, LinearProjection):
            return projection.proj.in_features
        if isinstance(projection, ResamplerProjection):
            return projection.proj_in.in_features
        if isinstance(projection, FaceIDPlusProjection):
            return projection.perceiver_resampler.proj_in.in_features
        if isinstance(projection, FullFaceProjection):
            return projection.proj[0].in_features  # type: ignore[return-value]
        return None

    def tokens(
        self, *embeds: Tensor, level: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Embeddings to image tokens, (batch, tokens, width).

        Args:
            embeds: In the order of `reads`.
            level: For noise-conditioned adapters, τ of each item; None is 0.
            noise: For these, of the shape of the first of the embeddings.
        """
        if self.noise is None:
            return self.image_proj(*embeds)
        return self.image_proj(self.noise(embeds[0], level, noise), *embeds[1:])

    def fuse(
        self, tokens: Tensor, text: Tensor, text_mask: Tensor | None = None, strength: float = 1.0
    ) -> Tensor:
        """Let the image tokens of one reference attend to the text; without a fusion, as given."""
        if self.fusion is None or strength == 0:
            return tokens
        return self.fusion(tokens, text, text_mask, strength)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> ImagePromptAdapter:
        """Open an adapter in any published layout (`checkpoint.load_adapter`).

        The arguments are those of diffusers' `load_ip_adapter`.

        Args:
            source: A file, a folder, or a hub id.
            options: `weight_name`, `subfolder`, `revision`, `local_files_only`, `token`,
                `cache_dir`, `face_id_plus_v2`.

        Raises:
            CheckpointError: It is missing, broken, of another layout, or for another model.
        """
        from ipdiverse.adapter.files.checkpoint import load_adapter

        return load_adapter(source, **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: Any = None,
        *,
        license: str | None = None,  # noqa: A002 - as the hub calls it
        base_model: str | None = None,
    ) -> None:
        """Write the weights and a model card into a folder (`publishing.save_folder`).

        Args:
            folder: Made if need be.
            dtype: Of the stored tensors; None keeps the adapter's.
            license: Its short name on the hub, for example `apache-2.0`; None states none.
            base_model: Hub id of what it prompts; None takes what it was trained on, if known.

        Raises:
            ArgumentError: The license or the base model is no such name.
            OutputError: The folder cannot be written.
        """
        from ipdiverse.adapter.files.card import Stated
        from ipdiverse.adapter.files.publishing import save_folder

        save_folder(self, folder, dtype, Stated(license, base_model))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,  # noqa: A002 - as the hub calls it
        base_model: str | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        dtype: Any = None,
    ) -> str:
        """Upload the weights and a model card.

        Args:
            repo_id: `owner/name`; made if need be.
            license: Its short name on the hub, for example `apache-2.0`; None states none.
            base_model: Hub id of what it prompts; None takes what it was trained on, if known.
            private: Of a repository that is made.
            token: None takes the one that is logged in.
            commit_message: None takes the hub's.
            create_pr: Propose instead of changing.
            dtype: Of the stored tensors; None keeps the adapter's.

        Returns:
            The page's address.

        Raises:
            ArgumentError: The repository, the license or the base model is no such name.
            ModelError: There is no token, the hub refused, or it cannot be reached.
        """
        from ipdiverse.adapter.files.card import Stated
        from ipdiverse.adapter.files.publishing import push_folder

        return push_folder(
            self,
            repo_id,
            Stated(license, base_model),
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            dtype=dtype,
        )


def attention_layers(unet: Any) -> dict[int, str]:
    """Number in `unet.attn_processors` to module name, for every attention layer."""
    return {
        number: name.removesuffix(".processor") for number, name in enumerate(unet.attn_processors)
    }


def cross_attention_layers(unet: Any) -> dict[int, str]:
    """Those that attend to the text."""
    return {n: name for n, name in attention_layers(unet).items() if name.endswith("attn2")}


def layer_widths(unet: UNet2DConditionModel) -> dict[int, tuple[int, int]]:
    """Token and query width of each cross-attention layer, read from the layers themselves."""
    return {
        number: (attention.to_k.in_features, attention.to_q.out_features)
        for number, attention in _cross_attentions(unet).items()
    }


def _cross_attentions(unet: UNet2DConditionModel) -> dict[int, Any]:
    return {n: unet.get_submodule(name) for n, name in cross_attention_layers(unet).items()}


def new_adapter(
    kind: Kind,
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModelWithProjection,
    fusion: Fusion | None = None,
    **projection_sizes: int,
) -> ImagePromptAdapter:
    """An untrained adapter that fits a UNet and an image encoder.

    Args:
        kind: `base` or `plus`.
        unet: The model to prompt; keys and values start as copies of its text projections, as in
            the original.
        image_encoder: What gives the image embeddings.
        fusion: Of the UNet's `cross_attention_dim`; None is plain IP-Adapter.
        projection_sizes: `num_tokens`, and for plus `width` and `depth`.
    """
    widths = layer_widths(unet)
    token_width = next(iter(widths.values()))[0]
    if kind == "base":
        projection = LinearProjection(
            image_encoder.config.projection_dim, token_width, **projection_sizes
        )
    else:
        projection = ResamplerProjection(
            image_encoder.config.hidden_size, token_width, **projection_sizes
        )
    adapter = ImagePromptAdapter(projection, widths, fusion)
    layers = adapter.layers()
    for number, attention in _cross_attentions(unet).items():
        for mine, theirs in (
            (layers[number].to_k_ip, attention.to_k),
            (layers[number].to_v_ip, attention.to_v),
        ):
            if mine is not None:
                mine.weight.data.copy_(theirs.weight.data)
    return adapter
