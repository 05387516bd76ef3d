"""What k-means promises at the edges of the numbers.

Right codes, right precision, the optimum where it says exact, and the manners of its surroundings.
"""

import os
import subprocess
import sys

import attack_kmeans
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans as Reference

from deepkmeans import clustering, intervals, keops
from deepkmeans.clustering import KMeans, encode, kmeans

GENERAL = ("torch", "faiss", "tree")
EVERY = pytest.mark.parametrize("backend", GENERAL)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def true_codes(rows, codebook):
    return torch.cdist(rows.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


# --- the attack, a short run of it ---------------------------------------------------------------------------------


def test_no_problem_made_to_break_the_engine_breaks_it():
    assert attack_kmeans.attack(attack_kmeans.engine_problem, attack_kmeans.engine_fault, range(250)) == []


def test_no_problem_made_to_break_the_exact_clustering_breaks_it():
    assert attack_kmeans.attack(attack_kmeans.exact_problem, attack_kmeans.exact_fault, range(120)) == []


def test_where_no_price_gives_the_wanted_number_of_clusters_few_are_tried(monkeypatch):
    """4,096 whole numbers in 3,000 clusters are 1,096 pairs, each half of one from its middle; bisection took 50."""
    tried, cuts = [], intervals._cuts
    monkeypatch.setattr(intervals, "_cuts", lambda *arguments: tried.append(arguments) or cuts(*arguments))
    found = kmeans(torch.arange(4096.0)[:, None], 3000, backend="exact")
    assert found.inertia == 1096 / 2 and len(found.codebook) == 3000
    assert len(tried) < 25


# --- precision and range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*GENERAL, "exact"])
def test_float64_rows_far_from_zero_are_clustered_as_float64(backend):
    X = 1.7e9 + np.repeat([0.0, 30.0, 60.0], 50)[:, None] + np.random.default_rng(0).normal(size=(150, 1))
    found, reference = kmeans(X, 3, n_init=5, backend=backend), Reference(3, n_init=5, random_state=0).fit(X)
    assert found.codebook.dtype == torch.float64
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-9)
    assert np.sort(found.codebook[:, 0]) == pytest.approx(np.sort(reference.cluster_centers_[:, 0]), rel=1e-15)
    estimator = KMeans(3, n_init=5, backend=backend).fit(X)
    assert (
        estimator.inertia_ == pytest.approx(reference.inertia_, rel=1e-9)
        and estimator.cluster_centers_.dtype == np.float64
    )


@EVERY
def test_float64_heaps_a_billion_apart_keep_their_clusters(backend):
    """Within each heap there is less than a float32 can see."""
    g = np.random.default_rng(0)
    X = np.repeat(np.stack(np.meshgrid([-1e9, 1e9], [0, 40, 80]), -1).reshape(-1, 2), 100, 0) @ [
        [1, 1, 0],
        [0, 1, 1],
    ] + g.normal(size=(600, 3))
    found = kmeans(X, 6, init=X[::100], backend=backend)
    assert torch.bincount(found.codes).tolist() == [100] * 6 and found.inertia == pytest.approx(
        Reference(6, init=X[::100], n_init=1).fit(X).inertia_, rel=1e-6
    )


@pytest.mark.parametrize("size", [1e-310, 1e-160, 1e-50, 1.0, 1e39, 1e200, 1.7e308])
@pytest.mark.parametrize("backend", [*GENERAL, "exact"])
def test_neither_tiny_nor_huge_numbers_are_too_much(backend, size):
    plain = np.array([1.0, 0.99, 0.98, 0.5, 0.49, 0.51, 0.1, 0.11, 0.12])[:, None]
    found = kmeans(plain * size, 3, n_init=5, backend=backend)
    assert (
        len({tuple(found.codes[i : i + 3].tolist()) for i in (0, 3, 6)}) == 3
        and [len(set(found.codes[i : i + 3].tolist())) for i in (0, 3, 6)] == [1] * 3
    )
    assert (np.sort(found.codebook[:, 0]) / size) == pytest.approx(
        [0.11, 0.5, 0.99], rel=1e-10 if size > 1e-300 else 1e-3
    )
    assert found.inertia == pytest.approx(6e-4 * size * size, rel=1e-9)  # 0 or infinite where that is
    codes, squares = encode(plain * size, found.codebook, backend)
    assert (
        torch.equal(codes, found.codes)
        and (KMeans(3, n_init=5, backend=backend).fit(plain * size).labels_[::3] >= 0).all()
    )


