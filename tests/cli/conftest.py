"""A folder with networks, weights, photographs, and what ``captum-mipin fit`` makes of them."""

import pytest
import torch
from command import FORM, call, take_photos
from safetensors.torch import save_file
from torch import nn

NETWORKS = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)
    )

def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build()

def staged():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        stem = nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.Conv2d(4, 4, 3)
        return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def dense():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        stem = nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*stem, nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))

class Refused(nn.Module):
    def forward(self, x):
        return x.cumprod(1)

def refused():
    return nn.Sequential(seeded(), Refused())

def single():
    return nn.Sequential(*seeded()[:-1], nn.Linear(144, 1), nn.Flatten(0))

def segmentation():
    return nn.Conv2d(3, 4, 3)

def grey():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def broken():
    raise LookupError("no such\\nthing")

def script():
    raise SystemExit(5)

def loud():
    print("made")
    return Loud()

class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = seeded()

    def forward(self, x):
        print("called")
        return self.body(x)

class Zoo:
    small = staticmethod(seeded)
    ready = seeded()
    name = "zoo"
"""


@pytest.fixture(scope="session")
def network():
    """A factory of the network that ``tiny_networks:build`` builds, with random weights."""

    def build():
        names = {}
        exec(NETWORKS, names)
        return names["build"]().eval()

    return build


@pytest.fixture(scope="session")
def folder(tmp_path_factory, network):
    """Networks, weights, 40 photographs, three of them apart, and two inverses."""
    root = tmp_path_factory.mktemp("cli")
    (root / "tiny_networks.py").write_text(NETWORKS)
    torch.manual_seed(3)
    weights = network().state_dict()
    torch.save(weights, root / "weights.pt")
    save_file(weights, root / "weights.safetensors")
    photographs = root / "photos"
    (photographs / "more").mkdir(parents=True)
    take_photos([photographs, photographs / "more"])
    (photographs / "notes.txt").write_text("not an image")
    (root / "few").mkdir()
    for path in sorted(photographs.glob("*.png"))[:3]:
        (root / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fit = f"fit tiny_networks:build --weights weights.pt {FORM} photos --quiet"
        assert call(fit, "--out inverse.safetensors") == 0
        assert call(fit, "--layer 1 --out layer.safetensors") == 0
    return root


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def model(folder, network) -> nn.Module:
    """The network with the weights of the folder."""
    model = network()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model
