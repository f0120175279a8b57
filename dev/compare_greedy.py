#!/usr/bin/env python3
"""Compares greedy continuations with transformers' generate(), token by token, on models trained briefly.

  dev/compare_greedy.py      usually through dev/compare_test.sh, which sets all up

Five models of different sizes and seeds continue three prompts of different lengths by 200 tokens: here one
prompt after the other, there as one batch padded at the left. They are trained on stories without
<|endoftext|>, so that none ends early; a sixth has learned where stories end, and must end where theirs does.
With --repetition-penalty one prompt after the other is continued there too: transformers would count the padding.
"""
import os
import shutil
import socket
import subprocess

import checks
import reference  # first: it turns off the network
import torch
import transformers
from checks import WORK, check, must_run

TOKENS = 200
PROMPTS = ["Grace", "One day Felix was in the forest. There was a white hat in the park. Then", "\n"]
PENALTIES = [0.8, 1.05, 1.3, 2.5]
# layers, width, heads, n_positions, seed, training text with ends of stories
MODELS = [(2, 64, 4, 256, 1, False), (3, 96, 3, 256, 2, False), (1, 160, 5, 300, 3, False),
          (4, 64, 1, 384, 4, False), (2, 128, 16, 512, 5, False), (2, 96, 3, 256, 6, True)]


def pieces_of(command):
    """What a program writes, one item a write(): train_gpt2 --generate writes the prompt, then each token."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as process:
        theirs.close()
        pieces = list(iter(lambda: ours.recv(1 << 16), b""))
        why = process.stderr.read().decode(errors="replace")
    return pieces if process.returncode == 0 else [why.encode()]


def continue_in_transformers(model, tokenizer, penalty):
    """The tokens behind each prompt, up to the end of text."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    if penalty == 1:
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        rows = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1]:].tolist()
    else:
        batches = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
        rows = [model.generate(**batch, **settings, repetition_penalty=penalty)[0, batch["input_ids"].shape[1]:]
                .tolist() for batch in batches]
    return [row[:row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in rows]


def compare_model(name, folder, ends, penalty=1):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    wanted, ours = [], []
    for prompt, row in zip(PROMPTS, continue_in_transformers(model, tokenizer, penalty)):
        wanted.append([prompt] + [tokenizer.decode([token]) for token in row] + ["\n"])
        pieces = pieces_of(["./train_gpt2", "--init", folder, "--generate", str(TOKENS), "--prompt", prompt,
                            "--temperature", "0", "--repetition-penalty", str(penalty), "--quiet"])
        ours.append([piece.decode(errors="replace") for piece in pieces])
    made = [len(row) - 2 for row in wanted]
    why = ""
    for a, b in zip(ours, wanted):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        if a != b and not why:
            why = f"after {same - 1} of {len(b) - 2} tokens {a[same:same + 3]} instead of {b[same:same + 3]}"
    different = len({token for row in wanted for token in row})
    check(not why, f"greedy, {name}: {made} tokens, {different} different ones", why)
    check(min(made) < TOKENS if ends else made == [TOKENS] * len(PROMPTS),
          f"greedy, {name}: {'ends of stories' if ends else 'no end'}", f"PyTorch made {made} tokens")


def compare():
    texts = {ends: checks.stories("stories" if ends else "endless", ends) for ends in (True, False)}
    for layers, width, heads, positions, seed, ends in MODELS:
        text, vocabulary = texts[ends]
        folder = f"{WORK}/greedy-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        must_run("./train_gpt2", "--init", "d4", "--n-layer", str(layers), "--n-embd", str(width), "--n-head",
                 str(heads), "--n-positions", str(positions), "--seed", str(seed), "--tokenizer", vocabulary,
                 "--train", text, "--val-fraction", "0", "--seq-len", "128", "--steps", "80",
                 "--learning-rate", "3e-3", "--save-every", "80", "--out", folder, "--quiet")
        name = f"{layers} layers of {width}, {heads} heads, seed {seed}"
        compare_model(name, folder, ends)
        for penalty in PENALTIES:
            compare_model(f"{name}, repetition penalty {penalty}", folder, ends, penalty)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    compare()
    checks.finish()
