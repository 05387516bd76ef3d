"""How small the pieces of this package are: `python docs/measures.py [notebook …]`, by default the whole repository.

An exported cell is one that begins with `#| export` and holds more than imports; directives are no lines of it.
A definition is a function or class at the top level of such a cell. The 90th percentile (p90) is the nearest rank.
Such a cell is tested where a cell with an `assert` stands before the next one; a chain is broken by any other code.
"""

import ast
import json
import sys
from math import ceil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
MANY = 2  # targets that a tuple assignment may have


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


def after_each(sources):
    """For each exported cell of a notebook, the code cells between it and the next one."""
    groups = []
    for source in sources:
        if is_exported(source):
            groups.append([])
        elif groups:
            groups[-1].append(source)
    return groups


def is_tested(group):
    """Does a cell between two exported ones assert something?"""
    return any(isinstance(node, ast.Assert) for source in group for node in ast.walk(ast.parse(source)))


def longest_chain(groups):
    """The most exported cells in a row with no other code between them."""
    lengths = [0]
    for group in groups:
        lengths[-1] += 1
        lengths += [0] if group else []
    return max(lengths)


def wide_assignments(source):
    """Assignments of a tuple that is written out to more than MANY targets."""
    pairs = [(node.targets[0], node.value) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    return sum(isinstance(a, ast.Tuple) and isinstance(b, ast.Tuple) and len(a.elts) > MANY for a, b in pairs)


def table_lines(number):
    """The code lines of the notebook of a table, its parameters and imports left out."""
    (notebook,) = (ROOT / "nbs" / "paper").glob(f"table{number}_*.ipynb")
    imports = ast.Import | ast.ImportFrom
    said = [source for source in code_cells(notebook) if not source.startswith("protocol:")]
    kept = [source for source in said if not all(isinstance(node, imports) for node in ast.parse(source).body)]
    return [line.strip() for source in kept for line in source.splitlines() if line.strip()]


def print_shared_lines(first=1, others=(2, 4)):
    """Print how much of the other tables stands word for word in the first."""
    there = set(table_lines(first))
    for number in others:
        lines = table_lines(number)
        same = sum(line in there for line in lines)
        share = f"{same} of {len(lines)}, {same / len(lines):.0%}"
        print(f"code lines of table {number} that stand in table {first}: {share}")


def notebooks_of_the_repository():
    """The committed notebooks: no checkpoints, nothing that a build left."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]


def main(given):
    """Print the measures of the given notebooks, or of the repository with its tests."""
    notebooks = [Path(path) for path in given] or notebooks_of_the_repository()
    tests = [] if given else sorted((ROOT / "tests").glob("*.py"))
    books = [code_cells(notebook) for notebook in notebooks]
    cells = [source for book in books for source in book]
    groups = [group for book in books for group in after_each(book)]
    exported = [source for source in cells if is_exported(source)]
    definitions = [lines for source in exported for lines in definition_lines(source)]
    print(f"exported cells: {len(exported)}; {spread([n_lines(source) for source in exported])}")
    print(f"definitions per exported cell: {len(definitions) / max(len(exported), 1):.2f}")
    print(f"top-level definitions: {len(definitions)}; {spread(definitions)}")
    print(f"exported cells that are tested: {sum(map(is_tested, groups)) / max(len(groups), 1):.0%}")
    print(f"longest chain of exported cells: {max((longest_chain(after_each(book)) for book in books), default=0)}")
    wide = 1000 * sum(map(wide_assignments, cells)) / max(sum(map(n_lines, cells)), 1)
    print(f"assignments of tuples to more than {MANY} targets: {wide:.1f} in a thousand lines")
    print(f"code lines over {WIDTH} characters: {long_lines(cells)} in {len(notebooks)} notebooks")
    if tests:
        found = long_lines(path.read_text(encoding="utf-8") for path in tests)
        print(f"code lines over {WIDTH} characters: {found} in {len(tests)} test files")
        print_shared_lines()


if __name__ == "__main__":
    main(sys.argv[1:])