def test_codebook_entries_of_another_size_than_the_rows_are_told_apart():
    rows = np.array([[1.0, 2.0], [1.5, 2.0], [-1.0, 0.0]])
    for backend in GENERAL:
        assert encode(rows, np.array([[1e300, 1e300], [1.4, 2.0], [1.0, 2.1], [-1e300, 0]]), backend)[0].tolist() == [
            2,
            1,
            2,
        ]
        assert encode(rows, np.array([[1e300, 0], [1e299, 0], [-1e301, 0]]), backend)[0].tolist() == [1, 1, 1]
        assert encode(rows * 1e-200, rows * 1e-200, backend)[0].tolist() == [0, 1, 2]


def test_weights_may_be_of_any_size():
    rows, weight = normal(100, 3).double(), np.random.default_rng(0).random(100) + 0.1
    plain = kmeans(rows, 5, sample_weight=weight)
    for size in (2.0**1000, 2.0**-1040):
        found = kmeans(rows, 5, sample_weight=weight * size)
        assert torch.equal(found.codes, plain.codes) and found.inertia == pytest.approx(plain.inertia * size, rel=1e-3)


# --- the nearest centre --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*GENERAL, "auto"])
@pytest.mark.parametrize("apart, dtype", [(1e4, torch.float32), (1e7, torch.float64)])
def test_encode_tells_rows_of_far_heaps_apart(backend, apart, dtype):
    g = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(3000, 9, generator=g, dtype=dtype) + apart * (2 * torch.randint(0, 2, (3000, 1), generator=g) - 1)
    ).to(dtype)
    codebook = rows[::10]
    assert torch.equal(encode(rows, codebook, backend)[0], true_codes(rows, codebook))


@EVERY
def test_lloyd_sees_rows_of_far_heaps_as_well(backend):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 9, generator=g) + 1e4 * (2 * torch.randint(0, 2, (2000, 1), generator=g) - 1)
    reference = Reference(50, init=rows[:50].double().numpy(), n_init=1, algorithm="lloyd", tol=0).fit(
        rows.double().numpy()
    )
    assert kmeans(rows, 50, init=rows[:50], tol=0, backend=backend).inertia == pytest.approx(
        reference.inertia_, rel=1e-3
    )


def test_low_precision_of_matrix_products_costs_no_code():
    rows, before = normal(3000, 9), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(encode(rows, rows[:500], "torch")[0], true_codes(rows, rows[:500]))
    finally:
        torch.set_float32_matmul_precision(before)


STOPS = [
    dict(max_iter=1),
    dict(max_iter=2, tol=0),
    dict(max_iter=7, tol=0),
    dict(tol=1e-1),
    dict(tol=1e-4),
    dict(tol=0, max_iter=300),
]


@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("backend, d", [*((b, d) for b in GENERAL for d in (1, 3, 9)), ("exact", 1), ("auto", 2)])
def test_codes_are_nearest_to_the_codebook_that_is_returned_wherever_the_iteration_stops(stop, backend, d):
    rows = torch.from_numpy(np.random.default_rng(d).standard_t(4, (900, d))).to(
        torch.float64 if d == 9 else torch.float32
    )
    weight = np.random.default_rng(1).random(900) + 0.1
    for options in (
        dict(),
        dict(sample_weight=weight),
        dict(pinned_zero=0.4),
        dict(sample_weight=weight, pinned_zero=0.4),
        dict(init=rows[:60] * 0.1),
    ):
        found = kmeans(rows, 60, backend=backend, **stop, **options)
        first = int("pinned_zero" in options)
        free = found.codes >= first
        squares = (rows.double()[:, None] - found.codebook.double()).square().sum(-1)  # (n, k)
        own = squares.gather(1, found.codes[:, None])[:, 0]
        assert (own <= squares[:, first:].min(1).values * (1 + 1e-14))[free].all() and int((~free).sum()) == round(
            0.4 * 900
        ) * first
        assert torch.bincount(found.codes, minlength=60).min() > 0
        assert found.inertia == pytest.approx(
            float((own * torch.as_tensor(options.get("sample_weight", np.ones(900)))).sum()), rel=1e-12
        )


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_labels_are_nearest_to_the_centres_of_the_estimator(stop):
    X = np.random.default_rng(0).standard_t(4, (900, 3))
    fitted = KMeans(60, **stop).fit(X)
    assert (
        fitted.labels_ == true_codes(torch.from_numpy(X), torch.from_numpy(fitted.cluster_centers_)).numpy()
    ).all() and (fitted.labels_ == fitted.predict(X)).all()
    assert (
        -fitted.score(X) == pytest.approx(fitted.inertia_, rel=1e-12)
        and np.bincount(fitted.labels_, minlength=60).min() > 0
    )


