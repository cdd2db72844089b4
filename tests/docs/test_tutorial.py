"""The tutorial notebook runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def outputs(cell: Any) -> str:
    """What a cell shows, as text and as HTML."""
    shown = [output.get("text", "") for output in cell.outputs]
    shown += [text for output in cell.outputs for text in output.get("data", {}).values()]
    return "\n".join(shown)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_runs_and_shows_its_results(
    forks: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    kernel = tmp_path / "jupyter" / "kernels" / "fork" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    words = [str(forks.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": words, "display_name": "a fork", "language": "python"}), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="fork", resources=place).execute()
    shown = {index: outputs(cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    whole = "\n".join(shown.values())
    assert "every sample was read once" in whole
    assert "<caption>Run</caption>" in whole
    assert "<caption>BuildResult</caption>" in whole
    assert re.search(r"<th>views</th><td>4 of 48x64", whole)
    comparison = next(text for text in shown.values() if "mIoU %" in text)
    assert "(teacher)" in comparison or "<th>teacher</th>" in comparison
    assert comparison.count("<tr>") == 4
    assert len(re.findall(r"^epoch \d: loss", whole, re.MULTILINE)) == 3
    assert shown[max(shown)].count("mIoU") >= 1
