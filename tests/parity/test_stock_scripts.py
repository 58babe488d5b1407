"""Scripts written for stock diffusers, before and after `diversify`, on small models in fp32."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.image_processor import IPAdapterMaskProcessor
from safetensors.torch import save_file

import ipdiverse
from ipdiverse.adapter.fusion import BlendFusion
from ipdiverse.base.adapters import adapter_file
from ipdiverse.errors import ArgumentError, IpdiverseError, ModelError
from ipdiverse.loading import quiet
from tests import joint_models, models

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-5
IMAGES = [models.picture(10), models.picture(11)]


def loaded(name: str, kinds: list[str], folder: Path) -> Any:
    """A stock pipeline that has loaded an adapter of each kind."""
    pipe = models.pipeline(name, "", fresh=True)
    for number, kind in enumerate(kinds):
        adapter = models.adapter(kind, pipe.unet)
        save_file(adapter.state_dict(), folder / f"{number}.safetensors")
    with quiet():
        pipe.load_ip_adapter(
            [str(folder)] * len(kinds),
            subfolder=[""] * len(kinds),
            weight_name=[f"{number}.safetensors" for number in range(len(kinds))],
        )
    return pipe


def run(pipe: Any, n: int = 1, guidance_scale: float = 4.0, **options: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    return pipe(
        prompt="a red critter in a forest",
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        num_images_per_prompt=n,
        generator=generators,
        output_type="latent",
        **options,
    ).images.numpy()


def equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", [*models.ARCHITECTURES, "kolors"])
@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_at_0_it_draws_what_stock_draws_and_undo_puts_stock_back(
    name: str, kind: str, tmp_path: Path
) -> None:
    pipe = loaded(name, [kind], tmp_path)
    pipe.set_ip_adapter_scale(0.6)
    before = run(pipe, 2, ip_adapter_image=IMAGES[0])
    without = run(pipe, 2, ip_adapter_image=IMAGES[1])
    assert np.abs(before - without).max() > 10 * TOLERANCE  # the image matters
    diversified = ipdiverse.diversify(pipe, 0.0)
    equal(run(pipe, 2, ip_adapter_image=IMAGES[0]), before)
    diversified.undo()
    assert np.array_equal(run(pipe, 2, ip_adapter_image=IMAGES[0]), before)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_kolors_draws_what_stock_draws_and_projects_its_text_as_before(
    guidance: float, tmp_path: Path
) -> None:
    theirs = loaded("kolors", ["plus"], tmp_path)
    theirs.set_ip_adapter_scale(0.7)
    options = {"guidance_scale": guidance}
    expected = run(theirs, ip_adapter_image=IMAGES[0], **options)
    pipe = models.pipeline("kolors")
    before = run(pipe, **options)
    with ipdiverse.attach(pipe, tmp_path / "0.safetensors") as prompt:
        prompt.set_scale(0.7)
        prompt.set_reference(IMAGES[0])
        equal(run(pipe, **options), expected)
        prompt.set_scale(0.0)
        assert np.array_equal(run(pipe, **options), before)
    assert pipe.unet.config.encoder_hid_dim_type == "text_proj"
    assert np.array_equal(run(pipe, **options), before)


def test_a_fusion_reads_the_text_that_kolors_layers_read(tmp_path: Path) -> None:
    pipe = models.pipeline("kolors")
    adapter = models.adapter("plus", pipe.unet)
    adapter.fusion, read = BlendFusion(adapter.token_width), []
    plain = adapter.fusion.forward
    adapter.fusion.forward = lambda tokens, text, mask, *rest: (  # type: ignore[method-assign]
        read.append((text, mask)) or plain(tokens, text, mask, *rest)
    )
    with ipdiverse.attach(pipe, adapter) as prompt:
        prompt.set_reference(IMAGES[0])
        run(pipe)
    (text, mask), *_ = read
    assert text.shape == (2, 256, adapter.token_width)
    with torch.no_grad():
        states = pipe.encode_prompt("a red critter in a forest")[0]
        assert torch.equal(text[1:], pipe.unet.encoder_hid_proj(states))
    # left of the words is padding: one token a letter here, and two marks
    assert mask.sum(1).tolist() == [2, 2 + len("a red critter in a forest")]
    assert mask[1, -1]
    assert not mask[1, 0]


def test_two_adapters_with_scales_by_block(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["base", "plus"], tmp_path)
    scales = [{"down": 0.3, "up": {"block_1": 0.9}}, 0.5]
    pipe.set_ip_adapter_scale(scales)
    before = run(pipe, ip_adapter_image=[IMAGES[0], IMAGES])
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, ip_adapter_image=[IMAGES[0], IMAGES]), before)
        pipe.set_ip_adapter_scale([0.2, 0.2])
        changed = run(pipe, ip_adapter_image=[IMAGES[0], IMAGES])
        assert np.abs(changed - before).max() > 10 * TOLERANCE
        pipe.set_ip_adapter_scale(scales)
        equal(run(pipe, ip_adapter_image=[IMAGES[0], IMAGES]), before)
    assert np.array_equal(run(pipe, ip_adapter_image=[IMAGES[0], IMAGES]), before)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_embeddings_act_as_in_stock(kind: str, tmp_path: Path) -> None:
    pipe = loaded("sd1", [kind], tmp_path)
    embeds = pipe.prepare_ip_adapter_image_embeds([IMAGES[0]], None, "cpu", 1, True)
    before = run(pipe, 2, ip_adapter_image_embeds=embeds)
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, 2, ip_adapter_image_embeds=embeds), before)


def test_arrays_and_prepared_tensors_act_as_in_stock(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    array = np.asarray(IMAGES[0])
    prepared = pipe.feature_extractor(IMAGES[0], return_tensors="pt").pixel_values
    for given in (array, [array], [[array, array[::-1]]], prepared):
        before = run(pipe, ip_adapter_image=given)
        with ipdiverse.diversify(pipe, 0.0):
            equal(run(pipe, ip_adapter_image=given), before)


def test_tensors_of_pictures_are_pictures_which_stock_does_not_know(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    pixels = torch.from_numpy(np.array(IMAGES[0])).permute(2, 0, 1)
    before = run(pipe, ip_adapter_image=IMAGES[0])
    with ipdiverse.diversify(pipe, 0.0):
        for given in (pixels, pixels[None], pixels / 255, pixels[None] / 255, [pixels[None]]):
            equal(run(pipe, ip_adapter_image=given), before)
        with pytest.raises(ArgumentError, match="which number is white"):
            run(pipe, ip_adapter_image=pixels / 255 * 2 - 1)


def test_files_and_lists_are_images_too(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    IMAGES[0].save(tmp_path / "photo.png")
    before = run(pipe, ip_adapter_image=IMAGES[0])
    with ipdiverse.diversify(pipe, 0.0):
        file, pixels = tmp_path / "photo.png", np.asarray(IMAGES[0])
        for given in (file, str(file), [file], (IMAGES[0],), pixels / 255, pixels * 1.0):
            equal(run(pipe, ip_adapter_image=given), before)
        with pytest.raises(IpdiverseError, match=r"gone\.png: the image file does not exist"):
            run(pipe, ip_adapter_image=tmp_path / "gone.png")


def test_one_image_is_for_all_adapters(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["base", "plus"], tmp_path)
    before = run(pipe, ip_adapter_image=[IMAGES[0], IMAGES[0]])
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, ip_adapter_image=IMAGES[0]), before)


def test_masks_act_as_in_stock(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    masks = IPAdapterMaskProcessor().preprocess([left, 255 - left], height=64, width=64)
    masks = [masks.reshape(1, 2, *masks.shape[-2:])]
    options = {
        "ip_adapter_image": [IMAGES],
        "cross_attention_kwargs": {"ip_adapter_masks": masks},
        "height": 64,
        "width": 64,
    }
    before = run(pipe, **options)
    swapped = run(pipe, **{**options, "ip_adapter_image": [IMAGES[::-1]]})
    assert np.abs(before - swapped).max() > 10 * TOLERANCE
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, **options), before)
        options["cross_attention_kwargs"] = {"ip_adapter_masks": [masks[0][:, :1]]}
        with pytest.raises(ArgumentError, match="do not fit the references"):
            run(pipe, **options)


def test_the_cutoff_callback_acts_as_in_stock(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    cut = {"callback_on_step_end": callback}
    whole = run(pipe, ip_adapter_image=IMAGES[0])
    before = run(pipe, ip_adapter_image=IMAGES[0], **cut)
    assert np.abs(before - whole).max() > 10 * TOLERANCE
    pipe.set_ip_adapter_scale(1.0)
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, ip_adapter_image=IMAGES[0], **cut), before)


def test_attach_takes_the_arguments_of_stock_too(tmp_path: Path) -> None:
    theirs = loaded("sd1", ["plus"], tmp_path)
    theirs.set_ip_adapter_scale(0.7)
    before = run(theirs, 2, ip_adapter_image=IMAGES[0])
    pipe = models.pipeline("sd1")
    with ipdiverse.attach(pipe, tmp_path / "0.safetensors"):
        pipe.set_ip_adapter_scale(0.7)
        equal(run(pipe, 2, ip_adapter_image=IMAGES[0]), before)
        with pytest.raises(ModelError, match="detach"):
            pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="0.safetensors")
    assert "set_ip_adapter_scale" not in vars(pipe)
    with pytest.raises(ModelError, match="diversify"):
        ipdiverse.attach(theirs, tmp_path / "0.safetensors")


def test_each_generator_decides_its_image_alone(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    before = run(pipe, 3, ip_adapter_image=IMAGES[0])
    with ipdiverse.diversify(pipe, 1.0) as diversified:
        three = run(pipe, 3, ip_adapter_image=IMAGES[0])
        assert np.abs(three - before).max() > 100 * TOLERANCE
        equal(run(pipe, 1, ip_adapter_image=IMAGES[0]), three[:1])
        diversified.set_diversity(0.0)
        equal(run(pipe, 3, ip_adapter_image=IMAGES[0]), before)


def test_a_dial_at_0_takes_a_fusion_off_and_leaves_nothing_behind(tmp_path: Path) -> None:
    theirs = loaded("sd1", ["plus"], tmp_path)
    before = run(theirs, 2, ip_adapter_image=IMAGES[0])
    pipe = models.pipeline("sd1")
    adapter = ipdiverse.load_adapter(tmp_path / "0.safetensors")
    torch.manual_seed(0)
    adapter.fusion = BlendFusion(adapter.token_width)
    with ipdiverse.attach(pipe, adapter) as prompt:
        fused = run(pipe, 2, ip_adapter_image=IMAGES[0])
        assert np.abs(fused - before).max() > 10 * TOLERANCE
        for diversity in (0.5, 0.7, 0.0):
            prompt.set_diversity(diversity)
        equal(run(pipe, 2, ip_adapter_image=IMAGES[0]), before)
        assert "prepare_latents" in vars(pipe)
    assert not {"prepare_latents", "set_ip_adapter_scale"} & vars(pipe).keys()


def test_unloading_takes_ours_off_too(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    plain = run(models.pipeline("sd1"))
    ipdiverse.diversify(pipe, 0.7)
    pipe.unload_ip_adapter()
    assert pipe.image_encoder is None  # as stock leaves it
    assert np.array_equal(run(pipe), plain)
    with pytest.raises(ModelError, match="no adapter is attached"):
        ipdiverse.detach(pipe)
    pipe = models.pipeline("sd1")
    with (
        ipdiverse.attach(pipe, tmp_path / "0.safetensors"),
        pytest.raises(ModelError, match=r"unload_ip_adapter.*ipdiverse\.detach"),
    ):
        pipe.unload_ip_adapter()


def test_called_again_it_turns_the_dial_and_detach_puts_stock_back(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    before = run(pipe, ip_adapter_image=IMAGES[0])
    ipdiverse.diversify(pipe, 0.3)
    ipdiverse.diversify(pipe, 1.0)
    varied = run(pipe, ip_adapter_image=IMAGES[0])
    assert np.abs(varied - before).max() > 100 * TOLERANCE
    ipdiverse.diversify(pipe, 0.0)
    equal(run(pipe, ip_adapter_image=IMAGES[0]), before)
    ipdiverse.detach(pipe)
    assert np.array_equal(run(pipe, ip_adapter_image=IMAGES[0]), before)


def test_another_pipeline_on_the_same_unet_is_told_apart(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    before = run(pipe, ip_adapter_image=IMAGES[0])
    diversified = ipdiverse.diversify(pipe, 0.5)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(ModelError, match="attached to another pipeline with this UNet"):
        run(other, ip_adapter_image=IMAGES[0])
    with quiet():
        other.load_ip_adapter(str(tmp_path), subfolder="", weight_name="0.safetensors")
    with pytest.raises(ModelError, match=r"was replaced.*found IPAdapter.*load_ip_adapter on ano"):
        run(pipe, ip_adapter_image=IMAGES[0])
    diversified.undo()
    assert np.array_equal(run(pipe, ip_adapter_image=IMAGES[0]), before)


def test_a_missing_image_is_one_line(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    with ipdiverse.diversify(pipe):
        with pytest.raises(ArgumentError, match="give the pipeline an ip_adapter_image"):
            run(pipe)
        with pytest.raises(ArgumentError, match=r"ip_adapter_image: does not fit.*each of 1;"):
            run(pipe, ip_adapter_image=IMAGES)
        with pytest.raises(ArgumentError, match=r"set_ip_adapter_scale: does not fit.*each of 1;"):
            pipe.set_ip_adapter_scale([1, 2])


def test_references_of_a_call_are_over_with_it(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)
    with ipdiverse.diversify(pipe, 0.0):
        run(pipe, ip_adapter_image=IMAGES[0])
        with pytest.raises(ArgumentError, match="give the pipeline an ip_adapter_image"):
            run(pipe)  # stock raises too, in its UNet
    pipe = models.pipeline("sd1")
    with ipdiverse.attach(pipe, tmp_path / "0.safetensors") as prompt:
        prompt.set_reference(IMAGES[0])
        before = run(pipe)
        other = run(pipe, ip_adapter_image=IMAGES[1])
        assert np.abs(other - before).max() > 10 * TOLERANCE
        assert np.array_equal(run(pipe), before)
        run(pipe, ip_adapter_image=IMAGES[0])
        prompt.set_reference(IMAGES[1])
        assert np.array_equal(run(pipe), other)
    assert "check_inputs" not in vars(pipe)


def test_a_prompt_encoded_on_the_way_does_not_end_the_call(tmp_path: Path) -> None:
    pipe = loaded("sd1", ["plus"], tmp_path)

    def told_again(pipe: Any, *_: Any) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat(pipe.encode_prompt("a red dog", "cpu", 1, True)[::-1])}

    given = {"ip_adapter_image": IMAGES[0], "callback_on_step_end": told_again}
    before = run(pipe, **given)
    assert np.abs(before - run(pipe, ip_adapter_image=IMAGES[0])).max() > 10 * TOLERANCE
    with ipdiverse.diversify(pipe, 0.0):
        equal(run(pipe, **given), before)


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("guided", [True, False])
def test_scripts_may_encode_once_for_many_calls(kind: str, guided: bool, tmp_path: Path) -> None:
    pipe = loaded("sdxl", [kind], tmp_path)
    given = {
        "ip_adapter_image": [IMAGES],
        "ip_adapter_image_embeds": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
    }
    (theirs,) = pipe.prepare_ip_adapter_image_embeds(**given)
    options = {"guidance_scale": 4.0 if guided else 1.0}
    before = run(pipe, 2, **options, ip_adapter_image_embeds=[theirs])
    with ipdiverse.diversify(pipe, 0.0):
        (ours,) = pipe.prepare_ip_adapter_image_embeds(**given)
        torch.testing.assert_close(ours, theirs)
        for _ in range(2):
            equal(run(pipe, 2, **options, ip_adapter_image_embeds=[ours]), before)


def test_faces_may_come_in_a_call(tmp_path: Path) -> None:
    pipe = models.pipeline("sd1")
    faces = torch.randn(1, models.FACE_DIM, generator=torch.Generator().manual_seed(0))
    with ipdiverse.attach(pipe, models.adapter("faceid", pipe.unet)) as prompt:
        found = run(pipe, ip_adapter_image=ipdiverse.Reference(faces=faces))
        prompt.set_reference(ipdiverse.Reference(faces=faces))
        assert np.array_equal(run(pipe), found)


def test_embeddings_without_text_get_any_scene_and_a_warning() -> None:
    pipe = ipdiverse.load_base().pipe
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    embeds, against = pipe.encode_prompt("in the snow", "cpu", 1, True)
    given = {"num_inference_steps": 1, "output_type": "latent"}
    with ipdiverse.attach(pipe, adapter) as prompt:
        prompt.set_diversity(1.0)
        with pytest.warns(UserWarning, match="prompt_embeds come without their text, so scenes"):
            pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=against,
                ip_adapter_image=IMAGES[0],
                **given,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipe("in the snow", ip_adapter_image=IMAGES[0], **given)


def test_what_users_bring_to_attach_acts_as_in_stock(tmp_path: Path) -> None:
    """Two adapters with masks and a scale each, and a window of steps."""
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    both = IPAdapterMaskProcessor().preprocess([left, 255 - left], height=64, width=64)
    masks = [one.reshape(1, 1, *one.shape[-2:]) for one in both]
    options = {
        "ip_adapter_image": IMAGES,
        "cross_attention_kwargs": {"ip_adapter_masks": masks},
        "height": 64,
        "width": 64,
    }
    pipe = loaded("sd1", ["plus", "base"], tmp_path)
    pipe.set_ip_adapter_scale([0.7, {"up": 0.4}])
    before = run(pipe, 2, **options)
    embeds = pipe.prepare_ip_adapter_image_embeds(IMAGES, None, "cpu", 1, True)
    pipe = models.pipeline("sd1")
    plain = run(pipe, 2, height=64, width=64)
    files = [tmp_path / "0.safetensors", str(tmp_path / "1.safetensors")]
    with ipdiverse.attach(pipe, *files):
        pipe.set_ip_adapter_scale([0.7, {"up": 0.4}])
        equal(run(pipe, 2, **options), before)
        options["ip_adapter_image"] = None
        equal(run(pipe, 2, **options, ip_adapter_image_embeds=embeds), before)
        callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        cut = {"callback_on_step_end": callback}
        assert not np.array_equal(
            run(pipe, 2, **options, **cut, ip_adapter_image_embeds=embeds), before
        )
        again = run(pipe, 2, **options, ip_adapter_image_embeds=embeds)
        assert np.array_equal(again, plain), "stock leaves the scale at 0 too"


def test_videos_are_refused_as_videos() -> None:
    base = models.pipeline("sd1", fresh=True)
    motion: Any = MotionAdapter(
        block_out_channels=(16, 32, 32, 32),
        motion_layers_per_block=2,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=motion)
    with pytest.raises(ModelError, match=r"AnimateDiffPipeline: draws videos.*of its own"):
        ipdiverse.attach(pipe, models.adapter("plus", base.unet))
    with pytest.raises(ModelError, match="draws videos"):
        ipdiverse.diversify(pipe)


def test_transformers_without_an_adapter_are_sent_to_load_ip_adapter() -> None:
    with pytest.raises(ModelError, match=r"FluxPipeline: has no IP-Adapter.*ipdiverse\.attach"):
        ipdiverse.diversify(joint_models.pipeline("flux"))


def test_what_cannot_be_diversified_is_refused() -> None:
    with pytest.raises(ModelError, match="load_ip_adapter first"):
        ipdiverse.diversify(models.pipeline("sd1"))
    with pytest.raises(ArgumentError, match="diversity"):
        ipdiverse.diversify(models.pipeline("sd1"), 1.5)
