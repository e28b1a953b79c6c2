#!/usr/bin/env bash
# transformers 5.24.0: T5ForSequenceClassification is built from a T5Config without complaint, but its
# forward pass raises AttributeError: it asks the configuration for decoder_start_token_id, which
# T5Config does not set. BartForSequenceClassification of a BartConfig runs. With
# T5Config(decoder_start_token_id=0) the forward pass works; saved models of T5 carry that field.
# Tests and benchmarks that build a classifier of each family from configurations meet this.
# Seen with transformers 5.24.0, torch 2.14.1, Python 3.11, CPU. Output seen:
# "T5: AttributeError: 'T5Config' object has no attribute 'decoder_start_token_id'; T5 with it: (1, 2);
# BART: (1, 3)".
# Exits with 0 as long as this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'transformers==5.24.0' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

SMALL = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 30}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 30,
}


def run(model, text):
    try:
        with torch.no_grad():
            return str(tuple(model.eval()(torch.tensor([text])).logits.shape))
    except AttributeError as error:
        return f"AttributeError: {error}"


plain = run(T5ForSequenceClassification(T5Config(**SMALL)), [5, 6, 7, 1])
told = run(T5ForSequenceClassification(T5Config(**SMALL, decoder_start_token_id=0)), [5, 6, 7, 1])
bart = run(BartForSequenceClassification(BartConfig(**BART)), [5, 6, 7, 2])
print(f"T5: {plain}; T5 with it: {told}; BART: {bart}")
assert "no attribute 'decoder_start_token_id'" in plain and told == "(1, 2)" and bart == "(1, 3)"
PYTHON
