"""The compressed networks of the repository: names, cards, and a measurement beside its record.

The oracles are the records as json reads them and the sizes that the file system tells.
"""

import json
import os
import shutil
import subprocess
import sys
from math import sqrt
from pathlib import Path

import pytest
import torch

import deepkmeans as dk
from deepkmeans import shelf
from deepkmeans.cli import main

NAMES = ("wrn-45", "wrn-47", "wrn-50")


def run(line, capsys):
    code = main(line.split())
    return code, *capsys.readouterr()


def file(root, protocol, plan):
    return root / "figures" / f"table3_wide_resnet_{protocol}_{plan}.dkm"


def oracle(root, protocol, plan):  # the record of re-training under a plan whose size is that of the file
    record = of_size(root / "figures" / f"table3_wide_resnet_{protocol}.jsonl", file(root, protocol, plan))
    assert record["parameters"]["plan_name"] == plan
    return record


def of_size(records, path):  # the record of hard re-training whose network has the size of a file
    made = [json.loads(line) for line in records.read_text().splitlines()]
    hard = [record for record in made if record["parameters"].get("kind") == "hard"]
    (record,) = [r for r in hard if round(1024 * r["stages"]["shared"]["kib"]) == os.stat(path).st_size]
    return record


def test_list_tells_of_each_file_what_its_record_and_the_file_system_say(root, capsys):
    code, out, err = run("list --json", capsys)
    cards = {Path(card["path"]): card for card in json.loads(out)["networks"]}
    assert code == 0 and err == "" and cards.keys() == set((root / "figures").glob("*.dkm"))
    text = run("list", capsys)[1]
    for protocol in ("cpu", "full"):
        for plan in NAMES:
            path, record = file(root, protocol, plan), oracle(root, protocol, plan)
            card, line = cards[path], next(line for line in text.splitlines() if record["id"] in line)
            shared, data = record["stages"]["shared"], record["dataset"]
            said = dict(
                network=record["parameters"]["model"],
                data=data["name"],
                top1=shared["top1"],
                images=data["test"],
                bytes=os.stat(path).st_size,
                ratio=shared["ratio"]["network"]["file"],
                record=record["id"],
                licence="Apache-2.0",
            )
            assert {name: card[name] for name in said} == said
            assert card["name"] == (plan if protocol == "full" else f"{plan}-{protocol}") == line.split()[0]
            shown = f"{said['top1']:.2f} % of {said['images']:,}", f" {said['bytes']:,} ", f" {said['ratio']:.2f} "
            assert all(text in line for text in shown)


def test_the_ratio_of_a_card_is_that_of_the_bytes(root):
    for card in shelf.cards(root / "figures"):
        dense = sum(t.numel() * 4 for t in dk.decompress(card.path).values() if t.is_floating_point())
        assert abs(dense / card.bytes - card.ratio) < 0.002 * card.ratio


def test_the_licence_is_that_of_the_package(root):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert {card.licence for card in shelf.cards(root / "figures")} == {project["license"]}


def test_a_name_opens_the_file_from_any_folder(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, "wrn-45-cpu"):
        path = file(root, "cpu" if name.endswith("-cpu") else "full", name.removesuffix("-cpu"))
        named, direct = dk.load_compressed(name).state_dict(), dk.load_compressed(path).state_dict()
        assert named.keys() == direct.keys() and all(torch.equal(named[key], direct[key]) for key in direct)
        assert json.loads(run(f"inspect {name} --json", capsys)[1])["bytes"] == os.stat(path).st_size
    by_name, by_path = run(f"energy {name} --json", capsys), run(f"energy {path} --json", capsys)
    assert by_name[0] == 0 and by_name == by_path


