"""The README's picture and table of results, from the tables and records of figures/: `python docs/readme.py`."""

import csv
import json
import re
from math import hypot
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from deepkmeans.paper.figures import method_look, use_style
from deepkmeans.paper.store import repository
from deepkmeans.shelf import binomial_error

COLUMNS = ("", "network, data, baseline, protocol", "the paper's ratio", "on disk")
COLUMNS += ("sharing alone (WR)", "Deep k-Means", "control", "best other method", "run")
NOTE = "Standard errors: {} to {} points a run by its test images (at `cpu` runs of the Wide ResNet scatter by {}), "
NOTE += "LeNet {} (sharing alone {}). Training on without compression: {}."


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
LENET = "lenet_regularizers_cpu"
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
    tables = {shown.table: _table(folder, f"{shown.table}_{shown.protocol}") for shown in SHOWN}
    changes = [line["ours"] for lines in tables.values() for line in lines]
    errors = [float(change.split()[2]) for change in changes if change.endswith("(1)")]
    dense = {name: [line for line in lines if _method(line) == "dense, trained on"] for name, lines in tables.items()}
    more = ", ".join(f"{_change(lines[0])} (Table {name[5]})" for name, lines in dense.items() if lines)
    alone = _error(_two_centres(folder)["control"]["shared"], _lenet_images(folder))
    sure = [min(errors), max(errors), _scatter(folder), _lenet_error(folder)]
    return NOTE.format(*(f"{error:.1f}" for error in sure), f"{alone:.0f}", more)


def _scatter(folder):  # standard deviation of the runs of one line of Table 3, in points
    stages = {"Deep k-Means": "shared", "control": "finetuned"}
    variances = []
    for line in _table(folder, "table3_wide_resnet_cpu"):
        stage = stages.get(_method(line).partition(",")[0])
        runs = _records(folder, "table3_wide_resnet_cpu", line["run"]) if stage else []
        if len(runs) > 1:
            variances.append(variance(record["stages"][stage]["top1"] for record in runs))
    return fmean(variances) ** 0.5


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


def _two_centres(folder):  # lines of LeNet with the smallest codebooks of all, {re-training: line}
    return {line["re-training"]: line for line in _table(folder, LENET) if line["K"] == "2"}


def _lenet_error(folder):
    two, images = _two_centres(folder), _lenet_images(folder)
    return max(_error(two["hard (default)"]["shared"], images), _error(two["control"]["fine-tuned"], images))


def _lenet(folder):
    two = _two_centres(folder)
    hard, control = two["hard (default)"], two["control"]
    alone = _mean(control["shared"]) - _mean(control["fine-tuned"]) + float(control["− baseline"])
    shared = _records(folder, LENET, hard["run"])[0]["stages"]["shared"]
    on_disk = f"{shared['ratio']['conv']['file']:.0f} (convolutions)"
    changes = [f"{alone:+.2f}", hard["− baseline"], control["− baseline"]]
    return ["LeNet", _measured_on(folder, LENET, "LeNet-5"), "–", on_disk, *changes, "–", _run(hard)]


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


def _error(text, images):  # of the mean of runs, by their deviation behind it and by the test images
    mean, _, deviation, runs = text.split()
    return hypot(float(deviation) / int(runs.strip("()")) ** 0.5, binomial_error(float(mean), images))


def _lenet_images(folder):  # how many are tested
    return json.loads((folder / f"{LENET}.jsonl").read_text().splitlines()[0])["dataset"]["test"]


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
    _draw_lenet(bottom, _table(root / "figures", LENET), _lenet_images(root / "figures"))
    fig.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path = root / "docs" / "results.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _draw_wide(ax, lines):
    for method, name in WIDE.items():
        own = [line for line in lines if _method(line) == method]
        points = [(float(line["ratio, entropy"]), *map(float, line["ours"].split()[:3:2])) for line in own]
        _draw(ax, sorted(points), FLOORS["wide"], label=name, **method_look(method))
    said = [(line["nominal ratio"], line["paper"], 0) for line in lines if _method(line) == "Deep k-Means"]
    grey = dict(color="0.55", marker="o", fillstyle="none", linestyle=":", label="the paper's")
    _draw(ax, sorted(tuple(map(float, point)) for point in said), FLOORS["wide"], **grey)
    _finish(ax, "Wide ResNet 16-4, CIFAR-10 (JPEG)", "times smaller, by the entropy of codes", FLOORS["wide"])
    ax.set_ylabel("change of top-1, points")


def _draw_lenet(ax, lines, images):
    control = [line for line in lines if line["re-training"] == "control"]
    hard = [line for line in lines if line["re-training"] == "hard (default)"]
    alone = [_mean(line["shared"]) - _mean(line["fine-tuned"]) + float(line["− baseline"]) for line in control]
    drawn = {
        "WR": [(float(line["conv. ratio"]), y, 0) for line, y in zip(control, alone)],
        "control": [_lenet_point(line, "fine-tuned", images) for line in control],
        "Deep k-Means": [_lenet_point(line, "shared", images) for line in hard],
    }
    for method, points in drawn.items():
        _draw(ax, points, FLOORS["lenet"], **method_look(method))
    _finish(ax, "LeNet-5, MNIST", "times smaller, convolutions", FLOORS["lenet"])


def _lenet_point(line, stage, images):
    return float(line["conv. ratio"]), float(line["− baseline"]), _error(line[stage], images)


def _draw(ax, points, floor, **look):  # (x, y, error of y)
    inside = [point for point in points if point[1] >= floor]
    x, y, error = zip(*inside) if inside else ([], [], [])
    ax.errorbar(x, y, error, **{"linestyle": "-", "elinewidth": 1.2} | look)
    for x, y, _ in points:
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
