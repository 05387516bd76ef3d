"""Recipes of nbs/tutorials/your_trainer.ipynb that need several processes or a library, against a plain loop."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import deepkmeans as dk


def batches():
    return list(dk.loaders(dk.subset(dk.load("digits"), train=640), 64)[0])


def plain(net, plan, data, epochs, optimizer, accumulate=1):  # → codes
    regularizer, steps = dk.Regularizer(net, plan), 0
    for _ in range(epochs):
        for i, (x, y) in enumerate(data, 1):
            (F.cross_entropy(net(x), y) / accumulate).backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                regularizer.step(steps / (epochs * len(data) // accumulate))
    return regularizer.codes()


def start():
    net = dk.build("lenet5", seed=1)
    return net, dk.make_plan(net, k=4)


WORKER = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
import deepkmeans as dk

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
data = [(x.double(), y) for x, y in dk.loaders(dk.subset(dk.load("digits"), train=640), 64)[0]]
net = dk.build("lenet5", seed=1).double()  # as rounding in float32 grows with the steps, on some processors more
regularizer = dk.Regularizer(net, dk.make_plan(net, k=4))
wrapped = DistributedDataParallel(net)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
for step in range(20):
    x, y = data[step % 10]
    optimizer.zero_grad()
    F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
    optimizer.step()
    regularizer.step((step + 1) / 20)
codes = {f"codes.{name}": codes for name, codes in regularizer.codes().items()}
save_file({**net.state_dict(), **codes}, f"{folder}/{rank}")
dist.destroy_process_group()
"""


def test_two_processes_do_what_one_does(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=1200) for worker in workers] == [0, 0]
    one, two = (load_file(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    net, plan = start()
    net.double()
    data = [(x.double(), y) for x, y in batches()]
    codes = plain(net, plan, data, 2, torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9))
    assert all(torch.equal(one[f"codes.{name}"], codes[name]) for name in codes)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-9)  # a mean of means, rounded otherwise


@pytest.fixture
def page(root):
    """What the page's cells of these names define."""

    def run(*ids, **names):
        sources = {
            c["id"]: "".join(c["source"])
            for c in json.loads((root / "nbs" / "tutorials" / "your_trainer.ipynb").read_text())["cells"]
        }
        for name in ("imports", *ids):
            exec(sources[name], names)
        return names

    return run


def test_lightning_does_what_a_plain_loop_does(page, capsys):
    pytest.importorskip("lightning")
    net, plan = start()
    loader, other = dk.loaders(dk.subset(dk.load("digits"), train=640), 64)[0], copy.deepcopy(net)
    names = page("lightning", "lightning-run", dense=net, plan=plan, loader=loader, epochs=2, result=lambda *_: "")
    regularizer = dk.Regularizer(net, plan)
    trainer = names["with_lightning"](net, regularizer, accumulate_grad_batches=2)
    codes = plain(
        other, plan, list(loader), 2, torch.optim.SGD(other.parameters(), lr=0.02, momentum=0.9), accumulate=2
    )
    assert trainer.global_step == 10 and all(torch.equal(regularizer.codes()[name], codes[name]) for name in codes)
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_lightning_resumes_from_its_checkpoint(page, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    loader = dk.loaders(dk.subset(dk.load("digits"), train=640), 64)[0]
    net, plan = start()
    names = page("lightning", "lightning-run", dense=net, plan=plan, loader=loader, epochs=2, result=lambda *_: "")

    def fit(resume=None, save=None):
        net, plan = start()
        callback = names["LightningHardAssignments"](dk.Regularizer(net, plan))
        trainer = lightning.Trainer(
            max_epochs=2,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_train_batches=10,
        )
        if save:
            callback.on_train_epoch_end = lambda trainer, module: (
                trainer.current_epoch == 0 and trainer.save_checkpoint(save)
            )
        trainer.fit(names["Classifier"](net), loader, ckpt_path=resume)
        return net.state_dict()

    straight = fit(save=tmp_path / "half.ckpt")
    resumed = fit(resume=tmp_path / "half.ckpt")
    torch.testing.assert_close(straight, resumed, rtol=0, atol=0)


def test_hugging_face_steps_once_for_each_step_of_the_optimizer(page):
    pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    net, plan = start()
    loader = dk.loaders(dk.subset(dk.load("digits"), train=640), 64)[0]
    names = page(
        "hugging-face", "hugging-face-run", dense=net, plan=plan, loader=loader, epochs=2, result=lambda *_: ""
    )
    regularizer = dk.Regularizer(net, plan)
    trainer = names["with_hugging_face"](
        net, regularizer, per_device_train_batch_size=32, gradient_accumulation_steps=2
    )
    assert trainer.state.global_step == 20 == int(regularizer.state_dict()["counters"][0])
    before = net.conv2.weight.detach().clone()
    dk.share(net, plan, codes=regularizer.codes())
    torch.testing.assert_close(net.conv2.weight, before)  # the rows lay on their centres
