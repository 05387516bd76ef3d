"""Stored outputs are what the cells print today: quick notebooks are executed and their texts compared by shape."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("execnb")

NOTEBOOKS = Path(__file__).parent.parent / "nbs"
SLOW = {  # why the outputs of a notebook are not compared
    "01_clustering": "half a minute of k-means",
    "05_retrain": "trains",
    "08_allocation": "a minute of allocating",
    "11_models": "builds all networks",
    "12_data": "what it shows depends on the data sets of the machine",
    "13_compress": "trains",
    "20_car": "trains",
    "21_sws": "trains",
    "23_hashing": "trains",
    "24_lowrank": "trains",
    "25_dkm": "trains",
    "31_suite": "starts kernels",
    "40_cli": "starts processes",
    "49_passes": "compiles",
    "49_tree": "compiles",
    "50_kernels": "compiles",
    "52_seeding": "compiles",
    "53_intervals": "compiles",
    "51_triton_kernels": "needs a GPU",
    "baseline": "a job, whose output says where its run lies",
    "benchmarks": "measures times",
    "index": "trains",
    "one_layer": "a job, whose output says where its runs lie",
    "retrain": "a job, whose output says where its run lies",
}
QUICK = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem not in SLOW]
NUMBER = r"[-+−]?(\d[\d,]*(\.\d+)?|\.\d+)(e[-+]?\d+)?"


def shape(text):
    """A text without what may differ from run to run: numbers, addresses and identities, widths."""
    text = re.sub(r"\b(0x[0-9a-f]+|[0-9a-f]{12})\b", "#", text)
    return " ".join(re.sub(NUMBER, "#", text).split())


def shapes(book):
    """{cell: the shape of all that it printed and showed as text}"""
    return {cell["id"]: shape("\n".join(map(said, cell["outputs"]))) for cell in book["cells"] if "outputs" in cell}


def said(output):
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


def executed(book, folder):
    """The same notebook without its outputs, executed as docs/contributing.md says."""
    cells = [cell | dict(outputs=[]) if "outputs" in cell else cell for cell in book["cells"]]
    stripped, fresh = folder / "stripped.ipynb", folder / "fresh.ipynb"
    stripped.write_text(json.dumps(book | dict(cells=cells)))
    command = [Path(sys.executable).parent / "exec_nb", stripped, "--dest", fresh, "--exc_stop"]
    subprocess.run(command, cwd=NOTEBOOKS, check=True)
    return json.loads(fresh.read_text())


def stale(book, folder):
    """{cell: (shape of what is stored, shape of what it prints)} where these differ."""
    stored = shapes(book)
    fresh = shapes(executed(book, folder))
    return {cell: (stored[cell], fresh[cell]) for cell in stored if stored[cell] != fresh[cell]}


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_stored_outputs_are_what_the_cells_print(path, tmp_path):
    assert stale(json.loads(path.read_text()), tmp_path) == {}


def test_every_slow_notebook_is_there():
    assert set(SLOW) <= {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


def test_what_is_stale_is_seen(tmp_path):
    cells = {"same": "print('a total of', 3 + 4)", "silent": "x = 3", "other": "x"}
    printed = {"same": "a total of 9\n", "silent": "3\n", "other": "three\n"}
    book = dict(metadata={}, nbformat=4, nbformat_minor=5, cells=[])
    for cell, source in cells.items():
        output = dict(output_type="stream", name="stdout", text=[printed[cell]])
        book["cells"].append(
            dict(cell_type="code", id=cell, metadata={}, source=source, outputs=[output], execution_count=None)
        )
    assert stale(book, tmp_path) == {"silent": ("#", ""), "other": ("three", "#")}
