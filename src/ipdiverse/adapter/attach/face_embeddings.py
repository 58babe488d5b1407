"""Face embeddings: from a file, or computed by insightface where it is installed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ipdiverse.errors import ArgumentError, CheckpointError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image
    from torch import Tensor


def load_face_embeddings(file: Path) -> Tensor:
    """Read embeddings, one face a row, float32 (faces, width)."""
    if not file.is_file():
        raise CheckpointError("no such file", where=file, fix="Check the path.")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        what, expected = "holds no face embeddings", " | ".join(_READERS)
        raise CheckpointError(what, where=file, expected=expected, found=file.suffix)
    try:
        array = reader(file)
    except Exception as error:  # whatever a reader raises on a broken file
        found = str(error).splitlines()[0][:200]
        raise CheckpointError("cannot be read", where=file, found=found) from error
    return face_array(array, file)


def face_array(array: Any, where: object = "faces") -> Tensor:
    """Check an array of embeddings and give it the shape (faces, width)."""
    try:
        values = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise CheckpointError("holds no numbers", where=where, found=str(error)[:200]) from error
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise CheckpointError(
            "holds no face embeddings",
            where=where,
            expected="finite numbers, (faces, width) or (width,)",
            found=f"shape {values.shape}",
        )
    return torch.from_numpy(values.copy())


def _one_tensor(file: Path) -> np.ndarray:
    from safetensors.torch import load_file

    tensors = list(load_file(file).values())
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, expected one")
    return tensors[0].float().numpy()


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda file: np.load(file, allow_pickle=False),  # pickles could run code
    ".safetensors": _one_tensor,
    ".json": lambda file: json.loads(file.read_text()),
}


def detect_face(image: Image.Image, root: Path | None = None) -> Tensor:
    """The largest face's embedding by insightface, (1, 512), normalised to length 1."""
    try:
        from insightface.app import FaceAnalysis  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            "is not installed",
            where="insightface",
            fix="Run `pip install -e '.[faces]'` in your copy of ipdiverse, or give embeddings: "
            "--faces FILE.",
        ) from error
    options = {} if root is None else {"root": str(root)}
    try:
        analysis = FaceAnalysis(name="buffalo_l", **options)
        analysis.prepare(ctx_id=0, det_size=(640, 640))
    except Exception as error:  # a failed download, or models that are not there
        found = str(error).splitlines()[0][:200] or "nothing"
        raise ModelError("has no models", where="insightface", found=found) from error
    faces = analysis.get(np.asarray(image.convert("RGB"))[:, :, ::-1])
    if not faces:
        raise ArgumentError(
            "shows no face", where="image", fix="Crop closer, or give embeddings: --faces FILE."
        )
    largest = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
    return face_array(largest.normed_embedding)
