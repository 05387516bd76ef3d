"""One page with everything that lies in figures/: the command that makes it, and where its numbers come from.

`python docs/gallery.py` writes figures/README.md. A notebook declares the files that it writes into figures/ in a cell
`FILES = {what: name}`, whose names may hold `{protocol}`, `{device}` and the like. The command is `deepkmeans reproduce
NAME`, with the protocol of the name, unless the notebook gives another as `COMMAND`. Both are read from the notebook's
text, and the notebook itself writes under these names.
"""

import ast
import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from deepkmeans import shelf
from deepkmeans.paper.store import PROTOCOLS, read_records, repository


class Declared(NamedTuple):
    """Files of figures/ that a notebook writes."""

    notebook: str  # its path in the repository
    name: str  # of the files, with places such as {protocol}
    command: str  # that makes them, with the same places


def declared(
    root=".",  # a folder in a clone of the repository
) -> list:  # of `Declared`
    """What the notebooks say that they write, and what was made by hand."""
    root = repository(root)
    books = sorted([*(root / "nbs").glob("*.ipynb"), *(root / "nbs" / "paper").glob("*.ipynb")])
    return [entry for book in books for entry in _declared(root, book)] + BY_HAND


def _declared(root, book):
    said = _constants(book)
    names = said.get("FILES", {}).values()
    where = book.relative_to(root).as_posix()
    return [Declared(where, name, said.get("COMMAND") or _usual_command(book.stem, name)) for name in names]


def _usual_command(stem, name):
    protocol = " --protocol {protocol}" if "{protocol}" in name else ""
    return f"deepkmeans reproduce {stem}{protocol}"


