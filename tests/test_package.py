"""What holds the repository together: exported modules, notebooks, wheel, environments, README."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import deepkmeans


def notebooks(root):
    return sorted((root / "nbs").glob("**/[!.]*.ipynb"))


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_modules_are_what_the_notebooks_export(root, tmp_path):
    for name in ("nbs", "settings.ini", "pyproject.toml", "README.md"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, tmp_path / name)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, env=env, check=True)
    exported, committed = (
        {p.relative_to(base): p.read_text() for p in (base / "deepkmeans").rglob("*.py")} for base in (tmp_path, root)
    )
    assert exported.keys() == committed.keys()
    for wing in ("baselines", "paper"):
        exported.pop(Path(f"deepkmeans/{wing}/__init__.py"))  # nbdev makes an empty one where there is none
    assert [name for name in exported if exported[name] != committed[name]] == []


def test_papermill_commands_that_are_quoted_name_an_output(root):  # without one it refuses to write to a terminal
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("figures/*.md"), *notebooks(root)]
    quoted = {c for page in pages for c in re.findall(r"papermill (nbs/[^`#\n]*)", page.read_text())}
    assert len(quoted) > 10
    assert [c for c in quoted if not c.split()[1].endswith(".ipynb") and " > out.ipynb" not in c] == []


def test_cells_have_fixed_meaningful_ids(root):
    for path in notebooks(root):
        ids = [c["id"] for c in cells(path) + cells(path, "markdown")]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9-]*", i) for i in ids), path.name
        escaped = [c["id"] for c in cells(path, "markdown") if "\\n\\n" in "".join(c["source"])]
        assert not escaped, path.name  # line breaks, and not their escapes


def test_notebooks_leave_no_folders_behind(root):  # `make test` runs them before this
    folders = {path.name for path in (root / "nbs").iterdir() if path.is_dir()}
    assert folders - {"runs", ".ipynb_checkpoints"} == {"paper", "tutorials"}


def test_imports_stand_in_cells_of_their_own(root):
    # nbdev_docs executes each cell that holds an import, without those before it
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    for path in notebooks(root):
        for cell in cells(path):
            body = [] if "#| export" in "".join(cell["source"]) else ast.parse("".join(cell["source"])).body
            imports = any(
                isinstance(node, (ast.Import, ast.ImportFrom)) for statement in body for node in ast.walk(statement)
            )
            assert not imports or all(isinstance(statement, harmless) for statement in body), (path.name, cell["id"])


def test_no_conditional_expression_is_a_part_of_another(root):  # which ruff has no rule for
    sources = [((p, c["id"]), "".join(c["source"])) for p in notebooks(root) for c in cells(p)]
    sources += [(p, p.read_text()) for folder in ("tests", "docs") for p in (root / folder).glob("*.py")]
    found = [(place, n) for place, text in sources for n in ast.walk(ast.parse(text)) if isinstance(n, ast.IfExp)]
    nested = [(place, ast.unparse(n)) for place, n in found if ast.IfExp in map(type, (n.test, n.body, n.orelse))]
    assert not nested


def test_parameterized_notebooks_have_one_parameters_cell(root):
    for path in [
        root / "nbs" / "retrain.ipynb",
        root / "nbs" / "one_layer.ipynb",
        *(root / "nbs" / "paper").glob("*.ipynb"),
    ]:
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1, path.name


def test_notebooks_are_committed_with_outputs_and_no_errors(root):
    for path in notebooks(root):
        outputs = [o for c in cells(path) for o in c["outputs"]]
        assert outputs, f"{path.name} has no outputs"
        assert not [o for o in outputs if o["output_type"] == "error"], path.name
        bars = [o for o in outputs if o.get("name") == "stderr" and "\r" in "".join(o["text"])]
        assert not bars, f"{path.name} holds progress bars"


def test_a_star_import_and_tools_see_what_the_package_imports(root):
    body = ast.parse((root / "deepkmeans" / "__init__.py").read_text()).body
    imported = [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(deepkmeans.__all__) == sorted(imported)


IMPORT = """
import sys, time, torch
start = time.perf_counter()
import deepkmeans
print(time.perf_counter() - start)
tools = {"IPython", "nbdev", "fastcore", "execnb", "papermill", "jupyter_client"}
libraries = {"matplotlib", "seaborn", "pandas", "faiss", "pykeops", "torchvision"}
print(*sorted((tools | libraries) & set(sys.modules)))
assert deepkmeans.kmeans and deepkmeans.share and deepkmeans.Regularizer and deepkmeans.compression
"""


def test_import_is_quick_and_needs_no_notebook_tool(tmp_path):
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert heavy == [] and float(seconds) < 3


def test_wheel_holds_the_package_and_runs_from_anywhere(root, tmp_path):
    for name in ("deepkmeans", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, tmp_path / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path / "dist",
            tmp_path,
        ],
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert {name.split("/")[0] for name in file.namelist()} == {
            "deepkmeans",
            wheel.name.split("-py3")[0] + ".dist-info",
        }
        file.extractall(tmp_path / "site")
    code = """
