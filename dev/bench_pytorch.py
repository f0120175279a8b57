#!/usr/bin/env python3
"""Times GPT-2 in PyTorch: the peer that README and dev/compare_pytorch.py compare with.

  dev/bench_pytorch.py --batch-size 4 --seq-len 64 [--steps 8] [--compile] [--half-pad] [--bfloat16]    a training step
  dev/bench_pytorch.py --generate 32 --seq-len 900                  greedy tokens behind so many, with cache

A step is forward, backward, clipping and fused AdamW in float32 with scaled-dot-product attention, on all cores.
--bfloat16: forward and backward under autocast, as transformers' --bf16 has it; generation in a bfloat16 model.
--half-pad: sequences of T, T/2, T/4, T/4 in turn, padded at the right to T, with an attention mask.
--model FOLDER takes another model than a random one of 124M. The last line ends in `median X` (ms a step, or
tokens a second) and `peak memory Y GB`.
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
parser.add_argument("--model")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--seq-len", type=int, default=64)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
parser.add_argument("--half-pad", action="store_true")
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--generate", type=int, default=0, metavar="N")
args = parser.parse_args()

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
if args.model:
    model = transformers.GPT2LMHeadModel.from_pretrained(args.model, dtype=torch.float32,
                                                         attn_implementation="sdpa")
else:
    config = transformers.GPT2Config()
    config._attn_implementation = "sdpa"
    model = transformers.GPT2LMHeadModel(config)
if args.bfloat16 and args.generate:
    model = model.to(torch.bfloat16)
model.eval()  # for GPT-2 that is: without dropout
B, T = args.batch_size, args.seq_len
tokens = torch.randint(0, model.config.vocab_size, (B, T + 1))


def generate(count):
    start = time.perf_counter()
    ids = model.generate(tokens[:1, :T], attention_mask=torch.ones(1, T, dtype=torch.long), do_sample=False,
                         max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
    assert ids.shape[1] == T + count
    return time.perf_counter() - start


def train():
    labels, mask = tokens[:, 1:].clone(), None
    if args.half_pad:
        lengths = torch.tensor([max(1, T // (1, 2, 4, 4)[b % 4]) for b in range(B)])
        mask = (torch.arange(T) < lengths[:, None]).long()
        labels[mask == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if args.compile else model
    seconds = []
    for step in range(args.steps + 2):  # the first two warm up, or compile
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            logits = forward(tokens[:, :-1], attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


if args.generate:
    generate(1)
    rates = [args.generate / (generate(1 + args.generate) - generate(1)) for _ in range(2)]
    what, result = "tokens/s", statistics.median(rates)
else:
    what, result = "ms a step", 1e3 * statistics.median(train())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024) / 1e9
print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {what}: median {result:.1f}, "
      f"peak memory {peak:.2f} GB")
