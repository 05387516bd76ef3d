"""The command line as a user types it: mostly in this process, a few times as the installed program."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deepkmeans import __version__, build, cli, compression, inspect, load_compressed
from deepkmeans.cli import main


MINE = """
import os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from torch import nn

def small(num_classes=10, width=6):
    convolutions = nn.Conv2d(1, width, 3), nn.ReLU(), nn.ConvTranspose2d(width, 4, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, num_classes))
def noted(note):
    net = small()
    net.architecture = note
    return net
def text(): return noted("small-v2")
def table(): return noted({"channels": 1})
def diverged():
    net = small()
    net.register_forward_hook(lambda net, images, y: y * float("nan"))
    return net
def picky():
    net = small()
    def check(net, images):
        assert images[0].shape[-1] == 9, "Wrong image height!"
    net.register_forward_pre_hook(check)
    return net
def number(): return 7
def broken(): return 1 / 0

def interrupted(): # as if Ctrl-C were pressed while a thread has work for a minute
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 60)
        print(time.time(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    net = build("lenet5", seed=0)
    save_file(net.state_dict(), folder / "lenet.safetensors")
    torch.save(net.state_dict(), folder / "lenet.pt")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, folder / "nested.pt")
    save_file(
        {f"model.{k}": v for k, v in net.state_dict().items()} | {"momentum.0": torch.zeros(2)},
        folder / "training.safetensors",
    )
    for word in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({f"{word}{k}": v for k, v in net.state_dict().items()}, folder / f"{word}pt")
    for word in ("model", "net", "model_state_dict"):
        torch.save({word: net.state_dict(), "optimizer": {"step": torch.tensor(3)}}, folder / f"{word}.pt")
    torch.save({"model": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "both.pt")
    torch.save(net, folder / "pickled.pt")
    (folder / "text.pt").write_text("no weights at all")
    (folder / "empty.pt").touch()
    (folder / "mine.py").write_text(MINE)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def run(line, capsys):
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


KINDS = (
    "lenet.safetensors",
    "lenet.pt",
    "nested.pt",
    "training.safetensors",
    "module.pt",
    "_orig_mod.pt",
    "module._orig_mod.pt",
    "model.pt",
    "net.pt",
    "model_state_dict.pt",
    "both.pt",
)


@pytest.mark.parametrize("checkpoint", KINDS)
def test_compress_reads_every_kind_of_checkpoint(checkpoint, here, capsys):
    code, out, err = run(f"compress {checkpoint} --arch lenet5 --K 8 -o out.dkm --json", capsys)
    found = json.loads(out)
    assert (
        (code, err) == (0, "")
        and found["bytes"] == Path("out.dkm").stat().st_size
        and [r["k"] for r in found["layers"]] == [8, 8]
    )
    assert torch.equal(load_compressed("out.dkm").fc1.weight, load_file("lenet.safetensors")["fc1.weight"])


def test_inspect_and_decompress_agree_with_the_library(here, capsys):
    options = "--rate 0.02 --first 10 --sparsity 0.3 --codebook float16 --exclude conv1"
    run(f"compress lenet.safetensors --arch lenet5 {options} -o half.dkm", capsys)
    code, out, _ = run("inspect half.dkm", capsys)
    assert code == 0 and "conv2" in out and "F16" in out and f"{inspect('half.dkm').bytes:,} bytes" in out
    assert (
        sum(r["bytes"] for r in json.loads(run("inspect half.dkm --json", capsys)[1])["lines"])
        == Path("half.dkm").stat().st_size
    )
    assert run("decompress half.dkm -o dense.safetensors", capsys)[0] == 0
    net, dense = build("lenet5"), load_file("dense.safetensors")
    net.load_state_dict(dense)
    x = torch.randn(2, 1, 28, 28)
    assert (
        torch.equal(net.eval()(x), load_compressed("half.dkm")(x))
        and len(np.unique(dense["conv2.weight"].reshape(-1, 5), axis=0)) == 10
    )


def test_tables_are_broken_at_the_width_of_a_terminal(here, capsys, monkeypatch):
    run("compress lenet.safetensors --arch lenet5 --K 8 -o out.dkm", capsys)
    assert max(map(len, run("inspect out.dkm", capsys)[1].splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "60")
    # what a library prints goes to the standard error, so the program writes its table with that in the place of the
    # output
    for stream in (sys.stderr, sys.__stdout__):
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
    code, out, err = run(
        "compress squeeze.safetensors --arch squeezenet1_1 --num-classes 4 --K 4 --layout kernel -o squeeze.dkm --json",
        capsys,
    )
    assert code == 0 and json.loads(out)["ratio"] > 5, err
    assert load_compressed("squeeze.dkm")(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_a_wanted_ratio_is_reached(here, capsys):
    code, out, err = run("compress lenet.safetensors --arch lenet5 --ratio 20 -o ratio.dkm --json", capsys)
    assert code == 0 and abs(json.loads(out)["ratio"] / 20 - 1) < 0.01, err
    assert compression(load_compressed("ratio.dkm"), coding="file").bits == 8 * Path("ratio.dkm").stat().st_size


def test_energy_of_a_file_and_of_a_name(here, capsys):
    run("compress lenet.safetensors --arch lenet5 --K 8 -o out.dkm", capsys)
    named, file = (json.loads(run(f"energy {what} --json", capsys)[1]) for what in ("--arch lenet5", "out.dkm"))
    assert named["macs"] == file["macs"] == 20 * 25 * 24 * 24 + 50 * 500 * 8 * 8 + 800 * 500 + 500 * 10
    assert file["total"] < named["total"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("compress missing.pt --arch lenet5 --K 8 -o x.dkm", "there is no file 'missing.pt'"),
        (
            "compress pickled.pt --arch lenet5 --K 8 -o x.dkm",
            "it holds Python objects, such as a whole network; save its state_dict()",
        ),
        ("compress text.pt --arch lenet5 --K 8 -o x.dkm", "neither torch nor safetensors wrote it"),
        ("compress empty.pt --arch lenet5 --K 8 -o x.dkm", "neither torch nor safetensors wrote it"),
        (
            "compress lenet.pt --arch lenet6 --K 8 -o x.dkm",
            "arch='lenet6' (did you mean 'lenet5'?) must be one of lenet5",
        ),
        ("compress lenet.pt --arch resnet19 --K 8 -o x.dkm", "arch='resnet19' (did you mean 'resnet18'?)"),
        ("compress lenet.pt --arch torchvision:vgg_16 --K 8 -o x.dkm", "(did you mean 'torchvision:vgg16'?)"),
        ("compress lenet.pt --arch zzzzzz --K 8 -o x.dkm", "arch='zzzzzz' must be one of lenet5"),
        (
            "compress lenet.pt --arch lenet5 --num-classes 7 --K 8 -o x.dkm",
            "'fc2.weight' is 10×500 in the file and 7×500",
        ),
        ("compress lenet.pt --arch tt_conv_cnn --K 8 -o x.dkm", "'conv1_1.weight' is no such tensor in the file"),
        ("compress lenet.pt --arch lenet5 --option depth --K 8 -o x.dkm", "must read NAME=VALUE"),
        ("compress lenet.pt --arch lenet5 --rate 1.5 -o x.dkm", "rate=1.5 must be above 0"),
        ("compress lenet.pt --arch lenet5 --K 8 --exclude nothing -o x.dkm", "no layer is called 'nothing'"),
        (
            "compress lenet.pt --arch lenet5 --K 8 -o no/such/folder/x.dkm",
            "path='no/such/folder/x.dkm' is in a folder that does not exist",
        ),
        ("compress lenet.pt --arch lenet5 --K 8 -o .", "is no regular file"),
        ("compress lenet.pt --arch lenet5 --K 8 -o lenet.pt", "path='lenet.pt' is the file that is read"),
        ("compress lenet.pt --arch lenet5 --K 8 -o ./nowhere/../lenet.pt", "is the file that is read"),
        ("decompress good.dkm -o good.dkm", "path='good.dkm' is the file that is read"),
        ("decompress good.dkm -o no/x.safetensors", "in a folder that does not exist"),
        ("compress lenet.pt --arch lenet5 --ratio 0 -o x.dkm", "ratio=0.0 must be above 1"),
        ("compress lenet.pt --arch lenet5 --rate 0 -o x.dkm", "rate=0.0 must be above 0"),
        ("compress lenet.pt --arch lenet5 --option depth=16 --K 8 -o x.dkm", "unexpected keyword argument 'depth'"),
        (
            "compress lenet.pt --arch wide_resnet --option widen=-1 --K 8 -o x.dkm",
            "arch='wide_resnet' with {'widen': -1} cannot be built",
        ),
        (
            "compress lenet.pt --arch wide_resnet --option num_classes=3 --K 8 -o x.dkm",
            "seed and num_classes are no options",
        ),
        ("compress lenet.pt --arch nowhere:make --K 8 -o x.dkm", "No module named 'nowhere'"),
        ("compress lenet.pt --arch mine:missing --K 8 -o x.dkm", "has no attribute 'missing'"),
        ("compress lenet.pt --arch mine:number --K 8 -o x.dkm", "makes a int, which is no network"),
        ("compress lenet.pt --arch mine:broken --K 8 -o x.dkm", "ZeroDivisionError"),
        (
            "compress lenet.pt --arch lenet5 --K 8 --include Conv9d -o x.dkm",
            "include='Conv9d' must be a layer of torch.nn",
        ),
        ("compress lenet.pt --arch lenet5 --K 8 --include ConvTranspose2d -o x.dkm", "matches no layer"),
        ("inspect good.dkm --max-bytes 1000", "more than max_bytes=1,000"),
        ("evaluate good.dkm --data digits --arch mine:small", "has no"),
        ("energy good.dkm --arch mine:small --input 1 8 8", "has no"),
        ("energy lenet5 --arch lenet5", "either a FILE or --arch"),
        ("compress lenet.pt --arch lenet5 --ratio 20 --sparsity 0.5 -o x.dkm", "sparsity=0.5 cannot be given"),
        ("compress lenet.pt --arch lenet5 --ratio 20 --codebook float16 -o x.dkm", "codebook=float16 cannot be given"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 -o x.dkm", "name='wrn-45' is a plan for the 16 convolutions"),
        ("energy vit_b_16 --input 3 32 32", "the network does not run on it (Wrong image height!"),
        ("energy --arch mine:picky --input 1 8 8", "the network does not run on it (Wrong image height!"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 --first 9 -o x.dkm", "first=9 cannot be given with --plan"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 --sparsity 0 -o x.dkm", "sparsity=0.0 cannot be given with"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 --layout row -o x.dkm", "layout='row' cannot be given with"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 --exclude fc1 -o x.dkm", "exclude=['fc1'] cannot be given"),
        ("compress lenet.pt --arch lenet5 --plan wrn-45 --include Linear -o x.dkm", "include=['Linear'] cannot be"),
        ("inspect lenet.safetensors", "no deepkmeans file"),
        ("inspect .", "is no file"),
        ("decompress lenet.pt -o x.safetensors", "lenet.pt:"),
        ("evaluate good.dkm --data cifar11", "must be one of digits"),
        ("energy", "either a FILE or --arch"),
    ],
)
def test_a_user_error_is_one_line_and_writes_nothing(line, message, here, capsys):
    if "good.dkm" in line:
        run("compress lenet.pt --arch lenet5 --K 2 -o good.dkm", capsys)
    code, out, err = run(line, capsys)
    assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("deepkmeans: error: ") and message in err
    assert not list(here.glob("x.*"))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "shrink x",
        "compress x --arch lenet5 -o y",
        "compress x --arch lenet5 --K 4 --rate .1 -o y",
        "compress x --arch lenet5 --K 0 -o y",
        "inspect",
        "compress x --arch lenet5 --K 4 -o -",
        "decompress x -o -",
        "compress x --arch lenet5 --K 4 --first x -o y",
        "compress x --arch lenet5 --K 4 --first 0 -o y",
    ],
)
def test_wrong_usage_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as done:
        main(line.split())
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.count("\n") == 1
    assert re.fullmatch(r"deepkmeans: error: .+; see deepkmeans( \w+)? --help\n", err)


@pytest.mark.parametrize(
    "line, message",
    [
        ("compres x", "there is no command 'compres' (did you mean 'compress'?)"),
        ("zzz", "there is no command 'zzz'; see"),
        ("compress x --arch lenet5 --conf bad.yaml --K 4 -o y", "'--conf' (did you mean '--config'?)"),
        ("compress x --arch lenet5 --ratoi=3 -o y", "there is no option '--ratoi' (did you mean '--ratio'?)"),
        ("compress x --arch lenet5 --k 3 -o y", "there is no option '--k' (did you mean '--K'?)"),
        ("compress x --arch lenet5 --ratio 3 --K 4 -o y", "argument --K: not allowed with argument --ratio"),
        ("inspect x --max 3000", "unrecognized arguments: --max 3000"),
        ("evaluate x --data digits --rec", "unrecognized arguments: --rec"),
    ],
)
def test_wrong_usage_is_told_in_a_line(line, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(line.split())
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("line", ["retrain", "retrain epochs=3", "reproduce figure1 --protocol smoke"])
def test_outside_a_clone_one_is_told_where_to_get_it(line, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ConfigParser()
    settings.read(root / "settings.ini")
    code, out, err = run(line, capsys)
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    url = settings["DEFAULT"]["git_url"]
    assert err == f"deepkmeans: error: run it in a clone of the repository: git clone {url}\n"


@pytest.mark.parametrize(
    "given, message",
    [
        ("epcohs=3", "there is no parameter 'epcohs' (did you mean 'epochs'?)"),
        ("k=3", "there is no parameter 'k' (did you mean 'K'?)"),
        ("zzzzzz=3", "there is no parameter 'zzzzzz'; nbs/retrain.ipynb tells of all"),
        ("epochs=many", "epochs='many' must be of type int"),
    ],
)
def test_the_parameters_of_the_main_job_are_read_before_it_starts(given, message, root, tmp_path, monkeypatch, capsys):
    pytest.importorskip("papermill")
    monkeypatch.chdir(root)
    monkeypatch.setattr("deepkmeans.paper.suite.execute", lambda *_, **__: pytest.fail("a kernel was started"))
    code, out, err = run(f"retrain {given}", capsys)
    assert code == 1 and out == "" and err.count("\n") == 1 and message in err and len(err) < 150


@pytest.mark.parametrize("command", ["compress", "inspect", "decompress", "evaluate", "energy"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"  deepkmeans {command} " in capsys.readouterr().out


def test_the_program_itself(root, here):
    tomllib = pytest.importorskip("tomllib")
    module, function = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["deepkmeans"].split(
        ":"
    )
    program = [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    done = subprocess.run(
        [*program, *"compress lenet.pt --arch lenet5 --K 4 -o program.dkm --json".split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] == Path("program.dkm").stat().st_size, done.stderr
    Path("program.dkm").write_bytes(Path("program.dkm").read_bytes()[:-1])
    started = subprocess.run(
        [*program, *"compress lenet.pt --arch mine:interrupted --K 4 -o x.dkm".split()], capture_output=True, text=True
    )
    assert started.returncode == 130
    assert time.time() - float(started.stderr) < 5, started.stderr  # of which the program takes half a second
    done = subprocess.run([*program, "inspect", "program.dkm"], capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr and "program.dkm" in done.stderr
    )


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_what_is_no_file_is_not_replaced_and_that_is_seen_before_the_work(command, here, capsys, monkeypatch, tmp_path):
    run("compress lenet.pt --arch lenet5 --K 2 -o good.dkm", capsys)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for work in ("load_weights", "decompress"):
        monkeypatch.setattr(cli, work, lambda *_, **__: pytest.fail("worked for nothing"))
    what = "compress lenet.pt --arch lenet5 --K 8" if command == "compress" else "decompress good.dkm"
    code, out, err = run(f"{what} -o {pipe}", capsys)
    assert code == 1 and "is no regular file" in err and pipe.is_fifo() and [pipe] == list(tmp_path.iterdir())


def test_the_input_is_recognised_behind_links(here, capsys):
    Path("link.pt").symlink_to("lenet.pt")
    before = Path("lenet.pt").read_bytes()
    for given, written in (("lenet.pt", "link.pt"), ("link.pt", "lenet.pt")):
        assert (
            run(f"compress {given} --arch lenet5 --K 8 -o {written}", capsys)[0] == 1
            and Path("lenet.pt").read_bytes() == before
        )


def test_whoever_stops_reading_gets_no_traceback(here, capsys, monkeypatch):
    run("compress lenet.pt --arch lenet5 --K 2 -o good.dkm", capsys)
    for words in ("inspect good.dkm", "inspect good.dkm --json", "--version"):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            try:
                assert main(words.split()) == 0
            except SystemExit as done:
                assert done.code == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_a_terminal_that_lacks_characters_gets_what_looks_like_them(encoding, here, capsys, monkeypatch):
    for words in (
        "compress lenet.pt --arch lenet5 --K 2 -o good.dkm",
        "inspect good.dkm",
        "energy good.dkm",
        "compress --help",
        "--help",
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            assert main(words.split()) == 0
        except SystemExit as done:
            assert done.code == 0
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert "deepkmeans" in text or "bytes" in text or "macs" in text.lower()
        assert "\\u" not in text and "?" not in text


def test_what_a_terminal_would_obey_is_spelled_out(here, capsys):
    code, out, err = run("inspect nothing\x1b[2J.dkm", capsys)
    assert code == 1 and "\x1b" not in err and "\\x1b[2J" in err


def mine_small(folder, **options):  # the network of the user's own module
    found = {}
    exec((folder / "mine.py").read_text(), found)
    return found["small"](**options)


def test_ones_own_network_goes_the_whole_way(here, capsys):
    save_file(mine_small(here, width=8).state_dict(), "own.safetensors")
    options = "--option width=8 --K 3 --include ConvTranspose2d --include Linear --data digits --json"
    code, out, err = run(f"compress own.safetensors --arch mine:small {options} -o own.dkm", capsys)
    found = json.loads(out)
    assert (
        code == 0
        and [r["layer"] for r in found["layers"]] == ["2", "4"]
        and found["data"] == "digits"
        and found["images"] == 360
    )
    assert {"top1", "top5", "loss"} <= found["before"].keys() and found["before"]["loss"] != found["after"]["loss"]
    after = json.loads(run("evaluate own.dkm --arch mine:small --option width=8 --data digits --json", capsys)[1])
    assert {key: after[key] for key in found["after"]} == found["after"]
    assert "names no architecture" in run("evaluate own.dkm --data digits", capsys)[2]
    assert (
        json.loads(run("energy own.dkm --arch mine:small --option width=8 --input 1 8 8 --json", capsys)[1])["macs"]
        == 8 * 9 * 36 + 8 * 4 * 9 * 36 + 2560
    )
    assert "--input" in run("energy own.dkm --arch mine:small --option width=8", capsys)[2]
    assert (
        "top-1"
        in run(
            "compress own.safetensors --arch mine:small --option width=8 --rate .5 --data digits -o own.dkm", capsys
        )[1]
    )


@pytest.mark.parametrize("arch", ["mine:text", "mine:table"])
def test_what_another_s_network_calls_its_architecture_is_left_alone(arch, here, capsys):
    save_file(mine_small(here).state_dict(), "own.safetensors")
    code, out, err = run(f"compress own.safetensors --arch {arch} --K 3 --data digits -o own.dkm", capsys)
    assert (code, err) == (0, "") and "digits: top-1" in out and inspect("own.dkm").architecture is None
    assert "needs --input" in run(f"energy --arch {arch}", capsys)[2]
    found = json.loads(run(f"energy --arch {arch} --input 1 8 8 --json", capsys)[1])
    assert found["network"] == arch and len(found["layers"]) == 3


def test_images_that_a_network_does_not_take_are_named(here, capsys, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "pets" / part / "cat").mkdir(parents=True)
        Image.effect_noise((5, 5), 50).save(tmp_path / "pets" / part / "cat" / "0.png")
    save_file(mine_small(here).state_dict(), "own.safetensors")
    code, out, err = run(
        f"compress own.safetensors --arch mine:small --rate .5 --data {tmp_path / 'pets'} -o x.dkm", capsys
    )
    assert code == 1 and "does not take the images and labels of pets" in err and not Path("x.dkm").exists()


def test_whatever_a_network_says_to_images_is_one_line(here, capsys):
    save_file(mine_small(here).state_dict(), "own.safetensors")
    assert run("compress own.safetensors --arch mine:small --K 3 -o own.dkm", capsys)[0] == 0
    for line in (
        "compress own.safetensors --arch mine:picky --K 3 --data digits -o x.dkm",
        "evaluate own.dkm --arch mine:picky --data digits",
    ):
        said = "deepkmeans: error: the network does not take the images and labels of digits: Wrong image height!\n"
        assert run(line, capsys) == (1, "", said)


def test_json_has_null_for_what_is_no_number(here, capsys):
    save_file(mine_small(here).state_dict(), "own.safetensors")
    line = "compress own.safetensors --arch mine:diverged --K 3 --data digits -o own.dkm --json"
    compressed, measured = (
        json.loads(run(line, capsys)[1], parse_constant=pytest.fail)
        for line in (line, "evaluate own.dkm --arch mine:diverged --data digits --json")
    )
    assert compressed["before"]["loss"] is compressed["after"]["loss"] is measured["loss"] is None


def test_a_warning_is_one_line(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("deepkmeans.data._tv_split", lambda _: pytest.fail("something was downloaded"))
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *_, **__: open("nowhere/mnist"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = run("compress lenet.pt --arch lenet5 --K 4 --data mnist --data-root nowhere -o x.dkm", capsys)
    warning, error = err.splitlines()
    assert code == 1 and out == "" and error.startswith("deepkmeans: error: mnist was not found.")
    assert warning.startswith("deepkmeans: warning: mnist is not among the local files; ")


def test_what_is_said_of_the_size_is_that_of_the_file(here, capsys):
    options = "--K 8 --include Conv2d --include Linear --codebook float16 --json"
    found = json.loads(run(f"compress lenet.pt --arch lenet5 {options} -o half.dkm", capsys)[1])
    assert (
        found["bytes"] == Path("half.dkm").stat().st_size
        and found["dense_bytes"] == 4 * 431_080
        and found["ratio"] == found["dense_bytes"] / found["bytes"]
    )


def test_long_work_shows_bars_on_a_terminal_only(here, capsys, monkeypatch):
    torch.save(dict(mine_small(here).state_dict()), "bars.pt")
    ratio, evaluated = (
        "compress bars.pt --arch mine:small --ratio 2 -o bars.dkm",
        "evaluate bars.dkm --arch mine:small --data digits",
    )
    assert run(ratio, capsys)[2] == run(evaluated, capsys)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bars = run(ratio, capsys)[2]
    assert "curves" in bars and "share" in bars and "evaluate" in run(evaluated, capsys)[2]


def test_the_version_and_json_everywhere(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"deepkmeans {__version__}\n"
    for command in ("compress", "inspect", "decompress", "evaluate", "energy", "reproduce"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--json" in capsys.readouterr().out


def test_reproduce_names_what_there_is(capsys):
    assert main(["reproduce", "table9", "--protocol", "smoke"]) == 1
    assert "figure1" in capsys.readouterr().err


def test_energy_takes_the_name_of_a_network(capsys):
    assert main(["energy", "resnet18", "--input", "3", "64", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 21 and found["total"] == 7 * found["macs"]
    assert main(["energy", "missing.dkm"]) == 1


@pytest.mark.parametrize("name", [*cli.MODELS, "inception_v3"])
def test_energy_has_an_image_for_every_network_and_no_folder_hides_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    code, out, err = run(f"energy {name} --json", capsys)
    assert code == 0 and json.loads(out)["macs"] > 10**6, err
    assert all(line.startswith("deepkmeans: warning: ") for line in err.splitlines())


CONFIGS = {
    "lenet.yaml": """
        # comments are welcome
        arch: lenet5
        first: 5e-1
        rate: 0.1
        exclude: [fc1, "fc*"]
        include: [Conv2d, Linear]
        seed: 3
        codebook: float16
    """,
    "lenet.json": """{"arch": "lenet5", "first": 0.5, "rate": 0.1, "exclude": ["fc1", "fc*"],
        "include": ["Conv2d", "Linear"], "seed": 3, "codebook": "float16"}""",
}
TYPED = "--arch lenet5 --first 50e-2 --rate 0.1 --exclude fc1 --exclude fc* --include Conv2d --include Linear --seed 3"


@pytest.mark.parametrize("name", CONFIGS)
def test_options_from_a_file_do_what_typed_ones_do(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(folder)
    (tmp_path / name).write_text(textwrap.dedent(CONFIGS[name]))
    words = ["compress", "lenet.safetensors"]
    assert main([*words, *TYPED.split(), "--codebook", "float16", "-o", str(tmp_path / "typed.dkm")]) == 0
    assert main([*words, "--config", str(tmp_path / name), "-o", str(tmp_path / "file.dkm")]) == 0
    assert (tmp_path / "file.dkm").read_bytes() == (tmp_path / "typed.dkm").read_bytes()


def test_a_typed_option_wins_and_a_file_may_name_everything(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    target = tmp_path / "x.dkm"
    config = dict(
        arch="wide_resnet",
        option=dict(depth=10, widen=1),
        K=8,
        output=str(target),
        json=True,
        model=str(tmp_path / "wrn.pt"),
    )
    torch.save(build("wide_resnet", depth=10, widen=1).state_dict(), tmp_path / "wrn.pt")
    (tmp_path / "all.json").write_text(json.dumps(config))
    assert main(["compress", f"--config={tmp_path / 'all.json'}", "--K", "4"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) == 9 and {layer["k"] for layer in layers} == {4}


@pytest.mark.parametrize(
    "content, message",
    [
        ("arch: [lenet5", "is neither JSON nor YAML"),
        ("- lenet5", "must hold options by their names"),
        ("", "must hold options by their names"),
        ("16: 3", "must hold options by their names"),
        (b"\xff\xfe\x00", "is neither JSON nor YAML"),
        ("json: !!bool maybe", "bad.yaml' is neither JSON nor YAML: 'maybe'"),
        ("card: {trained: 2024-13-45}", "bad.yaml' is neither JSON nor YAML: month must be in 1..12"),
        ("[" * 5000, "is neither JSON nor YAML"),
        (None, "No such file"),
    ],
)
def test_a_file_of_options_that_is_none_is_one_line(folder, tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(folder)
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(f"compress lenet.safetensors --config {tmp_path}/bad.yaml -o {tmp_path}/x.dkm".split()) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_card_is_written_by_options_or_a_file_and_inspected(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    told = {"data": "a = b", "top-1": 98.5, "licence": "MIT"}
    (tmp_path / "card.json").write_text(json.dumps({"card": told}))
    start = "compress lenet.pt --arch lenet5 --K 4 -o"
    options = "--card", "data=a = b", "--card=top-1=98.5", "--card=licence=MIT"
    assert main([*f"{start} {tmp_path}/typed.dkm".split(), *options]) == 0
    assert main(f"{start} {tmp_path}/file.dkm --config {tmp_path}/card.json".split()) == 0
    capsys.readouterr()
    for name in ("typed", "file"):
        assert json.loads(run(f"inspect {tmp_path}/{name}.dkm --json", capsys)[1])["card"] == told
    assert "licence: MIT\n" in run(f"inspect {tmp_path}/file.dkm", capsys)[1]
    (tmp_path / "dates.yaml").write_text("card: {trained: 2024-05-01, at: 2024-05-01 12:30:00, delta: -3}")
    assert main(f"{start} {tmp_path}/dates.dkm --config {tmp_path}/dates.yaml --card rows=3000000000".split()) == 0
    dates = {"trained": "2024-05-01", "at": "2024-05-01 12:30:00", "delta": -3, "rows": 3_000_000_000}
    assert inspect(tmp_path / "dates.dkm").card == dates
    code, _, err = run(f"{start} {tmp_path}/x.dkm --card licence", capsys)
    assert code == 1 and "card='licence' must read NAME=VALUE" in err and not (tmp_path / "x.dkm").exists()


@pytest.mark.parametrize("name, size", [("ratio", 20), ("plan", "wrn-45"), ("rate", 0.1)])
def test_a_typed_size_wins_over_another_of_a_file(folder, tmp_path, monkeypatch, capsys, name, size):
    monkeypatch.chdir(folder)
    (tmp_path / "sized.json").write_text(json.dumps({"arch": "lenet5", name: size}))
    line = f"compress lenet.pt --config {tmp_path}/sized.json --K 4 -o {tmp_path}/x.dkm --json"
    code, out, err = run(line, capsys)
    assert code == 0 and {layer["k"] for layer in json.loads(out)["layers"]} == {4}, err


@pytest.mark.parametrize("line", ["lenet.pt --config {0}", "--config {0} lenet.pt", "--K 4 lenet.pt --config {0}"])
def test_a_typed_model_wins_over_that_of_a_file(folder, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(folder)
    (tmp_path / "model.json").write_text(json.dumps(dict(arch="lenet5", model="gone.pt", K=8)))
    code, _, err = run(f"compress {line.format(tmp_path / 'model.json')} -o {tmp_path}/x.dkm", capsys)
    assert code == 0 and (tmp_path / "x.dkm").exists(), err


@pytest.mark.parametrize(
    "content, message",
    [
        ("ratoi: 20", "has an unknown option 'ratoi' (did you mean 'ratio'?)"),
        ("ratoi: 20\narch: lenet5\nmodel: lenet.pt", "has an unknown option 'ratoi' (did you mean 'ratio'?)"),
        ("config: other.yaml", "has an unknown option 'config'"),
        ("zzzzzz: 20", "has an unknown option 'zzzzzz'; see"),
        ("card: {key: !!binary aGVsbG8=}", "b'hello' is no text, number or date"),
        ("card: {key: !!set {a, b}}", "is no text, number or date"),
        ("K: many", "argument --K: 'many' must be a whole number of at least 1"),
        ("layout: rwo", "argument --layout: invalid choice: 'rwo'"),
        ("K: 4\nratio: 3", "argument --ratio: not allowed with argument --K"),
    ],
)
def test_a_wrong_option_in_a_file_is_told_with_the_file(folder, tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(folder)
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(f"compress lenet.safetensors --config {tmp_path}/bad.yaml -o {tmp_path}/x.dkm".split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and not (tmp_path / "x.dkm").exists()
    assert f"config='{tmp_path}/bad.yaml'" in err and message in err


def test_the_page_of_the_command_line_opens_with_a_session(root):
    cells = json.loads((root / "nbs" / "40_cli.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    session = next(i for i, text in enumerate(sources) if 'shell("deepkmeans compress' in text)
    assert session < min(i for i, text in enumerate(sources) if text.startswith("#| export"))


def test_the_module_runs_as_a_program_and_with_its_output_closed():
    listed = subprocess.run([sys.executable, "-m", "deepkmeans.cli", "list"], capture_output=True, text=True)
    assert listed.returncode == 0 and "wrn-50" in listed.stdout
    closed = subprocess.run(
        f"exec {sys.executable} -m deepkmeans.cli list >&-", shell=True, capture_output=True, text=True
    )
    assert closed.returncode == 0 and closed.stderr == ""


@pytest.mark.parametrize(
    "words", [["lenet5", "--option", "image_size=20"], ["torchvision:inception_v3", "--option", "init_weights=false"]]
)
def test_energy_takes_the_image_that_the_network_is_made_for(words, capsys):
    assert main(["energy", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
