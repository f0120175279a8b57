#!/usr/bin/env python3
"""Times a training step of a randomly initialised GPT-2 in PyTorch eager: the peer that README compares with.

  dev/bench_pytorch.py --batch-size 4 --seq-len 64 [--steps 8]

Forward, backward, clipping and fused AdamW in float32 with scaled-dot-product attention, on all cores.
"""
import argparse
import os
import resource
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--seq-len", type=int, default=64)
parser.add_argument("--steps", type=int, default=8)
args = parser.parse_args()

config = transformers.GPT2Config(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)  # the 124M model
config._attn_implementation = "sdpa"
model = transformers.GPT2LMHeadModel(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
tokens = torch.randint(0, config.vocab_size, (args.batch_size, args.seq_len + 1))
seconds = []
for step in range(args.steps + 1):  # the first one warms up
    start = time.perf_counter()
    logits = model(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{torch.__version__}, {torch.get_num_threads()} threads: median {1e3 * statistics.median(seconds[1:]):.0f} ms, "
      f"best {1e3 * min(seconds[1:]):.0f} ms a step, peak memory {peak:.2f} GB")
