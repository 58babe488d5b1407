"""The notebook of the quick start runs, from its first cell to its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FEW = "STEPS, N = 2, 2"


def opened(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def test_there_is_one() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["quickstart"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_committed_without_outputs(file: Path) -> None:
    notebook = opened(file)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}, "of no machine's version"
    assert len(code) <= 8, "a few cells"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"), ("TMPDIR", tmp_path)):
        monkeypatch.setenv(name, str(value))
    notebook = opened(file)
    (settings,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    settings.source = FEW
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("reference", "generate", "compare", "one-line"):
        (shown,) = [one for one in outputs[name] if one.output_type == "execute_result"]
        assert "image/png" in shown.data, name
    (shown,) = [one for one in outputs["evaluate"] if one.output_type == "execute_result"]
    scores = eval(shown.data["text/plain"])  # noqa: S307 - of the notebook's own dict
    assert list(scores) == [0.0, 0.5, 1.0]
    names = [{name.split()[0] for name in one} for one in scores.values()]
    assert names == [{"vendi", "distance", "image", "copies"}] * 3
    said = [one.text for cell in outputs.values() for one in cell if one.output_type == "stream"]
    ours = [text for text in said if "IProgress not found" not in text]  # tqdm's, on ipywidgets
    assert not ours, "nothing is printed that a reader would stumble over"
