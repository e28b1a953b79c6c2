"""Install the wheel of a folder in a fresh environment, and run README's first example from it.

    python .ci/release_check.py dist

The example reads a folder ``photos`` and a network with published weights. Pictures of noise and a
small network with random weights stand in for them here: what is checked is that the package is
whole.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 1 << 20  # bytes of the wheel

#: Runs before the example, in its folder.
STAND_INS = """
import numpy, pathlib, torch, torchvision
from PIL import Image
from torch import nn

pathlib.Path("photos").mkdir()
noise = numpy.random.default_rng(0)
for number in range(40):
    small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=numpy.uint8))
    small.resize((256, 256)).save(f"photos/{number:02}.jpg")

torchvision.models.mobilenet_v2 = lambda weights: nn.Sequential(
    *(nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.Conv2d(4, 8, 3)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)),
)
torch.manual_seed(0)
"""


def main(folder: str) -> None:
    """Check the only wheel in ``folder``."""
    (wheel,) = Path(folder).resolve().glob("*.whl")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1024:.0f} KiB", flush=True)
    if size > LARGEST:
        raise SystemExit(f"the wheel has {size} bytes, expected at most {LARGEST}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    if example is None:
        raise SystemExit("README.md has no example in Python")
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(f"{temporary}/fresh", with_pip=True)
        python = f"{temporary}/fresh/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", f"{wheel}[cli]"]
        subprocess.run(install, check=True)
        where = "import captum_mipin, sys; assert sys.prefix in captum_mipin.__file__\n"
        script = Path(temporary, "example.py")
        script.write_text(STAND_INS + where + example[1], encoding="utf-8")
        subprocess.run([python, script], check=True, cwd=temporary)
        check = [f"{temporary}/fresh/bin/captum-mipin", "check", "torchvision:squeezenet1_1"]
        subprocess.run(check, check=True, cwd=temporary, stdout=subprocess.DEVNULL)
    print("the wheel installs, and README's first example runs from it")


if __name__ == "__main__":
    main(*sys.argv[1:])
