"""Files that cannot be loaded or written: refused, and an existing file stays as it was."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import captum_mipin
from captum_mipin import (
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINError,
)
from captum_mipin.errors import (
    InverseFileError,
    ModelChangedError,
    NotFittedError,
)
from captum_mipin.storage import files


@pytest.fixture
def saved(mlp: Any, tmp_path: Path) -> Path:
    mlp.inverse.save(tmp_path / "file")
    return tmp_path / "file"


def test_a_saved_inverse_gives_the_same_bits(mlp: Any, cnn: Any, tmp_path: Path) -> None:
    for fitted in (mlp, cnn):
        fitted.inverse.save(tmp_path / "file")
        loaded = InverseNetwork.load(tmp_path / "file", fitted.model)
        assert loaded.targets == fitted.inverse.targets
        assert loaded.report == fitted.inverse.report
        assert loaded.settings == fitted.inverse.settings
        x = fitted.x[:4]
        assert torch.equal(
            loaded.source_signal(x, [0, 1, 2, 0]), fitted.inverse.source_signal(x, [0, 1, 2, 0])
        )
        assert torch.equal(loaded.class_attribution(1), fitted.inverse.class_attribution(1))
        loaded.fit(fitted.x, targets=1, progress=False)


def test_a_saved_inverse_keeps_its_layer_and_settings(mlp: Any, tmp_path: Path) -> None:
    inverse = InverseNetwork(
        mlp.model, layer=mlp.model[1], ridge=0.5, ridge_scale="mean", pooling="even"
    )
    inverse.fit(mlp.x, targets=2, progress=False).save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", mlp.model)
    assert loaded.layer is mlp.model[1]
    assert loaded.settings == inverse.settings
    found, expected = (
        LayerMIPINAttribution(mlp.model, i).attribute(mlp.x[:3], 2) for i in (loaded, inverse)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file(mlp: Any, saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InverseFileError, match=r"file' is not a complete safetensors file"):
        InverseNetwork.load(saved, mlp.model)


def test_a_bit_flipped_file(mlp: Any, saved: Path) -> None:
    whole = saved.read_bytes()
    for position in range(0, len(whole), 23):
        saved.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ (1 << position % 8)])
            + whole[position + 1 :]
        )
        with pytest.raises(
            InverseFileError, match=r"complete safetensors file|has format|damaged or was changed"
        ):
            InverseNetwork.load(saved, mlp.model)


def test_a_foreign_file(mlp: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign")
    torch.save(mlp.model.state_dict(), tmp_path / "pickle")
    (tmp_path / "text").write_text("hello")
    for name, message in (
        ("foreign", "has format None, expected"),
        ("pickle", "not a complete"),
        ("text", "not a complete"),
    ):
        with pytest.raises(InverseFileError, match=message):
            InverseNetwork.load(tmp_path / name, mlp.model)
    with pytest.raises(FileNotFoundError, match="nothing"):
        InverseNetwork.load(tmp_path / "nothing", mlp.model)


@pytest.mark.parametrize("keep_digest", [True, False])
def test_tampered_metadata(mlp: Any, saved: Path, keep_digest: bool) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = dict(file.metadata())
    # copies: safetensors 0.5 maps the file, which is written again below
    tensors = {name: tensor.clone() for name, tensor in load_file(saved).items()}
    for content in (
        metadata["content"].replace('"ridge": 0.001', '"ridge": 0.01'),
        "{}",
        "[]",
        '{"targets": 5}',
        "not JSON",
    ):
        digest = metadata["digest"] if keep_digest else files._digest(tensors, content)
        save_file(tensors, saved, {**metadata, "content": content, "digest": digest})
        if not keep_digest and content.startswith('{"dims'):
            continue  # a consistent file
        with pytest.raises(InverseFileError):
            InverseNetwork.load(saved, mlp.model)


def test_the_file_of_another_model(mlp: Any, cnn: Any, make_mlp: Any, saved: Path) -> None:
    other = make_mlp()
    with torch.no_grad():
        other[2].bias[0] += 1e-3
    for model in (cnn.model, other, nn.ReLU().eval(), nn.Sequential(mlp.model[0]).eval()):
        with pytest.raises(
            ModelChangedError,
            match="fitted to another model or to other weights than this " + type(model).__name__,
        ):
            InverseNetwork.load(saved, model)
    InverseNetwork.load(saved, make_mlp())


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.Sigmoid(), nn.Sequential(nn.ReLU(), nn.Threshold(1.0, 0.0))]
)
def test_the_file_of_another_model_with_the_same_weights(
    mlp: Any, saved: Path, between: nn.Module
) -> None:
    other = nn.Sequential(mlp.model[0], between.eval(), mlp.model[2]).eval()
    with pytest.raises(MIPINError):
        InverseNetwork.load(saved, other).source_signal(mlp.x[:2], 0)


def test_saving_what_is_not_fitted(mlp: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match=r"not fitted yet: call fit"):
        InverseNetwork(mlp.model).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_saving_into_a_missing_directory(mlp: Any, survives: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), survives(mlp):
        mlp.inverse.save(tmp_path / "nowhere" / "file")
    assert not list(tmp_path.iterdir())


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _half(tensors: Any, path: Any, metadata: Any) -> None:
    Path(path).write_bytes(b"half of it")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("storage.files.save_file", _full),
        ("storage.files.save_file", _half),
        ("storage.files.os.fsync", _full),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk(
    mlp: Any,
    survives: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    what: Any,
    old: bool,
) -> None:
    path = tmp_path / "file"
    if old:
        mlp.inverse.save(path)
    before = path.read_bytes() if old else None
    monkeypatch.setattr(f"captum_mipin.{where}", what)
    with pytest.raises(OSError, match="No space left on device"), survives(mlp):
        mlp.inverse.save(path)
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if old else []), (
        "no temporary file is left"
    )
    if old:
        assert path.read_bytes() == before
        InverseNetwork.load(path, mlp.model)


KILLED = """
import os, random, resource, signal, sys, time
import torch
from captum_mipin.storage import files

path, random_ = sys.argv[1], random.Random(0)
sizes = {"a": 200_000, "b": 100_000}
kinds = [{name: torch.full((size,), float(n)) for name, size in sizes.items()} for n in range(2)]
files.save(path, kinds[0], {"kind": 0})

def whole():
    tensors, content = files.load(path)
    assert all(bool((t == content["kind"]).all()) for t in tensors.values())
    assert tensors["a"].numel() == 200_000

def forever():
    number = 0
    while True:
        number = 1 - number
        files.save(path, kinds[number], {"kind": number})

seen = set()
for _ in range(12):
    child = os.fork()
    if child == 0:
        forever()
    time.sleep(0.01 + 0.05 * random_.random())
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    whole()
    seen.add(files.load(path)[1]["kind"])
assert seen == {0, 1}, "the children did save"

child = os.fork()
if child == 0:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    before = len(os.listdir(os.path.dirname(path)))
    try:
        files.save(path, kinds[1], {"kind": 1})
    except OSError:
        os._exit(0 if len(os.listdir(os.path.dirname(path))) == before else 4)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a full file is an OSError"
whole()
files.save(path, kinds[1], {"kind": 1})
assert files.load(path)[1] == {"kind": 1}
"""


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs fork, to kill a process in the middle of saving"
)
def test_a_process_killed_while_saving_leaves_the_old_file_whole(tmp_path: Path) -> None:
    root = str(Path(captum_mipin.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