def test_a_file_wins_over_a_name_and_a_folder_does_not(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(file(root, "cpu", "wrn-45"), "wrn-50")
    assert dk.inspect("wrn-50").bytes == os.stat("wrn-50").st_size != os.stat(file(root, "full", "wrn-50")).st_size
    Path("wrn-47").write_text("no network")
    code, out, err = run("inspect wrn-47", capsys)
    assert code == 1 and out == "" and "no compressed file" in err
    Path("wrn-45").mkdir()
    assert dk.inspect("wrn-45").bytes == os.stat(file(root, "full", "wrn-45")).st_size


def test_an_unknown_name_is_told_the_names_and_a_path_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dk.CompressedFileError, match="is no file; .*wrn-50, tt-conv-16-cpu, .*wrn-50-cpu$"):
        dk.load_compressed("wrn-51")
    code, out, err = run("evaluate wrn_50 --data digits", capsys)
    assert code == 1 and out == "" and err.count("\n") == 1 and all(name in err for name in NAMES)
    for path in ("gone.dkm", "folder/wrn-50", "."):
        with pytest.raises(dk.CompressedFileError, match="is no file$"):
            dk.load_compressed(path)


def test_a_network_of_the_shelf_is_not_overwritten_by_itself(root, capsys):
    path = file(root, "full", "wrn-50")
    before = path.read_bytes()
    try:
        code, _, err = run(f"decompress wrn-50 -o {path}", capsys)
        assert code == 1 and "would be lost" in err and path.read_bytes() == before
    finally:
        if path.read_bytes() != before:
            path.write_bytes(before)


INSTALLED = """
import sys
import deepkmeans as dk
from deepkmeans.cli import main
print(dk.__file__)
print(main(["list"]), main(["list", "--json"]))
try:
    dk.load_compressed("wrn-50")
except dk.CompressedFileError as error:
    print(error)
"""


