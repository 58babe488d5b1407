"""An adapter as a folder with a model card, for a disk or for the hub."""

from __future__ import annotations

import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.adapter.files.card import CURVE, Stated, model_card
from ipdiverse.adapter.files.checkpoint import save_adapter
from ipdiverse.adapter.files.sources import PUBLISHED
from ipdiverse.base.bases import HUB_ID
from ipdiverse.contact_sheet import labelled_points
from ipdiverse.dial import dial_of
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter


def save_folder(
    adapter: ImagePromptAdapter,
    folder: str | os.PathLike[str],
    dtype: Any = None,
    stated: Stated | None = None,
    *,
    repo_id: str | None = None,
) -> list[str]:
    """Write `ip-adapter.safetensors`, a model card `README.md`, and the dial's curve if measured.

    Args:
        adapter: What to save; its `spec` goes along, and is shown on the card.
        folder: Made if need be.
        dtype: Of the stored tensors; None keeps the adapter's.
        stated: What only the publisher knows, for the card.
        repo_id: Where it will be, for the card; None is the folder's name.

    Returns:
        The files' names.

    Raises:
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    card = model_card(adapter, repo_id or target.resolve().name, stated)
    curve = curve_png(adapter.spec)
    ensure_writable_folder(target)
    kept = dtype or next(adapter.parameters()).dtype
    save_adapter(adapter, target / PUBLISHED, adapter.spec, kept)
    if curve is None:
        (target / CURVE).unlink(missing_ok=True)  # of a calibration that it no longer has
    else:
        write_bytes_atomic(target / CURVE, curve)
    write_text_atomic(target / "README.md", card)
    return [PUBLISHED, "README.md", *([CURVE] if curve else [])]


def push_folder(
    adapter: ImagePromptAdapter,
    repo_id: str,
    stated: Stated | None = None,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dtype: Any = None,
) -> str:
    """Upload what `save_folder` writes to a repository of the hub, made if need be.

    Args:
        adapter: What to publish.
        repo_id: `owner/name`.
        stated: What only the publisher knows, for the card.
        private: Of a repository that is made.
        token: None takes the one that is logged in.
        commit_message: None takes the hub's.
        create_pr: Propose instead of changing.
        dtype: Of the stored tensors; None keeps the adapter's.

    Returns:
        The repository's address.

    Raises:
        ArgumentError: The repository has no such name.
        ModelError: There is no token, the hub refused, or it cannot be reached.
    """
    import huggingface_hub

    check_repository(repo_id)
    if not (token or huggingface_hub.get_token()):
        raise ModelError(
            "there is no token to upload with",
            where=repo_id,
            fix="Run `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    with tempfile.TemporaryDirectory() as folder:
        save_folder(adapter, folder, dtype, stated, repo_id=repo_id)
        try:
            api = huggingface_hub.HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload an image prompt adapter with ipdiverse",
                create_pr=create_pr,
            )
        except Exception as error:  # whatever the hub's library or the network raises
            raise _refused(repo_id, error) from error
    return str(address)


def curve_png(spec: Mapping[str, Any]) -> bytes | None:
    """The dial's curve: what each of its points keeps, over the variety that it gives.

    Args:
        spec: Of an adapter's file.

    Returns:
        A PNG; None where nothing was measured.
    """
    dial = dial_of(spec, "adapter")
    if dial is None or not dial.achieved:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, label, colour in (
        ("retention", "subject kept", "#2962c9"),
        ("accuracy", "prompt obeyed", "#d35400"),
    ):
        found = [(row.variety, getattr(row, name)) for row in dial.achieved]
        points = [point for point in found if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    for index in labelled_points([row.variety for row in dial.achieved]):
        at = (dial.achieved[index].variety, dial.achieved[index].retention)
        words = f"{dial.points[index][0]:.2g}"
        axes.annotate(words, at, (3, 5), textcoords="offset points", fontsize=7, color="#2962c9")
    axes.set_xlabel("variety")
    axes.set_ylabel("kept")
    axes.set_title("the dial, from diversity 0 to 1", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def check_repository(repo_id: str) -> None:
    """Refuse what cannot be a repository.

    Raises:
        ArgumentError: It is no `owner/name`.
    """
    if HUB_ID.fullmatch(repo_id) is None:
        raise ArgumentError(
            "is no repository of the hub", where="repo_id", expected="owner/name", found=repo_id
        )


def _refused(repo_id: str, error: Exception) -> ModelError:
    """Why an upload failed, in one line."""
    import httpx  # what the hub's library connects with

    why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        what, fix = "may not be written to", "Check that the token may write there, and its owner."
    elif status is None and isinstance(error, OSError | httpx.TransportError):
        what, fix = "cannot be reached", "Check the network, and that HF_HUB_OFFLINE is not set."
    else:
        what, fix = "cannot be uploaded", "Check the name and your token."
    return ModelError(what, where=repo_id, found=why, fix=fix)
