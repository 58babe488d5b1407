"""Group selection: of many candidates, the set that says most, judged by early previews.

max Σ u_i y_i + λ Σ b_ij y_i y_j with Σ y = K (arXiv:2508.15773): u how well a preview shows the
prompt, b how far two previews are apart. Only the first steps of a candidate are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.adapter.attach.attach import Attachment
from ipdiverse.adapter.attach.encoding import text_embeds, text_tower
from ipdiverse.base.memory import full_range
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, preview
from ipdiverse.sampling.task import Task

EARLY = 0.3
"""Share of the steps that a preview takes."""
APART = 1.0
"""λ: weight of a pair's distance against a preview's own worth, both in standard deviations."""


def select(
    worth: Float[Tensor, " candidates"],
    apart: Float[Tensor, "candidates candidates"],
    count: int,
    weight: float = APART,
) -> list[int]:
    """The best group found by greedy choice and then by swaps until none helps, in rising order.

    Args:
        apart: b of each pair; symmetric, its diagonal does not count.
        weight: λ; a group's sum of distances is divided by K − 1, so that it does not grow with K.
    """
    total = len(worth)
    if count >= total:
        return list(range(total))
    pairs = weight / max(1, count - 1) * (apart - torch.diag(torch.diagonal(apart)))
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(total) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(worth[i] + pairs[i, chosen].sum())))
    improved = True
    while improved:
        improved = False
        for position, other in product(range(count), range(total)):
            if other in chosen:
                continue
            rest = chosen[:position] + chosen[position + 1 :]
            gain = worth[other] - worth[chosen[position]]
            gain = gain + pairs[other, rest].sum() - pairs[chosen[position], rest].sum()
            if float(gain) > 1e-9:  # a rounding must not swap two equals for ever
                chosen[position], improved = other, True
    return sorted(chosen)


def chosen(
    jobs: Sequence[Job],
    request: Request,
    task: Task,
    attachment: Attachment,
    negative: Image.Image | None,
) -> list[Job]:
    """The best group of each prompt's candidates."""
    guesses = preview(task, jobs, request, attachment, negative, EARLY)
    kept: list[Job] = []
    for start in range(0, len(jobs), request.candidates or 1):
        part = jobs[start : start + (request.candidates or 1)]
        seen = guesses[start : start + len(part)]
        worth, apart = judged(attachment, seen, [job.prompt for job in part])
        kept += [part[i] for i in select(worth, apart, request.n)]
    return kept


@torch.no_grad()
def judged(
    attachment: Attachment, guesses: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Worth and distances of previews, each in standard deviations."""
    if attachment.image_encoder is None:
        seen = F.normalize(guesses.flatten(1).float(), dim=1)
        return torch.zeros(len(guesses)), _standard_pairs(1 - seen @ seen.T)
    seen = F.normalize(_seen(attachment, guesses).float(), dim=1)
    worth = torch.zeros(len(guesses))
    distinct = list(dict.fromkeys(prompts))
    read = joint_text(attachment.pipe, distinct, seen.shape[1])
    if read is not None:
        text = F.normalize(read[[distinct.index(prompt) for prompt in prompts]], dim=1)
        agreement = (seen * text.to(seen)).sum(1)
        # candidates that show the prompt equally well have no deviation
        worth = (agreement - agreement.mean()) / agreement.std().clamp_min(1e-6)
    return worth.cpu(), _standard_pairs(1 - seen @ seen.T).cpu()


def _seen(attachment: Attachment, guesses: Tensor) -> Tensor:
    vae, encoder = attachment.pipe.vae, attachment.image_encoder
    device = attachment.pipe._execution_device  # an offloaded VAE moves itself, not its arguments
    parameter = next(encoder.parameters())
    side = encoder.config.image_size
    processor = attachment.image_processor
    usual = (getattr(processor, name, None) or [0.5] * 3 for name in ("image_mean", "image_std"))
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in usual)
    # decoded at once: four, or as many as have the pixels of four at 512 × 512
    pixels_of_one = guesses.shape[-1] * guesses.shape[-2] * attachment.pipe.vae_scale_factor**2
    rows = []
    for guess in guesses.split(min(4, max(1, 4 * 512**2 // pixels_of_one))):
        with full_range(vae):
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents = (guess / vae.config.scaling_factor + shift).to(device, vae.dtype)
            pixels = vae.decode(latents).sample.float().clamp(-1, 1)
        shrunk = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        normal = ((shrunk + 1) / 2 - mean.to(shrunk)) / std.to(shrunk)
        output = encoder(normal.to(parameter.device, parameter.dtype))
        embeds = getattr(output, "image_embeds", None)  # SigLIP pools its states
        rows.append(output.pooler_output if embeds is None else embeds)
    return torch.cat(rows)


def _standard_pairs(apart: Tensor) -> Tensor:
    """Distances in standard deviations of all pairs, the mean at 0."""
    others = ~torch.eye(len(apart), dtype=torch.bool, device=apart.device)
    values = apart[others]
    return (apart - values.mean()) / values.std().clamp_min(1e-6) if len(values) > 1 else apart


@torch.no_grad()
def joint_text(pipe: Any, texts: list[str], width: int) -> Tensor | None:
    """Texts in the space of an image encoder, (texts, width); None if no text encoder is in it."""
    tower = text_tower(pipe, width)
    return None if tower is None else text_embeds(pipe, tower, texts)
