"""Image sets and loaders: properties over many inputs, hostile files, and the real sets where they are at hand."""

import gzip
import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from deepkmeans import data as data_module
from deepkmeans.data import AUGMENTS, Loader, Split, channel_stats, load, loaders, pixel_stats

REAL = Path(os.environ.get("DEEPKMEANS_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_real = pytest.mark.skipif(
    not (REAL / "mnist").is_dir(), reason="no real data: DEEPKMEANS_DATA is not set and ../shared/data is not there"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DEEPKMEANS_DATA", raising=False)


def split_of(n, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Split(
        torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8), torch.randint(0, 10, (n,), generator=g)
    )


def epoch(loader, e=0):
    loader.set_epoch(e)
    return [torch.cat(part) for part in zip(*loader)]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 50),
    shuffle=st.booleans(),
    augment=st.sampled_from(AUGMENTS),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(-5, 5),
    e=st.integers(0, 3),
)
def test_an_epoch_is_a_function_of_seed_and_epoch(n, batch, shuffle, augment, shape, seed, e):
    split, state = split_of(n, shape), torch.get_rng_state()

    def make():
        return Loader(split, batch, shuffle=shuffle, augment=augment, seed=seed)

    (x, y), (again, labels) = epoch(make(), e), epoch(make(), e)
    assert torch.equal(x, again) and torch.equal(y, labels) and torch.equal(state, torch.get_rng_state())
    assert x.shape == (n, *shape) and torch.equal(y.sort().values, split.labels.sort().values)
    assert len(list(make())) == len(make())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 50))
def test_drop_last_gives_full_batches_only(n, batch):
    loader = Loader(split_of(n, (1, 2, 2)), batch, drop_last=True)
    assert [len(x) for x, _ in loader] == [batch] * (n // batch) and len(loader) == n // batch


def test_the_batch_size_does_not_change_what_happens_to_an_image():
    split = split_of(30, (3, 8, 8))
    whole, parts = (epoch(Loader(split, b, shuffle=True, augment="crop-flip-contrast")) for b in (30, 7))
    torch.testing.assert_close(whole[0], parts[0])


def test_crops_cover_all_shifts_and_both_flips_evenly():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4], image[0, 0, 4, 5] = 255, 100  # a mark with a direction
    split = Split(image.expand(8000, -1, -1, -1), torch.zeros(8000, dtype=torch.int64))
    x = epoch(Loader(split, 4000, augment="crop-flip"))[0]
    where = (x == 1).flatten(1).float().argmax(1)  # (8000,)
    assert len(where.unique()) == 81 and (x == 1).sum() == 8000
    counts = torch.bincount(where, minlength=81)
    assert counts.min() > 50 and counts.max() < 160  # 98.8 expected
    right_of = x.flatten(1).gather(1, (where + 1).clamp_max(80)[:, None])[:, 0]
    inner = where % 9 < 8  # where the neighbour is still in the image
    assert abs((right_of[inner] > 0.3).float().mean() - 0.5) < 0.05


