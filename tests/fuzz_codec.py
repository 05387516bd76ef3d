"""Attacks on the reader of compressed files.

`python tests/fuzz_codec.py 1000000 figures/codec_fuzz.json` makes so many, some of them twice, and writes what became
of them, with `--jobs` processes side by side. Each attack is a function of its number.
"""

import argparse
import json
import random
import resource
import sys
import zlib
from collections import Counter
from copy import deepcopy
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch
import torch.nn as nn

from deepkmeans import build, make_plan, share
from deepkmeans.codec import CompressedFileError, decompress, file_bytes, inspect, load_compressed
from deepkmeans.sharing import shared_layers

MIB, SECONDS = 64, 1.0
BLOCK = 1000  # attacks at a time
NASTY = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "F64",
    "F16",
    "U8",
    "BOOL",
    "row",
    "kernel",
    "conv1",
    "alexnet",
    "googlenet",
    "wide_resnet",
    "torchvision:vit_h_14",
    "torchvision:regnet_y_128gf",
    "__metadata__",
    "checksums",
    "tensors.F32",
    10**4299,
    -(10**4299),
    float("inf"),
    "\ud800",
    "\x1b[2J\x1b[31mred",
    "a\nb\r\0",
    "\u202etxt",
    "x" * 70_000,
    {"name": []},
    [],
    [[]],
    {},
    [0],
    [2**40, 2**40],
    [1] * 9,
]


def tied():  # a network with two names for one layer, a pinned and a float16 codebook and an integer buffer
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2)
    )
    net.append(net[2])
    return net


def targets():  # [(bytes of a good file, network to read it into or None)]
    small = build("wide_resnet", 2, in_channels=1, depth=10, widen=1)
    share(small, make_plan(small, k=6, sparsity=0.3))
    lone = tied()
    share(lone, make_plan(lone, k=5, sparsity=0.4))
    return [(file_bytes(lone, codebook_dtype="float16"), tied()), (file_bytes(small), None)]


def split(data):  # → header as a dict with its tables decoded, body
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {k: json.loads(v) if v[:1] in "[{" else v for k, v in header["__metadata__"].items()}
    return header, data[8 + length :]


def joined(header, body):  # the file again, its checksums made right where they can be found
    header = dict(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = {
            k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in header["__metadata__"].items()
        }
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    try:
        spans = {name: slice(*entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
        place = spans.pop("checksums")
        sums = b"".join(
            zlib.crc32(part).to_bytes(4, "little") for part in (head, *(body[span] for span in spans.values()))
        )
        body = body[: place.start] + sums + body[place.start + len(sums) :]
    except (KeyError, TypeError, AttributeError):
        pass
    return head + body


def places(node):  # all (container, key) of a JSON tree
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data))] if rng.random() < 0.8 else data + rng.randbytes(rng.randint(1, 99))


def splice(data, rng):
    (a, b), (c, d) = (sorted(rng.sample(range(len(data)), 2)) for _ in range(2))
    return data[:a] + data[c:d] + data[b:]


def length(data, rng):
    return (
        rng.choice(
            [
                rng.randbytes(8),
                (int.from_bytes(data[:8], "little") + rng.randint(-99, 99)).to_bytes(8, "little", signed=True),
            ]
        )
        + data[8:]
    )


def field(data, rng):  # another value in the header or its tables, sealed
    header, body = split(data)
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(list(places(header)))
        if rng.random() < 0.1:
            del container[key]
        else:
            container[key] = (
                deepcopy(rng.choice(NASTY))
                if rng.random() < 0.6 or not isinstance(container[key], int)
                else container[key] + rng.choice([-1, 1, 8, 4096])
            )
    return joined(header, body)


def swap(data, rng):  # two fields of the header exchanged, sealed
    header, body = split(data)
    (a, i), (b, j) = (rng.choice(list(places(header))) for _ in range(2))
    a[i], b[j] = b[j], a[i]
    try:
        return joined(header, body)
    except (ValueError, RecursionError):  # one holds the other: a cycle has no JSON
        return flip(data, rng)


def offsets(data, rng):  # arrays that overlap, run in circles or reach beyond the file, sealed
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    ends = [offset for name in names for offset in header[name]["data_offsets"]] + [len(body), len(body) + 1, 2**40, -1]
    for name in rng.sample(names, rng.randint(1, len(names))):
        header[name]["data_offsets"] = [rng.choice(ends), rng.choice(ends)]
    if rng.random() < 0.5:
        header = dict(rng.sample(list(header.items()), len(header)))
    return joined(header, body)


def content(data, rng):  # other bytes in the arrays, sealed
    header, body = split(data)
    return joined(header, flip(body, rng))


def fill(data, rng):  # an array of zeros, of NaN, of the largest histograms, sealed
    header, body = split(data)
    a, b = header[rng.choice([name for name in header if name != "__metadata__"])]["data_offsets"]
    return joined(header, body[:a] + bytes([rng.choice([0, 1, 127, 128, 254, 255])]) * (b - a) + body[b:])


def retype(data, rng):  # tensors or centres of another type: as many bytes, so that only who knows the network can tell
    header, body = split(data)
    tables, size = (
        header["__metadata__"],
        dict(F64=8, I64=8, F32=4, I32=4, U32=4, F16=2, BF16=2, I16=2, I8=1, U8=1, BOOL=1),
    )
    old = rng.choice([name for name in header if "." in name])
    kind, _, was = old.partition(".")
    now = rng.choice(list(size))
    entry = header[old] | {"dtype": now}
    entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size[now]]
    header = dict((f"{kind}.{now}", entry) if name == old else (name, value) for name, value in header.items())
    if kind == "tensors":
        tables["tensors"] = {now if name == was else name: value for name, value in tables["tensors"].items()}
    else:
        tables["layers"][1:] = [
            [*line[:6], rng.choice([now, line[6]]), now if line[7] == was else line[7], *line[8:]]
            for line in tables["layers"][1:]
        ]
    return joined(header, body)


