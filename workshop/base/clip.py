"""Stages `text` and `clip`: the text encoder, then the image encoder in the same space.

`text` trains the text encoder alone to classify, from its pooled state, the attributes that a
caption states; the heads are not saved. `clip` then trains the image encoder contrastively against
it (InfoNCE, Radford et al., arXiv:2103.00020), with the text tower locked (Zhai et al.,
arXiv:2111.07991), and to classify every attribute from the states that adapters read. Trained
separately, each takes minutes on a CPU, and the UNet needs only `text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipdiverse.base.memory import autocast
from ipdiverse.critters.scene import ATTRIBUTES, caption, mentioned

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    from workshop.base.corpus import Corpus


class TextModules(nn.Module):
    """The text encoder and one auxiliary head per attribute: its values, or unstated."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text = text
        sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
        self.heads = nn.ModuleList([nn.Linear(text.config.hidden_size, size) for size in sizes])


class TextObjective:
    """Cross-entropy of every attribute, unstated included, from the pooled text state."""

    def __init__(
        self, modules: TextModules, tokenizer: CLIPTokenizer, corpus: Corpus, batch: int = 128
    ) -> None:
        self.module, self.tokenizer, self.corpus, self.batch = modules, tokenizer, corpus, batch

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss and the share of attributes read right."""
        indices, seeds = _draw(self.corpus, self.batch, rng)
        captions, labels = captions_and_labels(self.corpus, indices, seeds)
        # PyTorch's fused CPU attention is slow backward; the plain one is not
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            pooled = self.module.text(tokenize(self.tokenizer, captions)).pooler_output.float()
        logits = [head(pooled) for head in self.module.heads]
        losses = [F.cross_entropy(head, labels[:, i]) for i, head in enumerate(logits)]
        right = [(h.argmax(-1) == labels[:, i]).float().mean() for i, h in enumerate(logits)]
        return torch.stack(losses).mean(), {"right": float(torch.stack(right).mean())}


class VisionModules(nn.Module):
    """The image encoder, the temperature of the contrast and heads that are not saved."""

    def __init__(self, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.vision = vision
        self.log_temperature = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        width, pooled = vision.config.hidden_size, vision.config.projection_dim
        self.sizes = [len(values) for values in ATTRIBUTES.values()]
        # linear, as what an adapter reads must be easy to find: a copier that cannot see the body
        # keeps it in every second image only
        self.patches = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.pooled = nn.Linear(pooled, sum(self.sizes))


READING = 0.5
"""Weight of the attributes' cross-entropy: captions leave half of the attributes out, and contrast
alone learns shape last."""


class ClipObjective:
    """InfoNCE over a batch of (caption, image), text locked, and the attributes' cross-entropy."""

    def __init__(
        self,
        modules: VisionModules,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        corpus: Corpus,
        batch: int = 192,
    ) -> None:
        self.module, self.text = modules, text.eval().requires_grad_(False)
        self.tokenizer, self.corpus, self.batch = tokenizer, corpus, batch

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss and its 1-of-batch retrieval accuracy."""
        indices, seeds = _draw(self.corpus, self.batch, rng)
        captions, _ = captions_and_labels(self.corpus, indices, seeds)
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = self.text(tokenize(self.tokenizer, captions)).pooler_output
            seen = self.module.vision(self.corpus.pixels(indices), output_hidden_states=True)
            patches = self.module.patches(seen.hidden_states[-2]).mean(1)
            pooled = self.module.pooled(F.normalize(seen.image_embeds, dim=-1) * 8)
        image = seen.image_embeds
        scale = self.module.log_temperature.exp().clamp(max=100)
        logits = scale * F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
        target = torch.arange(len(indices))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        labels = torch.from_numpy(self.corpus.attributes[indices])
        figures = {"top1": float((logits.argmax(-1) == target).float().mean())}
        for name, read in (("patches", patches), ("pooled", pooled)):
            heads = read.float().split(self.module.sizes, dim=-1)
            losses = [F.cross_entropy(head, labels[:, i]) for i, head in enumerate(heads)]
            loss = loss + READING * torch.stack(losses).mean()
            right = [
                (head.argmax(-1) == labels[:, i]).float().mean() for i, head in enumerate(heads)
            ]
            figures |= {name: float(torch.stack(right).mean()), f"{name}_shape": float(right[0])}
        return loss, figures


def _draw(corpus: Corpus, batch: int, rng: torch.Generator) -> tuple[np.ndarray, list[int]]:
    """Image indices and caption seeds of a batch."""
    indices = torch.randint(len(corpus), (batch,), generator=rng).numpy()
    return indices, torch.randint(2**31, (batch,), generator=rng).tolist()


def captions_and_labels(
    corpus: Corpus,
    indices: np.ndarray,
    seeds: list[int],
    chances: list[float | None] | None = None,
) -> tuple[list[str], Tensor]:
    """Fresh captions of these images and, per attribute, the stated value + 1, or 0 for unstated.

    Args:
        corpus: Where the images are.
        indices: Which images.
        seeds: One per caption; decides what it mentions and how.
        chances: For each caption, as `mentioned` takes it.
    """
    captions, labels = [], []
    for index, seed, chance in zip(indices, seeds, chances or [None] * len(seeds), strict=True):
        stated = mentioned(corpus.scene(int(index)), seed, chance)
        captions.append(caption(stated, seed))
        labels.append(
            [1 + values.index(stated[n]) if n in stated else 0 for n, values in ATTRIBUTES.items()]
        )
    return captions, torch.tensor(labels)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, int64 (batch, tokens), padded and cut as Stable Diffusion's pipelines do."""
    length = tokenizer.model_max_length
    return tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
