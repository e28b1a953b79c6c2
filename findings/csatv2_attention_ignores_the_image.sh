#!/usr/bin/env bash
# timm 1.0.31: the spatial attention of CSATv2 does not look at the image. Its layer norm has a
# single feature, whose value less its mean is 0, so it returns its bias for every image. What
# follows, queries, keys and values, is the same for all images. The scores are a matrix of images
# by images, not of places by places as the comment beside them says, because the queries have no
# dimension of features any more; since all rows are equal, this does not show in the result.
# Seen with timm 1.0.31, torch 2.14.1, Python 3.11, CPU, random weights in all layers. Output seen:
# "scores of 3 images: (3, 3)", "largest difference of two images: 0.0 behind the attention".
# Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torchvision==0.29.1' 'timm==1.0.31' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import timm
import torch
from torch.overrides import TorchFunctionMode

torch.manual_seed(0)
block = timm.create_model("csatv2").eval().stages[0][0].attn.attn
with torch.no_grad():
    for weight in block.parameters():
        weight.normal_()


class Softmax(TorchFunctionMode):
    """Notes the shape of what a softmax takes."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__name__", "") == "softmax":
            shapes.append(tuple(arguments[0].shape))
        return function(*arguments, **(named or {}))


shapes, behind = [], []
block.norm2.register_forward_hook(lambda module, inputs, _: behind.append(inputs[0]))
images = torch.randn(3, 1, 7, 7)
with torch.no_grad(), Softmax():
    block(images)
# what the attention adds to its input
added = behind[0].transpose(1, 2).reshape(images.shape) - images
spread = float((added - added[:1]).abs().max())
print(f"scores of 3 images: {shapes[0]}")
print(f"largest difference of two images: {spread:.1f} behind the attention")
assert shapes[0] == (3, 3) and spread < 1e-5 and added.abs().max() > 0.01, "timm behaves otherwise now"
PYTHON
