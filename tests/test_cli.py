"""The command line as a user types it: mostly in this process, a few times as the installed program."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepkmeans import build, compression, inspect, load_compressed
from deepkmeans.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    net = build("lenet5", seed=0)
    save_file(net.state_dict(), folder / "lenet.safetensors")
    torch.save(net.state_dict(), folder / "lenet.pt")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, folder / "nested.pt")
    save_file({f"model.{k}": v for k, v in net.state_dict().items()} | {"momentum.0": torch.zeros(2)}, folder / "training.safetensors")
    torch.save(net, folder / "pickled.pt")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def run(line, capsys):
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("checkpoint", ["lenet.safetensors", "lenet.pt", "nested.pt", "training.safetensors"])
def test_compress_reads_every_kind_of_checkpoint(checkpoint, here, capsys):
    code, out, err = run(f"compress {checkpoint} --arch lenet5 --K 8 -o out.dkm --json", capsys)
    found = json.loads(out)
    assert (code, err) == (0, "") and found["bytes"] == Path("out.dkm").stat().st_size and [r["k"] for r in found["layers"]] == [8, 8]
    assert torch.equal(load_compressed("out.dkm").fc1.weight, load_file("lenet.safetensors")["fc1.weight"])


def test_inspect_and_decompress_agree_with_the_library(here, capsys):
    run("compress lenet.safetensors --arch lenet5 --rate 0.02 --first 10 --sparsity 0.3 --codebook float16 --exclude conv1 -o half.dkm", capsys)
    code, out, _ = run("inspect half.dkm", capsys)
    assert code == 0 and "conv2" in out and "F16" in out and f"{inspect('half.dkm').bytes:,} bytes" in out
    assert sum(r["bytes"] for r in json.loads(run("inspect half.dkm --json", capsys)[1])["rows"]) == Path("half.dkm").stat().st_size
    assert run("decompress half.dkm -o dense.safetensors", capsys)[0] == 0
    net, dense = build("lenet5"), load_file("dense.safetensors")
    net.load_state_dict(dense)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(net.eval()(x), load_compressed("half.dkm")(x)) and len(np.unique(dense["conv2.weight"].reshape(-1, 5), axis=0)) == 10


def test_tables_are_broken_at_the_width_of_a_terminal(here, capsys, monkeypatch):
    run("compress lenet.safetensors --arch lenet5 --K 8 -o out.dkm", capsys)
    assert max(map(len, run("inspect out.dkm", capsys)[1].splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "60")
    for stream in (sys.stderr, sys.__stdout__):  # what a library prints goes to the standard error, so the program writes its table with that in the place of the output
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for line in ("inspect out.dkm", "energy out.dkm"):
        table = run(line, capsys)[1].splitlines()[2:]
        assert len(table) > 10 and max(map(len, table)) <= 60


def test_evaluate_on_the_embedded_data(here, capsys):
    run("compress lenet.safetensors --arch lenet5 --K 8 -o out.dkm", capsys)
    found = json.loads(run("evaluate out.dkm --data digits --json", capsys)[1])
    assert 0 <= found["top1"] <= found["top5"] <= 100 and found["images"] > 100
    assert "top-1" in run("evaluate out.dkm --data digits", capsys)[1]


def test_a_torchvision_network(here, capsys):
    pytest.importorskip("torchvision")
    save_file(build("torchvision:squeezenet1_1", 4, seed=1).state_dict(), "squeeze.safetensors")
    code, out, err = run("compress squeeze.safetensors --arch squeezenet1_1 --num-classes 4 --K 4 --layout kernel -o squeeze.dkm --json", capsys)
    assert code == 0 and json.loads(out)["ratio"] > 5, err
    assert load_compressed("squeeze.dkm")(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.skipif(importlib.util.find_spec("deepkmeans.allocate") is None, reason="the chapter on choosing K is not here")
def test_a_wanted_ratio_is_reached(here, capsys):
    code, out, err = run("compress lenet.safetensors --arch lenet5 --ratio 20 -o ratio.dkm --json", capsys)
    assert code == 0 and abs(json.loads(out)["ratio"] / 20 - 1) < 0.01, err
    assert compression(load_compressed("ratio.dkm"), coding="file").bits == 8 * Path("ratio.dkm").stat().st_size


@pytest.mark.skipif(importlib.util.find_spec("deepkmeans.energy") is None, reason="the chapter on energy is not here")
def test_energy_of_a_file_and_of_a_name(here, capsys):
    run("compress lenet.safetensors --arch lenet5 --K 8 -o out.dkm", capsys)
    named, file = (json.loads(run(f"energy {what} --json", capsys)[1]) for what in ("--arch lenet5", "out.dkm"))
    assert named["macs"] == file["macs"] == 20 * 25 * 24 * 24 + 50 * 500 * 8 * 8 + 800 * 500 + 500 * 10
    assert file["total"] < named["total"]


@pytest.mark.parametrize("line, message", [
    ("compress missing.pt --arch lenet5 --K 8 -o x.dkm", "checkpoint='missing.pt' is no file"),
    ("compress pickled.pt --arch lenet5 --K 8 -o x.dkm", "nor a state dict that loads with weights_only"),
    ("compress lenet.pt --arch lenet6 --K 8 -o x.dkm", "must be one of lenet5"),
    ("compress lenet.pt --arch lenet5 --num-classes 7 --K 8 -o x.dkm", "'fc2.weight' is 10×500 in the file and 7×500"),
    ("compress lenet.pt --arch tt_conv_cnn --K 8 -o x.dkm", "'conv1_1.weight' is no such tensor in the file"),
    ("compress lenet.pt --arch lenet5 --option depth --K 8 -o x.dkm", "must read NAME=VALUE"),
    ("compress lenet.pt --arch lenet5 --rate 1.5 -o x.dkm", "rate=1.5 must be above 0"),
    ("compress lenet.pt --arch lenet5 --K 8 --exclude nothing -o x.dkm", "no layer is called 'nothing'"),
    ("compress lenet.pt --arch lenet5 --K 8 -o no/such/folder/x.dkm", "No such file or directory"),
    ("compress lenet.pt --arch lenet5 --ratio 20 --sparsity 0.5 -o x.dkm", "sparsity=0.5 cannot be given"),
    ("inspect lenet.safetensors", "no deepkmeans file"),
    ("inspect .", "is no file"),
    ("decompress lenet.pt -o x.safetensors", "lenet.pt:"),
    ("evaluate good.dkm --data cifar11", "must be one of digits"),
    ("energy", "either a FILE or --arch"),
])
def test_a_user_error_is_one_line_and_writes_nothing(line, message, here, capsys):
    if "good.dkm" in line:
        run("compress lenet.pt --arch lenet5 --K 2 -o good.dkm", capsys)
    code, out, err = run(line, capsys)
    assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("deepkmeans: error: ") and message in err
    assert not list(here.glob("x.*"))


@pytest.mark.parametrize("line", ["", "shrink x", "compress x --arch lenet5 -o y", "compress x --arch lenet5 --K 4 --rate .1 -o y", "compress x --arch lenet5 --K 0 -o y", "inspect"])
def test_wrong_usage_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as done:
        main(line.split())
    assert done.value.code == 2 and "usage: deepkmeans" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "inspect", "decompress", "evaluate", "energy"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"  deepkmeans {command} " in capsys.readouterr().out


def test_the_program_itself(root, here):
    tomllib = pytest.importorskip("tomllib")
    module, function = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["deepkmeans"].split(":")
    program = [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    done = subprocess.run([*program, *"compress lenet.pt --arch lenet5 --K 4 -o program.dkm --json".split()], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] == Path("program.dkm").stat().st_size, done.stderr
    Path("program.dkm").write_bytes(Path("program.dkm").read_bytes()[:-1])
    done = subprocess.run([*program, "inspect", "program.dkm"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr and "program.dkm" in done.stderr


def test_reproduce_names_what_there_is(capsys):
    assert main(["reproduce", "table9", "--protocol", "smoke"]) == 1
    assert "figure1" in capsys.readouterr().err


def test_energy_takes_the_name_of_a_network(capsys):
    assert main(["energy", "resnet18", "--input", "3", "64", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 21 and found["total"] == 7 * found["macs"]
    assert main(["energy", "missing.dkm"]) == 1