@EVERY
def test_a_centre_that_the_last_assignment_empties_moves_to_the_worst_row(backend, monkeypatch):
    """Means of a first assignment at random: 40 centres in the middle of all rows, and most lose all their rows."""
    rows, emptied, donors = normal(400, 2), [], clustering._donors
    monkeypatch.setattr(
        clustering,
        "_donors",
        lambda space, codebook, codes, count: emptied.append(count) or donors(space, codebook, codes, count),
    )
    space = clustering._space(rows)
    codes = torch.randint(0, 40, (400,), generator=torch.Generator().manual_seed(0))
    means, codes, _ = clustering._update(space, codes, 40)
    codebook, codes = clustering._settled(space, clustering._returned(space, means, codes), codes, backend)
    assert emptied and torch.bincount(codes, minlength=40).min() > 0 and len(codebook) == 40
    assert torch.equal(codes, true_codes(rows, codebook))


# --- exact where it says exact -------------------------------------------------------------------------------------


def test_a_value_far_below_costs_the_optimum_no_digit():
    x = torch.tensor([[-1e8], [0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0]])
    assert kmeans(x, 4).inertia == kmeans(-x, 4).inertia == 3.0
    values = np.random.default_rng(0).standard_normal(3000)
    values[0] = -1e6
    without = kmeans(values[1:, None], 999).inertia
    assert kmeans(values[:, None], 1000).inertia == pytest.approx(without, rel=1e-12)


def test_weights_sixteen_powers_of_ten_apart_cost_the_optimum_no_digit():
    found = kmeans(torch.tensor([[0.0], [1.0], [2.0]]), 2, sample_weight=[1e8, 1e-9, 1])
    assert found.codes.tolist() in ([0, 0, 1], [0, 1, 1]) and found.inertia == pytest.approx(1e-9, rel=1e-6)


def test_values_forty_powers_of_ten_apart_are_told_apart():
    x = torch.tensor([[1.0], [1e-20], [1.1e-20], [3e-20], [5e-20]], dtype=torch.float64)
    assert kmeans(x, 4).inertia == pytest.approx(5e-43, rel=1e-9)


# --- a row of weight 2 is the row written twice ---------------------------------------------------------------------


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("n, k", [(60, 7), (12_000, 100)])
def test_a_weight_of_2_is_the_row_written_twice(init, n, k):
    rows = normal(n, 3)
    times = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(1))
    written = rows.repeat_interleave(times, 0)[
        torch.randperm(int(times.sum()), generator=torch.Generator().manual_seed(2))
    ]
    for seed in range(20 if n < 100 else 1):
        a = KMeans(k, init=init, seed=seed, max_iter=5).fit(rows, sample_weight=times)
        b = KMeans(k, init=init, seed=seed, max_iter=5).fit(written)
        assert a.inertia_ == pytest.approx(b.inertia_, rel=1e-12) and torch.equal(a.predict(rows), b.predict(rows))


# --- what comes in -------------------------------------------------------------------------------------------------

