"""`train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ipdiverse.commands.console import agree_to_encoders, say
from ipdiverse.data.options import PrepareOptions
from ipdiverse.training.config import TrainConfig


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train an adapter on a prepared data set; stop it at any time, and the same command goes on.

    `--config FILE.toml` gives any of these fields; flags hold over it. The original trainer's flags
    are understood too.

    Args:
        root: The folder that image names in `data` are relative to, when that is a list of images
            rather than a prepared folder.
        yes: Download what a preset needs without asking.
    """

    root: str | None = None
    yes: bool = False

    def run(self) -> None:
        """Prepare what is not prepared, train, and say where the adapter is."""
        from ipdiverse.data.prepare import prepare
        from ipdiverse.training.trainer import train

        agree_to_encoders(self.base, self.image_encoder, self.yes, self.start)
        given = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        if Path(self.data).is_file():
            prepared = Path(self.out) / "data"
            prepare(self.data, prepared, PrepareOptions(root=self.root))
            given["data"] = str(prepared)
        say(f"wrote {train(TrainConfig(**given))}")
