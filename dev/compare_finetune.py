#!/usr/bin/env python3
"""Fine-tunes the same model on the same examples with train_gpt2 and with PyTorch, and compares every update.

  dev/compare_finetune.py      usually through dev/compare_test.sh, which sets all up

Prompts and completions of uneven lengths, 50 updates and more over several epochs, train_gpt2's default recipe:
tokens of prompts not scored, no decay on biases and layernorms, warm-up of an epoch, linear decay, clipping at
1, epsilon 1e-8. PyTorch pads at the right and masks. Which examples make an update is not asked of train_gpt2:
epoch_order() below is written anew from what sections 2 and 14 of train_gpt2.c document, and ids come from
transformers' tokenizer. An update made of other examples would show in loss and gradient norm at once.

Compared: losses and gradient norms of all updates (1e-4 relative; torch sums the norm in float32), learning
rates (1e-6), and what training changed, tensor by tensor: L2 norm of the difference / of the update <= 1e-2.
One part is left out, and printed: the key third of c_attn.bias. A softmax does not change when all its scores
get the same addend, so this gradient is zero but for rounding, and AdamW makes steps of full size of it.
The last run is of a folder with added tokens, which are in the examples, and of which one ends them: their rows
are learned as PyTorch learns them.
"""
import csv
import json
import random
import shutil

import checks
import reference  # first: it turns off the network
import torch
import transformers
from checks import WORK, check, must_run
from tokenizers import AddedToken

# name, examples, prompts?, --batch-size, --accumulate, --steps; the last one with tokens that are new to the model
RUNS = [
    # 11 updates an epoch, the last one of 5 examples: a micro-batch of 4 and one of 1
    ("pairs, accumulated", 85, True, 4, 2, 50),
    # an epoch of 53 updates ends in one of a single example
    ("whole texts, an odd number", 107, False, 1, 2, 60),
    ("added tokens", 61, True, 4, 1, 48),
]
ADDED = [AddedToken("<|pad|>", special=True), AddedToken("<|user|>", special=True, rstrip=True),
         AddedToken("<|bot|>", special=True, lstrip=True), AddedToken("<|end|>", special=True),
         AddedToken("the answer", single_word=True)]
LEARNING_RATE = 1e-3
BITS = 2**64 - 1


def mix_bits(x):
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def random_stream(seed, purpose):
    return mix_bits(mix_bits(seed) ^ purpose)


def shuffle(items, stream):
    for i in range(len(items), 1, -1):
        j = mix_bits((stream + i * 0xD1342543DE82EF95) & BITS) % i
        items[i - 1], items[j] = items[j], items[i - 1]


def epoch_order(count, seed, epoch, group):
    """The updates of an epoch: lists of `group` examples, and what is left over."""
    order = list(range(count))
    shuffle(order, random_stream(seed, int.from_bytes(b"order") + epoch))
    return [order[i:i + group] for i in range(0, count, group)]


def make_examples(path, count, prompts, marked):
    """Questions about made-up stories, with 0 to all of the story before them; some with added tokens in them."""
    rng = random.Random(count)
    lines = must_run("./data/stories", "questions", "--seed", "5", "--count", str(count)).decode().splitlines()
    examples = [json.loads(line) for line in lines[:count]]
    for example in examples:
        sentences = example["prompt"].split(". ")
        example["prompt"] = ". ".join(sentences[rng.randrange(len(sentences)):])
        example["completion"] *= rng.choice([1, 1, 1, 3])
        if marked:
            example["prompt"] = f"<|user|> {example['prompt']} <|bot|>"
            example["completion"] += rng.choice([" the answer", ", the answers", " <|user|>\tthe answer<|bot|>"])
    if not prompts:
        examples = [{"text": example["prompt"] + example["completion"]} for example in examples]
    with open(path, "w") as file:
        for example in examples:
            print(json.dumps(example), file=file)
    return examples


def encode(tokenizer, example):
    """Token ids and labels: the completion and the <|endoftext|> behind it, or all of a text."""
    end = [tokenizer.eos_token_id]
    prompt = tokenizer.encode(example["prompt"]) if "prompt" in example else end
    rest = tokenizer.encode(example.get("completion") or example["text"]) + end
    return torch.tensor(prompt + rest), torch.tensor([-100] * len(prompt) + rest)