def test_contrast_factors_cover_their_range_and_keep_the_mean():
    split = Split(
        torch.tensor([60, 200], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(2000, 3, 8, 2),
        torch.zeros(2000, dtype=torch.int64),
    )
    x = epoch(Loader(split, 500, augment="crop-flip-contrast"))[0] * 255
    clean = epoch(Loader(split, 500, augment="crop-flip"))[0] * 255  # the same crops and flips
    centre, moved = clean.mean((2, 3), keepdim=True), x - clean.mean((2, 3), keepdim=True)
    torch.testing.assert_close(x.mean((2, 3), keepdim=True), centre, atol=1e-3, rtol=1e-4)
    spread = (clean - centre).flatten(1).norm(dim=1)
    factor = moved.flatten(1).norm(dim=1)[spread > 1] / spread[spread > 1]
    assert 0.749 < factor.min() < 0.76 and 1.24 < factor.max() < 1.251


def test_memory_orders():
    split = split_of(8, (3, 6, 6))
    for augment in AUGMENTS:
        (a, _), (b, _) = (next(iter(Loader(split, 8, augment=augment, channels_last=last))) for last in (True, False))
        assert a.is_contiguous(memory_format=torch.channels_last) and b.is_contiguous() and torch.equal(a, b)


def test_batches_are_plain_pairs_as_from_a_pytorch_loader():
    split = split_of(20, (1, 4, 4))
    other = DataLoader(TensorDataset(split.images / 255, split.labels), batch_size=6)
    for (x, y), (want, labels) in zip(Loader(split, 6), other, strict=True):
        torch.testing.assert_close(x, want)
        assert torch.equal(y, labels)


def test_iterating_leaves_the_images_alone():
    split = split_of(10, (3, 5, 5))
    copy = split.images.clone()
    for augment in AUGMENTS:
        epoch(Loader(split, 3, augment=augment))
    assert torch.equal(split.images, copy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    split = split_of(50, (3, 8, 8))
    for augment in AUGMENTS:
        cpu, gpu = (epoch(Loader(split, 16, shuffle=True, augment=augment, device=d)) for d in ("cpu", "cuda"))
        assert gpu[0].is_cuda and torch.equal(cpu[1], gpu[1].cpu())
        torch.testing.assert_close(gpu[0].cpu(), cpu[0])


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=4, augment="resized-crop-flip"), "none, crop-flip, crop-flip-contrast"),
        (dict(batch_size=4, mean=[0.5]), "mean has shape (1,)"),
        (dict(batch_size=4, std=[1.0, 0.0, 1.0]), "std has the value 0"),
    ],
)
def test_loader_errors(kwargs, words):
    with pytest.raises(ValueError) as e:
        Loader(split_of(8, (3, 4, 4)), **kwargs)
    assert words in str(e.value)


# Files that are not what they should be ---------------------------------------------------------------------------


