"""On a GPU: what is on the device stays there and gives what the CPU gives.

Where there is none, a pretended one shows that no two devices meet.
"""

import warnings

import matplotlib
import nbformat
import pytest
import torch
from pretended_cuda import pretended_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from deepkmeans.clustering import KMeans, encode, kmeans
from deepkmeans.models import build
from deepkmeans.plan import make_plan
from deepkmeans.rows import to_rows
from deepkmeans.sharing import centroids, cluster, share

REAL = torch.cuda.is_available()
matplotlib.use("Agg")
# of plain tensors, within the pretended device
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def cuda():
    if REAL:
        yield
    else:
        with pretended_cuda():
            yield


@pytest.mark.skipif(REAL, reason="there is a real device")
@pytest.mark.parametrize(
    "act",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: y[x > 0],
        lambda x, y: x.numpy(),
        lambda x, y: torch.zeros(3) + torch.zeros(3, device=x.device),
    ],
)
def test_the_pretended_device_refuses_what_a_real_one_refuses(cuda, act):
    y = torch.ones(3)
    x = y.to("cuda")
    assert x.is_cuda and (x + x).is_cuda and not x.cpu().is_cuda and x[y > 0].tolist() == [1, 1, 1]
    with pytest.raises((RuntimeError, TypeError)):
        act(x, y)


