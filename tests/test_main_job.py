"""The main job as a user runs it: what it writes, repeats and resumes, and answers to nonsense."""

import json
import signal
import subprocess
import sys
import time

import pytest

from deepkmeans.cli import main

QUICK = dict(baseline_epochs=2, epochs=2, finetune_epochs=1, progress=False)


def only_run(folder):
    (record,) = folder.glob("*/record.json")
    return record.parent, json.loads(record.read_text())


@pytest.fixture(scope="module")
def two_runs(papermill, tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        done = papermill("nbs/retrain.ipynb", K=16, first_K=200, out=folder, **QUICK)
        assert done.returncode == 0, done.stderr[-2000:]
    return [only_run(folder) for folder in folders] + [done.stdout]


def test_record_says_what_was_done(two_runs):
    folder, record = two_runs[0]
    assert record["id"] == folder.name and record["parameters"]["K"] == 16
    assert list(record["stages"]) == ["baseline", "finetuned", "shared", "wr"]
    assert record["dataset"]["name"] == "digits" and record["environment"]["versions"]["torch"]
    assert {p.name for p in folder.iterdir()} >= {
        "model.safetensors",
        "stages.png",
        "rows.png",
        "history.png",
        "filters.png",
    }
    assert (
        record["stages"]["shared"]["top1"] >= record["stages"]["wr"]["top1"]
        and record["history"]["retrain"][0]["moved"] > 0
    )


def test_a_k_above_the_distinct_rows_is_capped_and_told(two_runs):
    _, record = two_runs[0]
    conv1 = record["layers"][0]
    assert record["capped"] == ["conv1"] and conv1["k_wanted"] == 200 and conv1["k"] <= 100
    assert "conv1: 200 clusters were wanted, " in two_runs[2]


def test_the_same_command_gives_the_same_record_and_model(two_runs):
    (one, a), (two, b) = two_runs[:2]
    a.pop("seconds"), b.pop("seconds")
    assert a == b
    for name in ("model.safetensors", "model.dkm"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_compressed_file_has_the_accuracy_of_the_record(two_runs, capsys):
    folder, record = two_runs[0]
    assert main(["evaluate", str(folder / "model.dkm"), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(record["stages"]["finetuned"]["top1"])
    assert f"{(folder / 'model.dkm').stat().st_size:,} bytes" in two_runs[2]


def test_a_run_can_start_from_a_checkpoint(two_runs, papermill, tmp_path):
    folder, record = two_runs[0]
    (baseline,) = (folder.parent / "baselines").glob("*.safetensors")
    done = papermill(
        "nbs/retrain.ipynb", checkpoint=baseline, K=2, epochs=0, finetune_epochs=0, out=tmp_path, progress=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = only_run(tmp_path)[1]["stages"]
    assert stages["baseline"] == record["stages"]["baseline"] and set(stages) == {"baseline", "wr", "shared"}


def test_retraining_can_see_a_part_of_the_images(two_runs, papermill, tmp_path):
    (baseline,) = (two_runs[0][0].parent / "baselines").glob("*.safetensors")
    for part in ("retrain_images", "train_images"):  # from a given baseline both leave the same images
        done = papermill(
            "nbs/retrain.ipynb",
            checkpoint=baseline,
            K=4,
            epochs=1,
            finetune_epochs=1,
            out=tmp_path / part,
            progress=False,
            **{part: 128},
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (only_run(tmp_path / part)[1] for part in ("retrain_images", "train_images"))
    assert one["stages"] == two["stages"] and one["dataset"]["train"] > two["dataset"]["train"] == 128


def test_the_job_of_the_baselines_starts_from_a_checkpoint_too(two_runs, papermill, tmp_path):
    (baseline,) = (two_runs[0][0].parent / "baselines").glob("*.safetensors")
    done = papermill(
        "nbs/baseline.ipynb",
        method="deep-compression",
        checkpoint=baseline,
        epochs=1,
        retrain_images=128,
        out=tmp_path,
        progress=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = only_run(tmp_path)[1]["stages"]
    assert stages["baseline"]["top1"] == two_runs[0][1]["stages"]["baseline"]["top1"] and set(stages) == {
        "baseline",
        "shared",
        "trained",
    }


def test_without_a_size_it_ends_twenty_times_smaller(two_runs, papermill, tmp_path):
    (baseline,) = (two_runs[0][0].parent / "baselines").glob("*.safetensors")
    done = papermill(
        "nbs/retrain.ipynb", checkpoint=baseline, epochs=1, finetune_epochs=0, out=tmp_path, progress=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder, record = only_run(tmp_path)
    assert abs(record["stages"]["shared"]["ratio"]["network"]["file"] / 20 - 1) < 0.01
    assert (
        len({layer["k_wanted"] for layer in record["layers"]}) > 1 and "wanted: 20 times smaller on disk" in done.stdout
    )


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(KK=4), "there is no parameter 'KK'; did you mean K?"),
        (dict(K=-1), "K=-1 must be at least 1"),
        (dict(K="many"), "K='many' must be of type int"),
        (dict(data="mnistt"), "must be one of digits, mnist"),
        (dict(model="lenet6"), "must be one of lenet5"),
        (dict(kind="soft"), "kind='soft' must be one of hard"),
        (dict(data="mnist", data_root="/nowhere"), "mnist was not found"),
        (dict(checkpoint="nowhere.safetensors"), "there is no file 'nowhere.safetensors'"),
        (dict(retrain_images=10**6), "must be from 0 to the number of images"),
        (dict(target_ratio=0.5), "target_ratio=0.5 must be above 1"),
    ],
)
def test_nonsense_ends_in_one_line_and_writes_nothing(papermill, tmp_path, monkeypatch, parameters, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "data_root" in parameters:
        pytest.importorskip("torchvision")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9"), monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = papermill("nbs/retrain.ipynb", out=tmp_path / "runs", **parameters)
    lines = [line for line in done.stderr.splitlines() if line.startswith("UserError")]
    assert done.returncode != 0 and len(lines) == 1 and message in lines[0], done.stderr[-1500:]
    assert not (tmp_path / "runs").exists()


KILLED = """
import sys
from deepkmeans import Regularizer, build, load, loaders, make_plan, train
from safetensors.torch import save_file
data = load("digits")
net = build("wide_resnet", in_channels=1, depth=10, widen=1, seed=3)  # has dropout and batch normalisation
regularizer = Regularizer(net, make_plan(net, k=4))
train(net, loaders(data, 256)[0], epochs=6, lr=0.02, regularizer=regularizer, checkpoint=sys.argv[1], progress=False)
save_file({k: v.contiguous() for k, v in net.state_dict().items()}, sys.argv[2])
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    def run(name):
        return [sys.executable, "-c", KILLED, str(tmp_path / f"{name}.safetensors"), str(tmp_path / f"{name}.end")]

    process = subprocess.Popen(run("killed"))
    while not (tmp_path / "killed.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere within a later epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.end").exists(), "it ended before it could be killed"
    for name in ("killed", "straight"):
        subprocess.run(run(name), check=True)
    assert (tmp_path / "killed.end").read_bytes() == (tmp_path / "straight.end").read_bytes()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(lr="nan"), "lr=nan must be finite"),
        (dict(K=4, rate=0.5), "K=4 and rate=0.5: give one of them"),
        (dict(sparsity=0.5, repeat=2), "sparsity=0.5 and sparse_at='zero' need K or rate"),
        (dict(model="torchvision:resnet18"), "in_channels=1 must be 3: torchvision:resnet18"),
    ],
    ids=["nan", "two sizes", "no size", "colour"],
)
def test_what_cannot_be_is_said_before_anything_is_trained(wrong, said, papermill, tmp_path):
    done = papermill("nbs/retrain.ipynb", out=tmp_path / "runs", **QUICK, **wrong)
    assert done.returncode and said in done.stderr and not (tmp_path / "runs").exists()
