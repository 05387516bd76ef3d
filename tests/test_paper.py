"""The store and the runner under rough treatment, on Dask, and behind the notebooks of the paper."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from PIL import Image

import deepkmeans as dk
from deepkmeans.paper import store, suite, tables

QUICK = dict(data="digits", baseline_epochs=2, epochs=3)
FEW = dict(data="digits", train_images=128, test_images=64, batch_size=32, baseline_epochs=1, epochs=1, K=8)
SUITE = [{**QUICK, "method": "deep-k-means", "layer": "conv1", "sizes": [k]} for k in (2, 4, 8)]
RUNNER = """
import json, sys
from deepkmeans.paper.suite import run
run(sys.argv[1], json.loads(sys.argv[2]), out=sys.argv[3], together='sizes', progress=False)
"""
LATE = """
import os, pathlib, sys
tried = pathlib.Path(sys.argv[1])
first = not tried.exists()
tried.touch()
if first:
    sys.exit('port taken')
os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', '-f', sys.argv[2]])
"""


def table(frame):
    return frame[[c for c in frame if c != "seconds"]].to_json(orient="records")


def alive(word):  # processes that were started with a word on their command line
    psutil = pytest.importorskip("psutil")
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(word in part for part in p.info["cmdline"] or ())]


def test_a_suite_whose_runner_is_killed_twice_gives_the_same_table(root, tmp_path):
    notebook, folder = root / "nbs" / "one_layer.ipynb", tmp_path / "killed"
    for sign in ("baselines/*.safetensors", "*/record.json"):  # within the training of the baseline; after some run
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(notebook), json.dumps(SUITE), str(folder)])
        while not list(folder.glob(sign)):
            assert runner.poll() is None
            time.sleep(0.01)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        assert len(list(folder.glob("*/record.json"))) < len(SUITE), "it ended before it could be killed"
        end = time.time() + 20
        while alive(str(folder)) and time.time() < end:
            time.sleep(0.1)
        assert not alive(str(folder)), "a run outlived its runner"
    resumed = suite.run(notebook, SUITE, out=folder, together="sizes", progress=False)
    assert resumed.made.all()
    assert table(resumed) == table(
        suite.run(notebook, SUITE, out=tmp_path / "straight", together="sizes", progress=False)
    )


SMALL = """
import json, os, pathlib
from deepkmeans.paper.store import run_id, save_record
if x == 3:
    raise ValueError("x=3 is not wanted")
save_record(f"{out}/{run_id(dict(x=x))}", dict(parameters=dict(x=x), y=x * x, pid=os.getpid()))
"""


PYTHON = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


@pytest.fixture
def small(tmp_path):
    book = nbformat.v4.new_notebook(metadata=PYTHON)
    book.cells = [
        nbformat.v4.new_code_cell("x: int = 1\nout: str = 'runs'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(SMALL),
    ]
    nbformat.write(book, tmp_path / "small.ipynb")
    return tmp_path / "small.ipynb"


def test_the_same_suite_on_dask(small, tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    wanted = [dict(x=x) for x in (1, 2, 3)]
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        assert cluster.scheduler_address.startswith("tcp://")
        frame = suite.run(small, wanted, out=tmp_path / "runs", scheduler=cluster.scheduler_address, progress=False)
    assert frame.made.tolist() == [True, True, False] and frame.y.tolist()[:2] == [1, 4] and frame.pid.nunique() == 2
    failed = capsys.readouterr().out
    assert failed.count("failed: ") == 1 and ".ipynb: ValueError: x=3 is not wanted" in failed


def test_a_kernel_that_does_not_come_up_gets_another_try(small, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "late"
    spec.mkdir(parents=True)
    late = [sys.executable, "-c", LATE, str(tmp_path / "tried"), "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps(dict(argv=late, display_name="late", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    book = json.loads(small.read_text())
    book["metadata"]["kernelspec"] = dict(name="late", display_name="late", language="python")
    small.write_text(json.dumps(book))
    assert (
        suite.run(small, [dict(x=2)], out=tmp_path / "runs", progress=False).made.all()
        and (tmp_path / "tried").exists()
    )


INTERRUPTED = """
def interrupting(send):  # a closure, which outlives the names of the cell
    def send_and_interrupt(stream, message, *given, **more):
        sent = send(stream, message, *given, **more)
        if message == "execute_reply":
            raise KeyboardInterrupt
        return sent
    return send_and_interrupt
