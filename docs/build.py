"""Build the documentation from the notebooks, without Quarto and without network: `python docs/build.py [FOLDER]`.

The pages are laid out as the files of the repository are, so that one relative link serves the site, JupyterLab and a
code host. Pages of the API come from the exported cells: signature, comments of the parameters, docstring, and a link
to the cell.
"""

import ast
import inspect
import json
import re
import shutil
import sys
import tokenize
from base64 import b64decode
from importlib.metadata import distribution
from io import StringIO
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parent.parent
SECTIONS = {  # caption: patterns of its pages, in their order
    "Get started": ["nbs/index.ipynb", "nbs/tutorials/*.ipynb", "nbs/retrain.ipynb"],
    "Method": ["nbs/[013-9]*_*.ipynb"],
    # and every notebook of nbs/ that no section names
    "The paper": ["figures/README.md", "figures/networks/README.md", "nbs/paper/*.ipynb"],
    "Baselines": ["nbs/2*_*.ipynb"],
    "Reference": ["nbs/benchmarks*.ipynb", "api/index.md", "nbs/file_format.ipynb", "docs/*.md", "CHANGELOG.md"],
}
TITLES = {"nbs/benchmarks.ipynb": "Benchmarks"}  # shorter in the navigation than on the page
EXPORTS_FOLDED = ("nbs/index.ipynb", "nbs/40_cli.ipynb")  # pages that are read for what they show
RESULTS_FIRST = ("nbs/paper/", "nbs/benchmarks", "nbs/tutorials/evidence")  # pages whose code is folded


# The notebooks


def notebooks(root):
    return [
        p
        for p in sorted((root / "nbs").glob("**/[!.]*.ipynb"))
        if not any(part[0] in "._" for part in p.relative_to(root).parts)
    ]


def cells(path, kind="code"):
    return [
        {**c, "source": "".join(c["source"])} for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind
    ]


def directives(source):
    return [line.split()[0].rstrip(":") for line in re.findall(r"^#\| *(\S.*)$", source, re.M)]


# The notebook at `path` as the site shows it; `name` is its path in the repository, `links` what a name in backticks
# leads to.
def page(path, name, links):
    notebook = json.loads(path.read_text())
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    shown, first = [], pictures(path, name, notebook)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = linked(cell["source"], links)
        elif cell["cell_type"] == "code":
            said = directives(cell["source"])
            if {"default_exp", "hide"} & set(said):
                continue
            if "export" in said:
                shown.append(
                    {
                        "cell_type": "markdown",
                        "id": f"at-{cell['id']}",
                        "metadata": {},
                        "source": f"({label(name, cell)})=",
                    }
                )
            folded = (
                {"exporti", "echo"} & set(said)
                or name in EXPORTS_FOLDED
                and "export" in said
                or name.startswith(RESULTS_FIRST)
            )
            cell["metadata"]["tags"] = [
                *cell["metadata"].get("tags", []),
                *["exported"] * ("export" in said),
                *["hide-input"] * bool(folded),
            ]
            cell["source"] = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M)
            cell["outputs"] = [o for o in cell["outputs"] if not (is_progress(o) or (first and is_drawn(o)))]
            # one fold for code that follows code
            if folded and shown[-1]["cell_type"] == "code" and not shown[-1]["outputs"]:
                cell["source"] = shown.pop()["source"].rstrip() + "\n\n\n" + cell["source"]
        shown.append(cell)
    if first:
        shown.insert(1, {"cell_type": "markdown", "id": "results", "metadata": {}, "source": first})
    return json.dumps({**notebook, "cells": shown})


def is_progress(output):  # bars
    return output.get("name") == "stderr" and "\r" in "".join(output["text"])


def is_drawn(output):  # a picture that matplotlib has drawn, and that stands before all else
    return "".join(output.get("data", {}).get("text/plain", "")).startswith("<Figure")


# The pictures that a notebook of results has drawn from its records, to stand before all else, but for those that a
# cell shows as they lie in figures/.
def pictures(path, name, notebook):
    if not name.startswith(RESULTS_FIRST):
        return ""
    below = {shown for cell in notebook["cells"] for shown in images(cell)}
    figures = path.parents[name.count("/")] / "figures"
    files = sorted(figures.glob(f"{path.stem}*.png"), key=lambda p: ("full" not in p.stem, len(p.stem), p.stem))
    return "\n\n".join(f"![{caption(p, path)}](/figures/{p.name})" for p in files if p.read_bytes() not in below)


def images(cell):  # the pictures among the outputs of a cell, as bytes
    found = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [b64decode("".join(image)) for image in found if image]


def caption(picture, path):  # "Table 3: Wide ResNet on CIFAR-10, full kernels"
    heading = cells(path, "markdown")[0]["source"].partition("\n")[0].strip("# ")
    return f"{heading}, {picture.stem.removeprefix(path.stem).replace('_', ' ').strip()}".removesuffix(", ")


def label(name, cell):
    return f"{Path(name).stem}-{cell['id']}"