def train_in_pytorch(model, tokenizer, examples, batch_size, accumulate, steps):
    """(losses, norms, learning rates, initial and final parameters, share of PAD)"""
    model.eval()  # no dropout, as in train_gpt2
    trained = {name: p for name, p in reference.parameters(model).items() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in trained.items()}
    plain = [p for name, p in trained.items() if name.endswith("bias") or ".ln_" in name]
    rest = [p for p in trained.values() if not any(p is q for q in plain)]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.01},
                                   {"params": plain, "weight_decay": 0.0}], lr=LEARNING_RATE)
    encoded = [encode(tokenizer, example) for example in examples]
    group, updates, epoch = batch_size * accumulate, [], 0
    while len(updates) < steps:
        updates += epoch_order(len(encoded), 1337, epoch, group)
        epoch += 1
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, -(-len(examples) // group), steps)
    losses, norms, rates, real, places = [], [], [], 0, 0
    for update in updates[:steps]:
        targets = sum((encoded[i][1][1:] >= 0).sum() for i in update)
        loss = 0.0
        optimizer.zero_grad()
        for begin in range(0, len(update), batch_size):
            ids, labels = zip(*(encoded[i] for i in update[begin:begin + batch_size]))
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, 0)
            ids = torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.eos_token_id)
            labels = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
            micro = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets).loss
            micro.backward()
            loss += micro.item()
            real, places = real + mask.sum().item(), places + mask.numel()
        losses.append(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return losses, norms, rates, initial, trained, 1 - real / places


def worst(ours, theirs):
    """(largest relative deviation, the update it is in)"""
    return max((abs(a - b) / abs(b) if b else abs(a), i) for i, (a, b) in enumerate(zip(ours, theirs)))


def check_rows(name, tokenizer, examples, initial, ours, theirs):
    """The rows of added tokens: those that the examples have are trained, as PyTorch trains them."""
    ids = sorted(tokenizer.get_added_vocab().values())
    moved = [(theirs[i] - initial[i]).norm().item() for i in ids]
    error = max((ours[i] - theirs[i]).norm().item() / size for i, size in zip(ids, moved) if size)
    seen = {i for example in examples for i in encode(tokenizer, example)[0].tolist()}
    texts = " ".join(str(tokenizer.decode([i])) for i in ids if i in seen)
    print(f"       rows of added tokens: worst relative difference {error:.1e}; in the examples: {texts}")
    check(len(seen & set(ids)) >= 4 and min(moved) > 0 and error <= 1e-2, f"{name}: rows of added tokens",
          f"{error:.1e}, {moved}")


def compare_run(start, tokenizer, name, count, prompts, batch_size, accumulate, steps):
    path, out = f"{WORK}/finetune-{count}.jsonl", f"{WORK}/finetune-{count}"
    examples = make_examples(path, count, prompts, "<|end|>" in tokenizer.get_vocab())
    shutil.rmtree(out, ignore_errors=True)
    must_run("./train_gpt2", "--init", start, "--train", path, "--val-fraction", "0", "--out", out, "--quiet",
             "--batch-size", str(batch_size), "--accumulate", str(accumulate), "--steps", str(steps),
             "--learning-rate", str(LEARNING_RATE), "--save-every", str(steps))
    with open(out + "/log.csv") as file:
        log = list(csv.DictReader(file))
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    losses, norms, rates, initial, final, padding = train_in_pytorch(
        model, tokenizer, examples, batch_size, accumulate, steps)
    lengths = [len(encode(tokenizer, example)[0]) for example in examples]
    print(f"       {name}: {count} examples of {min(lengths)} to {max(lengths)} tokens, {steps} updates, loss "
          f"{losses[0]:.4f} to {losses[-1]:.4f}; {100 * padding:.0f} % of PyTorch's batches is PAD")
    check(len(log) == steps, f"{name}: {steps} updates", f"log.csv has {len(log)}")
    for column, theirs, allowed in (("loss", losses, 1e-4), ("grad_norm", norms, 1e-4),
                                    ("learning_rate", rates, 1e-6)):
        error, at = worst([float(row[column]) for row in log], theirs)
        print(f"       {column}: worst relative deviation {error:.1e} in update {at + 1}")
        check(error <= allowed, f"{name}: {column}", f"{log[at][column]} is not {theirs[at]:.9g}")

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    errors, keys = [], []
    for tensor, ours in model.named_parameters():
        parts = [(tensor, slice(None), errors)]
        if tensor.endswith("c_attn.bias"):
            C = len(ours) // 3
            parts = [(tensor + "[query]", slice(0, C), errors), (tensor + "[key]", slice(C, 2 * C), keys),
                     (tensor + "[value]", slice(2 * C, None), errors)]
        for part, elements, results in parts:
            start_value, theirs = initial[tensor][elements].double(), final[tensor].detach()[elements].double()
            moved, difference = (theirs - start_value).norm(), (ours.detach()[elements].double() - theirs).norm()
            results.append(((difference / moved).item(), part))
    error, tensor = max(errors)
    print(f"       update: worst relative difference {error:.1e} in {tensor}; left out: {max(keys)[0]:.1e} in "
          f"{max(keys)[1]}, whose gradient is rounding")
    check(error <= 1e-2, f"{name}: update of {len(errors)} tensors", f"{error:.1e} in {tensor}")
    if "<|end|>" in tokenizer.get_vocab():
        wte = "transformer.wte.weight"
        check_rows(name, tokenizer, examples, initial[wte], model.state_dict()[wte], final[wte].detach())


def compare():
    text, vocabulary = checks.stories("stories")
    start = f"{WORK}/finetune-start"
    shutil.rmtree(start, ignore_errors=True)
    must_run("./train_gpt2", "--init", "d4", "--n-layer", "2", "--n-embd", "64", "--n-head", "4",
             "--n-positions", "320", "--tokenizer", vocabulary, "--train", text, "--val-fraction", "0",
             "--seq-len", "64", "--steps", "60", "--learning-rate", "3e-3", "--out", start, "--quiet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    for arguments in RUNS[:-1]:
        compare_run(start, tokenizer, *arguments)
    tokenizer = add_tokens(start, start + "-added")
    compare_run(start + "-added", tokenizer, *RUNS[-1])


def add_tokens(start, folder):
    """The model with new words, one of them the end of a text, and more rows than it has words."""
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens(ADDED)
    tokenizer.eos_token, tokenizer.pad_token = "<|end|>", "<|pad|>"
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    compare()
    checks.finish()
