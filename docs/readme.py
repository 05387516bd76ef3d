"""The README's picture and table of results, from the tables and records of figures/: `python docs/readme.py`."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from deepkmeans.paper.figures import method_look, use_style
from deepkmeans.paper.store import repository

COLUMNS = ("", "network, data, baseline, protocol", "the paper's ratio", "on disk")
COLUMNS += ("sharing alone (WR)", "Deep k-Means", "control", "best other method", "run")
NOTE = "A single run's standard error is {} to {} points."


class Shown(NamedTuple):
    """A line of the README: a ratio of a table, and the methods whose names end on `kind`."""

    title: str
    table: str  # figures/<table>_<protocol>.csv
    protocol: str
    network: str
    nominal: float
    kind: str = ""


SHOWN = [
    Shown("Table 1", "table1_tt_conv_cnn", "cpu", "TT-conv-CNN", 4),
    Shown("Table 1, wanted ratio", "table1_tt_conv_cnn", "cpu", "the same", 16, ", wanted ratio"),
    Shown("Table 2", "table2_freshnet_cnn", "cpu", "FreshNet-CNN", 16),
    Shown("Table 2, wanted ratio", "table2_freshnet_cnn", "cpu", "the same", 16, ", wanted ratio"),
    Shown("Table 3", "table3_wide_resnet", "full", "Wide ResNet 16-4", 50),
    Shown("Table 4", "table4_googlenet", "cpu", "stand-in: GoogLeNet at 64×64", 4),
    Shown("Table 4, wanted ratio", "table4_googlenet", "cpu", "the same", 16, ", wanted ratio"),
]
OURS = ("WR", "Deep k-Means", "spectral", "control", "dense")  # how the methods begin that are no rivals


def write_readme(
    root=".",  # a folder in a clone of the repository
) -> Path:  # the page
    """Put the table of results into the README, and below it how sure its numbers are."""
    root = repository(root)
    page = root / "README.md"
    lines = [_lenet(root / "figures"), *(_line(root / "figures", shown) for shown in SHOWN)]
    head, *below = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (COLUMNS, *lines)]
    table = "\n".join([head, "|---" * len(COLUMNS) + "|", *below, "", _note(root / "figures")])
    old = re.compile(re.escape(head) + r"\n(\|.*\n)*\n.*")
    page.write_text(old.sub(lambda _: table, page.read_text()))
    return page


def _note(folder):
    names = {f"{shown.table}_{shown.protocol}" for shown in SHOWN}
    changes = [line["ours"] for name in names for line in _table(folder, name)]
    errors = [float(change.split()[2]) for change in changes if change.endswith("(1)")]
    return NOTE.format(f"{min(errors):.1f}", f"{max(errors):.1f}")


def _table(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _measured_on(folder, name, network):  # "FreshNet-CNN, cifar10-jpeg, 77.4 %, cpu"
    records = _records(folder, name, " ".join(line["run"] for line in _table(folder, name)))
    baselines = [record["stages"]["baseline"]["top1"] for record in records if "baseline" in record["stages"]]
    return f"{network}, {records[0]['dataset']['name']}, {fmean(baselines):.1f} %, {name.rsplit('_', 1)[1]}"


def _records(folder, name, runs):  # those of some runs, "ea3bd05ba131 d49df1ac1bbf"
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [record for record in records if record["id"] in runs.split()]


def _lenet(folder):  # the smallest codebooks of all
    name = "lenet_regularizers_cpu"
    two = {line["re-training"]: line for line in _table(folder, name) if line["K"] == "2"}
    hard, control = two["hard (default)"], two["control"]
    alone = _mean(control["shared"]) - _mean(control["fine-tuned"]) + float(control["− baseline"])
    shared = _records(folder, name, hard["run"])[0]["stages"]["shared"]
    on_disk = f"{shared['ratio']['conv']['file']:.0f} (convolutions)"
    changes = [f"{alone:+.2f}", hard["− baseline"], control["− baseline"]]
    return ["LeNet", _measured_on(folder, name, "LeNet-5"), "–", on_disk, *changes, "–", _run(hard)]


def _line(folder, shown):
    name = f"{shown.table}_{shown.protocol}"
    lines = _table(folder, name)
    here = {_method(line): line for line in lines if float(line["nominal ratio"]) == shown.nominal}
    ours = [_change(here.get(method + shown.kind)) for method in ("WR", "Deep k-Means", "control")]
    about = shown.network if shown.kind else _measured_on(folder, name, shown.network)
    nominal = "–" if "wanted" in shown.kind else f"{shown.nominal:g}"
    on_disk = float(here["Deep k-Means" + shown.kind]["ratio on disk"])
    best, run = _best_other(lines, shown.nominal), _run(here["Deep k-Means" + shown.kind])
    return [shown.title, about, nominal, f"{on_disk:.3g}", *ours, best, run]


def _run(line):  # the id of the first of its runs
    return f"`{line['run'].split()[0]}`"


def _method(line):
    return line["method"].removesuffix(" †")


def _mean(text):  # of "98.71 ± 0.19 (3)"
    return float(text.split()[0])


def _change(line):  # "−0.70 (−1.95)", the paper's in brackets
    if line is None:
        return "–"
    ours = line["ours"].split()[0] if line["ours"] != "not run" else "not run"
    return f"{ours} ({float(line['paper']):+.2f})" if line["paper"] else ours


def _best_other(lines, ratio):  # "−0.20, one-shot at 4.2": of those that are at least nearly as small
    others = [line for line in lines if not line["method"].startswith(OURS) and line["ours"] != "not run"]
    small = [line for line in others if _reached(line) > 0.9 * ratio]
    if not small:
        return "not run"
    best = max(small, key=lambda line: _mean(line["ours"]))
    return f"{_change(best)}, {_method(best)} at {_reached(best):.3g}"


def _reached(line):
    counted = (line.get(name) for name in ("ratio on disk", "ratio, Huffman", "ratio, entropy", "nominal ratio"))
    return float(next(filter(None, counted)))


FLOORS = {"wide": -6, "lenet": -0.8}  # points; what lies below is an arrow with its value
WIDE = {"WR": "sharing alone", "control": "control", "Deep k-Means": "Deep k-Means"}


def draw_picture(
    root=".",  # a folder in a clone of the repository
) -> Path:  # docs/results.png
    """Draw what a Wide ResNet and LeNet lose over the ratio: the method, its control, sharing alone and the paper's."""
    root = repository(root)
    plt = use_style()
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6), layout="constrained")  # text for a telephone
    _draw_wide(top, _table(root / "figures", "table3_wide_resnet_full"))
    _draw_lenet(bottom, _table(root / "figures", "lenet_regularizers_cpu"))
    fig.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path = root / "docs" / "results.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _draw_wide(ax, lines):
    for method, name in WIDE.items():
        own = [line for line in lines if _method(line) == method]
        points = [(_reached(line), _mean(line["ours"])) for line in own]
        _draw(ax, sorted(points), FLOORS["wide"], label=name, **method_look(method))
    said = [(line["nominal ratio"], line["paper"]) for line in lines if _method(line) == "Deep k-Means"]
    grey = dict(color="0.55", marker="o", fillstyle="none", linestyle=":")
    _draw(
        ax,
        sorted((float(x), float(y)) for x, y in said),
        FLOORS["wide"],
        label="the paper's, by its count of bits",
        **grey,
    )
    _finish(ax, "Wide ResNet 16-4, CIFAR-10", "times smaller on disk", FLOORS["wide"])
    ax.set_ylabel("change of top-1, points")


