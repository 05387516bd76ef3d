"""Properties of the k-means engine that hold for every back end."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Reference

from deepkmeans import clustering, keops
from deepkmeans.clustering import BACKENDS, KMeans, decode, encode, kmeans

GENERAL = ("torch", "faiss", "tree")
few_seconds = settings(max_examples=40, deadline=None, derandomize=True)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def inertia(rows, found, weight=None):
    cost = (rows.double() - decode(found.codes, found.codebook).double()).square().sum(1)
    return float((cost if weight is None else cost * weight).sum())


@st.composite
def problems(draw):
    """Rows with duplicates, offsets and scales, and a k that may exceed the number of distinct rows."""
    n, d = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = rng.standard_normal((n, d))
    if draw(st.booleans()):
        rows = np.round(rows * draw(st.sampled_from([0, 1, 2])))
    rows = (rows + draw(st.sampled_from([0, 1, 1e3]))) * draw(st.sampled_from([1, 1e-15, 1e15]))
    weight = torch.from_numpy(rng.random(n) + 0.1) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.from_numpy(rows).to(dtype), draw(st.integers(1, n)), weight


@few_seconds
@given(problems(), st.sampled_from(GENERAL), st.sampled_from(["k-means++", "random"]))
def test_what_every_clustering_is(problem, backend, init):
    rows, k, weight = problem
    found = kmeans(rows, k, init=init, sample_weight=weight, backend=backend, tol=0, max_iter=1000)
    distinct = len(rows.unique(dim=0))
    counts = torch.bincount(found.codes, minlength=len(found.codebook))
    assert found.codebook.dtype == rows.dtype and found.codes.dtype == torch.int64
    assert len(found.codebook) == len(counts) == min(k, distinct)
    assert counts.min() >= 1
    w = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight
    for c in range(len(counts)):
        mine = found.codes == c
        mean = (rows[mine].double() * w[mine, None]).sum(0) / w[mine].sum()
        torch.testing.assert_close(found.codebook[c].double(), mean, rtol=1e-6, atol=1e-6 * float(rows.abs().max()))
    assert found.inertia == pytest.approx(inertia(rows, found, weight), rel=1e-9)
    if k >= distinct:
        assert found.inertia == 0


@few_seconds
@given(problems(), st.sampled_from(GENERAL))
def test_inertia_never_rises(problem, backend):
    rows, k, weight = problem
    start = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:k]]
    trace = [
        kmeans(rows, k, init=start, sample_weight=weight, tol=0, max_iter=i, backend=backend).inertia
        for i in range(1, 9)
    ]
    # that of the codebook to float32, in float64 rows with a large mean
    rounding = 1e-13 * float(rows.double().square().sum())
    assert all(after <= before * (1 + 1e-9) + rounding for before, after in zip(trace, trace[1:]))


@pytest.mark.parametrize("backend", GENERAL)
@pytest.mark.parametrize("n, d, k", [(3000, 3, 60), (2000, 7, 20), (2000, 1, 30), (4000, 2, 300)])
def test_against_scikit_learn(backend, n, d, k):
    rows = normal(n, d)
    reference = Reference(k, init=rows[:k].numpy(), n_init=1, max_iter=400, tol=0, algorithm="lloyd").fit(rows.numpy())
    found = kmeans(rows, k, init=rows[:k], max_iter=400, tol=0, backend=backend)
    assert (found.codes.numpy() == reference.labels_).all()
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-5)


@pytest.mark.parametrize("k", [5, 40, 700])
def test_near_centres_are_enough(k):
    """Each iteration of the tree ends where exhaustive search does."""
    rows = normal(5000, 3)
    for iterations in (2, 3, 6, 15):
        a, b = (kmeans(rows, k, init=rows[:k], tol=0, max_iter=iterations, backend=name) for name in ("tree", "torch"))
        assert (a.codes == b.codes).all() and a.n_iter == b.n_iter
        torch.testing.assert_close(a.codebook, b.codebook)


@pytest.mark.parametrize("spread", [1.0, 2.0**-10, 2.0**-14])
def test_long_rows_near_their_centres_end_where_exhaustive_search_does(spread):
    """The products by which the tree compares long rows round more coarsely than such rows are apart."""
    rows = normal(30, 9).repeat(100, 1) + spread * normal(3000, 9, 1)
    for iterations in (2, 5, 20):
        how = dict(init=rows[:60], tol=0, max_iter=iterations)
        a, b = (kmeans(rows, 60, backend=name, **how) for name in ("tree", "torch"))
        assert (a.codes == b.codes).all() and a.n_iter == b.n_iter


def test_the_fit_ends_at_nearest_centres():
    rows = normal(3000, 3)
    for backend in GENERAL:
        found = kmeans(rows, 50, tol=0, max_iter=1000, backend=backend)
        assert (encode(rows, found.codebook, backend)[0] == found.codes).all()


@few_seconds
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 5), st.sampled_from([0.0, 1e4]))
def test_encode_is_the_same_everywhere(seed, k, d, offset):
    rows, codebook = normal(200, d, seed) + offset, normal(k, d, seed + 1) + offset
    distances = (rows.double()[:, None] - codebook.double()).square().sum(-1)
    for backend in GENERAL:
        codes, least = encode(rows, codebook, backend)
        assert (
            distances.gather(1, codes[:, None])[:, 0] == distances.min(1).values
        ).all()  # equal codes but for true ties
        torch.testing.assert_close(least, distances.min(1).values)


@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_are_clustered_at_least_as_well_as_by_lloyd(weighted):
    rows, weight = (
        normal(500, 1),
        torch.rand(500, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else None,
    )
    for k in (2, 9, 100):
        best = kmeans(rows, k, sample_weight=weight)
        assert best.inertia == pytest.approx(kmeans(rows, k, sample_weight=weight, backend="exact").inertia)
        for seed in range(3):
            assert best.inertia <= kmeans(rows, k, sample_weight=weight, backend="torch", seed=seed).inertia * (
                1 + 1e-12
            )


def weighted_rows(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.rand(n, generator=generator).double() ** 4 + 1e-3


def test_many_weighted_clusters_end_where_the_plain_search_does():
    rows, weight = weighted_rows(3000)
    how = dict(init=rows[:100], sample_weight=weight, tol=0, max_iter=300)
    tree, plain = (kmeans(rows, 100, backend=backend, **how) for backend in ("tree", "torch"))
    assert torch.equal(tree.codes, plain.codes)


def test_weights_count_beside_pinned_rows():
    rows, weight = weighted_rows(300)
    found = kmeans(rows, 9, init=rows[:9], pinned_zero=0.3, sample_weight=weight)
    for c in range(1, 9):
        mean = np.average(rows[found.codes == c].double(), axis=0, weights=weight[found.codes == c])
        np.testing.assert_allclose(found.codebook[c], mean, rtol=1e-5, atol=1e-5)
    assert found.inertia == pytest.approx(inertia(rows, found, weight))


def test_rows_of_hardly_any_weight_are_no_centres():
    rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    rows[1000:] += 100
    weight = torch.cat([torch.ones(1000), torch.full((1000,), 1e-9)]).double()
    space = clustering._space(rows, weight)
    for seed in range(5):
        assert clustering._seed_plusplus(space, 3, torch.Generator().manual_seed(seed)).max() < 1000


def test_weights_stand_for_repeated_rows():
    rows, times = normal(300, 3), torch.randint(1, 5, (300,), generator=torch.Generator().manual_seed(3))
    for backend in GENERAL:
        weighted = kmeans(rows, 12, init=rows[:12], sample_weight=times, backend=backend)
        repeated = kmeans(rows.repeat_interleave(times, 0), 12, init=rows[:12], backend=backend)
        torch.testing.assert_close(weighted.codebook, repeated.codebook)
        assert weighted.inertia == pytest.approx(repeated.inertia)


# --- seeding -------------------------------------------------------------------------------------------------------


def test_plusplus_is_as_good_as_scikit_learns():
    from sklearn.cluster import kmeans_plusplus

    rows = normal(3000, 3)

    def cost(centres):
        return float(encode(rows, torch.as_tensor(centres))[1].sum())

    theirs = np.mean([cost(kmeans_plusplus(rows.numpy(), 60, random_state=s)[0]) for s in range(12)])
    for x in (rows, rows.repeat(10, 1)):  # plain, and from a million pairs on the tree
        space = clustering._space(x)
        ours = np.mean(
            [cost(x[clustering._seed_plusplus(space, 60, torch.Generator().manual_seed(s))]) for s in range(12)]
        )
        assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("k", [3, 900])
def test_seeding_follows_the_weights(k):
    rows = torch.cat([normal(1000, 3), normal(1000, 3) + 100])
    weight = torch.cat([torch.ones(1000), torch.full((1000,), 1e-9)])
    first = [
        int(clustering._seed_plusplus(clustering._space(rows, weight.double()), k, torch.Generator().manual_seed(s))[0])
        for s in range(8)
    ]
    assert max(first) < 1000


# --- degenerate cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", GENERAL)
def test_centres_that_nothing_wants(backend):
    rows = normal(400, 3)
    found = kmeans(rows, 20, init=torch.full((20, 3), 50.0), backend=backend)
    assert torch.bincount(found.codes, minlength=20).min() >= 1
    far = torch.cat([rows[:10], torch.full((10, 3), 1e3) + normal(10, 3)])
    found = kmeans(rows, 20, init=far, backend=backend)
    assert torch.bincount(found.codes, minlength=20).min() >= 1
    assert found.inertia < 1.3 * kmeans(rows, 20).inertia


@pytest.mark.parametrize("backend", GENERAL)
def test_one_centre_equal_rows_and_one_row(backend):
    rows = normal(100, 3)
    torch.testing.assert_close(kmeans(rows, 1, backend=backend).codebook[0], rows.mean(0))
    equal = kmeans(torch.full((30, 2), 0.1), 7, backend=backend)
    assert equal.codebook.shape == (1, 2) and equal.inertia == 0
    one = kmeans(rows[:1], 1, backend=backend)
    assert (one.codebook == rows[:1]).all() and one.codes.tolist() == [0]


@pytest.mark.parametrize("backend", GENERAL)
def test_as_many_centres_as_rows(backend):
    rows = torch.cat([normal(500, 3), normal(500, 3) * 1e-6 + 1])
    found = kmeans(rows, 1000, backend=backend)
    assert found.inertia == 0 and (decode(found.codes, found.codebook) == rows).all()


def cost_of_run(m):  # inertia of m consecutive whole numbers
    return m * (m * m - 1) / 12


def test_equally_spaced_numbers_and_ties():
    for k in (3, 5, 6, 7, 12):
        found = kmeans(torch.arange(13.0)[:, None], k)
        small, large = divmod(13, k)
        least = (k - large) * cost_of_run(small) + large * cost_of_run(small + 1)
        assert found.inertia == pytest.approx(least)


@pytest.mark.parametrize("backend", GENERAL)
def test_large_common_mean(backend):
    rows = normal(2000, 3)
    exact = torch.round(rows * 1024) / 1024  # stays exact after the shift
    a, b = (kmeans(exact + shift, 15, init=exact[:15] + shift, backend=backend) for shift in (0, 4096))
    assert (a.codes == b.codes).all() and a.inertia == pytest.approx(b.inertia, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    rows = normal(500, 3).to(dtype)
    found = kmeans(rows, 9)
    assert found.codebook.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.inertia == pytest.approx(kmeans(rows.float(), 9).inertia, rel=1e-4)


# --- the zero centre -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_pinned_zero(p):
    rows = normal(400, 3)
    found = kmeans(rows, 12, pinned_zero=p)
    pinned = found.codes == 0
    assert int(pinned.sum()) == round(p * 400) and (found.codebook[0] == 0).all()
    assert rows[pinned].norm(dim=1).max() <= rows[~pinned].norm(dim=1).min()
    rest = kmeans(rows[~pinned], min(11, int((~pinned).sum())))
    assert (found.codebook[1:] == rest.codebook).all()
    assert found.inertia == pytest.approx(inertia(rows, found))
    warm = kmeans(rows, len(found.codebook), pinned_zero=p, init=found.codebook)
    assert warm.inertia <= found.inertia * (1 + 1e-9)


def test_pinned_zero_at_its_ends():
    rows = normal(40, 3)
    least = kmeans(rows, 5, pinned_zero=0.001)  # one row at least
    assert (least.codes == 0).nonzero().tolist() == [[int(rows.norm(dim=1).argmin())]]
    assert least.codebook[0].tolist() == [0, 0, 0]
    everything = kmeans(rows, 5, pinned_zero=1.0)
    assert everything.codebook.tolist() == [[0, 0, 0]] and (everything.codes == 0).all()


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    (dict(rows=torch.full((5, 2), torch.nan)), "rows holds NaN"),
    (dict(rows=torch.tensor([[torch.inf]]), k=1), "rows holds NaN or infinite"),
    (dict(rows=torch.zeros(0, 2)), r"rows has shape \(0, 2\)"),
    (dict(rows=torch.zeros(5)), r"rows has shape \(5,\)"),
    (dict(rows=np.array([["a", "b"]], object)), "rows of type ndarray must be numbers that PyTorch knows"),
    (dict(rows=[[1.0, 2.0], [3.0]]), "rows of type list must be numbers that PyTorch knows"),
    (dict(rows=np.zeros((5, 2), np.longdouble)), "rows of type ndarray must be numbers that PyTorch knows"),
    (dict(k=2.0), "k=2.0 must be a whole number"),
    (dict(seed=0.5), "seed=0.5 must be a whole number"),
    (dict(seed=2**64), "seed=18446744073709551616 must be between"),
    (dict(rows=torch.zeros(5, 2, dtype=torch.complex64)), "rows has dtype torch.complex64"),
    (dict(rows=torch.eye(5).to_sparse()), "rows has layout torch.sparse_coo"),
    (dict(rows=torch.zeros(5, 2, device="meta")), "rows has no values"),
    (dict(k=0), "k=0 must be between 1 and the number of rows, 5"),
    (dict(k=6), "k=6 must be between 1 and the number of rows, 5"),
    (dict(init=torch.zeros(3, 2)), r"init has shape \(3, 2\), must be \(k, d\) = \(2, 2\)"),
    (dict(init=torch.full((2, 2), torch.nan)), "init holds NaN"),
    (dict(init="kmeans"), "init='kmeans' must be"),
    (dict(backend="cuda"), "backend='cuda' must be one of"),
    (dict(backend="exact"), "backend='exact' needs rows of length 1"),
    (dict(sample_weight=[1.0, 1, 1, 1]), "sample_weight has shape"),
    (dict(sample_weight=[1.0, 1, 1, 1, 0]), "sample_weight must be finite and greater than 0"),
    (dict(sample_weight=[1.0, 1, 1, 1, -1]), "sample_weight must be finite and greater than 0"),
    (dict(sample_weight=[1.0, 1, 1, 1, torch.nan]), "sample_weight must be finite and greater than 0"),
    (dict(pinned_zero=-0.1), "pinned_zero=-0.1 must be between 0 and 1"),
    (dict(k=1, pinned_zero=0.4), "k=1 must be at least 2 with pinned_zero=0.4"),
    (dict(max_iter=0), "max_iter=0 must be at least 1"),
    (dict(tol=-1.0), "tol=-1.0 must be at least 0"),
    (dict(n_init=0), "n_init=0 must be at least 1"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_errors(arguments, message):
    arguments = dict(rows=torch.zeros(5, 2), k=2) | arguments
    with pytest.raises(ValueError, match=message):
        kmeans(arguments.pop("rows"), arguments.pop("k"), **arguments)


def test_encode_refuses_a_codebook_of_another_length():
    with pytest.raises(ValueError, match="codebook has rows of length 3, must be d = 2"):
        encode(torch.zeros(5, 2), torch.zeros(4, 3))


# --- libraries that are missing ------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    return lambda *packages: monkeypatch.setattr(clustering, "_available", lambda p: p not in packages)


@pytest.mark.parametrize("backend, package", [("faiss", "faiss"), ("tree", "numba")])
def test_a_missing_library_is_named(without, backend, package):
    without(package)
    with pytest.raises(ImportError, match=f"backend='{backend}' needs {package}, which is not installed"):
        kmeans(normal(50, 3), 4, backend=backend)


def test_auto_does_without(without):
    without("numba", "faiss")
    with pytest.warns(UserWarning, match="needs (numba|faiss), which is not installed"):
        found = kmeans(normal(3000, 3), 100, max_iter=5)
    assert found.inertia == kmeans(normal(3000, 3), 100, max_iter=5, backend="torch").inertia


CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.fixture
def put_in_place(tmp_path, monkeypatch):  # of KeOps, a library of this source
    monkeypatch.setattr(keops.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(keops, "version", lambda package: "0")
    monkeypatch.delenv("KEOPS_CACHE_FOLDER", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    keops.fault.cache_clear()

    def replace(source):
        (tmp_path / "pykeops").mkdir(exist_ok=True)
        (tmp_path / "pykeops" / "__init__.py").write_text(
            f"open({str(tmp_path / 'tried')!r}, 'a').write('.')\n{source}"
        )

    yield replace
    keops.fault.cache_clear()
    monkeypatch.delenv("KEOPS_CACHE_FOLDER", raising=False)


@pytest.mark.skipif("pykeops" in sys.modules, reason="KeOps was imported into this process")
@pytest.mark.parametrize(
    "source, said",
    [
        (CRASH, "its process died of SIGSEGV; set CXX"),
        (HANG, "no answer in 6 seconds; set CXX"),
        ("raise RuntimeError('no compiler')", "RuntimeError: no compiler; set CXX"),
    ],
    ids=["crash", "hang", "error"],
)
def test_keops_that_does_not_work_stays_in_a_child(put_in_place, tmp_path, monkeypatch, source, said):
    put_in_place(source)
    if source == HANG:
        monkeypatch.setattr(keops, "_PATIENCE", 6)
    rows, began = normal(200, 3), time.monotonic()
    for _ in range(2):  # the second from what the first kept
        with pytest.warns(UserWarning, match=f"backend='keops' does not work here .{said}.*using 'torch'"):
            found = encode(rows, rows[:9], backend="keops")
        keops.fault.cache_clear()
    assert torch.equal(found[0], encode(rows, rows[:9], backend="torch")[0]) and time.monotonic() - began < 60
    assert (tmp_path / "tried").read_text() == ".", "one process has tried it, once"


WRONG = """
import torch
class LazyTensor:
    def __init__(self, x): pass
    __sub__ = square = sum = lambda self, *_: self
    def argKmin(self, top, dim): return torch.zeros(50, top, dtype=torch.int64)
