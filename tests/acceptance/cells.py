"""The acceptance table: one cell for each place where an image prompt works, and what shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tests.acceptance import features, scenes
from tests.acceptance.checks import the_five

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.acceptance.scenes import Scene

TITLES = {
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "kolors": "Kolors",
    "flux": "Flux.1",
    "sd3": "SD 3.5",
}
UNETS = ("sd1", "sd2", "sdxl")
FIVE = "the five"


@dataclass(frozen=True)
class Cell:
    """One row.

    Args:
        name: The test's id.
        architecture: A key of `TITLES`.
        feature: What is used.
        shows: What is asserted.
        run: Asserts it.
        slow: Runs with `-m slow` only.
    """

    name: str
    architecture: str
    feature: str
    shows: str
    run: Callable[[], None]
    slow: bool = False


def _five(name: str, feature: str, more: str, build: Callable[[], Scene]) -> Cell:
    shows = f"{FIVE}; {more}" if more else FIVE
    return Cell(name, name.split("-", maxsplit=1)[0], feature, shows, lambda: the_five(build()))


def _own(
    name: str, feature: str, shows: str, run: Callable[[], None], *, slow: bool = False
) -> Cell:
    return Cell(name, name.split("-", maxsplit=1)[0], feature, shows, run, slow)


_COMPILED = (
    "after scales 1, 0.5 and 0 nothing is compiled again when scale or reference change; "
    "output = eager"
)
_CONTROL = "the control picture matters"
_LEFT_OUT = ("sd2-inpaint-4", "sd2-controlnet-pose", "sd2-t2i-adapter", "sdxl-controlnet-pose")
"""As on the others; there is no T2I-Adapter for SD 2.x."""

_SCHEDULERS = {
    "lcm": ("LCMScheduler", 1.0),
    "tcd": ("TCDScheduler", 1.0),
    "euler-a": ("EulerAncestralDiscreteScheduler", 3.0),
    "dpm++": ("DPMSolverMultistepScheduler", 3.0),
    "unipc": ("UniPCMultistepScheduler", 3.0),
}


def _tasks(a: str) -> list[Cell]:
    prediction = ", v-prediction" if a == "sd2" else ""
    cells = [
        _five(f"{a}-txt2img", f"text-to-image{prediction}", "", lambda: scenes.text_to_image(a)),
        _five(f"{a}-img2img", "image-to-image", "", lambda: scenes.image_to_image(a)),
        _five(
            f"{a}-inpaint-9",
            "inpainting, its own UNet (9 channels)",
            "",
            lambda: scenes.inpainting(a, 9),
        ),
        _five(
            f"{a}-inpaint-4",
            "inpainting, any UNet (4 channels)",
            "",
            lambda: scenes.inpainting(a, 4),
        ),
        _five(
            f"{a}-controlnet-pose",
            "ControlNet, pose",
            _CONTROL,
            lambda: scenes.controlnet(a, scenes.pose, scenes.depth),
        ),
        _five(
            f"{a}-controlnet-depth",
            "ControlNet, depth",
            _CONTROL,
            lambda: scenes.controlnet(a, scenes.depth, scenes.pose),
        ),
        _five(f"{a}-t2i-adapter", "T2I-Adapter", _CONTROL, lambda: scenes.t2i_adapter(a)),
    ]
    return [cell for cell in cells if cell.name not in _LEFT_OUT]


def _few_steps() -> list[Cell]:
    cells = [
        _five(
            f"sd1-{name}",
            f"{scheduler}, 3 steps",
            "",
            lambda s=scheduler, g=guidance: scenes.few_steps("sd1", s, guidance_scale=g),
        )
        for name, (scheduler, guidance) in _SCHEDULERS.items()
    ]
    lcm = ("LCM's own pipeline, guidance as an input", "one branch", scenes.latent_consistency)
    return [*cells, _five("sd1-lcm-pipeline", *lcm)]


_BATCHES = "each output = its prompt and reference alone"
_OWN = [
    _own(
        "sd1-single-file",
        "single-file checkpoint, original layout",
        f"{FIVE}; output = that of the folder it was made from, exactly",
        features.single_file,
    ),
    _own(
        "sd1-lora",
        "LoRA beside",
        f"{FIVE}, with the LoRA; loaded before or after attaching makes no difference; "
        "unloaded while attached, exactly gone",
        lambda: features.lora_beside("sd1"),
    ),
    _own("sd1-fp16", "fp16", FIVE, lambda: features.precision("sd1", torch.float16)),
    _own("sd1-bf16", "bf16", FIVE, lambda: features.precision("sd1", torch.bfloat16)),
    _own("sdxl-bf16", "bf16", FIVE, lambda: features.precision("sdxl", torch.bfloat16)),
    _own(
        "sd1-offload",
        "`enable_model_cpu_offload`, then attach",
        f"{FIVE}; output = without it, exactly (the hooks' order; they execute on the CPU)",
        features.model_offload,
    ),
    _own(
        "sd1-offload-after",
        "attach, then `enable_model_cpu_offload`",
        "references change between calls; detaching is exact and stays so; offloading stays on",
        features.model_offload_after_attaching,
    ),
    _own("sd1-tiling", "VAE tiling", f"{FIVE}, on decoded tiles", features.vae_tiling),
    _own(
        "sd1-compile",
        "`torch.compile`, then attach",
        _COMPILED,
        lambda: features.compiled(first=True),
    ),
    _own(
        "sd1-compile-after",
        "attach, then `unet.compile`",
        _COMPILED,
        lambda: features.compiled(first=False),
        slow=True,
    ),
    _five("kolors-txt2img", "text-to-image", "", lambda: scenes.text_to_image("kolors")),
    _five("kolors-img2img", "image-to-image", "", lambda: scenes.image_to_image("kolors")),
    *(
        cell
        for a in ("sd1", "sdxl", "kolors")
        for cell in (
            _own(
                f"{a}-outputs",
                "several prompts, several images of each",
                f"a reference for each prompt, or for each output: {_BATCHES}",
                lambda a=a: features.several_outputs(a),
            ),
            _own(
                f"{a}-adapters",
                "several adapters",
                "one at scale 0 is absent, exactly; two halves are a whole",
                lambda a=a: features.several_adapters(a),
            ),
            _own(
                f"{a}-masks",
                "several references with masks",
                "white acts as no mask, black as no reference; order does not matter, place does",
                lambda a=a: features.masked_references(a),
            ),
            _own(
                f"{a}-negative",
                "negative reference",
                "acts with guidance; without, exactly not",
                lambda a=a: features.negative_reference(a),
            ),
            _own(
                f"{a}-window",
                "scale in a part of the steps, image-to-image",
                "first and second half of the steps taken each act, differently",
                lambda a=a: features.scale_window(a),
            ),
            _own(
                f"{a}-fusion",
                "text-image fusion",
                f"{FIVE}; at strength 0 it is absent",
                lambda a=a: features.fused(a),
            ),
        )
        if cell.name
        not in (
            *("sdxl-adapters", "sdxl-negative", "sdxl-window"),
            *("kolors-adapters", "kolors-negative", "kolors-window", "kolors-masks"),
        )
    ),
    _own("sd1-faceid", "FaceID", f"{FIVE}, by face", lambda: features.faces("faceid")),
    _own(
        "sd1-faceid-plus",
        "FaceID-Plus v2",
        f"{FIVE}, by face and picture",
        lambda: features.faces("faceid-plus-v2"),
    ),
]

_JOINT_KINDS = {
    "flux": "XLabs",
    "flux-instantx": "InstantX",
    "flux-redux": "Redux",
    "sd3": "InstantX",
}
_JOINT = [
    _five("flux-txt2img", "text-to-image, XLabs", "", lambda: scenes.text_to_image("flux")),
    _five("flux-true-cfg", "a negative prompt, in calls of its own", "", scenes.true_guidance),
    _five("flux-img2img", "image-to-image", "", lambda: scenes.image_to_image("flux")),
    _five("flux-inpaint", "inpainting", "", lambda: scenes.joint_inpainting("flux")),
    _five("flux-controlnet", "ControlNet", _CONTROL, scenes.flux_controlnet),
    _five("flux-kontext", "Kontext", "", scenes.kontext),
    _own(
        "flux-instantx",
        "text-to-image, InstantX",
        f"{FIVE}; beside XLabs at scale 0 it is alone, exactly",
        features.instantx,
    ),
    _own(
        "flux-redux",
        "text-to-image, Redux",
        f"{FIVE}; a strength for each item",
        features.redux,
    ),
    _own(
        "flux-redux-stock",
        "Redux of stock's prior pipeline, `steer` without attaching",
        "strength 0 is the text alone and 1 stock, bit for bit; tokens are noised; an item is the "
        "same alone; detaching is exact",
        features.redux_of_stock,
    ),
    _own("flux-16-tokens", "XLabs' second adapter", FIVE, features.more_tokens),
    _own("sd3-medium", "a second attention in a block", FIVE, features.second_attention),
    _five("sd3-txt2img", "text-to-image, InstantX", "", lambda: scenes.text_to_image("sd3")),
    _five("sd3-img2img", "image-to-image", "", lambda: scenes.image_to_image("sd3")),
    _five("sd3-inpaint", "inpainting", "", lambda: scenes.joint_inpainting("sd3")),
    _five("sd3-controlnet", "ControlNet", _CONTROL, scenes.sd3_controlnet),
    *(
        cell
        for a in ("flux", "sd3")
        for cell in (
            _own(
                f"{a}-outputs",
                "several prompts, several images of each",
                f"a reference for each prompt, or for each output: {_BATCHES}",
                lambda a=a: features.several_outputs(a),
            ),
            _own(
                f"{a}-masks",
                "several references with masks",
                "white acts as no mask, black as no reference; order does not matter, place does",
                lambda a=a: features.masked_references(a),
            ),
            _own(
                f"{a}-window",
                "scale in a part of the steps, image-to-image",
                "first and second half of the steps taken each act, differently",
                lambda a=a: features.scale_window(a),
            ),
            _own(
                f"{a}-adapters",
                "several adapters",
                "one at scale 0 is absent, exactly; two halves are a whole",
                lambda a=a: features.several_adapters(a),
            ),
            _own(
                f"{a}-call",
                "`ip_adapter_image=` of a call",
                "as `set_reference`, exactly, a negative one too where the pipeline takes it",
                lambda a=a: features.call_with_image(a),
            ),
        )
    ),
    *(
        cell
        for kind, named in _JOINT_KINDS.items()
        for cell in (
            _own(
                f"{kind}-imagined",
                f"imagined references, {named}",
                "at 0 nothing, bit for bit; each item's scene is its own, the same alone",
                lambda kind=kind: features.imagined(kind),
            ),
            _own(
                f"{kind}-generative",
                f"generative fusion, {named}",
                "at 0 it is absent, bit for bit; each item's tokens are its own, the same alone",
                lambda kind=kind: features.drawn_tokens(kind),
            ),
        )
    ),
]

CELLS: list[Cell] = sorted(
    [*(cell for a in UNETS for cell in _tasks(a)), *_few_steps(), *_OWN, *_JOINT],
    key=lambda cell: list(TITLES).index(cell.architecture),
)