def _draw_lenet(ax, lines):
    own = [line for line in lines if line["re-training"] in ("hard (default)", "control")]
    control = [line for line in own if line["re-training"] == "control"]
    alone = [_mean(line["shared"]) - _mean(line["fine-tuned"]) + float(line["− baseline"]) for line in control]
    ratios = [float(line["conv. ratio"]) for line in control]
    _draw(ax, list(zip(ratios, alone)), FLOORS["lenet"], **method_look("WR"))
    for method, name in (("control", "control"), ("Deep k-Means", "hard (default)")):
        points = [(float(r["conv. ratio"]), float(r["− baseline"])) for r in own if r["re-training"] == name]
        _draw(ax, points, FLOORS["lenet"], **method_look(method))
    _finish(ax, "LeNet-5, MNIST", "times smaller, convolutions", FLOORS["lenet"])


def _draw(ax, points, floor, **look):
    inside = [(x, y) for x, y in points if y >= floor]
    ax.plot(*zip(*inside) if inside else ([], []), **{"linestyle": "-"} | look)
    for x, y in points:
        if y < floor:
            ax.plot(x, floor, color=look["color"], marker="v", clip_on=False)
            place = dict(xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10)
            ax.annotate(f"{y:.0f}".replace("-", "−"), (x, floor), color=look["color"], **place)


def _finish(ax, title, label, floor):
    ax.axhline(0, color="0.15", linewidth=1.2, zorder=1)
    place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10, color="0.15")
    ax.annotate("the dense network", (0.99, 0), (0, 4), ha="right", **place)
    ax.set(title=title, xlabel=label, ylim=(floor, -0.12 * floor))


if __name__ == "__main__":
    print(draw_picture(), write_readme())
