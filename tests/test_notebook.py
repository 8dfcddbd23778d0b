"""The notebook runs as it is, but for fewer steps; the workflow `docs` runs it whole. Its outputs are kept with it."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot

NOTEBOOK = Path(__file__).parents[1] / "docs" / "digits.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
FEWER = {"mining_steps=200": "mining_steps=2", "finetune_steps=400": "finetune_steps=2", "snapshot_every=200": ""}
FEWER["eval_samples=200"] = "eval_samples=8"


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_the_cells_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pyplot, "show", lambda: None)
    names, code = {"__name__": "__main__"}, "\n".join("".join(cell["source"]) for cell in CELLS)
    for whole, part in FEWER.items():
        assert code.count(f"{whole},") == 1, whole
        code = code.replace(f"{whole},", f"{part}," if part else "")
    try:
        exec(compile(code, str(NOTEBOOK), "exec"), names)
    finally:
        pyplot.close("all")
    assert names["result"].step == 4
    assert "step    4   KID of nines" in capsys.readouterr().out


def test_outputs_are_those_of_one_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    shown = [call for cell in CELLS for call in re.findall(r"(?<!def )(?<!plt\.)\bshow\(", "".join(cell["source"]))]
    assert len(images) == len(shown) > 0