ARRAY = np.random.default_rng(0).integers(-50, 50, (60, 3)).astype(np.float64)
READ_ONLY = ARRAY.copy()
READ_ONLY.flags.writeable = False
SAME = {
    "reversed": ARRAY[::-1].copy()[::-1],
    "columns reversed": ARRAY[:, ::-1].copy()[:, ::-1],
    "big-endian": ARRAY.astype(">f8"),
    "big-endian integers": ARRAY.astype(">i4"),
    "integers": ARRAY.astype(np.int16),
    "read-only": READ_ONLY,
    "in columns": np.asfortranarray(ARRAY),
    "frame": pd.DataFrame(ARRAY),
    "frame of integers": pd.DataFrame(ARRAY.astype(int)),
    "frame of several types": pd.DataFrame(ARRAY).astype({0: "Int16", 1: "Float64"}),
    "objects": ARRAY.astype(object),
    "list": ARRAY.tolist(),
    "tensor of integers": torch.from_numpy(ARRAY).to(torch.int32),
    "with gaps": np.repeat(ARRAY, 2, 0)[::2],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", SAME)
def test_arrays_of_every_kind_give_what_the_plain_one_gives(kind):
    rows, plain = SAME[kind], kmeans(ARRAY, 6, init=ARRAY[:6], sample_weight=np.arange(1.0, 61))
    first = rows.iloc[:6] if isinstance(rows, pd.DataFrame) else rows[:6]
    found = kmeans(rows, 6, init=first, sample_weight=np.arange(60.0, 0, -1)[::-1].astype(">f4"), seed=np.int64(1))
    assert (
        torch.equal(found.codebook, plain.codebook)
        and torch.equal(found.codes, plain.codes)
        and found.codebook.dtype == torch.float64
    )
    assert torch.equal(encode(rows, first)[0], encode(ARRAY, ARRAY[:6])[0])


def test_numbers_of_numpy_are_numbers():
    plain = kmeans(ARRAY, 6, pinned_zero=0.25, n_init=2, seed=3, max_iter=4)
    found = kmeans(
        ARRAY,
        np.int32(6),
        pinned_zero=np.float32(0.25),
        n_init=np.int8(2),
        seed=np.uint8(3),
        max_iter=np.int64(4),
        tol=np.float32(1e-4),
    )
    assert torch.equal(found.codes, plain.codes) and found.inertia == plain.inertia


# --- scikit-learn's manners ----------------------------------------------------------------------------------------


def test_transform_gives_the_distances_and_score_minus_the_inertia():
    X, reference = ARRAY.astype(np.float32), Reference(5, n_init=1, init=ARRAY[:5], tol=0, max_iter=300).fit(ARRAY)
    fitted = KMeans(5, init=ARRAY[:5], tol=0, max_iter=300).fit(X)
    assert (
        np.allclose(fitted.transform(X), reference.transform(ARRAY), rtol=1e-5)
        and fitted.transform(X).dtype == np.float32
    )
    assert fitted.score(X) == pytest.approx(reference.score(ARRAY)) and fitted.score(
        X, sample_weight=np.arange(60)
    ) == pytest.approx(reference.score(ARRAY, sample_weight=np.arange(60)))
    assert np.array_equal(fitted.fit_transform(X), fitted.transform(X)) and isinstance(
        fitted.transform(torch.from_numpy(X)), torch.Tensor
    )
    assert np.allclose(
        KMeans(2).fit(ARRAY * 1e-200).transform(ARRAY * 1e-200) * 1e200, KMeans(2).fit(ARRAY).transform(ARRAY)
    )


def test_it_is_searched_over_and_stands_in_a_pipeline():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    search = GridSearchCV(KMeans(), {"n_clusters": [1, 2, 8]}).fit(ARRAY)
    assert search.best_params_ == {"n_clusters": 8}
    pipeline = make_pipeline(KMeans(8), LogisticRegression()).fit(ARRAY, ARRAY[:, 0] > 0)
    assert pipeline.score(ARRAY, ARRAY[:, 0] > 0) > 0.8


def test_its_output_is_a_data_frame_where_that_is_asked_for():
    from sklearn import config_context
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frame = pd.DataFrame(ARRAY, columns=list("abc"), index=range(100, 160))
    named = KMeans(4).set_output(transform="pandas").fit(frame)
    assert list(named.transform(frame).columns) == ["kmeans0", "kmeans1", "kmeans2", "kmeans3"] and list(
        named.transform(frame).index
    ) == list(frame.index)
    assert list(clone(named).fit_transform(frame).columns) == list(
        named.get_feature_names_out()
    ) and named.feature_names_in_.tolist() == ["a", "b", "c"]
    assert not hasattr(named.fit(torch.from_numpy(ARRAY[:, :2])), "feature_names_in_")  # those of the frame are gone
    assert isinstance(
        make_pipeline(StandardScaler(), KMeans(4)).set_output(transform="pandas").fit_transform(frame), pd.DataFrame
    )
    with config_context(transform_output="pandas"):
        assert isinstance(KMeans(4).fit_transform(frame), pd.DataFrame)


@pytest.mark.filterwarnings("error")
def test_a_fitted_estimator_may_be_read_only():  # as joblib hands it to other processes
    fitted = KMeans(4).fit(ARRAY)
    before = fitted.predict(ARRAY), fitted.transform(ARRAY)
    fitted.cluster_centers_.flags.writeable = False
    assert np.array_equal(fitted.predict(ARRAY), before[0]) and np.array_equal(fitted.transform(ARRAY), before[1])


@pytest.mark.parametrize("cluster", [kmeans, lambda rows, k, **options: KMeans(k, **options).fit(rows)])
def test_seedings_beside_a_given_codebook_are_warned_of(cluster):
    with pytest.warns(RuntimeWarning, match="performing only one init instead of n_init=3"):
        cluster(ARRAY, 6, init=ARRAY[:6], n_init=3)


def test_fewer_clusters_than_wanted_are_warned_of_and_centres_of_another_shape_refused():
    from sklearn.exceptions import ConvergenceWarning

    with pytest.warns(
        ConvergenceWarning, match=r"Number of distinct clusters \(2\) found smaller than n_clusters \(3\)"
    ):
        assert KMeans(3).fit(ARRAY[[0, 0, 1]]).cluster_centers_.shape == (2, 3)
    for init, what in ((ARRAY[:2], "clusters 6"), (ARRAY[:6, :2], "features of the data 3"), (ARRAY[0], "clusters 6")):
        with pytest.raises(ValueError, match=f"shape of the initial centers .* does not match the number of {what}"):
            KMeans(6, init=init).fit(ARRAY)


# --- the surroundings ----------------------------------------------------------------------------------------------

READ_ONLY_INSTALLATION = """
import warnings
from numba.core import caching
for kind in vars(caching).values():
    if isinstance(kind, type) and "_locator_classes" in vars(kind):
        kind._locator_classes = []  # as where neither the package's folder nor a home can be written to
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import deepkmeans.tree as tree, numpy as np
    order = tree.tree_order(np.array([[1], [0]], np.float32), 1).tolist()
    print(len(seen) > 0, "NUMBA_CACHE_DIR" in str(seen[0].message), order)
"""


def test_a_read_only_installation_compiles_without_a_cache():
    done = subprocess.run([sys.executable, "-c", READ_ONLY_INSTALLATION], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "True True [1, 0]", done.stderr


@pytest.mark.parametrize("planted", ["link", "file", "open to all", "another's"])
def test_what_keops_compiles_goes_into_a_folder_of_this_user_alone(tmp_path, planted, monkeypatch):
    path, target = tmp_path / "cache", tmp_path / "target"
    target.mkdir(mode=0o700)
    if planted == "link":
        path.symlink_to(target)
    elif planted == "file":
        path.write_text("")
    else:
        path.mkdir(mode=0o700)
    if planted == "open to all":
        path.chmod(0o777)
    if planted == "another's":
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="is not a folder that is this user's"):
        keops._own_folder(path)
    monkeypatch.undo()
    fresh = keops._own_folder(tmp_path / "fresh")
    assert keops._own_folder(fresh) == fresh and fresh.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "apart, k, d", [(1e7, 100, 1), (1e7, 100, 3), (1e7, 30, 3), (1e7, 90, 7), (1e3, 90, 7), (1e3, 60, 25)]
)
def test_heaps_far_apart_are_iterated_as_far_by_the_compiled_loop(dtype, apart, k, d):
    """Rows of spread 1 around ±1e7: centres in float32 let it end with up to 9 % more inertia; ±1e3: products do."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1200, d)) + rng.choice([-apart, apart], (1200, 1))
    rows = torch.from_numpy(rows.astype(np.float32)).to(dtype)
    start = rows.unique(dim=0)[:: max(1, len(rows.unique(dim=0)) // k)][:k]
    given = dict(init=start, max_iter=30, tol=0)
    inertia = {name: kmeans(rows, len(start), backend=name, **given).inertia for name in ("tree", "torch")}
    codes, centres = np.full(len(rows), 0), start.double().numpy()  # plain Lloyd in float64
    for _ in range(30):
        codes = np.square(rows.double().numpy()[:, None] - centres).sum(-1).argmin(1)
        if len(set(codes)) < len(centres):
            break
        centres = np.stack([rows.double().numpy()[codes == c].mean(0) for c in range(len(centres))])
    assert inertia["tree"] == pytest.approx(inertia["torch"], rel=1e-9)
    if dtype == torch.float64 and len(set(codes)) == len(centres):
        assert inertia["tree"] == pytest.approx(np.square(rows.numpy() - centres[codes]).sum(), rel=1e-6)


def test_large_rows_are_scaled_alike_where_tiny_numbers_count_as_zero():
    """The largest float32 are scaled by 2**-128, a number that a process may have told its processor to flush."""
    rows = torch.tensor([[3e38, 1e38], [2.9e38, 1e38], [-3e38, 0.0], [-2.9e38, 0.0]])
    expected = kmeans(rows, 2).codes
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        found = kmeans(rows, 2).codes
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected) and found[0] == found[1] != found[2] == found[3]