# `share` → a link to its page in the API, but for code blocks, headings and the text of other links
def linked(text, links):
    parts = re.split(r"(^```\w.*?^```$|^#[^\n]*$)", text, flags=re.S | re.M)
    parts[::2] = [re.sub(r"(?<![\[`])`(\w+)`(?![\]`])", lambda m: links.get(m[1], m[0]), part) for part in parts[::2]]
    return "".join(parts)


# The API


def modules(root):  # {module: (notebook, [(cell, its definitions)])} in reading order
    found = {}
    for path in notebooks(root):
        name = next(
            (m[1] for c in cells(path) if (m := re.match(r"#\| *default_exp ([\w.]+)", c["source"]))), "__init__"
        )
        if name != "__init__":
            exported = [c for c in cells(path) if "export" in directives(c["source"])]
            found[name] = path, [(c, [n for n in ast.parse(c["source"]).body if is_public(n)]) for c in exported]
    return found


def is_public(node):
    return bool(name_of(node)) and not name_of(node).startswith("_")


def name_of(node):  # of what is defined here: a function, a class, a constant; None for anything else
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
        return node.targets[0].id
    return node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None


def described(node, source, place):  # a definition as a directive of Sphinx's Python domain
    if isinstance(node, ast.ClassDef):
        inside = [
            n
            for n in node.body
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n)
        ]
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        arguments = f"({', '.join(map(field, fields(node)))})" if fields(node) else ""
        if init:
            arguments = f"({signature(init, skip=1)})"
        text = [prose(node), table(parameters(init, source) if init else field_rows(node, source)), place]
        return directive("class", node.name + arguments, *text, *[method(n, source) for n in inside])
    if isinstance(node, ast.FunctionDef):
        return directive(
            "function",
            f"{node.name}({signature(node)}){arrow(node)}",
            prose(node),
            table(parameters(node, source)),
            place,
        )
    return directive(
        "data",
        name_of(node),
        comments(source).get(node.end_lineno, ""),
        f"```python\n{ast.get_source_segment(source, node)}\n```",
        place,
    )


def method(node, source):
    is_property = any(isinstance(d, ast.Name) and "property" in d.id for d in node.decorator_list)
    head = node.name if is_property else f"{node.name}({signature(node, skip=1)}){arrow(node)}"
    return directive("property" if is_property else "method", head, prose(node), table(parameters(node, source)))


def directive(kind, head, *text):
    body = "\n\n".join(t for t in text if t)
    fence = "`" * (3 + max((len(m) for m in re.findall(r"^`{3,}", body, re.M)), default=0))
    return f"{fence}{{py:{kind}}} {head}\n\n{body}\n{fence}"


def signature(node, skip=0):
    given = ast.parse(ast.unparse(node)).body[0].args
    del given.args[:skip]
    for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
        argument.annotation = unquoted(argument.annotation)
    return ast.unparse(given)


def arrow(node):
    return f" -> {ast.unparse(unquoted(node.returns))}" if node.returns else ""


def unquoted(node):  # an annotation in quotes, of what is imported late, as the type that it names
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return ast.parse(node.value, mode="eval").body if is_text else node


def field(node):  # of a class, with its default where it has one
    default = f" = {ast.unparse(node.value)}" if node.value else ""
    return f"{node.target.id}: {ast.unparse(unquoted(node.annotation))}{default}"


def prose(node):
    return inspect.cleandoc(ast.get_docstring(node) or "")


# [(name, type, default, comment)] of those that have a comment on a line of their own, and of what is returned
def parameters(node, source):
    notes, last = comments(source), header_end(node, source)
    rows = [
        (f"`{a.arg}`", type_of(a.annotation), code(default), notes.get(a.lineno, ""))
        for a, default in arguments(node)
        if a.lineno != last
    ]
    return [row for row in [*rows, ("returns", type_of(node.returns), "", notes.get(last, "").lstrip("→ "))] if row[3]]


def code(node):  # of a default, where there is one
    return f"`{ast.unparse(node)}`" if node else ""


def type_of(annotation):  # the type, where there is one
    return code(unquoted(annotation))


def arguments(node):  # [(argument, its default or None)]
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    return [*zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]


def header_end(node, source):  # the line on which the signature ends
    lines = source.splitlines()
    return next(
        i
        for i in range(node.lineno, node.body[0].lineno + 1)
        if lines[i - 1].partition("#")[0].rstrip().endswith(":") or i == node.body[0].lineno
    )


def fields(node):
    return [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]


def field_rows(node, source):
    notes = comments(source)
    return [
        (f"`{f.target.id}`", type_of(f.annotation), code(f.value), notes[f.end_lineno])
        for f in fields(node)
        if f.end_lineno in notes
    ]


def comments(source):  # {line: comment}
    return {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


HEAD = ("name", "type", "default", "what it is")


def table(rows):  # of parameters, without a column in which nothing stands
    columns = [column for column in zip(HEAD, *rows) if any(column[1:])]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in zip(*columns)]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]) if rows else ""


