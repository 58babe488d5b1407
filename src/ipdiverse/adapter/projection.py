"""Image and face embeddings to image tokens, under the parameter names of published checkpoints.

`clip_dim` is the width of what is read of the image encoder, `token_width` the UNet's
`cross_attention_dim`. A face embedding, `face_dim` wide, comes from a recognition model (ArcFace:
512); it says who, not how the image looks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """What all have: a kind, what they read, in order, and its widths; None where they do not."""

    kind = ""
    reads: tuple[str, ...] = ()
    clip_dim: int | None = None
    face_dim: int | None = None
    num_tokens: int | None = None  # None is as many as the image encoder has states
    token_width: int


class LinearProjection(Projection):
    """Projection `base`: the pooled embedding to a few tokens (arXiv:2308.06721, section 3.2.1)."""

    kind = "base"
    reads = ("pooled",)

    def __init__(self, clip_dim: int, token_width: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.clip_dim, self.token_width, self.num_tokens = clip_dim, token_width, num_tokens
        self.proj = nn.Linear(clip_dim, num_tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(
        self, image_embeds: Float[Tensor, "batch clip_dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Project and normalise each token."""
        tokens = self.proj(image_embeds)
        return self.norm(tokens.unflatten(-1, (self.num_tokens, -1)))