"""


def test_keops_that_finds_the_wrong_centres_is_declined(put_in_place, tmp_path):
    put_in_place("def set_verbose(value): pass")
    (tmp_path / "pykeops" / "torch.py").write_text(WRONG)
    rows = normal(200, 3)
    with pytest.warns(UserWarning, match="it does not find the nearest centres; set CXX"):
        encode(rows, rows[:9], backend="keops")


INTERPRETED = """
import sys, torch, deepkmeans
from deepkmeans.triton_kernels import nearest
draw = torch.Generator().manual_seed(0)
for n, k, d in ((300, 70, 3), (1, 2, 1), (65, 64, 9), (130, 129, 27), (50, 3, 64)):
    rows, centres = (torch.randn(size, d, generator=draw) for size in (n, k))
    least = torch.cdist(rows.double(), centres.double()).topk(2, largest=False).indices
    for top in (1, 2):
        assert torch.equal(nearest(rows, centres, top), least[:, :top]), (n, k, d, top)
rows = torch.randn(400, 3, generator=draw)
ours, theirs = (deepkmeans.kmeans(rows, 30, backend=backend) for backend in ("triton", "torch"))
assert ours.inertia == theirs.inertia and torch.equal(ours.codes, theirs.codes)
twice = torch.tensor([[2.0], [1.0], [1.0], [3.0]])
assert nearest(torch.tensor([[1.1]]), twice, 2).sort().values.tolist() == [[1, 2]]
"""


def test_the_triton_kernel_interpreted_on_the_cpu_finds_what_float64_finds():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_triton_on_the_cpu_says_what_it_needs():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs rows of at most 10 numbers on CUDA, not .200, 3. on cpu"):
        kmeans(normal(200, 3), 9, backend="triton")


# --- promises about the surroundings -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("keops", "triton", "exact")])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_global_random_state_is_untouched(backend, init):
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    kmeans(normal(3000, 3), 400, init=init, backend=backend, max_iter=3)
    assert (torch.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()


def digest(seed, backend, d=3):
    found = kmeans(normal(20_000, d), 60, seed=seed, backend=backend, max_iter=8)
    return found.codebook.numpy().tobytes() + found.codes.numpy().tobytes() + repr(found.inertia).encode()


@pytest.mark.parametrize("backend, d", [(b, 3) for b in GENERAL] + [("exact", 1), ("faiss", 9)])
def test_same_seed_same_bytes_whatever_the_threads(backend, d):
    threads = torch.get_num_threads()
    try:
        seen = set()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            seen |= {digest(0, backend, d), digest(0, backend, d)}
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
    if backend != "exact":
        assert digest(1, backend, d) not in seen


def test_a_generator_is_drawn_from():
    generator, rows = torch.Generator().manual_seed(5), normal(500, 3)
    first, second = kmeans(rows, 9, seed=generator), kmeans(rows, 9, seed=generator)
    assert first.inertia == kmeans(rows, 9, seed=5).inertia != second.inertia


def test_the_best_of_several_seedings():
    rows, generator = normal(500, 3), torch.Generator().manual_seed(0)
    single = [kmeans(rows, 9, seed=generator).inertia for _ in range(5)]
    assert kmeans(rows, 9, n_init=5, seed=0).inertia == min(single)


def test_several_threads_at_once():
    """Calls from several Python threads neither disturb each other nor crash."""
    rows, found = [normal(6000, 3, s) for s in range(4)], [None] * 4
    alone = [kmeans(r, 100, max_iter=10).inertia for r in rows]

    def work(i):
        found[i] = kmeans(rows[i], 100, max_iter=10).inertia

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert found == alone


def test_the_input_is_left_alone():
    rows = normal(3000, 3).requires_grad_()
    before = rows.detach().clone()
    for backend in GENERAL:
        assert not kmeans(rows, 100, max_iter=3, backend=backend).codebook.requires_grad
    assert (rows == before).all()


def test_no_large_distance_matrix(monkeypatch):
    """`torch` never holds more of the n×k matrix than it states."""
    sizes, least = [], clustering._least
    monkeypatch.setattr(
        clustering, "_least", lambda distances, top: sizes.append(distances.nbytes) or least(distances, top)
    )
    rows = normal(30_000, 3)
    kmeans(rows, 300, max_iter=3, backend="torch", init="random")
    assert max(sizes) <= clustering.CACHE and sum(sizes) >= 3 * 4 * 300 * 30_000


def test_importing_the_package_loads_no_heavy_library():
    heavy = "sklearn scipy faiss numba pykeops pandas matplotlib".split()
    code = f"import sys; import deepkmeans.clustering; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- the estimator -------------------------------------------------------------------------------------------------


def test_estimator_passes_scikit_learns_examination():
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(KMeans(n_clusters=2))
    assert {r["status"] for r in results} <= {"passed", "skipped"} and len(results) > 30


def test_estimator_with_tensors_clone_and_pipeline():
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = normal(300, 3)
    fitted = clone(KMeans(5, seed=3)).fit(rows)
    assert isinstance(fitted.labels_, torch.Tensor) and (fitted.predict(rows) == fitted.labels_).all()
    assert (KMeans(5, seed=3).fit(rows.numpy()).labels_ == fitted.labels_.numpy()).all()
    assert (fitted.fit_predict(rows.flip(0)) == fitted.fit(rows).labels_.flip(0)).all()
    assert len(make_pipeline(StandardScaler(), KMeans(5)).fit(rows.numpy()).predict(rows.numpy())) == 300
    with pytest.raises(ValueError, match="Invalid parameter 'n_cluster'"):
        KMeans().set_params(n_cluster=3)


@pytest.mark.parametrize("backend", ["torch", "faiss", "tree"])
@pytest.mark.parametrize("d, k", [(1, 7), (3, 20), (9, 20), (30, 8)])
def test_it_does_what_the_ten_lines_of_the_chapter_do(root, backend, d, k):
    cells = json.loads((root / "nbs" / "01_clustering.ipynb").read_text())["cells"]
    chapter = {"torch": torch}
    exec("".join(next(cell["source"] for cell in cells if cell["id"] == "plain")), chapter)
    rows = torch.from_numpy(np.random.default_rng(d).standard_t(4, (800, d)))
    found = kmeans(rows, k, init=rows[:k], max_iter=6, tol=0, backend=backend)
    codebook, codes = chapter["plain_lloyd"](rows, rows[:k], 6)
    torch.testing.assert_close(found.codebook, codebook, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.codes, codes)


def test_only_the_module_keeps_what_numba_compiles_and_a_notebook_s_cell_does_not(root):
    """A cell's cache outlived a change of _BLOCK, which it had compiled in, and the kernel wrote beyond its arrays."""
    from deepkmeans import kernels

    cells = json.loads((root / "nbs" / "50_kernels.ipynb").read_text())["cells"]
    source = {cell["id"]: "".join(cell["source"]) for cell in cells}
    names = {"__name__": "__main__"}  # as in a notebook, where there is no __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numba finds no place for a function of a cell only where it looks for one
        exec("\n".join(source[name] for name in ("imports", "constants", "compare-all")), names)
    kinds = [type(compiled._cache).__name__ for compiled in (names["compare_all"], kernels.compare_all)]
    assert kinds == ["NullCache", "FunctionCache"]
