"""The notebooks run from their first cell to their last, and show what they say."""

import re
import statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import osrm_peft

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
INITS = ("plain LoRA", "OSRM")


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """outputs(name): what the cells of a notebook, run in a kernel in tmp_path, print and display; no cell may fail."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name):
        notebook = nbformat.read(ROOT / f"examples/{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    return run


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def shown(outputs, kind):
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def table(page, rows):
    """The numbers of a table in HTML, a list for each of its rows."""
    values = [float(value) for value in re.findall(r"<td[^>]*>(-?[\d.]+)</td>", page)]
    assert len(values) % rows == 0
    columns = len(values) // rows
    return [values[start : start + columns] for start in range(0, len(values), columns)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_has_no_outputs_and_is_linked(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 5 < len(code) <= 12
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    for page, link in (("README.md", f"examples/{path.name}"), ("docs/quickstart.md", f"../examples/{path.name}")):
        assert f"]({link})" in (ROOT / page).read_text(encoding="utf-8")
    sources = "\n".join(cell.source for cell in code)
    (imports,) = re.findall(r"^from osrm_peft import (\([^)]*\)|.*)$", sources, re.M)
    assert set(re.findall(r"\w+", imports)) <= set(osrm_peft.__all__) and "osrm_peft." not in sources


def test_training_and_merging_shows_less_interference_with_osrm(outputs, tmp_path):
    found = outputs("train_and_merge")
    shares = {init: float(re.search(rf"^{init}: ([\d.]+) %", printed(found), re.M)[1]) for init in INITS}
    assert 0 < shares["OSRM"] < shares["plain LoRA"]
    _, interference, scores = shown(found, "text/html")
    for init, matrix in zip(INITS, (table(interference, 6)[:3], table(interference, 6)[3:]), strict=True):
        others = [value for row, values in enumerate(matrix) for column, value in enumerate(values) if row != column]
        assert statistics.geometric_mean(others) == pytest.approx(shares[init], rel=0.01)
    plain, osrm = table(scores, 8)[:4], table(scores, 8)[4:]
    for alone, *merged in (plain, osrm):
        assert len(alone) == 4 and alone[3] > 60 and len(merged) == 3
    assert all(scores.count(f">{method}<") == 2 for method in ("one adapter each", "task_arithmetic", "tsv", "emr"))
    assert (tmp_path / "results/train_and_merge/merged/heads/tweets.safetensors").is_file()


def test_merging_adapters_shows_a_curve_and_loads_in_stock_peft(outputs, tmp_path):
    found = outputs("merge_adapters")
    (curve,) = shown(found, "image/png")
    assert len(curve) > 10_000
    about, scores = shown(found, "text/html")
    assert [row[:3] for row in table(about, 3)] == [[12, 8, 2]] * 3  # layers, rank, scale
    alone, *merged = table(scores, 5)
    assert alone[3] > 60 and [len(row) for row in merged] == [4] * 4
    assert re.search(r"lore, λ = (0\.[2468]|1\.0)<", scores)
    stock, ours = re.findall(r"^(?:stock PEFT|osrm_peft): tweets (-?\d\.\d{6})$", printed(found), re.M)
    assert stock == ours
    assert (tmp_path / "results/merge_adapters/served/tweets/adapter_model.safetensors").is_file()
