"""The memory guard: what a fit takes, what is free, and an error before the fit begins."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_mipin import InverseNetwork
from captum_mipin.errors import FitError
from captum_mipin.inverse import memory
from captum_mipin.inverse.memory import Plan, free_memory
from captum_mipin.inverse.passes import Passes
from captum_mipin.regression.geometry import Geometry
from captum_mipin.rules.linear import Convolution, Dense
from tests.small import normal

CPU = torch.device("cpu")


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


SYSTEM = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"}
FREE = {
    "no control group": (SYSTEM, 5000 * 1024),
    "version 2": (
        {
            **SYSTEM,
            "proc/self/cgroup": "0::/jobs/one\n",
            "sys/fs/cgroup/jobs/one/memory.max": "max\n",
            "sys/fs/cgroup/jobs/one/memory.current": "10\n",
            "sys/fs/cgroup/jobs/memory.max": "1000\n",
            "sys/fs/cgroup/jobs/memory.current": "700\n",
            "sys/fs/cgroup/jobs/memory.stat": "anon 500\ninactive_file 90\n",
        },
        1000 - 700 + 90,
    ),
    "a container whose path is that outside": (
        {
            **SYSTEM,
            "proc/self/cgroup": "0::/outside\n",
            "sys/fs/cgroup/memory.max": "2000\n",
            "sys/fs/cgroup/memory.current": "500\n",
        },
        1500,
    ),
    "version 1": (
        {
            **SYSTEM,
            "proc/self/cgroup": "9:cpu,cpuacct:/other\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "2900\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2900\n",
        },
        100,
    ),
    "more in use than allowed": (
        {
            **SYSTEM,
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": "10\n",
            "sys/fs/cgroup/a/memory.current": "12\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("case", FREE)
def test_free_memory_is_what_the_system_and_the_control_groups_leave(case, tmp_path):
    contents, free = FREE[case]
    assert free_memory(CPU, files(tmp_path, contents)) == free


def test_without_the_files_of_linux_the_whole_memory_counts(tmp_path):
    assert free_memory(CPU, tmp_path) > 1 << 27


def overlapping() -> nn.Sequential:
    """Patches like those of a vision transformer, 768 channels times 32 x 32 taps, that overlap."""
    return nn.Sequential(
        nn.Conv2d(3, 768, 32, stride=31),
        nn.ReLU(),
        nn.Conv2d(768, 2048, 2, groups=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 2),
    ).eval()


class Data:
    """Three batches; counts how many were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self):
        for _ in range(3):
            self.read += 1
            yield normal(3, 3, 63, 63)


def test_a_regression_larger_than_free_memory_is_refused_before_the_fit():
    model, data = overlapping(), Data()
    inverse = InverseNetwork(model, ridge=0)  # its pseudo-inverse needs the whole matrix
    with pytest.raises(FitError) as raised:
        inverse.fit(data, 0, progress=False)
    text = str(raised.value)
    assert "0/conv2d: 27," in text
    assert "786,432 signals" in text
    assert "layer=" in text
    assert 'fit 0/conv2d with solver="sgd"' in text
    assert "fit 0/conv2d on fewer places of each map, with positions=" in text
    assert data.read == 2  # the first batch for its shape, and again for the fit
    assert inverse.targets == []
    x = normal(3, 3, 63, 63)
    above = InverseNetwork(model, layer=model[3]).fit(x, 0, progress=False)
    few = InverseNetwork(model, positions=4).fit(x, 0, progress=False)
    assert above.targets == few.targets == [0]
    assert few.report.layers[-1].rows == 12


def test_gradient_descent_is_not_stopped():
    model, x = overlapping()[:2], normal(3, 3, 63, 63)
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(768 * 4, 2)).eval()
    inverse = InverseNetwork(model, solver="sgd", epochs=3).fit(x, 0, progress=False)
    first, last = inverse.report.layers
    assert (first.solver, last.solver) == ("exact", "sgd")
    assert 0 < last.explained_variance < 1


@pytest.fixture
def regressions_alone(monkeypatch):
    """Let the values of batches take nothing."""
    monkeypatch.setattr(Passes, "working", lambda *request: 0)
    monkeypatch.setattr(Passes, "ahead", lambda *request: 0)


@pytest.mark.usefixtures("regressions_alone")
def test_all_layers_that_need_too_much_are_named_at_once(monkeypatch):
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 20, 5), nn.ReLU(), nn.Conv1d(20, 30, 5), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(30 * 12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    free = 6 * 100 * 101 * 8
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    x = normal(12, 1, 20)
    with pytest.raises(FitError) as raised:
        InverseNetwork(model).fit(x, 0, progress=False)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()[1:3]] == [
        "  2/conv1d",
        "  0/conv1d",
    ]
    # One class fits; the moments of all classes, which memory= allows, do not.
    monkeypatch.setattr(memory, "free_memory", lambda device: 7 * 150 * 170 * 8)
    with pytest.raises(FitError, match="lower memory="):
        InverseNetwork(model).fit(x, [0, 1, 2], progress=False)
    InverseNetwork(model).fit(x, [0, 1, 2], memory=1000, progress=False)