def test_without_a_clone_the_shelf_is_empty_and_says_where_the_networks_are(root, tmp_path):
    left = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "deepkmeans", tmp_path / "site" / "deepkmeans", ignore=left)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, env=env)
    place, said, listed, codes, error = done.stdout.splitlines()
    assert place.startswith(str(tmp_path)) and done.stderr == "" and codes == "0 0"
    assert json.loads(listed) == {"networks": []} and "figures/ of the repository" in said
    assert error.startswith("path='wrn-50' is no file; ") and "figures/ of the repository" in error


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small network in a file of protocol `full`, its test images, and how many of them it has right."""
    net, data = dk.build("lenet5", seed=0), dk.load("digits")
    train, test = dk.loaders(data, 64, test_batch_size=500)
    dk.train(net, train, epochs=1, lr=0.02, progress=False)
    dk.share(net, dk.make_plan(net, k=4))
    path = tmp_path_factory.mktemp("shelf") / "table9_digits_full_tiny.dkm"
    dk.save_compressed(net, path)
    return path, data, round(dk.evaluate(net, test).top1 * len(data.test) / 100)


@pytest.fixture
def small(measured, tmp_path, monkeypatch):
    """A shelf of that network: `small(more)` writes a record that says so many images more than it has right."""
    path, data, right = measured
    path = Path(shutil.copy(path, tmp_path))
    size = os.stat(path).st_size

    def made(more=0, fingerprint=data.fingerprint, kib=size / 1024, amp=False):  # → images that are right, images
        shared = dict(top1=100 * (right + more) / len(data.test), kib=kib, ratio=dict(network=dict(file=2.0)))
        record = dict(
            id="0123456789ab",
            parameters=dict(model="lenet5", plan_name="tiny", amp=amp),
            stages=dict(shared=shared),
            dataset=dict(name="digits", fingerprint=fingerprint, test=len(data.test)),
        )
        other = record | dict(id="another", stages=dict(shared=shared | dict(kib=kib + 1)))  # of another size
        lines = (json.dumps(r) + "\n" for r in (other, record))
        path.with_name("table9_digits_full.jsonl").write_text("".join(lines))
        return right, len(data.test)

    monkeypatch.setattr(shelf, "FIGURES", tmp_path)
    return made


def test_record_says_equal_or_by_how_many_images(small, capsys):
    right, n = small()
    code, out, _ = run("evaluate tiny --data digits --record", capsys)
    assert code == 0 and "equal to record 0123456789ab" in out and f"{100 * right / n:.2f} % of {n} images" in out
    small(more=-2)
    code, out, _ = run("evaluate tiny --data digits --record", capsys)
    assert code == 0 and "2 images more than record 0123456789ab" in out
    small(more=1)
    found = json.loads(run("evaluate tiny --data digits --record --json", capsys)[1])
    p = (right + 1) / n
    assert found["record"] == "0123456789ab" and round((found["recorded_top1"] - found["top1"]) * n / 100) == 1
    assert abs(found["standard_error"] - 100 * sqrt(p * (1 - p) / n)) < 1e-9


def test_a_record_in_bfloat16_is_compared_with_a_measurement_in_bfloat16(small, measured, capsys):
    """Seven images of 10,000 were right in float32 that are wrong in the type of the record."""
    small(amp=True)
    found = json.loads(run("evaluate tiny --data digits --record --json", capsys)[1])
    plain = json.loads(run("evaluate tiny --data digits --json", capsys)[1])
    loader = dk.loaders(measured[1], 500, test_batch_size=500)[1]
    net = dk.load_compressed(measured[0], dense=True)
    assert found["loss"] == dk.evaluate(net, loader, amp=True).loss != plain["loss"]
    assert ", in bfloat16\n" in run("evaluate tiny --data digits --record", capsys)[1]


def test_record_fails_only_beyond_the_standard_error(small, capsys):
    right, n = small()
    scatter = {more: sqrt((right + more) * (1 - (right + more) / n)) for more in range(1, n - right)}  # images
    more = min(more for more, deviation in scatter.items() if more > deviation)
    small(more=more - 1)
    assert run("evaluate tiny --data digits --record", capsys)[0] == 0
    small(more=more)
    code, out, err = run("evaluate tiny --data digits --record", capsys)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert f"{more} images fewer than record 0123456789ab" in err and "standard error" in err
    assert run("evaluate tiny --data digits", capsys)[0] == 0  # without the record there is nothing to miss


def test_record_of_other_images_or_of_no_card_is_refused(small, root, tmp_path, capsys):
    small(fingerprint="ffffffffffff")
    code, _, err = run("evaluate tiny --data digits --record", capsys)
    assert code == 1 and "ffffffffffff" in err and dk.load("digits").fingerprint in err
    shutil.copy(tmp_path / "table9_digits_full_tiny.dkm", tmp_path / "mine.dkm")
    code, _, err = run(f"evaluate {tmp_path / 'mine.dkm'} --data digits --record", capsys)
    assert code == 1 and "mine.dkm' has no record" in err and "deepkmeans list" in err
    assert "deepkmeans: warning: mine.dkm is left out" in err


def test_a_file_that_no_record_fits_is_left_out_with_a_warning(small, capsys):
    small(kib=7.5)
    with pytest.warns(UserWarning, match="table9_digits_full_tiny.dkm is left out: 0 records"):
        assert shelf.cards() == []
    assert dk.inspect("tiny").bytes  # and still opens


def test_the_gallery_shows_the_cards(root):
    page = (root / "figures" / "README.md").read_text()
    section = page.partition("## Compressed networks\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == ["name", "network", "data", "top-1", "bytes", "ratio", "record"] and "Apache-2.0" in section
    wanted = {}
    for path in (root / "figures").glob("*.dkm"):
        record = of_size(path.with_name(path.name.rpartition("_")[0] + ".jsonl"), path)
        reached = f"{record['stages']['shared']['top1']:.2f} % of {record['dataset']['test']:,}"
        wanted[record["id"]] = [reached, f"{os.stat(path).st_size:,}"]
    assert {line[-1]: line[3:5] for line in lines[2:]} == wanted
