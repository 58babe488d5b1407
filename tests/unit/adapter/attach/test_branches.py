"""Which rows of a call are the prompt's: stock pipelines of every order, and what is refused."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.attach.branches import EncodedPrompt, tell_branches
from ipdiverse.adapter.attention import BOTH, NOTHING
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling.denoiser import steer
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = models.picture(1), models.picture(2)
NO, YES = NOTHING, BOTH


def rows(
    pipe: Any, prompt: Any = "a critter", called: Any = None, **options: Any
) -> list[list[str]]:
    """For each call of the UNet, what each row's image tokens are: the image's or nobody's."""
    calls: list[list[str]] = []
    with attach(pipe, models.adapter("base", pipe.unet)) as attachment:
        attachment.set_reference(A)
        part = attachment.hook.prompts[0].references[0]
        image, none = part.positive.flatten(), part.negative.flatten()
        inner = attachment.hook._set_scales

        def spy(*arguments: Any) -> None:
            inner(*arguments)
            tokens = attachment.hook.prompts[0].slot.groups[0].tokens.flatten(1)
            calls.append([YES if torch.equal(row, image) else NO for row in tokens])
            assert all(torch.equal(row, image) or torch.equal(row, none) for row in tokens)

        attachment.hook._set_scales = spy  # type: ignore[method-assign]
        settings = {"num_inference_steps": 1, "output_type": "latent"} | options
        (called or pipe)(prompt, **settings)
    return calls


