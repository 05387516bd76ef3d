"""To open a compressed file takes five packages and no more."""

import os
import re
import subprocess
import sys

import pytest
import torch

import deepkmeans as dk

READER = {"torch", "safetensors", "numpy", "constriction", "tqdm"}
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "faiss-cpu": "faiss"}  # where the package has another name
FILE = "figures/table3_wide_resnet_cpu_wrn-50.dkm"

CODE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import deepkmeans as dk

net = dk.load_compressed(sys.argv[2])
with torch.no_grad():
    torch.save(net(torch.load(sys.argv[3])), sys.argv[4])
print(dk.inspect(sys.argv[2]).bytes, len(dk.decompress(sys.argv[2])))
"""


def test_a_file_opens_and_runs_without_the_other_dependencies(root, tmp_path):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", wanted)[0] for wanted in project["dependencies"]}
    missing = {MODULES.get(name, name) for name in names - READER}
    assert (
        READER < names
        and {"sklearn", "numba", "faiss", "pandas", "pyarrow", "torchvision", "seaborn", "matplotlib"} < missing
    )
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", CODE, ",".join(missing), root / FILE, tmp_path / "x.pt", tmp_path / "y.pt"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, tensors = map(int, done.stdout.split())
    assert size == (root / FILE).stat().st_size and tensors > 16
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), dk.load_compressed(root / FILE)(x))
