#!/usr/bin/env python3
"""Adapters (LoRA) of train_gpt2 beside those of PEFT, run live, on models made up anew each time.

  dev/compare_lora.py [--seed N]      usually through dev/compare_test.sh, which sets all up

1. Rank 1 to 32 beside each kind of matrix and several at once: PEFT computes logits, gradients of A and B and ten
   AdamW steps; test_gpt2 --reference must agree (dev/reference.py --lora-rank), the base stay as it is to the bit.
2. What a new adapter of train_gpt2 begins with: A uniform as in PEFT, B zero, and a merged model that is its base.
3. The same adapter trained by both on the same examples, update by update, and then the folders: PEFT loads ours
   and gets the logits of OUT/merged, merge_and_unload() gives OUT/merged's weights, and train_gpt2 gets the loss and
   the greedy text of the adapter that PEFT saved, in float32 and in 16 bits.
4. What PEFT can and train_gpt2 cannot is refused in one line that names it.
"""
import argparse
import csv
import json
import os
import random
import re
import shutil

import checks
import compare_finetune
import reference  # first: it turns off the network
import peft
import torch
import transformers
from checks import WORK, check, must_run, run
from safetensors.torch import load_file, save_file

KINDS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
# rank, targets, further options of dev/reference.py
REFERENCES = [
    (1, KINDS[:1], []), (2, KINDS[1:2], ["--untied"]), (4, KINDS[2:3], ["--accumulate", "2"]),
    (8, KINDS[3:], ["--pad", "holes"]), (16, KINDS, ["--pad", "left", "--weight-decay", "0.3"]),
    (32, ["h.1.attn.c_attn", "mlp.c_fc"], ["--lora-alpha", "7.5"]),
    (5, KINDS, ["--freeze", "lora_A"]), (3, KINDS, ["--freeze", r"h\.0\..*lora", "--n-inner", "50"]),
]
STEPS, RANK, ALPHA, TARGETS = 40, 4, 12, ["attn.c_attn", "mlp.c_proj"]


def compare_references(rng):
    folders = []
    for i, (rank, targets, more) in enumerate(REFERENCES):
        folder = f"{WORK}/lora-reference-{i}"
        shutil.rmtree(folder, ignore_errors=True)
        words = ["--seed", str(rng.randint(1, 10**6)), "--n-layer", "2", "--n-embd", "24", "--lengths", "12,7,10,3",
                 "--steps", "10", "--init-std", "0.2", "--lora-rank", str(rank), *more]
        words += [word for target in targets for word in ("--lora-target", target)]
        print("       dev/reference.py", *words)
        for epsilon in ("1e-4", "1e-3", "1e-2"):  # as for any reference: the smallest that keeps out rounding
            args = reference.parse(["--out", folder, "--epsilon", epsilon, *words])
            if reference.make_reference(args)[0] <= reference.ILL_CONDITIONED:
                break
        folders.append(folder)
    ok, _, why = run("./test_gpt2", "--reference", *folders, show=True)
    check(ok, f"test_gpt2 --reference, {len(folders)} adapters of PEFT", why)
    # A comparison that cannot fail is worth nothing: a folder with another alpha, one with A and B of another block.
    wrong = WORK + "/lora-reference-wrong"
    shutil.rmtree(wrong, ignore_errors=True)
    shutil.copytree(folders[4], wrong)
    with open(wrong + "/adapter_config.json") as file:
        config = json.load(file)
    for key, value in (("lora_alpha", config["lora_alpha"] * 1.01), ("lora_alpha", config["lora_alpha"])):
        with open(wrong + "/adapter_config.json", "w") as file:
            json.dump(config | {key: value}, file)
        right = value == config["lora_alpha"]
        check(run("./test_gpt2", "--reference", wrong)[0] == right, f"test_gpt2 on an alpha of {value}", "unexpected")


def lora_options(targets=TARGETS):
    return ["--lora-rank", str(RANK), "--lora-alpha", str(ALPHA),
            *(word for target in targets for word in ("--lora-target", target))]


def train(start, examples, out, *more):
    shutil.rmtree(out, ignore_errors=True)
    must_run("./train_gpt2", "--init", start, "--train", examples, "--val-fraction", "0", "--out", out, "--quiet", *more)