def crowd(data, rng):  # thousands of layers without bytes, of empty tensors, of ties, sealed
    header, body = split(data)
    tables, n = header["__metadata__"], round(2 ** rng.uniform(0, 10))
    if rng.random() < 0.02:  # nearly or more than is allowed, and slow to make
        n = rng.choice([4080, 8000, 17_000, 100_000])
    what = rng.choice(["layers", "tensors", "ties", "options"])
    if what == "layers":
        tables["layers"] += [[f"l{i}", [1, 1], "scalar", 1, 1, 1, "F32", "F32", 0, 0] for i in range(n)]
    elif what == "tensors":
        tables["tensors"].setdefault("F32", []).extend([f"t{i}", [0]] for i in range(n))
    elif what == "ties":
        tables["ties"] = {f"u{i}": rng.choice(["4.weight", "bn.weight"]) for i in range(n)}
    else:
        tables["architecture"] = {"name": "lenet5"} | {f"o{i}": i for i in range(n)}
    return joined(header, body)


def blow(data, rng):  # a layer of few clusters that is far larger than its file, sealed
    header, body = split(data)
    line = rng.choice(header["__metadata__"]["layers"][1:])
    times = rng.choice([2, 100, 10**4, 10**6, 10**9, 2**38])
    line[1], line[3] = [line[1][0] * times, *line[1][1:]], line[3] * times
    if rng.random() < 0.5:
        line[8:] = 0, 0
    return joined(header, body)


DAMAGE, FORGERY = (flip, cut, splice, length), (field, swap, offsets, content, fill, retype, crowd, blow)


# Everything that a reader can do; each is tried, for one may take what another refuses → seconds of the slowest.
def read(path, model):
    refused, seconds = [], 0.0
    for reader in (
        lambda: load_compressed(path, model),
        lambda: str(inspect(path)),
        lambda: decompress(path),
    ):
        start = process_time()
        try:
            reader()
        except CompressedFileError as error:
            assert str(error).isprintable() and len(str(error)) < 1000, "a message that is no line"
            refused.append(error)
        seconds = max(seconds, process_time() - start)
    if refused:
        refused[0].seconds = seconds
        raise refused[0]
    return seconds


def attack(kind, data, model, rng, path, made):  # → "refused" or "read", seconds
    bad = kind(data, rng)
    made.add(zlib.crc32(bad) << 32 | zlib.adler32(bad))
    path.write_bytes(bad)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MIB * 2**20, resource.RLIM_INFINITY))
    try:
        outcome, seconds = "read", read(path, model)
    except CompressedFileError as error:
        outcome, seconds = "refused", error.seconds
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert outcome == "refused" or kind in FORGERY or bad == data, f"{kind.__name__}: damage was not noticed"
    assert seconds < SECONDS, f"{kind.__name__}: {seconds:.2f} s"
    return outcome, seconds


@lru_cache(1)
def prepared():  # the good files, read once, for what is imported at first use takes its time once
    torch.set_num_threads(1)
    for name in ("googlenet", "torchvision:vit_h_14"):
        build(name, seed=None)
    files = targets()
    with TemporaryDirectory() as folder:
        for data, model in files:
            path = Path(folder) / "good.dkm"
            path.write_bytes(data)
            read(path, None if model is None else tied())
    return files


def block(first):  # BLOCK attacks → {(kind, outcome): number}, seconds of the slowest, what tells the files apart
    found, slowest, made, files = Counter(), 0.0, set(), prepared()
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "bad.dkm"
        for number in range(first, first + BLOCK):
            rng = random.Random(number)
            kind, which = rng.choice(DAMAGE + FORGERY), rng.choice([0, 0, 0, 1])
            data, model = files[which]
            try:
                outcome, seconds = attack(kind, data, model, rng, path, made)
            except BaseException:
                print(f"attack {number}, {kind.__name__} on file {which}", file=sys.stderr)
                raise
            if model is not None and shared_layers(model):  # only a file that was read may have touched it
                assert outcome == "read"
                files[which] = data, tied()
            found[kind.__name__, outcome] += 1
            slowest = max(slowest, seconds)
    return found, slowest, made


def fuzz(count, jobs=1):  # yields a record after each block
    found, slowest, made = Counter(), 0.0, set()
    with get_context("spawn").Pool(jobs) as pool:
        for done, (kinds, seconds, files) in enumerate(pool.imap(block, range(0, count, BLOCK)), 1):
            found, slowest, made = found + kinds, max(slowest, seconds), made | files
            yield summary(len(made), done * BLOCK, found, slowest)
        pool.close()
        pool.join()


def summary(files, attacks, found, slowest):
    kinds = {
        kind.__name__: {outcome: found[kind.__name__, outcome] for outcome in ("refused", "read")}
        for kind in DAMAGE + FORGERY
    }
    return {
        "files": files,
        "attacks": attacks,
        "kinds": kinds,
        "slowest_seconds": round(slowest, 3),
        "memory_mib": MIB,
        "bytes_of_the_good_files": [len(data) for data, _ in prepared()],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attacks", type=int, help=f"rounded up to a multiple of {BLOCK}")
    parser.add_argument("record", type=Path, help="the file for what became of them, written again and again")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    given = parser.parse_args()
    for record in fuzz(given.attacks, given.jobs):
        given.record.write_text(json.dumps(record, indent=1) + "\n")
        told = f"{record['attacks']:,} attacks, {record['files']:,} different files"
        print(f"{told}, slowest {record['slowest_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
