"""A second reader of compressed files, written from nbs/file_format.ipynb alone.

It knows neither the package nor its entropy coder.
"""

import json
import struct
import zlib
from bisect import bisect_right
from itertools import accumulate
from math import prod

import numpy as np

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY = {
    "F64": "<f8",
    "I64": "<i8",
    "F32": "<f4",
    "I32": "<i4",
    "F16": "<f2",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_dense(path):  # → {name: array} of the dense network
    data = open(path, "rb").read()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "deepkmeans" and metadata["version"] == "1"
    arrays = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    sums = struct.unpack(f"<{len(arrays)}I", arrays.pop("checksums"))
    assert list(sums) == [zlib.crc32(part) for part in (data[: 8 + length], *arrays.values())]

    at = dict.fromkeys(arrays, 0)

    def take(name, size):
        at[name] += size
        return arrays[name][at[name] - size : at[name]] if size else b""

    dense, (columns, *lines) = {}, json.loads(metadata["layers"])
    for layer in (dict(zip(columns, line)) for line in lines):
        n, k, pinned, d = layer["n"], layer["k"], layer["pinned"], prod(layer["shape"]) // layer["n"]
        book = numbers(
            take(f"codebooks.{layer['stored']}", (k - pinned) * d * SIZES[layer["stored"]]), layer["stored"]
        ).reshape(k - pinned, d)
        book = np.concatenate([np.zeros((pinned, d), book.dtype), book]).astype(NUMPY[layer["dtype"]])
        weights = (
            [(8 + (b - 1) % 8 << (b - 1) // 8) if b else 0 for b in take("histograms", k)]
            if layer["histogram"]
            else [1] * k
        )
        codes = decode(weights, struct.unpack(f"<{layer['words']}I", take("codes", 4 * layer["words"])), n)
        dense[f"{layer['name']}.weight".lstrip(".")] = book[codes].reshape(layer["shape"])
    for dtype, tensors in json.loads(metadata.get("tensors", "{}")).items():
        for name, shape in tensors:
            dense[name] = numbers(take(f"tensors.{dtype}", prod(shape) * SIZES[dtype]), dtype).reshape(shape)
    return dense | {name: dense[owner] for name, owner in json.loads(metadata.get("ties", "{}")).items()}


def numbers(data, dtype):
    if dtype == "BF16":  # the upper half of a single-precision number
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, NUMPY[dtype])


def decode(weights, words, n):  # → (n,) codes
    used = [j for j, w in enumerate(weights) if w]
    f = [1 + weights[j] * (2**24 - len(used)) // sum(weights) for j in used]
    f[f.index(max(f))] += 2**24 - sum(f)
    below, words, state, codes = [0, *accumulate(f)], list(words), 0, []
    while words and state < 2**32:
        state = state << 32 | words.pop()
    for _ in range(n):
        low = state % 2**24
        j = bisect_right(below, low) - 1
        state = (state >> 24) * f[j] + low - below[j]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        codes.append(used[j])
    assert not words and state == 0, "the words hold other codes"
    return np.array(codes)