def png(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def put(root, table):
    (root / "mnist").mkdir(parents=True, exist_ok=True)
    for part in "train", "test":
        pq.write_table(pa.table(table), root / "mnist" / f"{part}.parquet")


@pytest.mark.parametrize(
    "case, words",
    [
        ("no label", "needs the columns"),
        ("image is a string", "needs the columns"),
        ("no rows", "at least one row"),
        ("bytes missing", "row 1 has no image bytes"),
        ("truncated", "row 1 cannot be decoded"),
        ("label 10", "label from 0 to 9"),
        ("two sizes", "row 1 has 5×4 pixels"),
        ("16 bits", "8-bit"),
    ],
)
def test_damaged_parquet(case, words, tmp_path):
    good = png(np.arange(16, dtype=np.uint8).reshape(4, 4), tmp_path)

    def rows(second):
        return [{"bytes": good, "path": "a"}, {"bytes": second, "path": "b"}]

    put(
        tmp_path,
        {
            "no label": {"image": rows(good)},
            "image is a string": {"image": ["a", "b"], "label": [0, 1]},
            "no rows": pa.table({"image": rows(good), "label": [0, 1]}).slice(0, 0),
            "bytes missing": {"image": rows(None), "label": [0, 1]},
            "truncated": {"image": rows(good[:50]), "label": [0, 1]},
            "label 10": {"image": rows(good), "label": [0, 10]},
            "two sizes": {"image": rows(png(np.zeros((5, 4), np.uint8), tmp_path)), "label": [0, 1]},
            "16 bits": {"image": rows(png(np.zeros((4, 4), np.uint16), tmp_path)), "label": [0, 1]},
        }[case],
    )
    with pytest.raises(ValueError) as e:
        load("mnist", tmp_path, progress=False)
    assert words in str(e.value) and "\n" not in str(e.value)


def folder(path, parts=("train", "val"), classes=("cat", "dog"), n=3, mode="RGB", size=(10, 8)):
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            (path / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = np.random.default_rng([p, c, i]).integers(0, 256, (size[1], size[0], 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(path / part / name / f"{i}.JPEG")
    return path


def resized(data, width, height):  # the same PNG, whose head speaks of other numbers of pixels
    head = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def eps():  # what would start Ghostscript
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, "eps")
    return out.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        eps,
        lambda: b"GIF89a\4\0\4\0\0\0\0;",
        lambda: b"BM" + bytes(60),
        lambda: b"%PDF-1.4 image",
        lambda: b"II*\0" + bytes(60),
    ],
)
def test_only_png_and_jpeg_reach_a_decoder_whatever_they_are_called(make, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    good = png(np.zeros((4, 4), np.uint8), tmp_path)
    put(tmp_path, {"image": [{"bytes": good, "path": "a"}, {"bytes": make(), "path": "b.png"}], "label": [0, 1]})
    with pytest.raises(ValueError, match="row 1 cannot be decoded as an image"):
        load("mnist", tmp_path, progress=False)
    (folder(tmp_path / "pets") / "train/cat/0.JPEG").write_bytes(make())
    for options in (dict(size=4), dict(stream=True, size=4)):
        with pytest.raises(ValueError, match="0.JPEG cannot be decoded"):
            epoch(Loader(load(tmp_path / "pets", progress=False, **options).train, 4, workers=0))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_gigabytes_behind_a_small_one_is_refused_by_its_head(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Image.Image, "load", lambda image: original(image) if image.width < 100 else pytest.fail("decoded")
    )
    good = png(np.zeros((28, 28), np.uint8), tmp_path)
    put(
        tmp_path,
        {"image": [{"bytes": good, "path": "a"}, {"bytes": resized(good, 9000, 9000), "path": "b"}], "label": [0, 1]},
    )
    with pytest.raises(ValueError, match="row 1 has 9000×9000 pixels but the first image has 28×28"):
        load("mnist", tmp_path, progress=False)
    put(tmp_path, {"image": [{"bytes": resized(good, 12_000, 12_000), "path": "a"}], "label": [0]})
    with pytest.raises(ValueError, match="row 0 cannot be decoded as an image: 12000×12000 pixels are more than"):
        load("mnist", tmp_path, progress=False)


original = Image.Image.load


def test_parquet_columns_that_are_not_used_are_not_read_and_the_others_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("deepkmeans.data.MAX_BYTES", 10**6)
    good = png(np.zeros((4, 4), np.uint8), tmp_path)

    def images(data, n):
        return {"image": [{"bytes": data, "path": "a"}] * n, "label": [0] * n}

    put(tmp_path, images(good, 3) | {"ballast": [bytes(10**6)] * 3})
    assert len(load("mnist", tmp_path, progress=False).train) == 3
    put(tmp_path, images(good + bytes(10**5), 100))  # ten megabytes which the file names once
    with pytest.raises(ValueError, match="holds more than"):
        load("mnist", tmp_path, progress=False)


@pytest.mark.parametrize(
    "shape, content, words",
    [
        ((2**16, 2**8, 2**8), b"", "length"),
        ((2**32 - 1,) * 9, b"", "length"),
        ((3, 2**10, 2**10), bytes(3 * 2**20), "are more than 1,000,000"),
        ((2, 3, 3), bytes(17), "length"),
        ((2, 3, 3), bytes(19), "length"),
    ],
)
def test_an_idx_file_that_unpacks_to_more_or_less_than_it_says(shape, content, words, tmp_path, monkeypatch):
    monkeypatch.setattr("deepkmeans.data.MAX_BYTES", 10**6)
    monkeypatch.setattr("deepkmeans.data.DEBIAN", tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "fashion-mnist" / f"{name}-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + content)
        )
    with pytest.raises(ValueError, match=f"is not a readable idx file: .*{words}"):
        load("fashion-mnist", download=False)


def test_a_pipe_in_an_image_folder_is_left_out(tmp_path):
    os.mkfifo(folder(tmp_path) / "train/cat/9.png")
    with pytest.warns(UserWarning, match="1 of 7 entries"):
        assert len(load(tmp_path, progress=False).train) == 6


def test_two_threads_that_cache_one_set_do_not_meet(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(
        data_module, "save_file", lambda tensors, path, metadata: names.append(path) or Path(path).touch()
    )
    for _ in range(2):
        data_module._to_cache(tmp_path / "x.safetensors", "stamp", torch.zeros(1), torch.zeros(1), False)
    assert len(set(names)) == 2 and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_image_folder(tmp_path):
    data = load(folder(tmp_path / "pets", ("train", "test")), progress=False)
    assert data.name == "pets" and data.classes == ("cat", "dog") and data.train.shape == (3, 8, 10)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "pets/train/dog/1.JPEG") as image:
        assert np.array_equal(data.train.images[4].permute(1, 2, 0), np.asarray(image))
    assert load(tmp_path / "pets", size=4, progress=False).train.shape == (3, 4, 4)


def test_a_class_that_only_the_test_images_have(tmp_path):
    folder(folder(tmp_path), ("val",), ("cow",))
    with pytest.raises(ValueError, match="cow"):
        load(tmp_path)


def test_labels_when_the_test_images_lack_a_class(tmp_path):
    folder(tmp_path, ("train",), ("ant", "bee", "cat"))
    folder(tmp_path, ("val",), ("bee", "cat"))
    assert load(tmp_path, progress=False).test.labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_what_a_folder_leaves_out_is_said(tmp_path):
    (folder(tmp_path, ("train", "val", "test")) / "train/cat/notes.txt").touch()
    with pytest.warns(UserWarning) as caught:
        load(tmp_path, progress=False)
    assert any("test is left out" in str(w.message) for w in caught) and any(
        "1 of 7 entries" in str(w.message) for w in caught
    )


def test_a_grey_split_joins_a_coloured_one(tmp_path):
    folder(folder(tmp_path, ("train",)), ("val",), mode="L")
    data = load(tmp_path, progress=False)
    assert data.test.shape == data.train.shape == (3, 8, 10) and torch.equal(
        data.test.images[:, 0], data.test.images[:, 2]
    )


def test_a_folder_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("deepkmeans.data.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="stream=True"):
        load(folder(tmp_path), progress=False)


def test_a_changed_folder_is_read_again(tmp_path):
    path = folder(tmp_path / "pets")
    first = load(path, progress=False).fingerprint
    assert load(path, progress=False).fingerprint == first
    (path / "train/cat/0.JPEG").rename(path / "train/dog/9.JPEG")
    assert load(path, progress=False).fingerprint != first


def test_imagenet_layout_streams(tmp_path):
    folder(tmp_path / "imagenet", classes=("n01440764", "n01443537"), size=(40, 30))
    data = load("imagenet", tmp_path, size=16)
    assert (
        data.train.shape == (3, 16, 16)
        and data.classes == ("n01440764", "n01443537")
        and data.augment == "resized-crop-flip"
    )
    assert data.fingerprint == load("imagenet", tmp_path / "imagenet", size=16).fingerprint
    train, test = loaders(data, 4, workers=0)
    x, y = epoch(train)
    assert x.shape == (6, 3, 16, 16) and sorted(y.tolist()) == [0, 0, 0, 1, 1, 1] and x.dtype == torch.float32
    assert not torch.equal(x, epoch(train, 1)[0]) and torch.equal(epoch(test)[0], epoch(test, 1)[0])


def test_a_stream_names_the_file_that_it_cannot_decode(tmp_path):
    (folder(tmp_path) / "train/cat/1.JPEG").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(ValueError, match="1.JPEG cannot be decoded"):
        epoch(Loader(load(tmp_path, stream=True, size=8).train, 4, workers=0))


def test_missing_sets(tmp_path):
    for name in "imagenet", "mnist", "cifar10":
        with pytest.raises(FileNotFoundError, match="DEEPKMEANS_DATA"):
            load(name, download=False)
    with pytest.raises(FileNotFoundError, match="not an image folder"):
        load(tmp_path)
    for kwargs in dict(size=9), dict(stream=True):
        with pytest.raises(ValueError, match="own size"):
            load("digits", **kwargs)


class Downloaded:
    """What torchvision's classes look like once they hold their images."""

    def __init__(self, root, train, download):
        self.source = split_of(12 if train else 5, (3, 4, 4))
        self.data, self.targets = self.source.images.permute(0, 2, 3, 1).numpy(), self.source.labels.tolist()


def test_torchvisions_images_get_our_axes_and_the_download_is_announced(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    with pytest.warns(UserWarning, match="torchvision downloads"):
        data = load("cifar10")
    assert torch.equal(data.train.images, split_of(12, (3, 4, 4)).images) and torch.equal(
        data.test.labels, split_of(5, (3, 4, 4)).labels
    )
    assert data.name == "cifar10"


def test_a_failed_download_says_what_was_looked_for(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error\n no route>")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)
    monkeypatch.setattr("deepkmeans.data.DEBIAN", Path("nowhere"))
    with pytest.raises(FileNotFoundError) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load("fashion-mnist")
    assert all(w in str(e.value) for w in ("not set", "nowhere", "no route", "root=<folder>")) and "\n" not in str(
        e.value
    )


def test_a_cache_that_cannot_be_written_is_announced(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(load(folder(tmp_path / "pets"), progress=False).train) == 6


# The real sets ----------------------------------------------------------------------------------------------------


@needs_real
def test_mnist():
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        data = load("mnist", REAL, progress=False)
        seconds.append(time.perf_counter() - start)
    assert (len(data.train), len(data.test), data.train.shape, data.name) == (60_000, 10_000, (1, 28, 28), "mnist")
    assert round(data.mean[0], 4) == 0.1307 and round(data.std[0], 4) == 0.3081  # the constants that everybody uses
    assert data.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert seconds[1] < seconds[0]


@needs_real
def test_cifar10_knows_whether_it_is_a_jpeg_copy():
    data = load("cifar10", REAL, progress=False)
    assert (len(data.train), len(data.test), data.train.shape) == (50_000, 10_000, (3, 32, 32))
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.002)
    start = pq.read_table(REAL / "cifar10" / "test.parquet").slice(0, 1).to_pylist()[0]["image"]["bytes"][:2]
    assert data.name == ("cifar10-jpeg" if start == b"\xff\xd8" else "cifar10") and data.augment == "crop-flip"
    mean, std = pixel_stats(data.train.images)
    np.testing.assert_allclose(mean.mean((1, 2)), data.mean, rtol=1e-5)
    assert mean.shape == (3, 32, 32) and (std > 0.1).all() and channel_stats(data.train.images)[0] == data.mean


def test_a_class_that_comes_later_gives_the_others_their_new_numbers_from_the_cache_too(tmp_path):
    path = folder(tmp_path / "pets", classes=("b", "c"))
    assert load(path, progress=False).test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    folder(path, ("train",), ("a",))
    data = load(path, progress=False)
    assert data.classes == ("a", "b", "c") and data.test.labels.tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_hidden_folders_and_files_are_no_classes_and_no_images_and_an_empty_class_is_said(stream, tmp_path):
    path = folder(tmp_path / "pets")
    (path / "train/.ipynb_checkpoints").mkdir()
    (path / "train/cat/._0.JPEG").write_bytes(b"Mac")
    (path / "train/eel").mkdir()
    with pytest.warns(UserWarning, match="has no images of the class eel"):
        data = load(path, size=8, stream=stream, progress=False)
    assert data.classes == ("cat", "dog", "eel") and len(data.train) == 6


def test_images_of_one_colour_are_standardised(tmp_path):
    images = torch.full((4, 3, 2, 2), 7, dtype=torch.uint8)
    assert channel_stats(images)[1] == (1 / 255,) * 3
    split = Split(images, torch.zeros(4, dtype=torch.int64))
    mean, std = channel_stats(images)
    assert next(iter(Loader(split, 4, mean=mean, std=std)))[0].abs().max() < 1e-4


@pytest.mark.parametrize("labels", [[0.5, 1.0], [True, False], ["a", "b"], [[1], [2]]])
def test_labels_of_a_parquet_file_are_whole_numbers(labels, tmp_path):
    image = {"bytes": png(np.zeros((4, 4), np.uint8), tmp_path), "path": "a"}
    put(tmp_path, {"image": [image, image], "label": labels})
    with pytest.raises(ValueError, match="train.parquet has 2 rows.*label, whole numbers"):
        load("mnist", tmp_path, progress=False)


def test_a_cache_of_another_form_is_not_taken(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = folder(tmp_path / "pets")
    first = load(path, progress=False)
    for file in (tmp_path / "cache" / "deepkmeans").iterdir():
        with data_module.safe_open(file, "pt") as opened:
            head = opened.metadata()
        save_file({name: value.float() for name, value in load_file(file).items()}, file, metadata=head)
    with pytest.warns(UserWarning, match="cannot be read and are decoded again"):
        again = load(path, progress=False)
    assert torch.equal(again.train.images, first.train.images) and again.fingerprint == first.fingerprint
