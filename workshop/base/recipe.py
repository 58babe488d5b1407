"""How the embedded base is trained: one light value, shared by the command line and the stages."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ipdiverse.errors import check_range

STAGES = ("vae", "text", "clip", "unet", "oracle")


@dataclass(frozen=True)
class BaseRecipe:
    """How the embedded base is trained.

    Args:
        seed: Of data, initial weights and noise.
        images: Rendered scenes of the training split.
        vae_steps: Steps of stage vae, batch 16.
        text_steps: Steps of stage text, batch 128.
        clip_steps: Steps of stage clip, batch 192.
        unet_steps: Steps of stage unet, batch 128.
        oracle_steps: Steps of stage oracle, batch 64 and as many broken images.
        compile: Compile the UNet with torch.compile, which needs a C++ compiler.
    """

    seed: int = 0
    images: int = 40_000
    vae_steps: int = 3500
    text_steps: int = 500
    clip_steps: int = 600
    unet_steps: int = 3000
    oracle_steps: int = 2000
    compile: bool = True

    def __post_init__(self) -> None:
        for field in fields(BaseRecipe):
            value = getattr(self, field.name)
            if field.name.endswith("_steps") or field.name == "images":
                check_range(field.name, value, 1, 100_000_000)
        check_range("seed", self.seed, 0, 2**63 - 1)
