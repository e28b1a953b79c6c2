#!/usr/bin/env bash
# torch 2.14.1: a model that writes to slices of a tensor (z[:, :3] = ...) is differentiable, and so is
# its exported program, with the same gradient. After run_decompositions() the program holds
# aten.copy.default, which has no derivative: its output is right, its backward pass raises RuntimeError.
# Gradients, saliency and optimised masks of such a program fail, while those of the model work.
# captum_mipin replaces that operation where a part of a graph is differentiated.
# Seen with torch 2.14.1, Python 3.11, CPU. Output seen: "exported: same output, same gradient;
# decomposed: same output, RuntimeError: derivative for aten::copy is not implemented".
# Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x).relu()
        z = torch.zeros_like(h)
        z[:, :3], z[:, 3:] = 2 * h[:, 3:], h[:, :3]
        return self.last(z)


def gradient(run, x):
    x = x.clone().requires_grad_()
    try:
        return torch.autograd.grad(run(x).sum(), x)[0]
    except RuntimeError as error:
        return f"RuntimeError: {error}"


torch.manual_seed(0)
model, x = Swapped().eval(), torch.randn(3, 4)
program = torch.export.export(model, (x,))
seen = []
for name, one in (("exported", program), ("decomposed", program.run_decompositions())):
    run, found = one.module(), gradient(one.module(), x)
    same = torch.is_tensor(found) and torch.allclose(found, gradient(model, x))
    output = "same output" if torch.allclose(run(x), model(x)) else "another output"
    seen.append(f"{name}: {output}, {'same gradient' if same else found}")
print("; ".join(seen))
assert seen == [
    "exported: same output, same gradient",
    "decomposed: same output, RuntimeError: derivative for aten::copy is not implemented",
]
PYTHON