def _constants(book):  # FILES and COMMAND of a notebook
    cells = json.loads(book.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = {}
    for text in texts:
        if re.search("^(FILES|COMMAND) = ", text, re.M):
            found |= _assigned(ast.parse(text))
    return found


def _assigned(tree):
    simple = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    named = {node.targets[0].id: node.value for node in simple}
    return {name: ast.literal_eval(named[name]) for name in ("FILES", "COMMAND") if name in named}


# Two files come from chapters of the library, which show them; two were tabulated from others' work, and their first
# lines say how.
BY_HAND = [
    Declared(
        "nbs/01_clustering.ipynb",
        "kmeans_backends.csv",
        "rm figures/kmeans_backends.csv && papermill nbs/01_clustering.ipynb out.ipynb",
    ),
    Declared(
        "nbs/21_sws.ipynb",
        "sws_lenet5.jsonl",
        "papermill nbs/baseline.ipynb out.ipynb -p method soft -p model lenet5 -p data mnist -p batch_size 256 "
        "-p baseline_epochs 10 -p baseline_lr 0.02 -p epochs 30 -p lr 0.02 -p protocol full",
    ),
    Declared("nbs/paper/energy_verification.ipynb", "energy_reference_accelforge.csv", ""),
    Declared("nbs/paper/energy_verification.ipynb", "energy_eyeriss_chip.csv", ""),
]


CHOICES = {"protocol": "|".join(PROTOCOLS), "device": "cpu|cuda"}  # what may stand in a place; else any word


def _filled(entry, name):  # the command of a file; None where it is not one of the entry's
    places = re.findall(r"{(\w+)}", entry.name)
    pattern = re.escape(entry.name).replace(r"\{", "{").replace(r"\}", "}")
    for place in places:
        pattern = pattern.replace(f"{{{place}}}", f"(?P<{place}>{CHOICES.get(place, '[a-z0-9_-]+')})")
    found = re.fullmatch(pattern, name)
    return entry.command.format(**found.groupdict()) if found else None


SHOWN = (".png", ".csv", ".md", ".jsonl", ".dkm")  # kinds of files


def origins(
    root=".",  # a folder in a clone of the repository
) -> dict:  # {path in figures/: [(notebook, command), …]}
    """Which notebook says that it writes a file, and how: one for each, if all is well."""
    root = repository(root)
    entries = declared(root)
    paths = [path for path in sorted((root / "figures").glob("*.*")) if path.suffix in SHOWN]
    paths = [path for path in paths if path.name != "README.md"]  # the page itself
    return {
        path: [(entry.notebook, command) for entry in entries if (command := _filled(entry, path.name)) is not None]
        for path in paths
    }


INTRODUCTION = """# Figures and tables

Generated from the files of this folder and their records; every number in it was measured by the notebook that it \
stands under, but for the paper's own.

`deepkmeans reproduce` draws everything again from the committed records and makes the runs that are missing; with \
`--again` it makes them all. The column `run` names the records of a line, which hold parameters, data, machine, \
versions and commit.

In the tables of the paper, *ours* is the change of accuracy against the baseline in points ± its standard error, and \
how many runs it is the mean of; *difference* is ours less the paper's, † stands where the paper has no such number. \
*Nominal* is the ratio that a line is named after. A ratio *on disk* is that of the file; *entropy*, *log2 K* and \
*Huffman* count the codes by these lengths, *numbers* the parameters. `cifar10-jpeg`: \
[CIFAR-10 from a copy whose images were coded as JPEG](../nbs/12_data.ipynb)."""


def write_gallery(
    root=".",  # a folder in a clone of the repository
) -> Path:  # figures/README.md
    """Write the page that shows all figures and tables with their commands and provenance."""
    root = repository(root)
    sections = {}
    for path, writers in origins(root).items():
        notebook, command = writers[0] if writers else ("", "")
        sections.setdefault(notebook, {}).setdefault(command, []).append(path)
    tables = sorted(notebook for notebook in sections if "/table" in notebook)
    others = sorted(sections.keys() - tables)
    first, rest = ([_section(root, notebook, sections[notebook]) for notebook in part] for part in (tables, others))
    page = root / "figures" / "README.md"
    page.write_text("\n\n".join([INTRODUCTION, *first, _networks_section(root), *rest]) + "\n")
    return page


def _networks_section(root):
    found = shelf.cards(root / "figures")
    lines = [list(line.values()) for line in shelf.table(found)]
    told = [
        "What `deepkmeans list` prints. `deepkmeans evaluate NAME --data cifar10 --record` measures one again and "
        "compares; `dk.load_compressed(NAME)` opens it.",
        f"The ratio is that of the file on disk, the record the `id` of a run in the `.jsonl` beside it. "
        f"Licence of all: {shelf.LICENCE}.",
    ]
    columns = list(shelf.table(found)[0]) if found else []
    return "\n\n".join(["## Compressed networks", *told, "\n".join(_markdown([columns, *lines]))])


def _section(root, notebook, made):  # {command: paths}
    if not notebook:
        return "## Others\n\n" + "\n".join(_listed(paths) for paths in made.values())
    heading, claim = _title(root / notebook)
    commands = sorted(made, key=lambda command: command == "")  # what has none comes last
    parts = [_made_by(heading, Path(notebook).stem, command, made[command]) for command in commands]
    return "\n\n".join([f"## {heading}", f"{claim} ([notebook](../{notebook}))", *parts])


def _title(book):  # heading and claim of a notebook
    first = json.loads(book.read_text())["cells"][0]["source"]
    lines = "".join(first).splitlines()
    heading = next(line.removeprefix("# ") for line in lines if line.startswith("# "))
    claim = next(line.removeprefix("> ") for line in lines if line.startswith("> "))
    return heading, claim


def _made_by(heading, stem, command, paths):
    head = [f"`{command}`"] if command else []
    captions = {path: f"{heading}, {path.stem.removeprefix(stem).replace('_', ' ').strip()}" for path in paths}
    first = sorted(paths, key=lambda path: path.suffix != ".png")  # pictures
    shown = [text for path in first if (text := _shown(path, captions[path].removesuffix(", ")))]
    notes = [_listed(paths), *(_provenance(path) for path in paths if path.suffix == ".jsonl")]
    return "\n\n".join([*head, *shown, "\n".join(notes)])


def _listed(paths):
    return "- files: " + ", ".join(f"[{path.name}]({path.name})" for path in paths)


MOST_LINES = 30  # of a table on the page
OPEN_LINES = 12  # of one that is not folded


def _shown(path, caption):  # a picture, a rendered table, or a table that is short enough
    if path.suffix == ".png":
        return f"![{caption}]({path.name})"
    if path.suffix == ".md":
        return path.read_text().strip()
    if path.suffix == ".csv":
        return _shown_table(path)


def _shown_table(path):  # the comments of a CSV file, and its table where it is short
    text = path.read_text().splitlines()
    comments = [line.removeprefix("#").strip() for line in text if line.startswith("#")]
    head, *lines = csv.reader(line for line in text if not line.startswith("#"))
    if not 0 < len(lines) <= MOST_LINES:
        return "\n".join(comments)
    values = [[_short(value, name) for value in column] for name, *column in zip(head, *lines)]
    columns = dict(zip((_title_of(name, path.stem) for name in head), values))
    same = {title: values[0] for title, values in columns.items() if len(lines) > 2 and len(set(values)) == 1}
    kept = {title: values for title, values in columns.items() if title not in same}
    said = ["In all lines: " + ", ".join(f"{title} {value}" for title, value in same.items() if value)] if same else []
    table = "\n".join(_markdown([list(kept), *zip(*kept.values())]))
    return "\n\n".join([*comments, *said, _folded(table, len(lines))])


def _folded(table, lines):
    if lines <= OPEN_LINES:
        return table
    return f"<details><summary>table, {lines} lines</summary>\n\n{table}\n\n</details>"


TITLES = {  # of columns that files name for machines
    "input_mib": "rows, MiB",
    "extra_mib": "beyond them, MiB",
    "kib": "size, KiB",
    "top1": "shared, top-1 %",
    "finetuned": "fine-tuned, top-1 %",
    "wanted": "wanted ratio",
    "limit": "limit, s",
    "left_out": "left out",
    "triton": "triton, ms",
    "torch_version": "PyTorch",
    "metric_saving": "saving by the metric",
    "reference_saving": "saving by the reference",
    "save_seconds": "save, s",
    "load_seconds": "load, s",
    "over_bound_percent": "above the bound, %",
} | {name: f"{name}, bytes" for name in ("dense", "fixed", "log2", "entropy", "huffman", "file", "allowed")}
OF_TABLES = {name: f"{name}, points" for name in ("paper", "ours", "difference")}


def _title_of(column, stem):
    return (OF_TABLES if stem.startswith("table") else TITLES).get(column, column)


def _short(text, column):  # a number with four digits; runs are named by digits, too
    try:
        number = float(text)
    except ValueError:
        return text
    if column == "run":
        return text
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _markdown(lines):  # lists of words, the columns first → the lines of a table
    rule = ["---"] * len(lines[0])
    return ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]


TOLD = {
    "protocol": "protocol",
    "data": "dataset.name",
    "fingerprint": "dataset.fingerprint",
    "seeds": "parameters.seed",
    "repeats": "parameters.repeat",
    "on": "environment.device",
    "torch": "environment.versions.torch",
    "deepkmeans": "environment.versions.deepkmeans",
    "commits": "environment.commit",
}


def _provenance(path):  # what the records say of protocol, data, seeds and machine; nothing where they say nothing
    records = read_records(path)
    said = [f"{len(records)} run{'s' if len(records) > 1 else ''}"]
    for title, field in TOLD.items():
        values = {str(_field(record, field)) for record in records} - {"None"}
        if values:
            said.append(f"{title} {', '.join(sorted(values))}")
    return f"- {path.name}: {'; '.join(said)}"


def _field(record, dotted):
    for part in dotted.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


if __name__ == "__main__":
    print(write_gallery())
