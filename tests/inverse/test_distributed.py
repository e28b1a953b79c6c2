"""Several processes that fit together end with the inverse of one alone, or all with an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from captum_mipin import InverseNetwork
from captum_mipin.errors import FitError, InputError
from captum_mipin.inverse.distributed import Processes
from captum_mipin.methods import Patterns

FAILED = "FitError: the fit failed in process 1 of 2: "
APART = "FitError: the processes cannot fit together: "
#: What each of two processes does, one scenario after the other.
SCRIPT = """
import json, os, signal, sys
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from captum_mipin import InverseNetwork
from captum_mipin.methods import Patterns
from captum_mipin.graph import capture
from captum_mipin.inverse import fit as fitting
from captum_mipin.inverse import memory
from shared_graphs import SharedGraphs

distributed.init_process_group("gloo")
rank, folder = distributed.get_rank(), sys.argv[1]

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 4, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(),
        nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 3)
    ).double().eval()

def data(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=generator)

class Fails:
    def __init__(self, x, at):
        self.x, self.at, self.seen = x, at, 0
    def __iter__(self):
        for batch in self.x.split(5):
            self.seen += 1
            if rank == 1 and self.seen == self.at:
                raise OSError("no such image")
            yield batch

def only_in_the_second(name, instead, module=fitting):  # in the place of a function of the fit
    original = getattr(module, name)
    if rank == 1:
        setattr(module, name, instead)
    return lambda: setattr(module, name, original)

def broken(*arguments):
    raise MemoryError("too large for this machine")

capture.trace = SharedGraphs(capture.trace)  # one capture for all scenarios
found = {}

def scenario(name, data, count=40, change=lambda model: None, **options):
    model = network()
    change(model)
    inverse = InverseNetwork(model)
    try:
        inverse.fit(data, [0, 2], progress=False, distributed=True, **options)
        x = globals()["data"](count)
        found[name] = [inverse.source_signal(x, target).flatten().tolist() for target in (0, 2)]
        found[name].append(inverse.information(2).flatten().tolist())
        layers = inverse.report.layers
        found[name].append([[layer.rows, layer.explained_variance] for layer in layers])
    except Exception as error:
        assert inverse.targets == []
        found[name] = f"{type(error).__name__}: {error}"

