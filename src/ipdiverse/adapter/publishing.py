"""An adapter as a folder with a model card, for a disk or for the hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.adapter.checkpoint import save_adapter
from ipdiverse.adapter.structure import describe
from ipdiverse.errors import ModelError
from ipdiverse.provenance import ensure_writable_folder, write_text_atomic

if TYPE_CHECKING:
    import os

    from ipdiverse.adapter.model import ImagePromptAdapter

WEIGHTS = "ip-adapter.safetensors"
_PIPELINES = {"SD 1.x": "sd15", "SD 2.x": "a Stable Diffusion 2 model", "SDXL": "sdxl"}


def save_folder(
    adapter: ImagePromptAdapter, folder: str | os.PathLike[str], dtype: Any = None
) -> None:
    """Write `ip-adapter.safetensors` and a model card, `README.md`.

    Args:
        adapter: What to save; its `spec` goes along.
        folder: Made if need be.
        dtype: Of the stored tensors; None keeps the adapter's.

    Raises:
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    ensure_writable_folder(target)
    kept = dtype or next(adapter.parameters()).dtype
    save_adapter(adapter, target / WEIGHTS, adapter.spec, kept)
    write_text_atomic(target / "README.md", model_card(adapter))


def push_folder(
    adapter: ImagePromptAdapter, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload what `save_folder` writes to a repository of the hub, made if need be.

    Returns:
        The repository's address.

    Raises:
        ModelError: The hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_folder(adapter, folder)
        try:
            api = HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        except Exception as error:  # whatever the hub's library or the network raises
            why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise ModelError(
                "cannot be uploaded", where=repo_id, found=why, fix="Check the name and your token."
            ) from error
    return str(address)


def model_card(adapter: ImagePromptAdapter) -> str:
    """What a page about this adapter should say, as Markdown with the hub's metadata."""
    facts: dict[str, Any] = describe(adapter)
    fusion = "none" if adapter.fusion is None else adapter.fusion.kind
    known = {k: v for k, v in adapter.spec.items() if k not in facts and k != "dial"}
    training = f"\n## Training\n\n```json\n{json.dumps(known, indent=2)}\n```\n" if known else ""
    stock = (
        ""
        if adapter.fusion is None
        else "Stock diffusers loads it too and leaves out the fusion.\n"
    )
    return f"""---
library_name: ipdiverse
tags:
- ip-adapter
- image-prompt
- diffusers
---

# An image prompt for {facts.get("family", "a custom model")}

| | |
|---|---|
| kind | {adapter.kind} |
| base | {facts.get("family", "custom")} |
| text-image fusion | {fusion} |
| width of a token | {adapter.token_width} |
| attention layers | {len(adapter.widths())} |
{training}{_dial_table(adapter.spec.get("dial"))}
## Use

```python
from ipdiverse import ImagePromptAdapter, attach, load_base

base = load_base("{_PIPELINES.get(str(facts.get("family")), "YOUR_BASE")}")
adapter = ImagePromptAdapter.from_pretrained("THIS_REPOSITORY", weight_name="{WEIGHTS}")
with attach(base.pipe, adapter) as prompt:
    prompt.set_reference(image)
    images = base.pipe("your prompt").images
```

{stock}"""


def _dial_table(dial: Any) -> str:
    """What the calibrated dial achieves at each of its points."""
    if not isinstance(dial, dict) or not dial.get("achieved"):
        return ""
    rows = [
        f"| {setting:.2f} | {one['variety']:.3f} | {one['retention']:.3f} | "
        f"{'-' if one.get('accuracy') is None else format(one['accuracy'], '.3f')} |"
        for (setting, _), one in zip(dial["points"], dial["achieved"], strict=True)
    ]
    head = "| `diversity` | variety | subject kept | prompt obeyed |\n|---|---|---|---|"
    return "\n".join(["", f"## Dial ({dial['source']})", "", head, *rows, ""])