import deepkmeans, torch
from deepkmeans.baselines import car, dkm, hashing, lowrank, sws, tensor_train
from deepkmeans.paper.store import paper_numbers
rows = deepkmeans.to_rows(torch.zeros(2, 1, 3, 3))
print(deepkmeans.__file__, car.__file__, rows.shape, len(paper_numbers('table3')))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path / "dist",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stdout


def test_environment_and_pyproject_agree(root):
    tomllib = pytest.importorskip("tomllib")
    yaml = pytest.importorskip("yaml")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    wanted = set(project["dependencies"]) | {
        r for name in re.search(r"\[(.*)\]", everything)[1].split(",") for r in extras[name]
    }
    listed = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    conda = {"pytorch": "torch", "matplotlib-base": "matplotlib", "python-build": "build"}
    have = [r for r in listed if isinstance(r, str)] + [r for d in listed if isinstance(d, dict) for r in d["pip"]]
    have = {re.sub(r"^[\w-]+", lambda m: conda.get(m[0], m[0]), r) for r in have}
    assert have - {"pip", f"python{project['requires-python']}"} == wanted


def test_the_lowest_versions_that_are_tested_are_those_declared(root):
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (root / "constraints-lowest.txt").read_text().splitlines()
    pinned = [re.sub(r"(\.0)*$", "", line) for line in lines if not line.startswith("#")]
    lowest = [re.sub(r"(\.0)*$", "", requirement.replace(">=", "==")) for requirement in declared]
    assert pinned == lowest


def readme_blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.S)


def test_readme_python_prints_what_it_says(root, tmp_path):
    (code,) = readme_blocks(root, "python")
    (said,) = readme_blocks(root, "text")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def numbers(text):
        return [float(x) for x in re.findall(r"\d+\.\d+", text)]

    assert re.sub(r"\d+\.\d+", "#", done.stdout.strip()) == re.sub(r"\d+\.\d+", "#", said.strip())
    assert all(abs(a - b) < 3 for a, b in zip(numbers(done.stdout), numbers(said), strict=True)), done.stdout


def test_readme_tells_lenet_as_it_was_measured(root):
    with open(root / "figures" / "lenet_regularizers_cpu.csv") as file:
        change = {(row["K"], row["re-training"]): row["− baseline"] for row in csv.DictReader(file)}
    lines = (root / "README.md").read_text().splitlines()
    (line,) = (line.strip("| ").split(" | ") for line in lines if line.startswith("| LeNet |"))
    assert line[5:7] == [change["2", "hard (default)"], change["2", "control"]]


def test_nothing_tracked_names_a_machine(root):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(
        [
            "git",
            "grep",
            "-nIE",
            r"(^|[^a-zA-Z0-9_.~-])/(home|root|tmp|work|Users)/[a-zA-Z.]",
            "--",
            ".",
            ":!tests/test_package.py",
        ],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout
    assert found == ""


def test_wheel_and_sdist_pass_twine_and_the_sdist_holds_the_notebooks(root, tmp_path):
    pytest.importorskip("build")
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "_build", "*.egg-info", "__pycache__", "build", "dist", ".data", ".hypothesis"
    )
    shutil.copytree(root, tmp_path / "repo", ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path / "dist", tmp_path / "repo"],
        check=True,
        capture_output=True,
    )
    built = sorted((tmp_path / "dist").iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True)
    with tarfile.open(built[-1] if built[-1].name.endswith(".gz") else built[0]) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {p.relative_to(root).as_posix() for p in notebooks(root)} | {
        "settings.ini",
        "Makefile",
        "docs/build.py",
        "constraints-lowest.txt",
        "CHANGELOG.md",
    } <= held


def test_a_private_name_means_one_thing_in_the_whole_package(root):
    kinds, places = (ast.FunctionDef, ast.ClassDef), {}
    for path in sorted((root / "deepkmeans").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kinds) and node.name.startswith("_") and not node.name.startswith("__"):
                places.setdefault(node.name, []).append(path.stem)
    assert len(places) > 500 and {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_passes_settings_on_as_they_are_typed(root):
    typed = ["make", "-n", "retrain", "K=8", "DATA=my images", "MAX_STEPS=3", "FINETUNE_K=2"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    printed = subprocess.run(typed, cwd=root, env=outside, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed.splitlines()[-1])
    assert words[:2] == [".venv/bin/deepkmeans", "retrain"]
    assert sorted(words[2:]) == ["K=8", "data=my images", "finetune_K=2", "max_steps=3"]