def compare_beginning(start, examples):
    """One update at rate 0: the folder holds what an adapter begins with."""
    out = WORK + "/lora-new"
    train(start, examples, out, "--steps", "1", "--learning-rate", "0", *lora_options())
    ours, base = load_file(out + "/adapter_model.safetensors"), load_file(start + "/model.safetensors")
    merged = load_file(out + "/merged/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    theirs = peft.get_peft_model(model, peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, fan_in_fan_out=True))
    theirs.save_pretrained(WORK + "/lora-new-peft")
    theirs = load_file(WORK + "/lora-new-peft/adapter_model.safetensors")
    check({n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()},
          "a new adapter: names and shapes are PEFT's", f"{sorted(ours)} is not {sorted(theirs)}")
    for name, values in ours.items():
        if "lora_B" in name:
            check(not values.any() and not theirs[name].any(), f"{name} begins at zero")
            continue
        bound = values.shape[1] ** -0.5  # a uniform number has the standard deviation bound / sqrt(3)
        error = abs(values.std().item() / bound * 3**0.5 - 1)
        check(values.abs().max() <= bound and theirs[name].abs().max() <= bound and error < 0.12
              and abs(values.mean()) < 0.12 * bound, f"{name} is uniform up to 1 / sqrt({values.shape[1]})",
              f"largest {values.abs().max():.4f} for {bound:.4f}, standard deviation off by {error:.2f}")
    pairs = [tuple(v.flatten().tolist()[:8]) for n, v in ours.items() if "lora_A" in n]
    check(len(set(pairs)) == len(pairs), "each A begins with other numbers")
    check(base.keys() == merged.keys() and all(torch.equal(base[n], merged[n]) for n in base),
          "a new adapter's merged model is its base to the bit")
    return out


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def compare_training(start, adapter, examples, path, tokenizer):
    """The same adapter trained by both. Returns train_gpt2's folder, and the model that PEFT trained."""
    out, batch, accumulate = WORK + "/lora-ours", 4, 2
    train(adapter, path, out, "--steps", str(STEPS), "--batch-size", str(batch), "--accumulate", str(accumulate),
          "--learning-rate", str(compare_finetune.LEARNING_RATE))
    base = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    losses, norms, rates, initial, final, _ = compare_finetune.train_in_pytorch(
        model, tokenizer, examples, batch, accumulate, STEPS)
    with open(out + "/log.csv") as file:
        log = list(csv.DictReader(file))
    check(len(log) == STEPS, f"an adapter is trained on: {STEPS} updates", f"log.csv has {len(log)}")
    for column, theirs, allowed in (("loss", losses, 1e-4), ("grad_norm", norms, 1e-4), ("learning_rate", rates, 1e-6)):
        error, at = compare_finetune.worst([float(row[column]) for row in log], theirs)
        print(f"       {column}: worst relative deviation {error:.1e} in update {at + 1}; {theirs[0]:.4f} to "
              f"{theirs[-1]:.4f}")
        check(error <= allowed, f"an adapter trained by both: {column}", f"{log[at][column]} is not {theirs[at]:.9g}")
    ours = load_file(out + "/adapter_model.safetensors")
    check(len(ours) == len(final), "an adapter trained by both: its tensors", f"{len(ours)}, {len(final)}")
    error, name = max(((ours["base_model.model." + n] - p.detach()).norm().item()
                       / (p.detach() - initial[n]).norm().item(), n) for n, p in final.items())
    print(f"       update: worst relative difference {error:.1e} in {name}")
    check(error <= 1e-2, "an adapter trained by both: updates", f"{error:.1e} in {name}")
    return out, model


def close(name, ours, theirs):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"       {name}: worst deviation {error:.1e} of the largest")
    check(error <= 1e-5, name, f"{error:.1e}")