session = get_ipython().kernel.session
session.send = interrupting(session.send)
"""


def test_what_a_user_watches_is_the_notebook_s_own_output(small, tmp_path, capfd):
    book = nbformat.read(small, 4)
    book.cells.append(nbformat.v4.new_code_cell(INTERRUPTED))  # as a kernel is that is to end
    nbformat.write(book, small)
    assert suite.execute(small, tmp_path / "executed.ipynb", dict(x=2, out=str(tmp_path)), show=True) == ""
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")  # newer kernels warn of their transport on stderr


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_results_of_jupyterlab_lie_in_runs_of_the_repository_and_those_of_tests_do_not(root, monkeypatch):
    def out(given="runs"):
        return store.given_parameters({"__annotations__": {"out": str}, "out": given})["out"]

    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # in a kernel
    for folder in ("nbs", "nbs/paper"):
        monkeypatch.chdir(root / folder)
        assert os.path.realpath(out()) == os.path.realpath(root / "runs")
        assert os.path.realpath(out("/somewhere")) == "/somewhere"
    monkeypatch.chdir(root)
    assert out() == "runs"
    monkeypatch.chdir(root / "nbs")
    monkeypatch.delitem(sys.modules, "ipykernel")  # as nbdev_test runs it
    assert out() == "runs"


def test_figures_1_and_2_at_smoke(root, tmp_path):
    before = stamps(root / "figures")
    (executed,) = suite.reproduce("figure1", "smoke", out=tmp_path, root=root, show=False).values()
    cells = {
        c["id"]: "".join(
            o.get("text", "") if isinstance(o.get("text"), str) else "".join(o.get("text", ()))
            for o in c.get("outputs", ())
        )
        for c in json.loads(executed.read_text())["cells"]
    }
    assert "14 of 14 runs are there" in cells["run"]
    assert cells["verdict-claims"].count("goes to ratio") == 2 and "re-training wins in" in cells["verdict-control"]
    assert stamps(root / "figures") == before, "smoke must not touch figures/"


def test_allocation_at_smoke(root, tmp_path):
    before = stamps(root / "figures")
    suite.reproduce("allocation", "smoke", out=tmp_path, root=root, show=False)
    methods = [record["method"] for record in store.read_records(tmp_path / "allocation_lenet5_smoke.jsonl")]
    assert methods.count("allocator, data") == methods.count("one K") == 3 and methods.count("baseline") == 1
    assert stamps(root / "figures") == before, "smoke must not touch figures/"


def test_table_1_at_smoke(root, tmp_path):
    (executed,) = suite.reproduce("table1", "smoke", out=tmp_path, root=root, show=False).values()
    said = {
        c["id"]: "".join("".join(o.get("text", ())) for o in c.get("outputs", ()))
        for c in json.loads(executed.read_text())["cells"]
    }
    assert "5 of 5 runs are there" in said["run"] and "that it is the better one" not in "".join(said.values()), (
        "smoke has no verdicts"
    )


def test_a_table_whose_runs_fail_is_shown_and_is_an_error(root, tmp_path):
    (tmp_path / "baselines").write_text("a file where the networks are to lie")
    with pytest.raises(store.UserError, match="table1_tt_conv_cnn_smoke.ipynb: 5 of its runs failed"):
        suite.reproduce("table1", "smoke", out=tmp_path, root=root, show=False)
    assert "0 of 5 runs are there" in (tmp_path / "paper" / "table1_tt_conv_cnn_smoke.ipynb").read_text()


def test_every_baseline_runs_from_the_same_network(root, tmp_path):
    small = dict(
        model="lenet5", data="digits", train_images=128, test_images=64, batch_size=32, baseline_epochs=1, epochs=1
    )
    methods = {
        "tt": {"rank": 4},
        "tt-naive": {"rank": 4},
        "hashed": {},
        "freshnet": {},
        "lrd": {},
        "tucker": {},
        "separable": {},
        "dkm": {},
        "deep-compression": {},
        "soft": {"components": 3},
    }
    runs = suite.run(
        root / "nbs" / "baseline.ipynb",
        [{**small, "method": m, "settings": s} for m, s in methods.items()],
        out=tmp_path,
        jobs=2,
        progress=False,
    ).set_index("method")
    assert runs.made.all() and runs["stages.baseline.loss"].nunique() == 1
    size = runs.filter(regex=r"^stages.trained.ratio.network").max(axis=1)
    assert (size > 1).all() and abs(size["hashed"] / 16 - 1) < 0.01 and abs(size["freshnet"] / 16 - 1) < 0.01, size


def test_committed_records_are_found_by_their_suites(root):
    for name, notebook in (
        ("lenet_regularizers_cpu", "retrain"),
        ("figure1_2_lenet_full", "one_layer"),
    ):
        records = store.read_records(root / "figures" / f"{name}.jsonl")
        assert (
            records
            and store.lookup(
                root / "nbs" / f"{notebook}.ipynb",
                [r["parameters"] for r in records],
                [root / "figures" / f"{name}.jsonl"],
            )
            == records
        )


@pytest.fixture
def gallery(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "docs"))
    return importlib.import_module("gallery")


def test_the_gallery_is_the_generated_one(root, gallery):
    committed = (root / "figures" / "README.md").read_text()
    try:
        assert gallery.write_gallery(root).read_text() == committed
    finally:
        (root / "figures" / "README.md").write_text(committed)


@pytest.fixture
def readme(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "docs"))
    return importlib.import_module("readme")


def test_the_table_of_the_readme_is_the_generated_one(root, readme, tmp_path):
    clone = tmp_path / "clone"
    (clone / "nbs" / "paper").mkdir(parents=True)
    (clone / "figures").symlink_to(root / "figures")
    committed = (root / "README.md").read_text()
    (clone / "README.md").write_text(committed.replace("| LeNet |", "| stale |\n| LeNet |"))
    assert readme.write_readme(clone).read_text() == committed


MADE_UP = """method,nominal ratio,paper,ours,difference,ratio on disk,"ratio, entropy",run
WR,4,-48.950,-50.00 ± 0.50 (1),-1.050,3.90,4.00,a
Deep k-Means,4,-1.950,-0.70 ± 0.30 (1),1.250,3.95,4.00,b
control †,4,,not run,,,,
one-shot,1.28,,-0.20 ± 0.30 (1),,1.27,1.28,c
low-rank,4.1,,-3.00 ± 0.40 (1),,,4.10,d
DKM †,8,,-3.50 ± 0.40 (1),,7.50,8.00,e
"Deep k-Means, wanted ratio †",4,,-0.10 ± 0.30 (1),,4.00,4.10,f
"""


def test_the_picture_of_the_readme_is_drawn_from_figures_alone(root, readme, tmp_path):
    for folder in ("nbs/paper", "docs", "figures"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("table3_wide_resnet_full.csv", "lenet_regularizers_cpu.csv", "lenet_regularizers_cpu.jsonl"):
        shutil.copy(root / "figures" / name, tmp_path / "figures")
    with Image.open(readme.draw_picture(tmp_path)) as drawn, Image.open(root / "docs" / "results.png") as committed:
        assert drawn.size == committed.size and len(drawn.convert("RGB").getcolors(2**20)) > 100


def test_a_line_of_the_readme_names_the_best_rival_that_is_as_small(readme, tmp_path):
    (tmp_path / "made_up_cpu.csv").write_text(MADE_UP)
    stages = dict(baseline=dict(top1=80.0), shared=dict(top1=79.3))
    records = [dict(id=i, dataset=dict(name="digits"), stages=stages) for i in "abcdef"]
    records += [dict(records[0], id="of an older protocol", stages=dict(baseline=dict(top1=10.0)))]
    (tmp_path / "made_up_cpu.jsonl").write_text("\n".join(map(json.dumps, records)))
    shown = readme.Shown("Table 4", "made_up", "cpu", "GoogLeNet", 4)
    about = "GoogLeNet, digits, 80.0 %, cpu"
    ours = ["-50.00 (-48.95)", "-0.70 (-1.95)", "not run"]
    assert readme._line(tmp_path, shown) == ["Table 4", about, "4", "3.95", *ours, "-3.00, low-rank at 4.1", "`b`"]
    wanted = shown._replace(title="Table 4, wanted ratio", network="the same", kind=", wanted ratio")
    assert readme._line(tmp_path, wanted)[2:7] == ["–", "4", "–", "-0.10", "–"]


def test_each_file_is_declared_by_one_notebook_and_its_command_names_one(root, gallery):
    known = {**suite.REPRODUCIBLE, **{path.stem: path.stem for path in (root / "nbs" / "paper").glob("*.ipynb")}}
    for path, writers in gallery.origins(root).items():
        assert len(writers) == 1, f"{path.name} is declared by {writers or 'no notebook'}"
        notebook, command = writers[0]
        assert (root / notebook).is_file()
        words = command.split()
        if words[:2] == ["deepkmeans", "reproduce"]:
            assert words[2] in known and words[3:] in ([], *(["--protocol", p] for p in store.PROTOCOLS)), command
        elif "papermill" in words:
            run = words[words.index("papermill") + 1 :]
            names = [run[i + 1] for i, word in enumerate(run) if word == "-p"]
            assert set(names) <= set(store.notebook_parameters(root / run[0])), command


def test_the_gallery_names_the_commands_of_what_no_table_makes(root, gallery):
    commands = {path.name: command for path, ((_, command),) in gallery.origins(root).items()}
    assert commands["file_size.csv"] == "deepkmeans reproduce file_size"
    assert commands["energy_reference_nn_dataflow.csv"] == "deepkmeans reproduce energy_verification"
    assert commands["benchmarks_memory_cpu.csv"] == "make bench DEVICE=cpu"
    (record,) = store.read_records(root / "figures" / "sws_lenet5.jsonl")
    words = commands["sws_lenet5.jsonl"].split()
    given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    asked = store.notebook_parameters(root / "nbs" / "baseline.ipynb") | {
        k: type(record["parameters"].get(k, ""))(v) for k, v in given.items()
    }
    assert store.run_id(asked) == store.run_id(
        store.notebook_parameters(root / "nbs" / "baseline.ipynb") | record["parameters"]
    )


def test_a_table_is_drawn_from_the_committed_records_alone(root, tmp_path):
    """In a copy of the repository: the notebook writes what it declares, nothing else, and makes no run."""
    clone = tmp_path / "clone"
    shutil.copytree(root / "nbs", clone / "nbs")
    (clone / "figures").mkdir()
    for name in ("table3_wide_resnet_full.jsonl", "table3_wide_resnet_full.csv"):
        shutil.copy(root / "figures" / name, clone / "figures")
    before = stamps(clone / "figures")
    given = dict(protocol="full", save=True, out=str(tmp_path / "empty"), root=str(clone))
    assert suite.execute(clone / "nbs" / "paper" / "table3_wide_resnet.ipynb", tmp_path / "table3.ipynb", given) == ""
    assert not (tmp_path / "empty").exists()
    after = stamps(clone / "figures")
    written = {path.name for path in after if after[path] != before.get(path)}
    assert written == {f"table3_wide_resnet_full.{ending}" for ending in ("csv", "jsonl", "png")}
    lines = (clone / "figures" / "table3_wide_resnet_full.csv").read_text().splitlines()
    committed = (root / "figures" / "table3_wide_resnet_full.csv").read_text().splitlines()
    assert lines == committed and lines[0].endswith(",run")


def test_what_the_benchmark_keeps_stays_another_machine_s(root, tmp_path):
    """With `only`, the kept lines were given the processor of the new ones."""
    for folder in ("nbs/paper", "figures"):
        (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / "figures" / "benchmarks_cpu.csv"
    pd.read_csv(root / "figures" / path.name).assign(processor="another").to_csv(path, index=False)
    what = dict(execute=True, only="LeNet-5 conv1", repeats=1, threads=1, root=str(tmp_path))
    assert not suite.execute(root / "nbs" / "benchmarks.ipynb", tmp_path / "executed.ipynb", what)
    table = pd.read_csv(path)
    new = table.layer == "LeNet-5 conv1"
    assert set(table[~new].processor) == {"another"} and "another" not in set(table[new].processor)
    assert "another" in (tmp_path / "executed.ipynb").read_text()


def test_again_leaves_the_committed_records_out(root, tmp_path):
    lines = [tables.Line("WR", 45, "retrain", dict(model="lenet5"), "wr")]
    given = dict(protocol="cpu", execute=False, save=False, again=False, seeds=1, out=str(tmp_path), root=str(root))
    files = dict(records="table3_wide_resnet_{protocol}.jsonl")
    assert tables.Table(3, files, lines, given).known == [root / "figures" / "table3_wide_resnet_cpu.jsonl"]
    assert tables.Table(3, files, lines, given | dict(again=True)).known == []


def _painted(folder, colour):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(4):
                Image.new("L", (28, 28), colour + i).save(folder / split / name / f"{i}.png")
    return dk.load(str(folder), progress=False)


def test_changed_images_under_the_same_path_are_another_run(tmp_path):
    net = dk.build("lenet5", 2)
    before = _painted(tmp_path / "images", 0)
    common = dict(epochs=1, lr=0.01, checkpoint=tmp_path / "run.safetensors", progress=False)
    dk.train(net, dk.loaders(before, 4)[0], **common)
    after = _painted(tmp_path / "images", 100)
    with pytest.raises(ValueError, match=f"other settings: loader=.*{before.fingerprint}.*not.*{after.fingerprint}"):
        dk.train(net, dk.loaders(after, 4)[0], **common)
    same = dict(data=str(tmp_path / "images"))
    assert store.run_id(same, before.fingerprint) != store.run_id(same, after.fingerprint)
    assert store.run_id(same, before.fingerprint) == store.run_id(same, before.fingerprint)


def test_a_list_of_other_batches_is_other_data_too(tmp_path):
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8) % 2
    common = dict(epochs=1, lr=0.01, checkpoint=tmp_path / "run.safetensors", progress=False)

    def cut(images, size):
        return list(zip(images.split(size), labels.split(size)))

    history = dk.train(dk.build("lenet5", 2), cut(images, 4), **common)
    assert dk.train(dk.build("lenet5", 2), cut(images, 4), **common) == history
    for batches in (cut(images + 1, 4), cut(images, 2)):
        with pytest.raises(ValueError, match="other settings: loader="):
            dk.train(dk.build("lenet5", 2), batches, **common)


BROKEN = {
    "brackets without end": b"[" * 100_000,
    "a number of 5,000 digits": b'{"K": ' + b"1" * 5000 + b"}",
    "a list": b"[]",
    "half a record": b'{"parameters": {',
    "bytes that are no text": b"\xff\xfe",
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_broken_record_is_named_and_does_not_block_the_store(what, tmp_path):
    store.save_record(tmp_path / "good", {"parameters": {"K": 4}, "id": "good"})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_bytes(BROKEN[what])
    with pytest.warns(UserWarning, match="bad/record.json is no record of a run"):
        assert [record["id"] for record in store.read_records(tmp_path)] == ["good"]


@pytest.mark.parametrize("checkpoint", ["/dev/zero", "pipe", 5, {"a": 1}, ["a"], "x" * 5000, "a\0b", "huge"])
def test_a_record_may_name_anything_as_its_checkpoint(checkpoint, tmp_path):
    cell = nbformat.v4.new_code_cell("x: int = 1\ncheckpoint: str = ''", metadata={"tags": ["parameters"]})
    job = tmp_path / "job.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=PYTHON), job)
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**42)  # four terabytes of nothing
    if checkpoint in ("pipe", "huge"):
        checkpoint = str(tmp_path / checkpoint)
    wanted = {"x": 1, "checkpoint": ""}
    store.save_record(tmp_path / "bad", {"parameters": {**wanted, "checkpoint": checkpoint}})
    store.save_record(tmp_path / "good", {"parameters": wanted, "id": "good"})
    assert store.lookup(job, [{}, {"x": 2}], [tmp_path])[0]["id"] == "good"
    if not str(checkpoint).endswith("huge"):  # which takes its time where a run of the suite names a file
        (tmp_path / "start").write_bytes(b"weights")
        start = {"checkpoint": str(tmp_path / "start")}
        store.save_record(tmp_path / "started", {"parameters": {**wanted, **start}, "id": "started"})
        assert store.lookup(job, [start], [tmp_path])[0]["id"] == "started"


def test_a_run_that_diverges_has_a_record_that_says_so_and_is_not_made_again(root, tmp_path, capsys):
    line = tables.Line("Deep k-Means", 8, "retrain", FEW | dict(lr=1e12), "shared")
    job, runs = root / "nbs" / "retrain.ipynb", [line.run(0)]
    suite.run(job, runs, out=tmp_path, progress=False)
    (executed,) = (tmp_path / "notebooks").glob("*.ipynb")
    made_at = executed.stat().st_mtime_ns
    found = suite.run(job, runs, out=tmp_path, progress=False)
    assert executed.stat().st_mtime_ns == made_at and "failed" not in capsys.readouterr().out
    assert "lr=1000000000000" in found["notes.diverged"].item()
    assert "stages.wr.top1" in found and "stages.shared.top1" not in found
    compared = tables.compare([line], 1, store.paper_numbers("table1"), [tmp_path], root)
    assert compared.ours.item() == "1 diverged"


def test_repeated_runs_start_from_one_baseline_and_differ_afterwards(root, tmp_path):
    line = tables.Line("Deep k-Means", 8, "retrain", FEW, "shared", repeated="repeat")
    runs = suite.run(root / "nbs" / "retrain.ipynb", [line.run(i) for i in range(2)], out=tmp_path, progress=False)
    assert runs["stages.baseline.loss"].nunique() == 1 and runs["stages.shared.loss"].nunique() == 2
    assert len(list((tmp_path / "baselines").glob("*.safetensors"))) == 1
    assert line._replace(repeated="seed").run(1)["seed"] == 1


def test_the_luck_of_a_baseline_is_no_scatter_of_the_method(root, tmp_path):
    line, job = tables.Line("Deep k-Means", 8, "retrain", FEW, "shared"), root / "nbs" / "retrain.ipynb"
    for seed, baseline in enumerate((80.0, 85.0, 90.0)):
        parameters = store.complete_parameters(store.notebook_parameters(job), line.run(seed))
        shared = dict(top1=baseline - 1, ratio=dict(network=dict(file=8.0)))
        stages = dict(baseline=dict(top1=baseline), shared=shared)
        record = dict(id=str(seed), parameters=parameters, dataset=dict(test=10_000), stages=stages)
        store.save_record(tmp_path / str(seed), record)
    told = tables.compare([line], 3, store.paper_numbers("table1"), [tmp_path], root)
    assert told.ours.item() == "-1.00 ± 0.37 (3)"  # √(84·16/10,000), that of the images


def test_a_run_that_a_suite_names_twice_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(suite, "_execute_all", lambda notebook, defaults, missing, *_: made.extend(missing) or [])
    notebook = Path(store.repository()) / "nbs" / "retrain.ipynb"
    suite.run(notebook, [{"K": 3}, {"K": 3}, {"K": 4}], out=tmp_path, progress=False)
    assert [parameters["K"] for parameters in made] == [3, 4]


@pytest.mark.parametrize("other, compared", [(89.17, True), (88.6, False)])
def test_a_network_that_another_processor_measured_is_the_same_and_another_network_is_not(other, compared):
    line = dict(change=-1.0, paper=float("nan"), error=0.3, ended=1)
    frame = pd.DataFrame.from_dict({"ours": line | {"baseline": 89.18}, "theirs": line | {"baseline": other}}, "index")
    (said,) = tables.claims(frame, [("ours", "theirs")])
    assert ("within the scatter" in said) == compared and ("not compared" in said) != compared
