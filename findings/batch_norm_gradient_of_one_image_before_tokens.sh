#!/usr/bin/env bash
# torch 2.14.1: on a CPU, the gradient through a batch norm in evaluation mode is wrong for one
# image if the feature map becomes a row of tokens behind the norm, here
# norm(x).flatten(2).transpose(1, 2).flatten(1). The gradient then arrives with the strides
# (channels, 1, width * channels, channels), whose first entry belongs to a dimension of length 1.
# The same image in a batch of two has the right gradient. The map of Captum's Saliency is
# therefore another one for an image alone than in a batch. Seen with torch 2.14.1, captum 0.9.0,
# Python 3.11, CPU, float32 and float64. Output seen: "1 image: error 2.05 of the largest value",
# "2 images: error 0.00 of the largest value". Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'captum==0.9.0' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from captum.attr import Saliency
from torch import nn

torch.manual_seed(0)
norm, head = nn.BatchNorm2d(4).eval(), nn.Linear(36, 2)
norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))


def model(x: torch.Tensor) -> torch.Tensor:
    tokens = norm(x).flatten(2).transpose(1, 2)  # (images, places, channels)
    return head(tokens.flatten(1))


# by hand: place p and channel c have the gradient head.weight[1, 4 p + c] / deviation of c
slope = head.weight[1].view(9, 4) / (norm.running_var + norm.eps).sqrt()
expected = slope.T.reshape(4, 3, 3).detach()
image, errors = torch.randn(1, 4, 3, 3), []
for count in (1, 2):
    batch = image.repeat(count, 1, 1, 1)
    found = Saliency(model).attribute(batch, target=1, abs=False)[0]
    errors.append(float((found - expected).abs().max() / expected.abs().max()))
    print(count, f"image{'s' * (count > 1)}: error {errors[-1]:.2f} of the largest value")
assert errors[0] > 0.1 and errors[1] < 1e-5, "torch behaves otherwise now"
PYTHON