class Looks(TorchDispatchMode):
    """Counts how often the host waits for a number, or for how many there are, of the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
        on_device = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
        self.count += func in waits and on_device
        return func(*args, **(kwargs or {}))


def test_the_host_looks_at_a_device_every_few_iterations_and_finds_what_the_cpu_finds(cuda):
    rows = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    how = dict(init=rows[:50], tol=0, backend="torch")
    looks, found = {}, {}
    for max_iter in (10, 33):
        with Looks() as counted:
            found[max_iter] = kmeans(rows.to("cuda"), 50, max_iter=max_iter, **how)
        looks[max_iter] = counted.count
    assert found[33].n_iter == 33 and looks[33] - looks[10] < 10
    expected = kmeans(rows, 50, max_iter=33, **how)
    assert torch.equal(found[33].codes.cpu(), expected.codes)
    torch.testing.assert_close(found[33].codebook.cpu(), expected.codebook)


def test_a_cluster_that_runs_empty_is_filled_as_on_the_cpu(cuda):
    rows = torch.cat([torch.arange(40.0), torch.tensor([100.0, 101.0, 300.0])])[:, None]
    start = torch.tensor([[0.0], [19.0], [20.0], [20.5], [200.0], [190.0]])
    how = dict(init=start, max_iter=50, tol=0, backend="torch")
    found, expected = kmeans(rows.to("cuda"), 6, **how), kmeans(rows, 6, **how)
    assert torch.equal(found.codes.cpu(), expected.codes) and found.n_iter == expected.n_iter


@pytest.mark.parametrize(
    "backend", ["torch", "auto", pytest.param("keops", marks=pytest.mark.skipif(not REAL, reason="no CUDA device"))]
)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(init="random", n_init=2), dict(pinned_zero=0.3), dict(weighted=True), dict(given=True)],
    ids=str,
)
@pytest.mark.parametrize("d", [1, 3, 9])
def test_kmeans_stays_on_the_device_and_finds_what_the_cpu_finds(cuda, backend, options, d):
    rows = 0.05 * torch.randn(600, d, generator=torch.Generator().manual_seed(d))
    weight = torch.linspace(1, 2, 600) if "weighted" in options else None
    init = rows[:12] if "given" in options else options.get("init", "k-means++")
    options = {
        **{k: v for k, v in options.items() if k not in ("weighted", "given")},
        "init": init,
        "max_iter": 300,
        "tol": 0,
    }
    on_cpu = kmeans(
        rows,
        12,
        sample_weight=weight,
        backend="exact" if backend == "auto" and d == 1 and isinstance(init, str) else "torch",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kmeans(rows.to("cuda"), 12, sample_weight=weight, backend=backend, **options)
    assert found.codebook.is_cuda and found.codes.is_cuda
    codebook, codes = found.codebook.cpu().double(), found.codes.cpu()
    gaps = torch.cdist(rows.double(), codebook) ** 2  # (n, k), the oracle
    own = gaps.gather(1, codes[:, None])[:, 0]
    free = codes > 0 if "pinned_zero" in options else torch.ones(600, dtype=torch.bool)
    assert (own <= gaps[:, 1 if "pinned_zero" in options else 0 :].min(1).values + 1e-9)[free].all()
    assert found.inertia == pytest.approx(float((own * (1 if weight is None else weight)).sum()), rel=1e-9)
    assert found.inertia == pytest.approx(on_cpu.inertia, rel=1e-5)
    again, distances = encode(rows.to("cuda"), found.codebook, backend=backend)
    assert again.is_cuda and torch.allclose(distances.cpu(), gaps.min(1).values, rtol=1e-9)


def test_the_estimator_takes_tensors_of_the_device(cuda):
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).to("cuda")
    fitted = KMeans(5).fit(rows)
    assert fitted.predict(rows).is_cuda and torch.equal(fitted.predict(rows).cpu(), fitted.labels_.cpu())


def test_codes_that_were_found_on_the_cpu_are_shared_on_the_device(cuda):
    net = build("lenet5")
    plan = make_plan(net, k=6)
    codes = {name: kmeans(to_rows(net.get_submodule(name).weight.detach()), 6).codes for name in plan}
    dense = net.conv1.weight.detach().clone()
    net.to("cuda")
    again = cluster(net.conv1.weight, plan["conv1"], codes=codes["conv1"])
    assert again.codes.is_cuda and again.codes.tolist() == codes["conv1"].tolist()
    share(net, plan, codes=codes)
    assert net.conv1.weight.is_cuda
    torch.testing.assert_close(
        to_rows(net.conv1.weight).cpu(), centroids(to_rows(dense), codes["conv1"], 6)[codes["conv1"]]
    )


def execute(notebook, **parameters):  # in this process, where the device is
    names = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{notebook.name}: {cell.id}", "exec"), names)
            names.update(parameters if cell.id == "parameters" else {})
    return names


SMALL = dict(device="cuda", data="digits", progress=False)
FEW = dict(train_images=128, test_images=64, baseline_epochs=1, epochs=1)


@pytest.mark.parametrize(
    "given",
    [
        dict(epochs=2, kind="spectral", strength=1e-3, refresh_every=1, amp=True),
        dict(K=16, sparsity=0.3, amp=True),
        dict(kind="none", sparsity=0.3, sparse_at="mean", K=16),
        dict(layout="scalar"),
    ],
    ids=str,
)
def test_the_main_job_on_the_device(cuda, root, tmp_path, given):
    done = execute(root / "nbs" / "retrain.ipynb", out=str(tmp_path), **SMALL, **{**FEW, "finetune_epochs": 1, **given})
    assert (
        list(done["stages"])[-1] == "finetuned"
        and next(done["shared"].parameters()).is_cuda
        and (done["folder"] / "model.dkm").exists()
    )


@pytest.mark.parametrize(
    "method", ["tt", "tt-naive", "hashed", "freshnet", "lrd", "tucker", "separable", "dkm", "deep-compression", "soft"]
)
def test_each_baseline_on_the_device(cuda, root, tmp_path, method):
    settings = {"sigma": 0.05} if method == "soft" else {}
    done = execute(
        root / "nbs" / "baseline.ipynb",
        out=str(tmp_path),
        method=method,
        settings=settings,
        amp=method in ("tt", "dkm", "soft"),
        **SMALL,
        **FEW,
    )
    assert "trained" in done["stages"] and next(done["made"].parameters()).is_cuda


@pytest.mark.parametrize("method", ["deep-k-means", "control", "car"])
def test_one_layer_on_the_device(cuda, root, tmp_path, method):
    done = execute(
        root / "nbs" / "one_layer.ipynb",
        out=str(tmp_path),
        method=method,
        sizes=[16],
        epochs=1,
        baseline_epochs=1,
        car_share=0.1,
        car_batches=1,
        **SMALL,
    )
    assert len(list(tmp_path.glob("*/record.json"))) == 1 and done


@pytest.mark.filterwarnings("ignore:backend='keops' does not work here")
def test_the_benchmark_on_the_device(cuda, root, tmp_path):
    for folder in ("nbs/paper", "figures"):
        (tmp_path / folder).mkdir(parents=True)
    done = execute(
        root / "nbs" / "benchmarks.ipynb",
        device="cuda",
        execute=True,
        only="LeNet-5 conv1",
        repeats=1,
        root=str(tmp_path),
    )
    table = done["table"].set_index("method")
    ours = table.loc[["ours", "ours, torch", "ours, keops"]]
    assert (
        ours.seconds.notna().all()
        and (ours.inertia <= table.inertia.min() * 1.001).all()
        and "faiss" not in table.index
    )
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"benchmarks_cuda.csv", "benchmarks_cuda.png"}
    assert (table.seconds.notna() | (table.left_out.str.len() > 0)).all(), "what was not timed must say why"