class PerceiverAttention(nn.Module):
    """Learned queries attend to image features and to themselves (Flamingo, arXiv:2204.14198)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # heads of 64: files do not hold the number, and stock diffusers takes 64 for granted
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        latents: Float[Tensor, "batch tokens width"],
        shift: Float[Tensor, "#batch 1 width"] | float = 0.0,
        scale: Float[Tensor, "#batch 1 width"] | float = 0.0,
    ) -> Float[Tensor, "batch tokens width"]:
        """One round of attention, without the residual; the time may shift and scale latents."""
        features, latents = self.norm1(features), self.norm2(latents) * (1 + scale) + shift
        key, value = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(latents), key, value)
        )
        # the original scales query and key by head_dim^-1/4 each, for fp16; this scales once
        return self.to_out(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class Perceiver(Projection):
    """Tokens read the image encoder's hidden states, in `depth` rounds."""

    def __init__(self, clip_dim: int, width: int, token_width: int, depth: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(clip_dim, width)
        self.proj_out = nn.Linear(width, token_width)
        self.norm_out = nn.LayerNorm(token_width)
        self.layers = nn.ModuleList(
            [nn.ModuleList([PerceiverAttention(width), feed_forward(width)]) for _ in range(depth)]
        )

    def read(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        hidden: Float[Tensor, "batch patches clip_dim"],
    ) -> Float[Tensor, "batch tokens token_width"]:
        """What the tokens become."""
        features = self.proj_in(hidden)
        for layer in self.layers:
            attention, feed_forward = layer  # type: ignore[misc]
            tokens = attention(features, tokens) + tokens
            tokens = feed_forward(tokens) + tokens
        return self.norm_out(self.proj_out(tokens))


def feed_forward(width: int) -> nn.Sequential:
    """Norm, linear, GELU, linear; four times as wide inside, no biases in the linear layers."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


class ResamplerProjection(Perceiver):
    """Projection `plus`: learned queries read the penultimate hidden states.

    Args:
        num_tokens: How many queries; 16 in published checkpoints.
        width: Width inside; a multiple of 64.
        depth: Rounds of attention and feed-forward; 4 in published checkpoints.
    """

    kind = "plus"
    reads = ("hidden",)

    def __init__(
        self,
        clip_dim: int,
        token_width: int,
        num_tokens: int = 16,
        width: int = 768,
        depth: int = 4,
    ) -> None:
        latents = torch.empty(1, num_tokens, width)
        if not latents.is_meta:  # there, arithmetic imports sympy and torch's compiler: seconds
            latents.normal_().div_(width**0.5)  # first of all draws, so that a seed's stay
        super().__init__(clip_dim, width, token_width, depth)
        self.clip_dim, self.token_width, self.num_tokens = clip_dim, token_width, num_tokens
        self.latents = nn.Parameter(latents)

    def forward(
        self, image_embeds: Float[Tensor, "batch patches clip_dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Read the hidden states into a fixed number of tokens."""
        return self.read(self.latents.expand(len(image_embeds), -1, -1), image_embeds)


class FullFaceProjection(Projection):
    """Projection `full-face`: every penultimate hidden state becomes a token.

    Args:
        hidden_width: Width between the two layers; None takes `clip_dim`, as published.
    """

    kind = "full-face"
    reads = ("hidden",)

    def __init__(self, clip_dim: int, token_width: int, hidden_width: int | None = None) -> None:
        super().__init__()
        self.clip_dim, self.token_width = clip_dim, token_width
        inner = hidden_width or clip_dim
        self.proj = nn.Sequential(
            nn.Linear(clip_dim, inner),
            nn.GELU(),
            nn.Linear(inner, token_width),
            nn.LayerNorm(token_width),
        )

    def forward(
        self, hidden: Float[Tensor, "batch patches clip_dim"]
    ) -> Float[Tensor, "batch patches width"]:
        """Project each state."""
        return self.proj(hidden)


class FaceIDProjection(Projection):
    """Projections `faceid` and `portrait`: a face embedding to a few tokens.

    Args:
        num_tokens: Tokens a face; 4 in published FaceID, 16 in Portrait.
        hidden_width: Width between the two layers; None takes twice `face_dim`, as published.
    """

    kind = "faceid"
    reads = ("face",)

    def __init__(
        self, face_dim: int, token_width: int, num_tokens: int = 4, hidden_width: int | None = None
    ) -> None:
        super().__init__()
        self.face_dim, self.token_width, self.num_tokens = face_dim, token_width, num_tokens
        self.proj = face_layers(face_dim, num_tokens * token_width, hidden_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(
        self, face: Float[Tensor, "batch *faces face_dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Project one face, or several whose tokens then stand side by side (Portrait)."""
        tokens = self.norm(self.proj(face).unflatten(-1, (self.num_tokens, -1)))
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens


class FaceIDPlusProjection(Projection):
    """Projection `faceid-plus`: a face's tokens, refined by what the face looks like.

    Args:
        num_tokens: 4 in published checkpoints.
        depth: Rounds of the perceiver.
        hidden_width: Width between the first two layers; None takes twice `face_dim`.
        shortcut: Version 2 adds the refinement to the face's own tokens; version 1 replaces them.
            Both have the same keys, so the user says which.
    """

    kind = "faceid-plus"
    reads = ("face", "hidden")

    def __init__(
        self,
        face_dim: int,
        clip_dim: int,
        token_width: int,
        num_tokens: int = 4,
        depth: int = 4,
        hidden_width: int | None = None,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.face_dim, self.clip_dim, self.token_width = face_dim, clip_dim, token_width
        self.num_tokens, self.shortcut = num_tokens, shortcut
        self.proj = face_layers(face_dim, num_tokens * token_width, hidden_width)
        self.norm = nn.LayerNorm(token_width)
        self.perceiver_resampler = Perceiver(clip_dim, token_width, token_width, depth)

    def forward(
        self, face: Float[Tensor, "batch face_dim"], hidden: Float[Tensor, "batch patches clip_dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Project the face and refine its tokens by the image."""
        tokens = self.norm(self.proj(face).unflatten(-1, (self.num_tokens, -1)))
        refined = self.perceiver_resampler.read(tokens, hidden)
        return tokens + refined if self.shortcut else refined


class PooledProjection(FaceIDProjection):
    """Projection `pooled`: as `faceid`, of the pooled image embedding (InstantX for Flux.1)."""

    kind = "pooled"
    reads = ("pooled",)

    def __init__(
        self, clip_dim: int, token_width: int, num_tokens: int, hidden_width: int | None = None
    ) -> None:
        super().__init__(clip_dim, token_width, num_tokens, hidden_width)
        self.clip_dim, self.face_dim = clip_dim, None


class ReduxProjection(Projection):
    """Projection `redux`: each last hidden state of SigLIP becomes a token of text (Flux Redux)."""

    kind = "redux"
    reads = ("last",)

    def __init__(self, clip_dim: int, token_width: int, hidden_width: int) -> None:
        super().__init__()
        self.clip_dim, self.token_width = clip_dim, token_width
        self.redux_up = nn.Linear(clip_dim, hidden_width)
        self.redux_down = nn.Linear(hidden_width, token_width)

    def forward(
        self, last: Float[Tensor, "batch patches clip_dim"]
    ) -> Float[Tensor, "batch patches width"]:
        """Project each state."""
        return self.redux_down(F.silu(self.redux_up(last)))


class GivenTokens(Projection):
    """In place of a projection, where image tokens stand behind a prompt's text (Flux Redux).

    Args:
        num_tokens: How many there are; stock's prior pipeline gives 729.
    """

    kind = "redux"

    def __init__(self, token_width: int, num_tokens: int = 729) -> None:
        super().__init__()
        self.token_width, self.num_tokens = token_width, num_tokens


class TimeEmbedding(nn.Module):
    """Timesteps (batch,) to (batch, width): sines of them, then two layers."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed; in float32 up to the layers, as half precision would merge timesteps."""
        half = self.linear_1.in_features // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angles = timestep.float()[:, None] * 10_000**-steps
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TimeResamplerProjection(ResamplerProjection):
    """Projection `time-resampler`: `plus`, told the timestep (InstantX for SD 3.5).

    Its tokens differ at each step: a reference is kept as hidden states, and `at` projects them.

    Args:
        frequencies: Width of what the time embedding starts from; 320 in the published checkpoint.
    """

    kind = "time-resampler"

    def __init__(
        self,
        clip_dim: int,
        token_width: int,
        num_tokens: int,
        width: int,
        depth: int,
        frequencies: int,
    ) -> None:
        super().__init__(clip_dim, token_width, num_tokens, width, depth)
        self.time_embedding = TimeEmbedding(frequencies, width)
        for layer in self.layers:
            layer.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))  # type: ignore[operator]

    def forward(self, image_embeds: Tensor) -> Tensor:
        """The hidden states themselves: what of a reference holds at every step."""
        return image_embeds

    def at(
        self,
        hidden: Float[Tensor, "batch patches clip_dim"],
        time: Float[Tensor, "1 width"],
    ) -> Float[Tensor, "batch tokens token_width"]:
        """Image tokens at a time that `time_embedding` embedded."""
        features = self.proj_in(hidden) + time[:, None]
        tokens = self.latents.expand(len(hidden), -1, -1)
        for layer in self.layers:
            attention, feed_forward, by_time = layer  # type: ignore[misc]
            shift, scale, shift_mlp, scale_mlp = by_time(time)[:, None].chunk(4, dim=-1)
            tokens = attention(features, tokens, shift, scale) + tokens
            normed = feed_forward[0](tokens) * (1 + scale_mlp) + shift_mlp
            tokens = feed_forward[1:](normed) + tokens
        return self.norm_out(self.proj_out(tokens))


def face_layers(face_dim: int, width: int, hidden_width: int | None) -> nn.Sequential:
    """Linear, GELU, linear; biases everywhere."""
    inner = hidden_width or 2 * face_dim
    return nn.Sequential(nn.Linear(face_dim, inner), nn.GELU(), nn.Linear(inner, width))
