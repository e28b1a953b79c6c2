#!/usr/bin/env bash
# torch 2.9.1: in evaluation mode, a forward pass of nn.InstanceNorm2d(track_running_stats=True)
# writes to its running statistics. The values stay the same, but torch counts a write:
# `running_mean._version` goes up by 1 at each call. An evaluation-mode pass should only read its
# buffers (nn.BatchNorm2d does), and whoever notices changed weights by `_version` sees a change
# where there is none. Seen with torch 2.9.1, numpy 2, Python 3.11, CPU; torch 2.14.1 counts none.
# Output seen: "InstanceNorm2d 1 same values", "BatchNorm2d 0 same values".
# Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.9.1' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

writes = {}
for kind in (nn.InstanceNorm2d, nn.BatchNorm2d):
    norm = kind(3, track_running_stats=True).eval()
    values, version = norm.running_mean.clone(), norm.running_mean._version
    with torch.no_grad():
        norm(torch.randn(2, 3, 4, 4))
    writes[kind.__name__] = norm.running_mean._version - version
    same = torch.equal(values, norm.running_mean)
    print(kind.__name__, writes[kind.__name__], "same values" if same else "other values")
    assert same
assert writes == {"InstanceNorm2d": 1, "BatchNorm2d": 0}, "torch behaves otherwise now"
PYTHON
