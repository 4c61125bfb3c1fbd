"""train.py on a CPU with its products in bfloat16, as on a GPU: weights and sums stay in float32.

    python study/bfloat16.py --task reply --steps 3     # options as of train.py

A step is faster on a CPU that has instructions for it (AVX-512 BF16 or AMX). vLLM samples in
float32; the correction for its log-probs makes up for the difference, as on a GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import torch

import train
from config import TrainConfig, parse
from infra.ranks import InputError, run_program

load_in_float32 = train.load


def load(*args):
    """train.load, with a forward and a backward pass in bfloat16."""
    learner, engine = load_in_float32(*args)
    decoder = learner.policy.lm.base_model
    forward = decoder.forward

    def in_bfloat16(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **options)

    decoder.forward = in_bfloat16
    # The products with the output head are outside of the decoder. vLLM resets this while it loads.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return learner, engine


if __name__ == "__main__":
    train.load = load
    try:
        config = parse(TrainConfig, __doc__)
    except InputError as error:
        sys.exit(f"error: {error}")
    run_program(train.main, config)
