#!/usr/bin/env bash
# transformers 5.24.0: MODEL_MAPPING, the table from configurations to models behind AutoModel,
# cannot be read through: values() and items() raise ValueError. It names a model,
# VoxtralRealtimeTextModel, that the package does not export. All other tables *_MAPPING, such as
# that of image classifiers, can be read; each reading imports the modules of all of its models.
# Tools that walk through what a model's code refers to, as for a digest of it, meet this table,
# since PreTrainedModel's code leads there; captum_mipin reads such tables without their methods.
# Seen with transformers 5.24.0, torch 2.14.1, Python 3.11, CPU. Output seen:
# "image classifiers: at least 40 of 42; all models: ValueError: Could not find VoxtralRealtimeTextModel".
# Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torchvision==0.29.1' 'transformers==5.24.0' numpy pillow
"$folder/venv/bin/python" - <<'PYTHON'
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

known = len(list(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.values()))
try:
    text = f"{len(list(MODEL_MAPPING.values()))} models"
except ValueError as error:
    text = f"ValueError: {' '.join(str(error).split()[:4])}"
print(f"image classifiers: {known}; all models: {text}; configurations: {len(list(MODEL_MAPPING.keys()))}")
assert known > 30 and text == "ValueError: Could not find VoxtralRealtimeTextModel"
PYTHON
