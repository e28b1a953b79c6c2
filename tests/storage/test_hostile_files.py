"""Well-formed files with the content of no inverse: a clear error or an explanation."""

import copy
import json
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import normal
from torch import nn

from captum_mipin import InverseNetwork
from captum_mipin.errors import InverseFileError, MIPINError
from captum_mipin.storage import files as stored

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
X = normal(20, 6)
INVERSE = InverseNetwork(MODEL).fit(X, progress=False)
FACTORS = InverseNetwork(MODEL, layer=MODEL[1]).fit(
    X[:4], [0, 2], progress=False
)  # in factors, and at a layer


@pytest.fixture(scope="module")
def files():
    with tempfile.TemporaryDirectory() as folder:
        for name, inverse in (("whole", INVERSE), ("layer", FACTORS)):
            inverse.save(Path(folder) / name)
        yield Path(folder)


def parts(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["content"])


def explained(path):
    """Return the signal of a file, or the error that says why there is none."""
    try:
        inverse = InverseNetwork.load(path, MODEL)
        inverse.report, inverse.targets  # noqa: B018  # they are computed
        bits = inverse.information(0)
        assert bits.shape == inverse.class_attribution(0).shape
        if inverse.layer is not None:
            return inverse.explain((X[:3],), 0, biases=(True,), layer=inverse.layer).signals[0][0]
        return inverse.source_signal(X[:3], 0)
    except MIPINError as error:
        return error


VALUES = st.sampled_from(
    [None, True, -1, 0, 2**40, 1e300, "", "0/linear", "..", [], [0], [[0, 1]], [None], {}, {"a": 1}]
)


def places(value, path=()):
    """Yield the path of each entry of nested dictionaries and lists."""
    yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.DataWarning")  # of another scale
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_other_content_is_refused_or_explains(files, data):
    tensors, content = parts(files / data.draw(st.sampled_from(["whole", "layer"])))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from([path for path in places(content) if path]))
        holder = content
        for key in way:
            holder = holder[key]
        if data.draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = copy.deepcopy(data.draw(VALUES))
    stored.save(files / "changed", tensors, content)
    found = explained(files / "changed")
    assert isinstance(found, MIPINError) or bool(torch.isfinite(found).all())


OTHERS = st.sampled_from(
    [
        lambda t: t.double(), lambda t: t.to(torch.int64), lambda t: t > 0, lambda t: t.flatten(),
        lambda t: t[:0],
        lambda t: t[:1], lambda t: t * float("nan"), lambda t: t * float("inf"), lambda t: t.sum(),
        lambda t: t.to(torch.complex64), lambda t: torch.full_like(t, 99),
        lambda t: torch.full_like(t, -1),
        lambda t: torch.cat([t, t]), lambda t: t.unsqueeze(0), lambda t: t.transpose(0,
        -1).contiguous(),
    ]
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_other_tensors_are_refused_or_explain(files, data):
    tensors, content = parts(files / data.draw(st.sampled_from(["whole", "layer"])))
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.integers(0, 2))
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = data.draw(OTHERS)(tensors[name])
    else:
        other = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    complex_numbers = any(tensor.is_complex() for tensor in tensors.values())
    assume(not complex_numbers or torch.complex64 in safetensors.torch._SIZE)  # not in 0.5
    stored.save(files / "changed", tensors, content)
    found = explained(files / "changed")
    assert isinstance(found, MIPINError) or (
        found.dtype == X.dtype and bool(torch.isfinite(found).all())
    )


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"null", b'{"a":1}', b"\xff\xfe", b"{" * 100000,
        b'{"__metadata__":{"format":5}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"OBJECT","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [None, 2**63, 2**64 - 1])
def test_hostile_headers(tmp_path, header, length):
    (tmp_path / "file").write_bytes(
        struct.pack("<Q", len(header) if length is None else length) + header + bytes(8)
    )
    with pytest.raises(InverseFileError):
        InverseNetwork.load(tmp_path / "file", MODEL)


@pytest.mark.parametrize(
    "text", ["[" * 100000, '{"a":' * 100000, "1" * 10000, "NaN", '"\\ud800"', "{} {}"]
)
def test_hostile_content(tmp_path, text):
    digest = stored._digest({}, text)
    save_file({}, tmp_path / "file", {"format": stored.FORMAT, "content": text, "digest": digest})
    with pytest.raises(InverseFileError):
        InverseNetwork.load(tmp_path / "file", MODEL)
