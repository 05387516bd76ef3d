"""The README's table of results, from the tables and records of figures/: `python docs/readme.py` writes it anew."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from deepkmeans.paper.store import repository

HEAD = (
    "| | network, data, baseline, protocol | ratio | sharing alone (WR) | Deep k-Means | control | best other method |"
)


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
    """Put the table of results into the README."""
    root = repository(root)
    page = root / "README.md"
    lines = [_lenet(root / "figures"), *(_line(root / "figures", shown) for shown in SHOWN)]
    table = "\n".join([HEAD, "|---" * 7 + "|", *(f"| {' | '.join(cells)} |" for cells in lines)])
    old = re.compile(re.escape(HEAD) + r"\n(\|.*\n)*")
    page.write_text(old.sub(lambda _: f"{table}\n", page.read_text()))
    return page


def _table(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _measured_on(folder, name, network):  # "FreshNet-CNN, cifar10-jpeg, 77.4 %, cpu"
    shown = {run for line in _table(folder, name) for run in line["run"].split()}
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    records = [record for record in records if record["id"] in shown]
    baselines = [record["stages"]["baseline"]["top1"] for record in records if "baseline" in record["stages"]]
    return f"{network}, {records[0]['dataset']['name']}, {fmean(baselines):.1f} %, {name.rsplit('_', 1)[1]}"


def _lenet(folder):  # the smallest codebooks of all
    name = "lenet_regularizers_cpu"
    two = {line["re-training"]: line for line in _table(folder, name) if line["K"] == "2"}
    hard, control = two["hard (default)"], two["control"]
    alone = _mean(control["shared"]) - _mean(control["fine-tuned"]) + float(control["− baseline"])
    ratio = f"{float(control['conv. ratio']):.0f} (convolutions)"
    changes = [f"{alone:+.2f}", hard["− baseline"], control["− baseline"]]
    return ["LeNet", _measured_on(folder, name, "LeNet-5"), ratio, *changes, "–"]


def _line(folder, shown):
    name = f"{shown.table}_{shown.protocol}"
    lines = _table(folder, name)
    here = {_method(line): line for line in lines if float(line["nominal ratio"]) == shown.nominal}
    ours = [_change(here.get(method + shown.kind)) for method in ("WR", "Deep k-Means", "control")]
    about = shown.network if shown.kind else _measured_on(folder, name, shown.network)
    return [shown.title, about, f"{shown.nominal:g}", *ours, _best_other(lines, shown.nominal)]


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
    return f"{_change(best)}, {_method(best)} at {_reached(best):.4g}"


def _reached(line):
    return float(line.get("ratio on disk") or line.get("ratio, entropy") or line["nominal ratio"])


if __name__ == "__main__":
    print(write_readme())
