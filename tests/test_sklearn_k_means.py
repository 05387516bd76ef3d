"""scikit-learn's own tests of k-means, of the version that is installed, on our estimator.

Their module is run anew with our `KMeans` in the place of theirs; sklearn_k_means_skipped.csv has what does not apply:
patterns of names of cases, and why. `pytest tests/test_sklearn_k_means.py` ends with how often each reason was met.
A case of `global_dtype` runs in float32 and in float64.
"""

import csv
import os
import re
from functools import wraps
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sklearn.cluster

from deepkmeans.clustering import KMeans as Ours

NAME = "sklearn.cluster.tests.test_k_means"
pytest.importorskip(NAME, reason="this installation of scikit-learn has no tests", exc_type=ImportError)
BACKENDS = {"lloyd": "torch", "elkan": "tree"}  # the two that must agree; the second compares with near centres only
SKIPPED = list(csv.DictReader((Path(__file__).parent / "sklearn_k_means_skipped.csv").read_text().splitlines()))


class KMeans(Ours):
    """Our estimator under the names and defaults of scikit-learn's parameters."""

    def __init__(
        self,
        n_clusters=8,
        *,
        init="k-means++",
        n_init=1,
        max_iter=300,
        tol=1e-4,
        random_state=0,
        copy_x=True,
        algorithm="lloyd",
    ):
        self.n_clusters, self.init, self.n_init, self.max_iter, self.tol = n_clusters, init, n_init, max_iter, tol
        self.random_state, self.copy_x, self.algorithm = random_state, copy_x, algorithm

    def fit(self, X, y=None, sample_weight=None):
        same = {name: getattr(self, name) for name in ("n_clusters", "init", "n_init", "max_iter", "tol")}
        fitted = Ours(**same, seed=self.random_state, backend=BACKENDS[self.algorithm]).fit(X, y, sample_weight)
        vars(self).update((name, value) for name, value in vars(fitted).items() if name.endswith("_"))
        return self


def with_ours(name):  # a new copy of their module
    spec = find_spec(name)
    module = module_from_spec(spec)
    with mock.patch.object(sklearn.cluster, "KMeans", KMeans):
        spec.loader.exec_module(module)
    return module


def where_it_applies(test):  # skipped within the test, so that pytest counts the cases of a reason together
    @wraps(test)
    def asked(*args, **kwargs):
        case = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2]
        for line in SKIPPED:
            if re.search(line["cases"], case):
                pytest.skip(line["reason"])
        test(*args, **kwargs)

    return asked


for name, value in vars(with_ours(NAME)).items():
    if name.startswith("test_"):
        globals()[name] = where_it_applies(value)


@pytest.fixture
def global_random_seed():
    return 42


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request):
    return request.param
