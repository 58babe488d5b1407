"""What a cell of the acceptance table asserts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.base.pipelines import denoiser_of
from ipdiverse.dial import Levers
from ipdiverse.sampling.denoiser import release, steer
from tests import joint_models, models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.adapter.model import ImagePromptAdapter
    from tests.acceptance.scenes import Scene

REFERENCES = [models.picture(10), models.picture(11)]
ROUNDING = 2e-5
"""Processors round differently at different batch sizes."""


def the_five(
    scene: Scene,
    adapter: ImagePromptAdapter | None = None,
    rounding: float = ROUNDING,
    references: Sequence[Any] = REFERENCES,
) -> None:
    """The prompt acts, scale 0 is exact, items do not mix, levers act, detaching is exact."""
    denoiser = denoiser_of(scene.pipe)
    state, processors = tensors(denoiser), dict(denoiser.attn_processors)
    plain = scene.run([0])
    attachment = put_on(scene.pipe, adapter or adapter_of(scene.pipe))
    try:
        prompted = acts_and_stops_at_zero(scene, attachment, references, plain)
        items_do_not_mix(scene, attachment, references, rounding)
        levers_act(scene, attachment, references, rounding)
        if scene.other is not None:
            attachment.set_reference(references[0])
            differ(scene.other([0]), prompted)
    finally:
        detach(scene.pipe)
    np.testing.assert_array_equal(scene.run([0]), plain)
    assert denoiser.attn_processors == processors
    after = tensors(denoiser)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def adapter_of(pipe: Any) -> ImagePromptAdapter:
    """A random adapter for a pipeline's denoiser: `plus`, XLabs' on Flux, InstantX' on SD 3."""
    kind = type(denoiser_of(pipe)).__name__
    if kind == "FluxTransformer2DModel":
        return joint_models.adapter(joint_models.xlabs_tensors())
    if kind == "SD3Transformer2DModel":
        return joint_models.adapter(joint_models.sd3_tensors())
    return models.adapter("plus", pipe.unet)


def put_on(pipe: Any, *adapters: ImagePromptAdapter) -> Attachment:
    """Attach; some stock pipelines have no image encoder of their own."""
    parts = models.pipeline("sd1")
    encoder = getattr(pipe, "image_encoder", None) or parts.image_encoder
    processor = getattr(pipe, "feature_extractor", None) or parts.feature_extractor
    return attach(pipe, *adapters, image_encoder=encoder, image_processor=processor)


def acts_and_stops_at_zero(
    scene: Scene, attachment: Attachment, references: Sequence[Any], plain: np.ndarray
) -> np.ndarray:
    """Gives item 0 with the first reference."""
    attachment.set_reference(references[0])
    attachment.set_scale(0.0)
    np.testing.assert_array_equal(scene.run([0]), plain)
    attachment.set_scale(1.0)
    prompted = scene.run([0])
    attachment.set_reference(references[1])
    differ(prompted, plain)
    differ(scene.run([0]), prompted)
    return prompted


def items_do_not_mix(
    scene: Scene, attachment: Attachment, references: Sequence[Any], rounding: float
) -> None:
    attachment.set_reference(references)
    together = scene.run([0, 1])
    for item in (0, 1):
        attachment.set_reference(references[item])
        equal(together[item], scene.run([item])[0], rounding)


STRONG = Levers(image_guidance=1.5, interval=(0.3, 1e6), cads=0.5)


def levers_act(
    scene: Scene, attachment: Attachment, references: Sequence[Any], rounding: float
) -> None:
    attachment.set_reference(references)
    before, seeds = scene.run([0, 1]), (3, 4)
    steer(attachment, Levers(), seeds)
    np.testing.assert_array_equal(scene.run([0, 1]), before)
    steer(attachment, STRONG, seeds)
    together = scene.run([0, 1])
    differ(together, before)
    release(attachment)
    np.testing.assert_array_equal(scene.run([0, 1]), before)
    attachment.set_reference(references[1])
    steer(attachment, STRONG, seeds[1:])
    equal(together[1], scene.run([1])[0], 4 * rounding)
    release(attachment)


def equal(found: np.ndarray, expected: np.ndarray, rounding: float = ROUNDING) -> None:
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= rounding * max(1.0, float(np.abs(expected).max()))


def differ(found: np.ndarray, other: np.ndarray) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - other).max() > 1e-3 * max(1.0, float(np.abs(other).max()))


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
