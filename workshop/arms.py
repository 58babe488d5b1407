"""The adapters of the embedded world: which ones are trained, how, and which ship.

`plain` is the published IP-Adapter of this world: references that are the target, no fusion. As
users do with the published one, every other arm fine-tunes it, for the same number of steps: with
every reference (the target itself, a changed copy of it, another image of its subject) and every
text-image fusion, by the trainer that users have. `diverse`, the default, is `paired-gated` trained
further. `self-none` is plain IP-Adapter trained for as many steps as that, the copier that it must
beat; `self-none-short` is the one for the other arms' steps. `plus` is `plain`, and the base
weights of `diverse`, whose dial leads from these to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ipdiverse.adapter.files.checkpoint import as_safetensors, load_adapter, save_adapter
from ipdiverse.adapter.files.layouts import PACKED, pack_base_weights
from ipdiverse.adapter.files.structure import describe
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, remember_base_weights
from ipdiverse.base.adapters import ADAPTERS, CRITTERS_ADAPTERS, SHIPPED_ADAPTERS, adapter_file
from ipdiverse.base.bases import CRITTERS
from ipdiverse.base.memory import bf16_is_fast
from ipdiverse.critters import make
from ipdiverse.critters.scene import SCENE, Scene, pair_of
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import ArgumentError, ModelError, check_range
from ipdiverse.training.checkpoints import ADAPTER
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.trainer import Trainer, train
from ipdiverse.writing import write_bytes_atomic
from workshop.base.shipping import provenance


@dataclass(frozen=True)
class Arm:
    """One way to train an adapter.

    Args:
        reference: What prompts a target.
        fusion: Text-image fusion; `generative` learns alone, and of embeddings.
        learns: What is trained; `all but fusion` keeps the fusion's random weights, as its first
            publication did; `attention` is the projection's last, of as many parameters as a
            fusion's.
        shuffled: The fusion reads the text of another image of the batch while it learns.
        adapter: `plus` (16 tokens) or `base` (4).
        shared: Chance that the reference has a scene attribute of the target (`shared_scenes`).
        edits: Share of references that contradict the caption in one attribute of identity.
        init_from: The arm that it starts from; None learns from random weights.
        steps: Optimizer steps of 64 samples.
        learning_rate: The first one; it falls to 0.
    """

    reference: Literal["self", "augmented", "paired"]
    fusion: Literal["none", "blend", "gated", "generative"]
    learns: Literal["all", "all but fusion", "fusion", "projection", "attention"] = "all"
    shuffled: bool = False
    adapter: Literal["plus", "base"] = "plus"
    shared: float = 0.0
    edits: float = 0.0
    init_from: str | None = "plain"
    steps: int = 500
    learning_rate: float = 5e-4


def _arms() -> dict[str, Arm]:
    plain = Arm("self", "none", init_from=None, steps=2400, learning_rate=1e-3)
    arms = {"plain": plain, "base-plain": replace(plain, adapter="base", steps=1200)}
    for reference in ("self", "augmented", "paired"):
        arms[f"{reference}-none"] = Arm(reference, "none")
        arms[f"{reference}-blend-random"] = Arm(reference, "blend", learns="all but fusion")
        arms[f"{reference}-blend"] = Arm(reference, "blend")
        arms[f"{reference}-gated"] = Arm(reference, "gated")
    for fusion in ("none", "gated"):  # what only a fusion could tell: which part the text replaces
        arms[f"edited-{fusion}"] = Arm("paired", fusion, edits=0.5)
    # A gate moves by about the learning rate a step: at the other arms' rate it could not get past
    # tanh(.13) in 500 steps, and "the gate stayed shut" would say nothing about the fusion.
    alone = Arm("paired", "gated", learns="fusion", learning_rate=3e-3)
    for reference in ("self", "augmented", "paired"):
        for fusion in ("blend", "gated"):
            arms[f"alone-{reference}-{fusion}"] = replace(alone, reference=reference, fusion=fusion)
    arms["alone-paired-shuffled"] = replace(alone, shuffled=True)
    arms["alone-paired-projection"] = replace(alone, fusion="none", learns="projection")
    arms["alone-paired-attention"] = replace(alone, fusion="none", learns="attention")
    for percent in (0, 25, 50, 75, 100):
        arms[f"shared-{percent}"] = Arm("paired", "none", shared=percent / 100, steps=300)
    arms["diverse"] = Arm("paired", "gated", init_from="paired-gated", steps=1500)
    arms["self-none-short"] = arms["self-none"]
    trained = arms["paired-gated"].steps + arms["diverse"].steps
    arms["self-none"] = replace(arms["self-none"], steps=trained)
    arms["generative"] = Arm("paired", "generative", steps=4000, learning_rate=1e-3)
    return arms


_FROZEN: dict[str, tuple[Literal["projection", "layers", "fusion"], ...]] = {
    "all": (),
    "all but fusion": ("fusion",),
    "fusion": ("projection", "layers"),
    "projection": ("layers",),
    "attention": ("layers",),
}
LAST_ATTENTION = "image_proj.layers.3.0."
"""Of the projection of `plus`: the prefix of its parameters."""

ARMS = _arms()
"""By name."""


def arm_config(name: str, folder: Path, steps: int | None, seed: int) -> TrainConfig:
    """The run that trains an arm.

    Args:
        name: Of `ARMS`.
        folder: Working folder: data and runs.
        steps: Optimizer steps of 64 samples; None takes the arm's own.
        seed: Of data order, initial weights and noise.

    Raises:
        ArgumentError: There is no such arm, or a number is out of range.
    """
    if name not in ARMS:
        raise ArgumentError("unknown arm", where=name, expected=", ".join(ARMS))
    arm = ARMS[name]
    return TrainConfig(
        data=str(folder / _data(arm)),
        out=str(folder / f"{name}-seed{seed}"),
        base=CRITTERS,
        adapter=arm.adapter,
        init_from=None
        if arm.init_from is None
        else str(folder / f"{arm.init_from}-seed{_init_seed(arm, seed)}" / ADAPTER),
        fusion=arm.fusion,
        frozen=_FROZEN[arm.learns],
        reference=arm.reference,
        cache_images="both",  # one cache serves every arm
        cache_dtype="float16",
        steps=arm.steps if steps is None else steps,
        batch=64,
        timesteps="cubic",
        learning_rate=arm.learning_rate,
        lr_scheduler="linear",
        lr_warmup_steps=50,
        mixed_precision="bf16" if bf16_is_fast() else "no",
        ema=0.999 if arm.fusion == "generative" else 0.0,
        seed=seed,
        checkpoints_total_limit=1,
    )


def _data(arm: Arm) -> str:
    shared = f"-shared-{100 * arm.shared:.0f}" if arm.shared else ""
    return "data" + ("-edited" if arm.edits else "") + shared


def _init_seed(arm: Arm, seed: int) -> int:
    """One published adapter serves every seed; other arms are started from with the same seed."""
    return 0 if arm.init_from == "plain" else seed


def train_arm(
    name: str, folder: Path, steps: int | None = None, seed: int = 0, images: int = 8000
) -> Path:
    """Train one arm, and before it the one that it starts from; an interrupted one continues.

    Args:
        name: Of `ARMS`.
        folder: Working folder, shared by all arms.
        steps: Optimizer steps of 64 samples; None takes the arm's own.
        seed: Of data order, initial weights and noise.
        images: Scenes to train on, each with a partner.

    Returns:
        The adapter's file.

    Raises:
        ArgumentError: There is no such arm, or a number is out of range.
    """
    check_range("images", images, 2, 10_000_000)
    config = arm_config(name, folder, steps, seed)
    if config.init_from and not Path(config.init_from).exists():
        before = ARMS[name].init_from or ""
        train_arm(before, folder, steps, _init_seed(ARMS[name], seed), images)
    arm = ARMS[name]
    with shared_scenes(arm.shared):
        prepare(CRITTERS, folder / _data(arm), PrepareOptions(n=images, edits=arm.edits))
    with (
        shuffled_text() if arm.shuffled else nullcontext(),
        learning_only(LAST_ATTENTION) if arm.learns == "attention" else nullcontext(),
    ):
        return train(config)


@contextmanager
def learning_only(prefix: str) -> Iterator[None]:
    """Of the parameters that would learn meanwhile, those whose names begin otherwise stay."""
    learning = Trainer._learning  # pyright: ignore[reportPrivateUsage]

    def fewer(self: Trainer) -> dict[str, torch.nn.Parameter]:
        found = learning(self)
        for name, parameter in found.items():
            parameter.requires_grad_(name.startswith(prefix))
        return {name: one for name, one in found.items() if one.requires_grad}

    Trainer._learning = fewer  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        Trainer._learning = learning  # pyright: ignore[reportPrivateUsage]


@contextmanager
def shared_scenes(chance: float) -> Iterator[None]:
    """Pairs of critters made meanwhile share each scene attribute with a chance beyond luck."""

    def partner(scene: Scene, rng: np.random.Generator) -> Scene:
        other = pair_of(scene, rng)
        same = [name for name in SCENE if chance and rng.random() < chance]
        return replace(other, **{name: getattr(scene, name) for name in same})

    make.pair_of = partner
    try:
        yield
    finally:
        make.pair_of = pair_of


@contextmanager
def shuffled_text() -> Iterator[None]:
    """Gated fusions that learn read the text of the next sample of the batch."""
    forward = GatedFusion.forward

    def shuffled(
        self: GatedFusion,
        image_tokens: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        if self.training:
            text = text.roll(1, 0)
            text_mask = None if text_mask is None else text_mask.roll(1, 0)
        return forward(self, image_tokens, text, text_mask, strength)

    GatedFusion.forward = shuffled
    try:
        yield
    finally:
        GatedFusion.forward = forward


def ship_arm(name: str, folder: Path, steps: int | None = None, seed: int = 0) -> Path | None:
    """Write a trained arm into the package, in fp16 and with how it was made, if it is to ship.

    Returns:
        The file in the package; None where the arm does not ship.
    """
    file = next((f for f, arm in SHIPPED_ADAPTERS.items() if arm == name), None)
    if file is None:
        return None
    config = arm_config(name, folder, steps, seed)
    paths = ("data", "out")  # say nothing on another machine
    recipe: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in paths}
    recipe["init_from"] = ARMS[name].init_from
    command = f"python -m workshop train-adapters --arms {name} --seeds {seed}"
    command += "" if steps is None else f" --steps {steps}"
    made = {"reference": config.reference, "recipe": recipe, "arm": name, **provenance(command)}
    CRITTERS_ADAPTERS.mkdir(parents=True, exist_ok=True)
    target = CRITTERS_ADAPTERS / f"{file}.safetensors"
    trained = load_adapter(f"{config.out}/adapter.safetensors")
    if name == "diverse":  # calibration then places its dial (`make adapters`)
        _save_fine_tuned(trained, adapter_file(CRITTERS, "plus"), target, made)
    else:
        save_adapter(trained, target, made, torch.float16)
    if file == ADAPTERS["plus"]:
        _replace_base_weights(target)
    return target


def _save_fine_tuned(
    adapter: ImagePromptAdapter, base: Path, target: Path, spec: Mapping[str, Any]
) -> None:
    """Write an adapter with its base weights packed: whole, the package would not fit in 40 MB."""
    remember_base_weights(adapter, load_adapter(base))
    own = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
    stored = {name: tensor.half() for name, tensor in adapter.base_weights.items()}
    tensors = {**own, PACKED: pack_base_weights(own, stored)}
    write_bytes_atomic(target, as_safetensors(tensors, {**spec, **describe(adapter)}))


def _replace_base_weights(base: Path) -> None:
    """Give the default that ships these base weights, in place of those that it holds."""
    default = CRITTERS_ADAPTERS / f"{ADAPTERS['diverse']}.safetensors"
    if not default.is_file():
        return
    adapter = load_adapter(default)
    with suppress(ModelError):  # one of another size: the default has to be trained anew
        _save_fine_tuned(adapter, base, default, adapter.spec)