def compare_folders(start, out, trained, ids):
    """PEFT reads what train_gpt2 wrote."""
    base = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(base, out)
    config = ours.peft_config["default"]
    check(config.fan_in_fan_out and config.base_model_name_or_path == start and config.r == RANK
          and config.lora_alpha == ALPHA and sorted(config.target_modules) == sorted(TARGETS),
          "adapter_config.json as PEFT reads it", str(config))
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(out)  # finds the base by its name
    wanted = logits_of(ours, ids)
    check(torch.equal(logits_of(by_name, ids), wanted), "AutoPeftModelForCausalLM loads our folder")
    close("logits of our adapter and of PEFT's", wanted, logits_of(trained, ids))
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        out + "/merged", output_loading_info=True, dtype=torch.float32)
    check(not any(info.values()), "OUT/merged is a whole model", str(info))
    close("logits of OUT/merged", logits_of(merged, ids), wanted)
    whole = ours.merge_and_unload()
    for name, p in whole.named_parameters():
        q = merged.get_parameter(name)
        if any(target in name for target in TARGETS) and name.endswith(".weight"):
            close(f"merged {name}", q, p)
        else:
            check(torch.equal(p, q), f"merged {name} is the base's")
    wanted = transformers.AutoTokenizer.from_pretrained(start)("The river runs")["input_ids"]
    for folder in (out, out + "/merged"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        check(tokenizer("The river runs")["input_ids"] == wanted, f"AutoTokenizer loads {folder}")


def loss_of(folder, path):
    printed = must_run("./train_gpt2", "--init", folder, "--eval", "--val", path, "--quiet").decode()
    return float(re.search(r"loss ([0-9.]+)", printed).group(1))


def compare_of_peft(trained, examples, path, tokenizer):
    """train_gpt2 reads what PEFT saved, in all types of numbers."""
    folder = WORK + "/lora-peft"
    shutil.rmtree(folder, ignore_errors=True)
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoded = [compare_finetune.encode(tokenizer, example) for example in examples]
    file = folder + "/adapter_model.safetensors"
    saved = load_file(file)
    prompt = "The river"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        save_file({name: value.to(dtype) for name, value in saved.items()}, file, metadata={"format": "pt"})
        values = {name: value.float() for name, value in load_file(file).items()}
        peft.set_peft_model_state_dict(trained, values)
        with torch.no_grad():
            total = sum(trained(input_ids=i[None], labels=t[None]).loss.item() * (t[1:] >= 0).sum().item()
                        for i, t in encoded)
        wanted = total / sum((t[1:] >= 0).sum().item() for _, t in encoded)
        ours = loss_of(folder, path)
        check(abs(ours - wanted) <= 1e-4 * wanted, f"loss of PEFT's adapter, {dtype}", f"{ours} is not {wanted}")
        ids = trained.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False,
                               pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        printed = must_run("./train_gpt2", "--init", folder, "--generate", "40", "--prompt", prompt,
                           "--temperature", "0", "--quiet").decode(errors="replace").removesuffix("\n")
        check(printed == text, f"greedy text of PEFT's adapter, {dtype}", f"{printed!r} is not {text!r}")


def compare_refusals(start, examples):
    """What PEFT makes and train_gpt2 does not compute: one line, status 1, with the word in it."""
    configs = {
        "use_dora": {"use_dora": True}, "use_rslora": {"use_rslora": True}, "bias": {"bias": "lora_only"},
        "rank_pattern": {"rank_pattern": {"h.1.attn.c_attn": 2}},
        "alpha_pattern": {"alpha_pattern": {"h.1.attn.c_attn": 2}},
        "modules_to_save": {"modules_to_save": ["ln_f"]},
        "trainable_token_indices": {"trainable_token_indices": [3, 4]},
        "lora_bias": {"lora_bias": True},
        "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
        "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
        "wte": {"target_modules": ["c_attn", "wte"]},
    }
    for word, settings in configs.items():
        folder = f"{WORK}/lora-refused"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            base = transformers.AutoModelForCausalLM.from_pretrained(start)
            model = peft.get_peft_model(base, peft.LoraConfig(**{
                "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True} | settings))
            model.save_pretrained(folder)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            checks.skip(f"refused: {word}: PEFT itself does not make it ({str(error)[:60]})")
            continue
        ok, printed, why = run("./train_gpt2", "--init", folder, "--tokenizer", start, "--eval", "--val", examples,
                               "--quiet")
        check(not ok and word in why and why.startswith("exit status 1"), f"refused: {word}", f"{ok}, {why}")


def compare(seed):
    text, vocabulary = checks.stories("lora")
    start, path = f"{WORK}/lora-start", f"{WORK}/lora.jsonl"
    compare_references(random.Random(seed))
    train("d4", text, start, "--n-layer", "2", "--n-embd", "64", "--n-head", "4", "--n-positions", "320",
          "--tokenizer", vocabulary, "--seq-len", "64", "--steps", "60", "--learning-rate", "3e-3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    examples = compare_finetune.make_examples(path, 60, True, False)
    adapter = compare_beginning(start, path)
    out, trained = compare_training(start, adapter, examples, path, tokenizer)
    compare_folders(start, out, trained, compare_finetune.encode(tokenizer, examples[0])[0][None])
    compare_of_peft(trained, examples, path, tokenizer)
    compare_refusals(start, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.makedirs(WORK, exist_ok=True)
    compare(parser.parse_args().seed)
    checks.finish()
