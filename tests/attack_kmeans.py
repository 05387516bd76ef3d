"""Problems made to break k-means, each answer compared with long double.

`python tests/attack_kmeans.py 20000 3000` makes so many for the engine and so many for the exact clustering, and counts
the faults. The kinds: offsets, heaps far apart, sizes from 1e-300 to 1e290, equal rows, heavy tails, weights over
sixteen powers of ten, numbers that cancel, stops by max_iter and tol, a pinned zero.
"""

import argparse
import sys

import numpy as np
import torch

from deepkmeans.clustering import encode, kmeans

LONG = np.longdouble
BACKENDS = ("torch", "faiss", "tree", "auto")
ROUNDING = 1e-12  # relative; what float64 may lose in a sum of some hundred terms


def unit_of(values):  # a power of two, so that dividing by it rounds nothing
    return LONG(2) ** int(np.frexp(float(np.abs(values).max()))[1])


def squared_distances(rows, codebook):  # (n, k) long double, in the unit of the largest number
    unit = unit_of(rows)
    gaps = rows.astype(LONG)[:, None] / unit - codebook.astype(LONG) / unit  # (n, k, d)
    return np.square(gaps).sum(-1), unit


def some_rows(rng, n, d):
    rows = [
        lambda: rng.standard_normal((n, d)),
        lambda: rng.standard_t(2, (n, d)),
        lambda: np.round(2 * rng.standard_normal((n, d))),
        lambda: rng.standard_normal((n, d)) + 10.0 ** rng.integers(0, 12),
        lambda: rng.standard_normal((n, d)) + rng.choice([-1, 1], (n, 1)) * 10.0 ** rng.integers(1, 12),
        lambda: rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-20, 0, (n, 1)),
        lambda: rng.standard_normal((n, d))[rng.integers(0, max(1, n // 3), n)],
    ][rng.integers(7)]()
    return rows * 10.0 ** rng.choice([0, 0, 0, -300, -160, -40, 40, 150, 290])


def engine_problem(seed):
    """Rows (n, d), k and the options of `kmeans`."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(1, 120)), int(rng.integers(1, 12))
    rows = some_rows(rng, n, d)
    if rng.random() < 0.4:
        rows = np.clip(rows, -3e38, 3e38).astype(np.float32)
    weight = [None, rng.random(n) + 0.1, 10.0 ** rng.uniform(-8, 8, n)][rng.integers(3)]
    return (
        rows,
        int(rng.integers(1, n + 1)),
        dict(
            sample_weight=weight,
            backend=BACKENDS[rng.integers(4)],
            init=["k-means++", "random"][rng.integers(2)],
            seed=seed,
            max_iter=int(rng.integers(1, 30)),
            tol=[0, 1e-4, 1e-2][rng.integers(3)],
            pinned_zero=[0, 0, 0, 0.3][rng.integers(4)],
        ),
    )


def engine_fault(rows, k, options):
    """What is wrong with the clustering of these rows, or None."""
    if options["pinned_zero"] and k == 1 and 0 < round(options["pinned_zero"] * len(rows)) < len(rows):
        return None
    found = kmeans(torch.from_numpy(rows), k, **options)
    codebook, codes = found.codebook.numpy(), found.codes.numpy()
    weight = np.ones(len(rows)) if options["sample_weight"] is None else options["sample_weight"]
    pinned = round(options["pinned_zero"] * len(rows))
    distances, unit = squared_distances(rows, codebook)
    own = distances[np.arange(len(rows)), codes]
    free = codes > 0 if pinned else np.ones(len(rows), bool)
    least = distances[:, int(pinned > 0) :].min(1) if free.any() else own
    inertia = (own * weight.astype(LONG)).sum() * unit * unit
    distinct = len(np.unique(rows[free], axis=0)) + (pinned > 0)
    if codebook.dtype != rows.dtype or not np.isfinite(codebook).all():
        return f"a codebook of {codebook.dtype} {codebook.min()} … {codebook.max()}"
    if not (own <= least * (1 + ROUNDING))[free].all():
        wrong = (own > least * (1 + ROUNDING))[free].sum()
        farther = float(np.sqrt(np.nanmax((own / least)[free])))
        return f"{wrong} codes are not the nearest, up to {farther:.3g} times as far"
    if len(codebook) != min(k, distinct) or not np.bincount(codes, minlength=len(codebook)).all():
        held = np.bincount(codes).tolist()
        return f"{len(codebook)} centres for k = {k} and {distinct} distinct rows, rows a centre: {held}"
    if np.isfinite(found.inertia) and 1e-290 < inertia < 1e290 and abs(found.inertia / inertia - 1) > 1e-9:
        return f"inertia {found.inertia}, should be {inertia}"
    if codes.size and (encode(rows, codebook, options["backend"])[0].numpy() != codes)[free].any() and not pinned:
        other = encode(rows, codebook, options["backend"])[0].numpy()
        if not (distances[np.arange(len(rows)), other] <= least * (1 + ROUNDING)).all():
            return "encode does not find the nearest"


# (n, n + 1) long double: cost[i, j] of values[i:j] as one cluster, without a subtraction but of values
def costs(values, weight):
    n = len(values)
    cost = np.zeros((n, n + 1), LONG)
    for i in range(n):
        mass, mean, square = LONG(0), LONG(0), LONG(0)
        for j in range(i, n):
            gap, share = (values[j] - values[i]) - mean, weight[j] / (mass + weight[j])
            square, mass, mean = square + gap * gap * (mass * share), mass + weight[j], mean + gap * share
            cost[i, j + 1] = square
    return cost


def exact_problem(seed):
    """Numbers (n,), weights (n,) and k."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 36))
    values = [
        lambda: rng.standard_normal(n),
        lambda: np.append(rng.standard_normal(n - 1), -1e6),
        lambda: np.round(4 * rng.standard_normal(n)),
        lambda: 1e8 + np.arange(n) * rng.random(),
        lambda: rng.standard_normal(n) * 10.0 ** rng.uniform(-30, 0, n),
        lambda: np.append(np.arange(n - 1.0), -1e8),
        lambda: 1e-3 * rng.standard_normal(n) + 1e9 * (np.arange(n) % 2),
        lambda: rng.standard_t(1, n) * 10.0 ** rng.choice([-200, 0, 100]),
    ][rng.integers(8)]()
    return (
        values,
        [np.ones(n), 10.0 ** rng.uniform(-8, 8, n), rng.random(n) + 0.1][rng.integers(3)],
        int(rng.integers(1, n + 1)),
    )


def exact_fault(values, weight, k):
    """By how much the exact clustering of these numbers misses the optimum, or None."""
    codes = kmeans(torch.from_numpy(values)[:, None], k, sample_weight=weight, backend="exact").codes.numpy()
    order = np.argsort(values, kind="stable")
    n, cost = len(values), costs(values[order].astype(LONG) / unit_of(values), weight[order].astype(LONG))
    ends = [0, *(np.flatnonzero(np.diff(codes[order])) + 1), n]
    ours = sum(cost[a, b] for a, b in zip(ends, ends[1:]))
    best = cost[0]
    for _ in range(min(k, len(np.unique(values))) - 1):
        best = np.array([LONG(0), *(min(best[i] + cost[i, j] for i in range(j)) for j in range(1, n + 1))])
    if ours > best[n] * (1 + 1e-9):  # weights sixteen powers of ten apart leave float64 so many digits of a mean
        return f"inertia {float(ours / best[n]) if best[n] else ours} times the optimum"


def attack(problem, fault, seeds):
    """The faults of these problems, as lines."""
    found = ((seed, fault(*problem(seed))) for seed in seeds)
    return [f"{problem.__name__}({seed}): {what}" for seed, what in found if what]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=int)
    parser.add_argument("exact", type=int)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    engine, exact = (range(given.first, given.first + count) for count in (given.engine, given.exact))
    faults = attack(engine_problem, engine_fault, engine) + attack(exact_problem, exact_fault, exact)
    print(
        *faults[:40],
        f"{len(faults)} faults in {given.engine} problems for the engine and {given.exact} exact ones",
        sep="\n",
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
