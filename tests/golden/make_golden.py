"""Write gpt2.safetensors, what a small GPT-2 must compute: cd tests && python -m golden.make_golden

PyTorch computes it in float64; losses and norms stay float64, the rest is rounded to float32 once. The file holds

    param.NAME                     the parameters, wte without padding rows
    tokens, targets                (B, T) int32
    logits, loss, grad.NAME        of one pass each way
    losses, norms, after.NAME      of ten steps of AdamW on the same batch, as in torch_gpt2.train
    metadata "config"              the model's sizes, in JSON
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch_gpt2
from safetensors.numpy import save_file
from training import random_batch, random_parameters

from llm_numba.models.gpt2 import GPT2

FILE = Path(__file__).parent / "gpt2.safetensors"
CONFIG = GPT2(max_seq_len=32, vocab_size=97, num_layers=3, num_heads=3, channels=42)
B, T, STEPS = 3, 17, 10


def make() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    parameters, (tokens, targets) = random_parameters(CONFIG, rng), random_batch(CONFIG, B, T, rng)
    once = torch_gpt2.forward_backward(parameters, tokens, targets, CONFIG.num_heads)
    losses, norms, after = torch_gpt2.train(parameters, tokens, targets, CONFIG.num_heads, STEPS)
    return {
        **{f"param.{name}": x for name, x in parameters.items()},
        **{f"grad.{name}": x.astype(np.float32) for name, x in once.gradients.items()},
        **{f"after.{name}": x.astype(np.float32) for name, x in after.items()},
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(targets),
        "logits": once.activations["logits", None].astype(np.float32),
        "loss": np.array([once.loss]),
        "losses": np.array(losses),
        "norms": np.array(norms),
    }


if __name__ == "__main__":
    save_file(make(), FILE, {"config": json.dumps(asdict(CONFIG))})
