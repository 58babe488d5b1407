"""Opening models from several threads, though the libraries change the whole process meanwhile."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import CheckpointError, IpdiverseError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_ADAPTER = ("image_proj", "ip_adapter", "to_k_ip", "adapter_modules", "redux_up.")
AS_BASE = "Give it with --base."
"""What to do with a file that is a base."""
_LORA = "Load it into the pipeline, by `pipe.load_lora_weights`; an adapter goes on top of that."
_PART = "It is a part of a base: give the base's folder or hub id with --base."
_TRAINER = "Give the adapter's own file, which the trainer wrote in the same place."
_KINDS = (
    ("a LyCORIS (LoKr, LoHa or the like)", _LORA, ".lokr_w .hada_w .oft_ .glora_"),
    ("a LoRA", _LORA, "lora_unet_ lora_te .lora_A .lora_B lora_down lora_up lora.down"),
    (
        "a ControlNet",
        "Give it with --controlnet.",
        "controlnet_ control_model. zero_convs. input_hint_block control_lora",
    ),
    (
        "a T2I-Adapter",
        "Put it into a pipeline of diffusers, and attach the image prompt to that.",
        "adapter.body. body.0.in_conv body.0.block1 body.0.resnets",
    ),
    (
        "a whole Stable Diffusion model",
        AS_BASE,
        "model.diffusion_model. cond_stage_model. joint_blocks.",
    ),
    ("a whole Flux model", AS_BASE, "double_blocks. single_transformer_blocks. context_embedder"),
    (
        "a textual inversion",
        "Load it by `pipe.load_textual_inversion`.",
        "string_to_param emb_params clip_l clip_g",
    ),
    ("a UNet", _PART, "time_embedding. time_embed. unet. input_blocks."),
    ("a VAE", _PART, "quant_conv decoder.up encoder.down first_stage_model."),
    ("a CLIP image encoder", "Give its folder with --image-encoder.", "vision_model. visual."),
    ("a text encoder", _PART, "text_model. encoder.block. text_projection"),
    (
        "a DeepSpeed checkpoint",
        "Run the zero_to_fp32.py that DeepSpeed put there, and give its result.",
        "ds_version ds_config fp32_flat_groups zero_stage",
    ),
    ("an optimizer's state", _TRAINER, "param_groups exp_avg optimizer_state"),
    ("a trainer's random state", _TRAINER, "random_state numpy_random_seed rng_state"),
    ("a learning rate scheduler's state", _TRAINER, "last_epoch _last_lr"),
    ("a gradient scaler's state", _TRAINER, "growth_interval _growth_tracker"),
    ("a trainer's arguments", _TRAINER, "TrainingArguments"),
)
"""What model files are, what to do with each, and parts of names that tell; first match holds."""

_one_builds = threading.RLock()
_one_counts = threading.Lock()
_silent_blocks: list[None] = []
_as_before = ExitStack()


def what_is(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these tensors is, and what to do with it; None if it is not known."""
    text = "\n".join(names)
    if any(part in text for part in _ADAPTER):
        return "an IP-Adapter", "Give it with --adapter."
    found = (
        (what, fix) for what, fix, parts in _KINDS if any(part in text for part in parts.split())
    )
    return next(found, None)


@contextmanager
def building() -> Iterator[None]:
    """Let one thread at a time build modules or load weights into them.

    diffusers loads inside accelerate's `init_empty_weights`, which replaces
    `torch.nn.Module.register_parameter` for the whole process and afterwards restores what it found
    there; transformers does the same with the default dtype. If two threads load at once, the later
    one restores the other's replacement, and from then on every module of the process is built
    without memory for its weights (device `meta`).
    """
    with _one_builds:
        yield


@contextmanager
def loading() -> Iterator[None]:
    """`building`, and the libraries are quiet: for whatever calls their `from_pretrained`."""
    with building(), quiet():
        yield


@contextmanager
def one_line(what: str, where: str) -> Iterator[None]:
    """Whatever a library raises in a `with` block, as a ModelError that names what it was for."""
    try:
        yield
    except IpdiverseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(what, where=where, found=lines[0][:300]) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the terminal; we say what matters.

    If blocks overlap, in one thread or several, the last to end restores them.
    """
    with _one_counts:
        if not _silent_blocks:
            _silence(_as_before)
        _silent_blocks.append(None)
    try:
        yield
    finally:
        with _one_counts:
            _silent_blocks.pop()
            if not _silent_blocks:
                _as_before.close()


def _silence(as_before: ExitStack) -> None:
    """Silence the libraries, and note how to restore each."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    # transformers switches the hub's bars along with its own. So the hub's are pushed
    # first, and restored last: an exit stack unwinds backwards.
    off = hub.are_progress_bars_disabled()
    as_before.callback(hub.disable_progress_bars if off else hub.enable_progress_bars)
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    for library in libraries:
        as_before.callback(library.set_verbosity, library.get_verbosity())
        if library.is_progress_bar_enabled():
            as_before.callback(library.enable_progress_bar)
        library.set_verbosity_error()
        library.disable_progress_bar()
        for handler in logging.getLogger(library.__name__.split(".")[0]).handlers:
            # diffusers logs an error that it also raises, which is one line of ours
            as_before.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.CRITICAL)


@contextmanager
def unbroken(file: Path, container: str) -> Iterator[None]:
    """Whatever a library raises on a broken file, as the first line of what it said."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"is a broken {container} file",
            where=file,
            found=lines[0][:200] if lines else type(error).__name__,
            fix="It may be cut off. Download it again.",
        ) from error
