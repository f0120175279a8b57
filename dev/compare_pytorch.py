#!/usr/bin/env python3
"""Compares train_gpt2 with PyTorch on a model and a text: results, speed and memory. `make compare` runs it.

  dev/compare_pytorch.py [--model FOLDER|d4|d6|d12] [--data FILE.txt|FILE.jsonl] [options]

1. One table of deviations: logits, loss, gradients, AdamW steps (dev/reference.py computes them in PyTorch,
   test_gpt2 --reference compares) and a greedy continuation. A size makes a model at random, with a vocabulary
   of pairs of bytes; without --data, stories are made up.
   The same in bfloat16: how far from float32, beside PyTorch's autocast (dev/compare_bfloat16.py).
2. Times, in turn in several rounds, medians, in float32 and bfloat16: a training step, one on a batch of which
   half is PAD (train_gpt2 packs, PyTorch pads and masks), greedy generation with key/value cache.
Exit status 1 when a result deviates too far; times are only shown. --quick is a test of this script.
"""
import argparse
import csv
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import time

import compare_bfloat16
import numpy as np
import reference  # first: it turns off the network
import torch
import transformers
from checks import must_run

WORK = "build/compare_pytorch"
SIZES = {"tiny": (2, 64, 4), "d4": (4, 256, 4), "d6": (6, 384, 6), "d12": (12, 768, 12)}
MODEL = WORK + "/model"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="d12", help="model folder with vocabulary, or a size to make at random")
    add("--data", metavar="FILE", help=".txt or .jsonl")
    add("--seed", type=int, default=1)
    add("--check", default="4x64", metavar="BxT", help="batch on which results are compared")
    add("--steps", type=int, default=10, help="AdamW steps that are compared")
    add("--tokens", type=int, default=50, help="greedy tokens that are compared")
    add("--times", default="4x64", metavar="BxT,...", help="training steps to time, like 4x64,4x1024; or none")
    add("--contexts", default="64,900", help="tokens before those whose generation is timed")
    add("--timed-steps", type=int, default=5)
    add("--rounds", type=int, default=3)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--quick", action="store_true", help="a tiny model, few steps")
    args = parser.parse_args()
    if args.quick:
        args.model, args.steps, args.tokens, args.contexts, args.rounds = "tiny", 3, 20, "16", 1
        args.check = args.times = "4x32"
        args.timed_steps, args.no_compile = 2, True
    if args.model not in SIZES and not os.path.isdir(args.model):
        parser.error(f"--model {args.model}: no such folder, and no size ({', '.join(SIZES)})")
    return args


def sizes(text):
    return [] if text == "none" else [tuple(map(int, size.split("x"))) for size in text.split(",")]