x = data(40)
scenario("a tensor", x, batch_size=5)
scenario("little memory", x, batch_size=5, memory=x.nbytes // 8)
scenario("a dataset", TensorDataset(x), batch_size=7)
scenario("a loader that shuffles", DataLoader(TensorDataset(x), batch_size=5, shuffle=True))
shared_out = DataLoader(TensorDataset(x), batch_size=5, sampler=DistributedSampler(x))
scenario("a distributed sampler", shared_out)
scenario("batches", list(x.split(5)))
scenario("unequal", list(x.split(16)))
scenario("an empty shard", [x])
kept = {"checkpoint": f"{folder}/checkpoint", "memory": x.nbytes // 8}
scenario("stopped", Fails(x, 22), **kept)
assert rank or os.path.exists(kept["checkpoint"])
scenario("resumed", list(x.split(5)), **kept)
assert rank or not os.path.exists(kept["checkpoint"])
scenario("raises in the first batch", Fails(x, 1))
scenario("raises later", Fails(x, 10))
scenario("raises in a later pass", Fails(x, 20), memory=x.nbytes // 8)
scenario("other weights", x, change=lambda model: nn.init.constant_(model[0].bias, rank))
nan = torch.full_like(x[:4], float("nan"))
scenario("not finite", [nan if rank == k % 2 == 1 else x[:4] for k in range(4)])
scenario("nothing", [])
scenario("one example", [x[:1]])
restore = only_in_the_second("solve", broken)
scenario("cannot solve", x)
restore()
restore = only_in_the_second("free_memory", lambda device: 1, memory)
scenario("a smaller machine", x)
restore()
early = InverseNetwork(network())
if rank == 1:
    early.fit(x, 1, progress=False)
try:
    early.fit(x, 0, progress=False, distributed=True)
except Exception as error:
    found["earlier classes"] = f"{type(error).__name__}: {error}"
sampler = torch.utils.data.WeightedRandomSampler(torch.ones(40), 40)
scenario("a sampler of its own", DataLoader(TensorDataset(x), sampler=sampler))
try:
    InverseNetwork(network(), solver="sgd").fit(x, 0, progress=False, distributed=True)
except Exception as error:
    found["sgd"] = f"{type(error).__name__}: {error}"

def patterns(name, data, change=lambda model: None, **options):
    model = network()
    change(model)
    fitted = Patterns(model)
    try:
        fitted.fit(data, progress=False, distributed=True, **options)
        layers = [fit.layer for fit in fitted.report.layers]
        by_layer = {layer: fitted[layer].flatten().tolist() for layer in layers}
        found[name] = [by_layer, str(fitted.report)]
    except Exception as error:
        assert fitted.state is None
        found[name] = f"{type(error).__name__}: {error}"

patterns("patterns of a tensor", x, batch_size=5)
patterns("patterns of batches", list(x.split(16)))
patterns("patterns of an empty shard", [x])
shuffled = DataLoader(TensorDataset(x), batch_size=5, shuffle=True)
patterns("patterns of a loader that shuffles", shuffled)
patterns("patterns where one raises", Fails(x, 3))
patterns("patterns of nothing", [])
patterns("patterns of one example", [x[:1]])
biased = lambda model: nn.init.constant_(model[0].bias, rank)
patterns("patterns of other weights", x, change=biased)
huge = [torch.full_like(x[:4], 1e200 if rank == k % 2 == 1 else 1) for k in range(4)]
patterns("patterns that are not finite", huge)
patterns("patterns of other inputs", [x, torch.zeros(4, 2, 7, 7).double()])
patterns("patterns in batches of none", x, batch_size=rank)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)

class Gone:
    def __iter__(self):
        if rank == 1:
            os._exit(3)
        return iter([x])

# torchrun ends the process that is left, which may be before it has noticed
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    InverseNetwork(network()).fit(Gone(), 0, progress=False, distributed=True)
except Exception as error:
    with open(f"{folder}/gone", "w") as file:
        file.write(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    subprocess.run(
        [*torchrun, str(folder / "script.py"), str(folder)],
        env=env,
        capture_output=True,
        timeout=300,
        check=False,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    names: dict[str, object] = {}
    code = (
        SCRIPT.split("class Fails")[0]
        .replace('distributed.init_process_group("gloo")', "")
        .split("rank, folder")
    )
    exec(code[0] + code[1].split("\n", 1)[1], names)
    model, x = names["network"](), names["data"](40)
    inverse = InverseNetwork(model).fit(x, [0, 2], progress=False)
    return inverse, x


@pytest.mark.parametrize(
    "name",
    [
        "a tensor",
        "little memory",
        "a dataset",
        "a loader that shuffles",
        "a distributed sampler",
        "batches",
        "unequal",
        "an empty shard",
        "resumed",
    ],
)
def test_all_end_with_the_inverse_of_one_process(run, alone, name):
    (first, second), _ = run
    assert not isinstance(first[name], str), first[name]
    assert first[name] == second[name]
    inverse, x = alone
    for target, found in zip((0, 2), first[name], strict=False):
        expected = inverse.source_signal(x, target).flatten()
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), expected, rtol=1e-8, atol=1e-8
        )
    torch.testing.assert_close(
        torch.tensor(first[name][2]), inverse.information(2).flatten(), rtol=1e-5, atol=1e-6
    )
    assert [rows for rows, _ in first[name][3]] == [layer.rows for layer in inverse.report.layers]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("raises in the first batch", FAILED + "OSError: no such image", "OSError"),
        ("raises later", FAILED + "OSError: no such image", "OSError: no such image"),
        ("raises in a later pass", FAILED + "OSError: no such image", "OSError"),
        ("other weights", APART + "their weights differ", "FitError"),
        ("not finite", FAILED + "FitError: batch 0: input", "FitError: batch 0"),
        ("nothing", "FitError: the data yields no batch", "FitError: the data yields no batch"),
        ("one example", "FitError: the data has 1 example", "FitError: the data has 1 example"),
        ("cannot solve", FAILED + "MemoryError: too large", "MemoryError"),
        ("a smaller machine", FAILED + "FitError: this machine", "FitError: this machine"),
        ("earlier classes", APART + "their classes differ", "FitError"),
        (
            "a sampler of its own",
            "FitError: the DataLoader draws by a BatchSampler",
            "FitError: the DataLoader",
        ),
        ("sgd", 'InputError: solver="sgd" runs in a single process', "InputError"),
    ],
)
def test_all_end_with_an_error(run, name, first, second):
    (one, other), _ = run
    assert one[name].startswith(first)
    assert other[name].startswith(second)


@pytest.mark.parametrize(
    "name", ["a tensor", "batches", "an empty shard", "a loader that shuffles"]
)
def test_all_end_with_the_patterns_of_one_process(run, alone, name):
    (first, second), _ = run
    found = first[f"patterns of {name}"]
    assert not isinstance(found, str), found
    assert found == second[f"patterns of {name}"]
    inverse, x = alone
    expected = Patterns(inverse.model).fit(x, progress=False)
    assert found[1] == str(expected.report)
    for layer, pattern in found[0].items():
        torch.testing.assert_close(
            torch.tensor(pattern).double(), expected[layer].flatten(), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("where one raises", FAILED + "OSError: no such image", "OSError: no such image"),
        ("of nothing", "FitError: the data has no batch", "FitError: the data has no batch"),
        ("of one example", "FitError: the data has 1 example", "FitError: the data has 1 example"),
        ("of other weights", APART + "their weights differ", "FitError: the processes"),
        (
            "that are not finite",
            FAILED + "FitError: batch 0: the model's output",
            "FitError: batch 0: the model's output or features contain NaN",
        ),
        ("of other inputs", APART + "their inputs differ", "FitError: the processes"),
        (
            "in batches of none",
            "InputError: batch_size=0 must be",
            "FitError: the fit failed in process 0 of 2: InputError",
        ),
    ],
)
def test_no_process_ends_with_patterns_alone(run, name, first, second):
    (one, other), _ = run
    assert one[f"patterns {name}"].startswith(first)
    assert other[f"patterns {name}"].startswith(second)


def test_a_process_that_is_gone_is_noticed(run):
    assert (
        (run[1] / "gone")
        .read_text()
        .startswith("FitError: another process has ended, start all processes again")
    )


def test_without_a_process_group():
    with pytest.raises(InputError, match="needs a process group: start the script with torchrun"):
        InverseNetwork(torch.nn.Linear(2, 2).eval()).fit(torch.randn(5, 2), distributed=True)


def test_one_process_fails_as_ever():
    with pytest.raises(FitError, match="mine"), Processes(False).fail_together():
        raise FitError("mine")
