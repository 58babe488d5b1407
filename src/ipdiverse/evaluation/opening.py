"""What a study opens: what it is asked of first, then its base, as `generate` opens it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.bases import check_adapter, check_part, load_image_encoder
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.folders import folder_pairs, opened
from ipdiverse.evaluation.sampling import study_pairs
from ipdiverse.sampling import task
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from ipdiverse.base.bases import Base
    from ipdiverse.base.presets import HubFile
    from ipdiverse.evaluation.study import Study


def asked(study: Study) -> tuple[list[Any], list[Image.Image]]:
    """The pairs, and the reference of each.

    Raises:
        DataError: A folder, or a file of prompts, is unusable.
        ImageError: So is a reference.
        ArgumentError: There are too few.
    """
    if study.references is None:
        drawn = study_pairs(study.pairs, study.seed, study.split, study.edits)
        return drawn, [pair.image() for pair in drawn]
    prompts = Path(study.prompts) if study.prompts else None
    found = folder_pairs(Path(study.references), prompts, study.pairs)
    if len(found) < 2:
        raise ArgumentError(
            "gives too few pairs of a prompt and a reference",
            where="study",
            expected="2 or more",
            found=len(found),
        )
    return found, opened(found)


def sources(study: Study) -> list[str]:
    """Every adapter that an arm names, once."""
    return list(dict.fromkeys(source for arm in study.arms for source in arm.sources))


def needed_files(study: Study) -> list[HubFile]:
    """What a study takes from the hub for the presets that it names, each file once.

    Raises:
        ModelError: A preset's adapter is of another base, or the image encoder is nothing known.
    """
    _check_names(study)
    requests = [_request(study, source) for source in sources(study)]
    return list(dict.fromkeys(file for one in requests for file in task.needed_files(one)))


def open_base(study: Study) -> Base:
    """The base, placed as the device has room, with the image encoder that presets' adapters read.

    Raises:
        IpdiverseError: It cannot be opened or had.
    """
    _check_names(study)
    named = [PRESETS[source] for source in sources(study) if source in PRESETS]
    reads = next((preset.name for preset in named if preset.encoder is not None), "")
    return task.open_base(_request(study, reads))


def open_reader(study: Study, base: Base) -> tuple[Any, Any] | None:
    """The image encoder that a study names, with its preprocessing; None where it names none.

    Raises:
        ModelError: It cannot be opened.
    """
    return load_image_encoder(study.image_encoder, base) if study.image_encoder else None


def _check_names(study: Study) -> None:
    """Before gigabytes come; adapters in files may be missing where readings of them are known."""
    for source in sources(study):
        if source in PRESETS:
            check_adapter(study.base, source)
    if study.image_encoder:
        check_part(study.image_encoder)


def _request(study: Study, adapter: str) -> Request:
    return Request(base=study.base, adapter=adapter, image_encoder=study.image_encoder or "")
