"""How small the pieces of this package are: `python docs/measures.py [notebook …]`, by default the whole repository.

An exported cell is one that begins with `#| export` and holds more than imports; directives are no lines of it.
A definition is a function or class at the top level of such a cell. The 90th percentile (p90) is the nearest rank.
"""

import ast
import json
import sys
from math import ceil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120


def code_cells(notebook):
    """The sources of a notebook's code cells."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def is_exported(source):
    """Does the cell go into the package, with more than imports?"""
    if not source.startswith("#| export"):
        return False
    return not all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


def n_lines(source):
    """Lines of a cell without its directives."""
    return sum(not line.startswith("#|") for line in source.strip().splitlines())


def definition_lines(source):
    """The number of lines of each function and class at the top level, decorators included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    definitions = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    starts = [min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in definitions]
    return [node.end_lineno - start + 1 for node, start in zip(definitions, starts)]


def percentile(numbers, share):
    """The nearest-rank percentile of some numbers, 0 where there are none."""
    return sorted(numbers)[ceil(share * len(numbers)) - 1] if numbers else 0


def spread(numbers):
    """Median, p90 and the largest, in words."""
    return f"median {percentile(numbers, 0.5)}, p90 {percentile(numbers, 0.9)}, longest {max(numbers, default=0)} lines"


def long_lines(sources):
    """How many lines of some sources have more than WIDTH characters."""
    return sum(len(line) > WIDTH for source in sources for line in source.splitlines())


def notebooks_of_the_repository():
    """The committed notebooks: no checkpoints, nothing that a build left."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]


def main(given):
    """Print the measures of the given notebooks, or of the repository with its tests."""
    notebooks = [Path(path) for path in given] or notebooks_of_the_repository()
    tests = [] if given else sorted((ROOT / "tests").glob("*.py"))
    cells = [source for notebook in notebooks for source in code_cells(notebook)]
    exported = [source for source in cells if is_exported(source)]
    definitions = [lines for source in exported for lines in definition_lines(source)]
    print(f"exported cells: {len(exported)}; {spread([n_lines(source) for source in exported])}")
    print(f"definitions per exported cell: {len(definitions) / max(len(exported), 1):.2f}")
    print(f"top-level definitions: {len(definitions)}; {spread(definitions)}")
    print(f"code lines over {WIDTH} characters: {long_lines(cells)} in {len(notebooks)} notebooks")
    if tests:
        found = long_lines(path.read_text(encoding="utf-8") for path in tests)
        print(f"code lines over {WIDTH} characters: {found} in {len(tests)} test files")


if __name__ == "__main__":
    main(sys.argv[1:])
