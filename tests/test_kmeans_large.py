"""Rows that do not fit in memory, or lie in several processes; few centres and many."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from deepkmeans import clustering, kernels
from deepkmeans.clustering import kmeans


STREAMED = """
import resource, sys
import torch
from deepkmeans import clustering
clustering.IN_MEMORY, kmeans, _backend = 2**26, clustering.kmeans, clustering._backend
kmeans(torch.randn(5000, 32), 4, backend="faiss")  # so that the libraries have their buffers
rows = torch.from_file(sys.argv[1], size=1_000_000 * 32).view(-1, 32)
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (in_use + 80 * 2**20,) * 2)
try:
    rows.clone()
except RuntimeError:
    print("no room for a copy", _backend("auto", rows, 4, True))
found = kmeans(rows, 4, init=torch.eye(4, 32), max_iter=2)
print(found.n_iter, torch.bincount(found.codes).tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is set in Linux's way")
def test_rows_larger_than_the_memory(tmp_path):
    """128 MB of rows are clustered with 80 MiB of memory, and the result is that of a block of them."""
    block = torch.randn(10_000, 32, generator=torch.Generator().manual_seed(0))
    with open(tmp_path / "rows", "wb") as file:
        for _ in range(100):
            file.write(block.numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, tmp_path / "rows"],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )  # so that the allocator keeps nothing for later, or not, as the addresses happen to be
    (tmp_path / "rows").unlink()
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "no room for a copy faiss"
    counts = 100 * torch.bincount(kmeans(block, 4, init=torch.eye(4, 32), max_iter=2).codes)
    assert second == f"2 {counts.tolist()}"


def test_seeding_from_a_sample_says_so(monkeypatch):
    rows = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    whole = kmeans(rows, 10)
    monkeypatch.setattr(clustering, "IN_MEMORY", 2**17)
    with pytest.warns(UserWarning, match=r"the 20,000 rows do not fit .* a random sample of 1,489"):
        assert kmeans(rows, 10).inertia < 1.1 * whole.inertia


TOGETHER = """
import sys
import torch
import torch.distributed as dist
from deepkmeans.clustering import kmeans
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
results = []
for rows, start, weight in torch.load(f"{folder}/problems", weights_only=True):
    part = slice(0, len(rows) // 3) if rank == 0 else slice(len(rows) // 3, None)
    weight = None if weight is None else weight[part]
    found = kmeans(rows[part], len(start), init=start, sample_weight=weight, tol=0, group=dist.group.WORLD)
    results.append((found.codebook, found.codes, found.inertia, found.n_iter))
try:
    kmeans(rows[part], 2, group=dist.group.WORLD)
except ValueError as error:
    results.append(str(error))
torch.save(results, f"{folder}/result{rank}")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_find_what_one_finds(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows, few = torch.randn(3000, 3, generator=g), torch.randint(0, 2, (90, 3), generator=g).float()
    problems = [
        (rows, rows[:40], None),
        (rows, rows[-7:], torch.rand(3000, generator=g) + 0.1),
        (rows, torch.cat([rows[:5], torch.full((3, 3), 50.0) + torch.eye(3)]), None),  # centres that nothing wants
        (few, torch.rand(12, 3, generator=g), None),  # more centres than distinct rows
    ]
    torch.save(problems, tmp_path / "problems")
    workers = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, str(rank), tmp_path], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for worker in workers:
        assert worker.wait(120) == 0, worker.stderr.read()
    *first, refused = torch.load(tmp_path / "result0")
    *second, _ = torch.load(tmp_path / "result1")
    assert refused.startswith("a group needs a codebook as init")
    for (rows, start, weight), (codebook, codes, inertia, n_iter), (same, others, _, _) in zip(problems, first, second):
        alone = kmeans(rows, len(start), init=start, sample_weight=weight, tol=0, backend="faiss")
        assert (codebook == same).all() and n_iter == alone.n_iter
        torch.testing.assert_close(codebook, alone.codebook)
        assert (torch.cat([codes, others]) == alone.codes).all() and inertia == pytest.approx(alone.inertia)


@pytest.mark.parametrize("n, d, k", [(5000, 1, 3), (5000, 3, 40), (700, 5, 300), (40000, 2, 3000), (5000, 6, 100)])
def test_comparing_all_centres_or_near_ones_is_the_same(n, d, k):
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    start = x[:k].astype(float)
    (codes, *ended), (others, *others_ended) = (
        how(x, np.empty(0), start, 50, 0.0, None) for how in (kernels._lloyd_all, kernels._lloyd_near)
    )
    assert (codes == others).all() and ended == others_ended


DISAGREEING = """
import datetime, sys
import torch
import torch.distributed as dist
from deepkmeans.clustering import kmeans
rank, folder = int(sys.argv[1]), sys.argv[2]
minute = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=minute)
rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(rank))
start, first = torch.arange(12.0).view(4, 3), rank == 0
cases = [
    dict(rows=rows[:0]) if first else {},
    dict(rows=torch.full((5, 3), torch.nan)) if first else {},
    dict(rows="rows") if first else {},
    dict(sample_weight=[1.0]) if first else {},
    dict(init=start + rank),
    dict(k=4 - rank, init=start[:4 - rank]),
    dict(rows=rows[:, :2], init=start[:, :2]) if first else {},
    dict(max_iter=5 + rank),
    dict(tol=0.1 * rank),
    dict(rows=rows.double()) if first else {},
    dict(sample_weight=torch.ones(200)) if first else {},
    dict(backend="tree") if first else {},
    dict(k=2000, init=start.repeat(500, 1)),
]
for case in cases:
    try:
        kmeans(**dict(rows=rows, k=4, init=start, group=dist.group.WORLD) | case)
        print("accepted")
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_processes_that_were_given_different_things_all_say_so_and_none_waits(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DISAGREEING, str(rank), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = ([*worker.communicate(timeout=100)][0].splitlines() for worker in workers)
    wrong = [
        "rows has shape (0, 3)",
        "rows holds NaN",
        "rows of type str must be numbers",
        "sample_weight has shape (1,)",
    ]
    assert [a[: len(w)] for a, w in zip(first, wrong)] == wrong and all(
        "another process of the group refused its arguments" in b for b in second[:4]
    )
    assert (
        first[4:11]
        == second[4:11]
        == [
            f"the processes of the group were given different {names}, must be the same in all"
            for names in ("init", "init, k", "init", "max_iter", "tol", "dtype", "sample_weight")
        ]
    )
    assert first[11].startswith("backend='tree' needs all rows in one process") and "another process" in second[11]
    assert first[12:] == second[12:] == ["k=2000 must be between 1 and the number of rows, 400"]
