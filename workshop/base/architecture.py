"""The embedded models: a small Stable Diffusion. All sizes are chosen in this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE = 64
LATENT_SIZE = 8
LATENT_CHANNELS = 16
TEXT_WIDTH = 128
MAX_TOKENS = 40


def vae() -> AutoencoderKL:
    """64×64×3 to 8×8×16 and back; no attention, convolutions only."""
    import diffusers

    build: Any = diffusers.AutoencoderKL
    return build(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)  # faster on CPUs, and `MuonAdamW` needs it


def unet() -> UNet2DConditionModel:
    """Cross-attention at 8×8, 4×4 and in the middle; the pooled text joins the timestep."""
    import diffusers

    build: Any = diffusers.UNet2DConditionModel
    return build(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        addition_embed_type="text",  # as in SDXL, but of the same text states
        addition_embed_type_num_heads=4,
    ).to(memory_format=torch.channels_last)


def noise_schedule() -> DDIMScheduler:
    """The schedule of training: v-prediction on the cosine schedule, ending in pure noise.

    Stable Diffusion's own schedule is made for latents of 64×64. Latents of 8×8 are less redundant:
    at a third of its timesteps nothing of them is left.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """The sampler: stochastic DPM-Solver++ (arXiv:2211.01095), whose noise corrects earlier errors.

    In 25 steps a third as many images are invalid as with DDIM.
    """
    from diffusers import DPMSolverMultistepScheduler

    build: Any = DPMSolverMultistepScheduler.from_config
    return build(noise_schedule().config, algorithm_type="sde-dpmsolver++")


def text_encoder(vocab_size: int) -> CLIPTextModel:
    """Three causal layers; the pooled state at the end of text is in the image encoder's space."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=0,
            # pooled at the first of these; for an id of 2 transformers pools at the largest id
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    """Patches of 8 pixels, four layers; projects into the text encoder's pooled space."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    """Resize and crop to the encoder's 64 pixels, then to -1..1."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