def make_vocabulary(folder, vocab_size):
    """256 bytes, pairs of them as merges, ASCII first, and <|endoftext|>: enough for any text and size."""
    characters = [chr(b) if 33 <= b < 127 or 161 <= b < 173 or 174 <= b else None for b in range(256)]
    others = iter(range(256, 512))
    characters = [character or chr(next(others)) for character in characters]  # GPT-2's names of bytes
    pairs = sorted(((a, b) for a in range(256) for b in range(256)), key=max)
    # Pieces of text begin with a space and do not end with one: such pairs would never be met.
    merges = [(characters[a], characters[b]) for a, b in pairs if b != 32][:vocab_size - 257]
    tokens = characters_in_order(characters) + [a + b for a, b in merges] + ["<|endoftext|>"]
    with open(folder + "/vocab.json", "w") as file:
        json.dump({token: i for i, token in enumerate(tokens)}, file, ensure_ascii=False)
    with open(folder + "/merges.txt", "w") as file:
        file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    with open(folder + "/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>",
                   "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, file)


def characters_in_order(characters):
    """GPT-2's ids 0 to 255: first the bytes that stand for themselves."""
    return [c for b, c in enumerate(characters) if ord(c) == b] + \
        [c for b, c in enumerate(characters) if ord(c) != b]


def make_batch(args, tokenizer):
    """The first B examples of the file, padded at the right to T, for dev/reference.py --batch."""
    B, T = sizes(args.check)[0]
    end, rows = tokenizer.eos_token_id, []
    with open(args.data, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    if args.data.endswith(".jsonl"):
        for line in text.splitlines()[:B]:
            example = json.loads(line)
            prompt = tokenizer.encode(example["prompt"]) if "prompt" in example else []
            ids = (prompt or [end]) + tokenizer.encode(example.get("completion") or example["text"]) + [end]
            rows.append((ids[-T:], [-100] * len(prompt) + ids[len(prompt):]))
        rows = [(ids, labels[-T:]) for ids, labels in rows]
    else:
        ids = [end] + tokenizer.encode(text[:20 * B * T])
        rows = [(ids[b * T:(b + 1) * T - 5 * b],) * 2 for b in range(B)]  # uneven on purpose
    rows = [row for row in rows if row[0]]
    T = max(len(ids) for ids, _ in rows)
    path = WORK + "/batch.jsonl"
    with open(path, "w") as file:
        for ids, labels in rows:
            pad = T - len(ids)
            print(json.dumps({"input_ids": ids + [end] * pad, "attention_mask": [1] * len(ids) + [0] * pad,
                              "labels": labels + [-100] * pad}), file=file)
    return path, rows[0][0][:T // 2]


def make_model(args):
    """MODEL, in float32 and with a vocabulary, as both sides read it."""
    if args.model not in SIZES:
        os.symlink(os.path.abspath(args.model), MODEL)
        return
    torch.manual_seed(args.seed)
    layers, width, heads = SIZES[args.model]
    vocab_size = 600 if args.quick else 50257
    config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab_size,
                                     bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1)
    transformers.GPT2LMHeadModel(config).save_pretrained(MODEL)
    make_vocabulary(MODEL, vocab_size)


def compare_results(args, batch):
    """Deviations, by test_gpt2 --reference. Returns whether all are within its tolerance."""
    folder = WORK + "/reference"
    epsilon = "1e-4"  # reference.py says why not 1e-8
    reference.make_reference(reference.parse(
        ["--out", folder, "--model", MODEL, "--batch", batch, "--steps", str(args.steps), "--epsilon", epsilon,
         "--threads", str(torch.get_num_threads()), "--float32-only"]))
    result = subprocess.run(["./test_gpt2", "--reference", folder], capture_output=True, text=True)
    names = {"losses": f"losses of {args.steps} AdamW steps", "norms": "their gradient norms",
             "rates": "their learning rates", "updates": "update by all of them (L2)"}
    print(f"\n{'':34} {'absolute':>10} {'relative':>10}  worst in")
    lines = re.findall(r"(\w+) +worst absolute (\S+), relative (\S+) in (\S*)(.*)", result.stdout)
    for kind, absolute, relative, tensor, outside in lines:
        print(f"{names.get(kind, kind):34} {absolute:>10} {relative:>10}  {tensor}{outside}")
    if len(lines) < 7:
        print(result.stdout + result.stderr)
    return result.returncode == 0 and len(lines) == 7


def text_bytes(tokenizer, ids):
    unchanged = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [b for b in range(256) if chr(b) not in unchanged]
    table = unchanged | {chr(256 + i): b for i, b in enumerate(rest)}
    return bytes(table[c] for token in tokenizer.convert_ids_to_tokens(ids) for c in token)


def compare_greedy(args, tokenizer, prompt):
    """A greedy continuation. Returns whether it is the same text, byte by byte."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = tokenizer.decode([token for token in prompt if token != tokenizer.eos_token_id])
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=args.tokens, do_sample=False,
                          pad_token_id=tokenizer.eos_token_id)[0, ids["input_ids"].shape[1]:].tolist()
    made = made[:made.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in made else made
    ours = must_run("./train_gpt2", "--init", MODEL, "--generate", str(args.tokens), "--prompt", prompt,
                    "--temperature", "0", "--quiet").removesuffix(b"\n")
    ours = ours.removeprefix(prompt.encode())
    same = max(n for n in range(len(made) + 1) if ours.startswith(text_bytes(tokenizer, made[:n])))
    equal = same == len(made) and ours == text_bytes(tokenizer, made)
    print(f"{'greedy continuation':34} {same} of {len(made)} tokens the same"
          f"{'' if equal else '   OUTSIDE'}", flush=True)
    return equal


def peak_memory(pid):
    """Peak memory of a running process in GB, 0 where that cannot be known."""
    try:
        with open(f"/proc/{pid}/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 / 1e9 if found else 0


def timed(command, on_output=None):
    """Runs a program: (output, peak memory in GB). on_output: list that gets the times of what it writes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, peak = b"", 0
    while True:
        # ru_maxrss would start at what this Python uses: looked up while it runs, where /proc exists.
        peak = peak_memory(process.pid) or peak
        if not select.select([process.stdout], [], [], 0.05)[0]:
            continue
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            break
        output += piece
        if on_output is not None:
            on_output.append(time.perf_counter())
    why = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and b"overfit one batch" not in output:
        raise RuntimeError(" ".join(why.split())[-200:] or f"exit status {process.returncode}")
    return output, peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def our_step(args, B, T, data, *options):
    """--overfit: the same batch again and again, as PyTorch's side does it, and nothing is saved."""
    out = WORK + "/out"
    shutil.rmtree(out, ignore_errors=True)
    _, peak = timed(["./train_gpt2", "--init", MODEL, "--train", data, "--val-fraction", "0", "--out", out,
                     "--batch-size", str(B), "--seq-len", str(T), "--steps", str(args.timed_steps + 2),
                     "--overfit", "--quiet", "--no-decay", "none", "--learning-rate", "1e-4", *options])
    with open(out + "/log.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return 1e3 * statistics.median(np.diff(seconds)[1:]), peak


def our_generation(context, count, piece, *options):
    times = []
    _, peak = timed(["./train_gpt2", "--init", MODEL, "--generate", str(count + 1), "--prompt",
                     piece * context, "--temperature", "0", "--quiet", *options], times)
    if len(times) < 3 or times[-1] == times[1]:
        raise RuntimeError("the tokens came too quickly to be told apart")
    return count / (times[-1] - times[1]), peak  # times[0]: the prompt, times[1]: the first token


def peer(args, *words):
    output, peak = timed([sys.executable, "dev/bench_pytorch.py", "--model", MODEL, "--steps",
                       str(args.timed_steps), *words])
    return float(re.search(r"median ([0-9.]+)", output.decode()).group(1)), peak


def show_times(args, what, contestants):
    """Rounds in turn; a contestant that fails is named in one line and left out. Prints medians."""
    results = [[] for _ in contestants]
    for _ in range(args.rounds):
        for i, (name, function) in enumerate(contestants):
            if results[i] is not None:
                try:
                    results[i].append(function())
                except (RuntimeError, AttributeError, IndexError, ValueError) as problem:
                    print(f"{what}, {name}: left out, {problem}")
                    results[i] = None
    words = [what.ljust(34)]
    for (name, _), rounds in zip(contestants, results):
        if rounds:
            median = statistics.median(value for value, _ in rounds)
            words.append(f"{name} {median:.1f} ({max(peak for _, peak in rounds):.2f} GB)")
    print("  ".join(words), flush=True)


def compare_times(args, tokenizer):
    piece = next((text for text in (" a", "e", " the", "\n") if len(tokenizer.encode(text * 40)) == 40), None)
    rng = np.random.default_rng(args.seed)
    print(f"\n{os.cpu_count()} cores, {args.rounds} rounds in turn; median (peak memory)", flush=True)
    for B, T in sizes(args.times):
        half = [max(1, T // (1, 2, 4, 4)[b % 4]) for b in range(B)]
        shard, padded = f"{WORK}/{B}x{T}.bin", f"{WORK}/{B}x{T}.jsonl"
        ids = rng.integers(0, min(tokenizer.vocab_size, 65536), B * T + 1)
        with open(shard, "wb") as file:
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, len(ids)
            file.write(header.tobytes() + ids.astype(np.uint16).tobytes())
        for what, data, more in ((f"step {B}x{T}, ms", shard, []), (f"step {B}x{T}, half PAD, ms", padded,
                                                                      ["--half-pad"])):
            if data == padded:
                if not piece:
                    print(f"{what}: left out, the vocabulary has no piece to make texts of a given length of")
                    continue
                with open(padded, "w") as file:  # <|endoftext|> stands at both ends
                    for length in half:
                        print(json.dumps({"text": piece * max(1, length - 1)}), file=file)
            options = ["--batch-size", str(B), "--seq-len", str(T), *more]
            ours = "--precision", "bfloat16"
            contestants = [("train_gpt2", lambda: our_step(args, B, T, data)),
                           ("bfloat16", lambda: our_step(args, B, T, data, *ours)),
                           ("PyTorch eager", lambda: peer(args, *options)),
                           ("bfloat16 autocast", lambda: peer(args, "--bfloat16", *options))]
            if not args.no_compile:
                contestants += [("torch.compile", lambda: peer(args, "--compile", *options)),
                                ("compile, autocast", lambda: peer(args, "--compile", "--bfloat16", *options))]
            show_times(args, what, contestants)
    count = 8 if args.quick else 32
    for context in map(int, args.contexts.split(",")):
        if piece:
            show_times(args, f"greedy behind {context} tokens, tokens/s", [
                ("train_gpt2", lambda: our_generation(context, count, piece)),
                ("bfloat16", lambda: our_generation(context, count, piece, "--precision", "bfloat16")),
                ("PyTorch eager", lambda: peer(args, "--generate", str(count), "--seq-len", str(context))),
                ("bfloat16", lambda: peer(args, "--bfloat16", "--generate", str(count), "--seq-len",
                                          str(context)))])


def main():
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    make_model(args)
    if not args.data:
        args.data = WORK + "/stories.txt"
        with open(args.data, "wb") as file:
            file.write(must_run("./data/stories", "text", "--seed", "1", "--megabytes", "0.1"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    batch, prompt = make_batch(args, tokenizer)
    print(f"train_gpt2 against PyTorch {torch.__version__}, transformers {transformers.__version__}: "
          f"{args.model}, {os.path.basename(args.data)}", flush=True)
    equal = compare_results(args, batch)
    equal = compare_greedy(args, tokenizer, prompt) and equal
    print()
    compare_bfloat16.compare([WORK + "/reference"])
    equal = equal and compare_bfloat16.checks.counts["failed"] == 0
    shutil.rmtree(WORK + "/reference")  # gigabytes, for a large model
    compare_times(args, tokenizer)
    print("\nresults agree" if equal else "\nresults DO NOT agree")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