def made(task: str, name: str = "sd1", **parts: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.pipeline(name, task, **parts)


def perturbed(task: str = "PAG", name: str = "sd1") -> Any:
    return made(task, name, pag_applied_layers=["mid"])


def edited(name: str = "sd1") -> Any:
    return made("InstructPix2Pix", name, unet=models.unet(name, in_channels=8))


def controlled(task: str = "ControlNet", **options: Any) -> Any:
    net = diffusers.ControlNetModel.from_unet(models.unet("sd1"))
    net.controlnet_cond_embedding = ControlNetConditioningEmbedding(16, 3, (8, 8, 8))  # to a fourth
    return made(task, controlnet=net, **options)


GUIDED = {"guidance_scale": 7.5}
EDIT = {"image": [B], "image_guidance_scale": 1.5}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[list[str]]]] = {
    "unguided": (lambda: made(""), {"guidance_scale": 0.0}, [[YES]]),
    "guided": (lambda: made(""), GUIDED, [[NO, YES]]),
    "two images": (lambda: made(""), {**GUIDED, "num_images_per_prompt": 2}, [[NO, NO, YES, YES]]),
    "sdxl": (lambda: made("", "sdxl"), GUIDED, [[NO, YES]]),
    "perturbed": (perturbed, {**GUIDED, "pag_scale": 3.0}, [[NO, YES, YES]]),
    "perturbed, two": (
        perturbed,
        {**GUIDED, "pag_scale": 3.0, "num_images_per_prompt": 2},
        [[NO, NO, YES, YES, YES, YES]],
    ),
    "perturbed alone": (perturbed, {"guidance_scale": 0.0, "pag_scale": 3.0}, [[YES, YES]]),
    "perturbed off": (perturbed, {**GUIDED, "pag_scale": 0.0}, [[NO, YES]]),
    "perturbed sdxl": (
        lambda: perturbed("PAG", "sdxl"),
        {**GUIDED, "pag_scale": 3.0},
        [[NO, YES, YES]],
    ),
    "edit": (edited, {**GUIDED, **EDIT}, [[YES, NO, NO]]),
    "edit, two": (
        edited,
        {**GUIDED, **EDIT, "num_images_per_prompt": 2},
        [[YES, YES, NO, NO, NO, NO]],
    ),
    "edit unguided": (edited, {"guidance_scale": 1.0, **EDIT}, [[YES]]),
    "self-attention guidance": (
        lambda: made("SAG"),
        {**GUIDED, "sag_scale": 0.75},
        [[NO, YES], [NO]],
    ),
    "self-attention alone": (
        lambda: made("SAG"),
        {"guidance_scale": 1.0, "sag_scale": 0.75},
        [[YES], [YES]],
    ),
    "ControlNet, guess mode, two": (
        controlled,
        {**GUIDED, "image": B, "guess_mode": True, "num_images_per_prompt": 2},
        [[NO, NO, YES, YES]],
    ),
    "ControlNet, guess mode, unguided": (
        controlled,
        {"guidance_scale": 1.0, "image": B, "guess_mode": True},
        [[YES]],
    ),
    "ControlNet, perturbed": (
        lambda: controlled("ControlNetPAG", pag_applied_layers=["mid"]),
        {**GUIDED, "image": B, "pag_scale": 3.0},
        [[NO, YES, YES]],
    ),
    "perturbed, from an image": (
        lambda: perturbed("PAGImg2Img"),
        {**GUIDED, "image": B, "strength": 1.0, "pag_scale": 3.0},
        [[NO, YES, YES]],
    ),
    "panorama": (
        lambda: made("Panorama"),
        {**GUIDED, "height": 64, "width": 64, "view_batch_size": 1},
        [[NO, YES]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_row_gets_what_its_branch_is(case: str) -> None:
    make, options, expected = CASES[case]
    found = rows(make(), **options)
    assert found[: len(expected)] == expected
    assert all(call in expected for call in found)


@pytest.mark.parametrize("case", ["guided", "perturbed", "edit"])
def test_a_prompt_like_the_negative_one_is_told_by_the_class(case: str) -> None:
    make, options, expected = CASES[case]
    assert rows(make(), "", negative_prompt="", **options) == expected


def test_a_class_that_does_not_say_whether_it_guides_needs_texts_that_differ() -> None:
    with pytest.raises(ArgumentError, match=r"SAGPipeline: cannot tell.*Give a negative prompt"):
        rows(made("SAG"), "", negative_prompt="", sag_scale=0.75, **GUIDED)


def test_guidance_may_end_on_the_way() -> None:
    """As diffusers' own page on callbacks does it."""

    def end(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    found = rows(
        made(""),
        num_inference_steps=3,
        callback_on_step_end=end,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **GUIDED,
    )
    assert found == [[NO, YES], [YES], [YES]]


def test_embeddings_in_place_of_a_prompt_are_known() -> None:
    pipe = made("")
    positive, negative = pipe.encode_prompt("a critter", "cpu", 1, True, "bad")
    assert rows(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative, **GUIDED) == [
        [NO, YES]
    ]


def test_another_pipeline_on_the_same_unet_is_told_apart() -> None:
    """Its own text is refused; text that the attached one encoded has known rows."""
    pipe = made("")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    options = {"image": B, "strength": 1.0, "guidance_scale": 0.0}
    with pytest.raises(ArgumentError, match=r"cannot tell which rows.*attach to the one that you"):
        rows(pipe, "a critter", other, **options)

    def both(prompt: str, **settings: Any) -> Any:
        pipe(prompt, num_inference_steps=1, output_type="latent")
        return other(prompt, num_images_per_prompt=2, **settings)

    assert rows(pipe, "a critter", both, **options) == [[NO, YES], [YES, YES]]


def test_the_unet_called_directly_is_refused_unless_its_text_is_known() -> None:
    pipe = made("")
    text = torch.randn(2, 16, 64)
    with attach(pipe, models.adapter("base", pipe.unet)) as attachment, torch.no_grad():
        attachment.set_reference(A)
        with pytest.raises(ArgumentError, match="StableDiffusionPipeline: cannot tell which rows"):
            pipe.unet(torch.randn(2, 4, 8, 8), 500, text)
        models.as_encoded(attachment, text[1:], text[:1])
        pipe.unet(torch.randn(2, 4, 8, 8), 500, text)


def test_pipelines_with_several_prompts_are_refused() -> None:
    class LEditsPPPipelineStableDiffusion:
        unet = models.unet("sd1")

    with pytest.raises(ModelError, match=r"LEdits.*: draws one image with several prompts"):
        attach(LEditsPPPipelineStableDiffusion(), models.adapter("base", models.unet("sd1")))


def test_levers_refuse_guidance_that_they_do_not_know() -> None:
    pipe = perturbed()
    with attach(pipe, models.adapter("base", pipe.unet)) as attachment:
        attachment.set_reference(A)
        steer(attachment, Levers(image_guidance=2.0), (1,))
        with pytest.raises(ModelError, match=r"PAGPipeline: has guidance of its own.*release"):
            pipe("a", num_inference_steps=1, pag_scale=3.0, guidance_scale=5.0)


TEXTS = torch.arange(6.0)[:, None, None].expand(6, 2, 3).contiguous()


class Guided:
    do_classifier_free_guidance = True

    def encode_prompt(self) -> None: ...


def test_rows_are_told_block_by_block() -> None:
    """A prompt of one item may be the negative prompt of another."""
    known = [EncodedPrompt(TEXTS[[0, 1]], TEXTS[[1, 0]])]
    assert tell_branches(Guided(), TEXTS[[1, 0, 0, 1]], known).layout == (NO, YES)
    assert tell_branches(Guided(), TEXTS[[0, 1, 1, 0]], known).layout == (YES, NO)
    assert tell_branches(Guided(), TEXTS[[0, 1]], known).layout == (YES,)
    newer = [*known, EncodedPrompt(TEXTS[[2, 3]], TEXTS[[0, 1]])]
    assert tell_branches(Guided(), TEXTS[[0, 1]], newer).layout == (NO,)
    with pytest.raises(ArgumentError, match="cannot tell"):
        tell_branches(Guided(), TEXTS[[4, 5]], newer)
    with pytest.raises(ArgumentError, match="cannot tell"):
        tell_branches(Guided(), TEXTS[[0, 1, 4, 5]], newer)


def test_words_are_those_of_the_rows() -> None:
    words = torch.tensor([[True, False], [True, True]])
    prompt = EncodedPrompt(TEXTS[:1], TEXTS[1:2], words)
    told = tell_branches(Guided(), TEXTS[[1, 0]], [prompt])
    assert told.words_of((NO, YES), 1, 2).tolist() == words.tolist()  # type: ignore[union-attr]
    assert told.words_of((YES,), 1, 2).tolist() == [[True, True]]  # type: ignore[union-attr]
    assert told.words_of((YES,), 1, 5) is None
    mixed = [prompt, EncodedPrompt(TEXTS[2:3], TEXTS[3:4], words)]
    assert tell_branches(Guided(), TEXTS[[1, 2]], mixed).prompt is None