@pytest.mark.usefixtures("regressions_alone")
def test_of_the_logits_of_a_class_one_counts(monkeypatch):
    """A head of many classes does not need a Gram matrix of all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 500)).eval()
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    assert InverseNetwork(model).fit(normal(600, 3), 7, progress=False).targets == [7]


def test_the_dual_counts_rows():
    few, many = Plan.of(Dense(8, (1000,)), 10, False), Plan.of(Dense(8, (1000,)), None, False)
    assert (few.solver, many.solver) == ("rows", "moments")
    assert few.stored + few.further < 0.02 * (many.stored + many.further)


def strided() -> tuple[nn.Sequential, torch.Tensor]:
    """A model of a 1-D convolution of kernel 64 and stride 8, and its inputs."""
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 8, 64, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 17, 2)
    return nn.Sequential(*layers).eval(), normal(40, 1, 192)


def test_a_strided_convolution_counts_one_gram_matrix_for_each_remainder():
    geometry = Geometry((256, 1, 64), (8,), (0,), (1,), 1)
    inverter = Convolution((geometry,), torch.Size([9, 1, 512]))
    plan, whole = (Plan.of(inverter, None, False, whole=whole) for whole in (False, True))
    assert plan.signals == whole.signals == 256 * 64
    assert plan.stored == pytest.approx(whole.stored / 8, rel=0.01)
    assert plan.further < 2 * plan.stored
    fork = Convolution((geometry, geometry), torch.Size([9, 1, 512]))
    assert Plan.of(fork, None, False) == Plan.of(fork, None, False, whole=True)


@pytest.mark.usefixtures("regressions_alone")
def test_a_strided_convolution_needs_less_than_a_gram_matrix_of_all_signals(monkeypatch):
    model, x = strided()
    expected = InverseNetwork(model, ridge=1e-3).fit(x, 0, progress=False).source_signal(x, 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 512**2 * 8)
    inverse = InverseNetwork(model, ridge=1e-3).fit(x, 0, progress=False)
    assert torch.equal(inverse.source_signal(x, 0), expected)
    for options in ({"ridge": 0}, {"positions": 100}):  # these need the whole matrix
        with pytest.raises(FitError, match="0/conv1d"):
            InverseNetwork(model, **options).fit(x, 0, progress=False)


#: Measures the peak of each case in a process of its own, which need not import torch again.
MEASURED = """
import os
import torch
from torch import nn
from captum_mipin import InverseNetwork
from captum_mipin.inverse import fit
from captum_mipin.inverse.memory import Plan

def status(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def measure(name, layers, size, batch):
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(*size)
    model(x)
    InverseNetwork(model, layer=layers[-1]).fit(x, 0, progress=False)
    check, counted = fit.check_memory, []
    def measured(plans, classes, memory, device, values):
        plan = max(plans.values(), key=Plan.needed)
        open("/proc/self/clear_refs", "w").write("5")  # the peak is from now on
        counted[:] = plan.needed() + values, status("VmRSS"), plan.solver
        check(plans, classes, memory, device, values)
    fit.check_memory = measured
    InverseNetwork(model).fit(x, 0, batch_size=batch, progress=False)
    needed, before, solver = counted
    print(name, status("VmHWM") - before, needed, solver, sep=";", flush=True)

for case in CASES:
    if not (child := os.fork()):
        measure(*case)
        os._exit(0)
    os.waitpid(child, 0)
"""
RELU = ", nn.ReLU()"
LAYERS = {
    "convolution": (f"nn.Conv1d(2, 48, 40){RELU}", (40, 2, 80), 20, "moments"),
    "strided convolution": (f"nn.Conv1d(2, 64, 64, stride=8){RELU}", (40, 2, 160), 20, "moments"),
    "dense, few rows": (f"nn.Linear(1500, 3000){RELU}", (400, 1500), 20, "rows"),
    "convolution, few rows": (f"nn.Conv1d(40, 60, 30){RELU}", (10, 40, 60), 5, "rows"),
    "images": (f"nn.Conv2d(3, 32, 5){RELU}", (128, 3, 64, 64), 32, "moments"),
    "two layers": (
        f"nn.Conv2d(3, 32, 3){RELU}, nn.Conv2d(32, 32, 3){RELU}",
        (64, 3, 64, 64),
        32,
        "moments",
    ),
    "a long signal": (f"nn.Conv1d(1, 64, 64, stride=8){RELU}", (60, 1, 16000), 20, "moments"),
}


@pytest.fixture(scope="module")
def peaks():
    """Return for each case the bytes that its fit takes, those that are counted, and the solver."""
    cases = [
        f"({name!r}, [{layers}], {size}, {batch})"
        for name, (layers, size, batch, _) in LAYERS.items()
    ]
    code = MEASURED.replace("CASES", f"[{', '.join(cases)}]")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    rows = (line.split(";") for line in done.stdout.splitlines())
    return {name: (int(taken), int(counted), how) for name, taken, counted, how in rows}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", LAYERS)
def test_the_estimate_is_what_a_fit_takes(case, peaks):
    taken, counted, solver = peaks[case]
    assert solver == LAYERS[case][-1]
    assert 1 / 1.5 < taken / counted < 1.5, taken / counted


def test_values_of_batches_count_and_smaller_batches_are_the_way_out(monkeypatch):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()
    model, x = nn.Sequential(*layers, nn.Linear(8 * 900, 2)).eval(), normal(64, 3, 32, 32)
    monkeypatch.setattr(memory, "free_memory", lambda device: 8_000_000)
    small = r"has 7\.6 MiB of free memory[\s\S]*0/conv2d: [\d.]+ MiB,"
    with pytest.raises(FitError, match=small + r".*\n.*with batch_size="):
        InverseNetwork(model).fit(x, 0, batch_size=64, progress=False)
    InverseNetwork(model).fit(x, 0, batch_size=8, memory=1, progress=False)