def first_line(node):
    return prose(node).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def write_api(root, stage, links):
    (stage / "api").mkdir()
    rows, pages = [], modules(root)
    for name, (path, exported) in pages.items():
        chapter = path.relative_to(root)
        title, _, about = cells(path, "markdown")[0]["source"].partition("\n")
        chapter_link = f"The chapter: [{title.strip('# ')}](../{chapter})."
        head = f"# {name}\n\n{about.strip()}\n\n{chapter_link}\n\n```{{py:module}} deepkmeans.{name}\n```"
        text = [described(n, c["source"], f"[source](#{label(chapter, c)})") for c, nodes in exported for n in nodes]
        (stage / "api" / f"{name}.md").write_text(linked("\n\n".join([head, *text]), links) + "\n")
        rows += [
            f"| {links[n.name]} | {name} | {first_line(n)} |"
            for _, nodes in exported
            for n in nodes
            if name_of(n) in links and hasattr(n, "name")
        ]
    (stage / "api" / "index.md").write_text(API.format(rows="\n".join(rows), pages="\n".join(pages)))


API = """# API

All of these come with `import deepkmeans as dk`, but for the baselines: `from deepkmeans.baselines.car import greedy`.
The harness of the paper has pages of its own, `from deepkmeans.paper.suite import reproduce`.
Every wrong argument is a `ValueError` that names the argument, its value and the bound.

| name | module | what it is |
|---|---|---|
{rows}

```{{toctree}}
:hidden:

{pages}
```
"""


def chapter_links(root):  # {name of a notebook: a link to its page}
    return {p.stem: f"[`{p.stem}`](/{p.relative_to(root).as_posix()})" for p in notebooks(root) if p.stem != "index"}


def api_links(root):  # {name: a link to its entry} of all that the package itself and the baselines offer
    text = (root / "deepkmeans" / "__init__.py").read_text()
    offered = [(n.module, a.name) for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) for a in n.names]
    for path in sorted((root / "deepkmeans" / "baselines").glob("[!_]*.py")):
        offered += [(f"deepkmeans.baselines.{path.stem}", name) for name in public_names(path)]
    return {name: f"{{py:obj}}`{name} <{module}.{name}>`" for module, name in offered}


def public_names(path):  # of a module
    assigned = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign)]
    names = next(ast.literal_eval(n.value) for n in assigned if n.targets[0].id == "__all__")
    return [name for name in names if not name.isupper()]


# The site


def navigation(stage):  # toctrees for the front page
    def found(pattern):
        return sorted(p.relative_to(stage).as_posix() for p in stage.glob(pattern))

    pages = {caption: [p for pattern in patterns for p in found(pattern)] for caption, patterns in SECTIONS.items()}
    pages["The paper"] += sorted(set(found("nbs/*.ipynb")) - {p for section in pages.values() for p in section})

    def entry(page):
        return f"{TITLES[page]} <{page}>" if page in TITLES else page

    return "\n\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(map(entry, section)) + "\n```"
        for caption, section in pages.items()
    )


def stage_pages(root, stage):
    shutil.rmtree(stage, ignore_errors=True)
    api, links = api_links(root), chapter_links(root) | api_links(root)
    for path in notebooks(root):
        name = path.relative_to(root).as_posix()
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(page(path, name, links))
    shutil.copytree(root / "figures", stage / "figures")
    gallery = stage / "figures" / "README.md"
    # Sphinx takes a link to Markdown for a page
    gallery.write_text(re.sub(r"\[(\w+\.md)\]\(\1\)", r"{download}`\1`", gallery.read_text()))
    (stage / "docs").mkdir()
    for path in (*(root / "docs").glob("*.md"), root / "CHANGELOG.md"):
        (stage / path.relative_to(root)).write_text(linked(path.read_text(), links))
    shutil.copy(root / "docs" / "results.png", stage / "docs")
    write_api(root, stage, api)
    front = linked((root / "README.md").read_text(), links)
    (stage / "index.md").write_text(f"{front}\n\n{navigation(stage)}\n")
    copy_mathjax(stage / "_static" / "mathjax")
    for name in ("site.css", "site.js", "icon.svg"):
        shutil.copy(root / "docs" / name, stage / "_static")


def copy_mathjax(target):  # the script and its fonts, out of a wheel that holds nothing else of use
    for file in distribution("sphinx-mathjax-offline").files:
        if file.name == "tex-mml-chtml.js" or "woff-v2" in file.parts:
            place = target / Path(*file.parts[file.parts.index("mathjax") + 1 :])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), place)


def build(root=ROOT, out=None):
    out = Path(out or root / "docs" / "_build")
    stage_pages(root, out / "source")
    static = f"html_static_path={out / 'source' / '_static'}"
    places = ["-c", str(root / "docs"), "-d", str(out / "doctrees"), str(out / "source"), str(out / "html")]
    return build_main(["-q", "-W", "--keep-going", "-D", static, *places])


if __name__ == "__main__":
    sys.exit(build(out=sys.argv[1] if len(sys.argv) > 1 else None))
