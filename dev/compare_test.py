#!/usr/bin/env python3
"""Compares the built programs with PyTorch and transformers, live, on models made up anew each time.

  dev/compare_test.py [--seed N] [--count N]     usually through dev/compare_test.sh, which sets all up

1. References of random shapes, masks and options: test_gpt2 --reference must agree, numpy must agree that it
   agrees, and test_gpt2 must see it when a reference is wrong.
2. The tokenizer (dev/compare_tokenizer.py), added tokens in random folders (dev/compare_tokens.py), the converters
   and downloads (dev/compare_convert.py).
3. A model folder that train_gpt2 wrote: transformers must load it, and get the same ids, logits, loss of
   completions, and greedy text.
4. Model folders of all kinds, read and written (dev/compare_folders.py), and with words and ends of text of their
   own (dev/compare_words.py); the same as llama.cpp's file (dev/compare_gguf.py). Pictures (dev/compare_plot.py).
5. A fine-tuning, update by update (dev/compare_finetune.py), greedy texts (dev/compare_greedy.py), and adapters
   beside PEFT's (dev/compare_lora.py).
6. The script behind `make compare`, on a tiny model.
"""
import argparse
import glob
import json
import os
import random
import re
import shutil
import sys
import time

import checks
import compare_answers
import compare_finetune
import compare_folders
import compare_gguf
import compare_greedy
import compare_lora
import compare_plot
import compare_tokens
import compare_words
import numpy as np
import reference  # it turns off the network
import torch
import transformers
from checks import WORK, check, run
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

TEXT = """The river runs below the old stone bridge, and the children count the boats: one, two, 30, 400.
"Don't wait," said the miller, "we'll mend the wheel before it's dark." They'd heard him; nobody came.
Über den Dächern pfeift der Wind.  Ça va?  Привет, 世界!\t(tabs\tand   spaces) -- the end... \U0001f642
<|endoftext|>
Bread needs flour, water, salt and time. A cook who has no time needs an oven, and patience for the rest.
"""
EXAMPLES = [("The river runs", " below the old stone bridge"), ("Bread needs", " patience, and time."),
            ("Don't wait, don't wait, don't wait,", " said he")]


def random_options(rng):
    """Options for reference.py that nobody thought of. The first row is whole: something is scored."""
    pick, number = rng.choice, rng.randint
    heads, steps, micro_batches = number(1, 5), number(2, 6), pick([1, 1, 2, 3])
    width = heads * number(max(2, -(-8 // heads)), 17)
    T = pick([number(3, 40), number(3, 40), number(200, 330)])
    B = micro_batches * number(1, 3 if T < 100 else 1)
    lengths = [T] + [pick([0, 1] + [number(1, T)] * 5) for _ in range(B - 1)]
    prompts = [0] + [pick([0, number(0, n)]) for n in lengths[1:]]
    options = {
        "seed": number(1, 10**6), "attention": pick(["eager", "sdpa"]), "n-head": heads, "n-embd": width,
        "n-layer": number(1, 3), "n-positions": T + number(0, 9),
        "vocab-size": number(20, 400 if T < 100 else 90),
        "layer-norm-epsilon": pick([1e-5, 1e-5, 1e-6, 1e-3]), "init-std": round(rng.uniform(0.08, 0.3), 3),
        "seq-len": T, "lengths": ",".join(map(str, lengths)), "prompts": ",".join(map(str, prompts)),
        "pad": pick(["right", "left", "holes", "mixed"]), "positions": pick(["tokens", "tokens", "columns"]),
        "accumulate": micro_batches, "steps": steps, "warmup-steps": pick([0, number(0, steps)]),
        "learning-rate": pick([1e-3, 3e-3]), "schedule": pick(["linear", "cosine", "constant"]),
        "final-lr": pick([0.0, 0.1, 0.6]), "weight-decay": pick([0.0, 0.01, 0.3]), "beta1": pick([0.9, 0.8]),
        "beta2": pick([0.999, 0.95]), "max-grad-norm": pick([0.0, 0.1, 1.0, 100.0])}
    words = [word for name, value in options.items() for word in ("--" + name, str(value))]
    words += pick([[], [], ["--untied"]]) + pick([[], ["--n-inner", str(number(5, 5 * width))]])
    words += pick([[], [], ["--no-decay", "none"], ["--no-decay", "wpe|c_fc", "--no-decay", "ln_[12].bias$"]])
    return words + pick([[], [], ["--freeze", "wte", "--freeze", "wpe"], ["--freeze", "weight"],
                         ["--freeze", "bias"], ["--freeze", r"^transformer\.(w|h\.0)"],
                         ["--freeze", "attn|ln_1"]])


def difference(folder, dump):
    """What is wrong with a dump of test_gpt2, by the rule of test_gpt2 --reference; empty if nothing is."""
    wanted, initial = load_file(folder + "/reference.safetensors"), load_file(folder + "/model.safetensors")
    if not os.path.exists(dump):
        return "no dump was written"
    computed = load_file(dump)
    for name in wanted.keys() - {"input_ids", "attention_mask", "position_ids", "labels"}:
        if name not in computed:
            return name + " is missing"
        if computed[name].shape != wanted[name].shape:
            return f"{name} has the shape {computed[name].shape} instead of {wanted[name].shape}"
        a, b = computed[name].astype(np.float64), wanted[name].astype(np.float64)
        if name.startswith("param."):
            start = initial[name.removeprefix("param.")]
            if "grad." + name.removeprefix("param.") not in wanted:
                if computed[name].tobytes() != start.tobytes():
                    return name + " is frozen, and changed"
            elif not np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b - start):  # NaN fails as well
                error = np.linalg.norm(a - b) / np.linalg.norm(b - start)
                return f"{name}: relative error of the update {error:.1e}"
        elif not (np.abs(a - b) <= 1e-5 * np.abs(b).max() + 1e-4 * np.abs(b)).all():
            return f"{name}: worst error {np.abs(a - b).max():.1e}, largest magnitude {np.abs(b).max():.1e}"
    return ""


def make_reference(words, folder):
    """A reference folder from reference.py's options, its epsilon keeping rounding out of the updates."""
    for epsilon in (1e-4, 1e-3, 1e-2):
        args = reference.parse(["--out", folder, "--epsilon", str(epsilon), *words])
        if reference.make_reference(args)[0] <= reference.ILL_CONDITIONED:
            break


def compare_references(rng, count):
    folders = [f"{WORK}/reference-{i}" for i in range(count)]
    for folder in folders:
        words = random_options(rng)
        print("       dev/reference.py", *words)
        make_reference(words, folder)
    ok, _, why = run("./test_gpt2", "--reference", *folders, show=True)
    check(ok, f"test_gpt2 --reference, {count} references", why)
    for folder in folders:
        dump = folder + "/dump.safetensors"
        ok, _, why = run("./test_gpt2", "--reference", folder, "--dump", dump)
        why = difference(folder, dump) or ("" if ok else why)
        check(not why, f"{folder} by numpy", why)
    # A comparison that cannot fail is worth nothing: one element off, in one tensor of each kind.
    right, wrong = folders[0], f"{WORK}/reference-wrong"
    tensors = load_file(right + "/reference.safetensors")
    with safe_open(right + "/reference.safetensors", "numpy") as file:
        metadata = file.metadata()
    names = ["logits", "loss", "losses", "grad_norms", "learning_rates"]
    names += [rng.choice(sorted(name for name in tensors if name.startswith(kind)))
              for kind in ("grad.", "param.")]
    for name in names:
        broken = dict(tensors, **{name: tensors[name].copy()})
        flat = broken[name].reshape(-1)
        flat[np.abs(flat).argmax()] *= 1.01
        shutil.copytree(right, wrong, dirs_exist_ok=True)
        save_file(broken, wrong + "/reference.safetensors", metadata=metadata)
        check(not run("./test_gpt2", "--reference", wrong)[0], f"test_gpt2 sees a wrong {name}", "it passed")


def compare_with(script):
    if not os.path.exists(script):
        checks.skip(f"{script}: there is no such file")
        return
    ok, _, why = run(sys.executable, script, show=True)
    check(ok, script, why)


def train_model_folder(out):
    """Trains a vocabulary and a tiny model on TEXT into the folder `out`. Returns whether it went well."""
    text, vocabulary = WORK + "/text.txt", WORK + "/vocabulary"
    with open(text, "w") as file:
        file.write(TEXT * 5)
    ok, _, why = run("./tokenizer", "train", "--vocab-size", "320", "--out", vocabulary, text)
    if not check(ok, "tokenizer train", why):
        return False
    ok, _, why = run(
        "./train_gpt2", "--init", "d4", "--n-layer", "2", "--n-head", "4", "--n-embd", "64",
        "--n-positions", "48", "--tokenizer", vocabulary, "--train", text, "--val", text, "--out", out,
        "--steps", "60", "--batch-size", "4", "--seq-len", "48", "--learning-rate", "0.003",
        "--warmup-steps", "5", "--quiet")
    return check(ok, "train_gpt2 writes a model folder", why)


def compare_model_folder(out):
    """Reads what was written as users of transformers do, and compares what both make of it."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    check(not problems, "AutoModelForCausalLM.from_pretrained", str(problems))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model.eval().requires_grad_(False)

    plain = TEXT.replace("<|endoftext|>\n", "")
    for line in [plain, "", " ", "  two", "'s 'S\u00a0x\r\n\r\n 1234567 ½ é e\u0301"]:
        ok, ids, why = run("./tokenizer", "encode", "--tokenizer", out, stdin=line.encode())
        if ok:
            ids, wanted = [int(word) for word in ids.split()], tokenizer.encode(line)
            ok, why = ids == wanted, f"{ids} is not {wanted}"
        check(ok, f"AutoTokenizer: {line[:30]!r}", why)

    lines = [prompt + completion for prompt, completion in EXAMPLES]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    wanted = tokenizer(lines, padding="max_length", max_length=40)
    ok, padded, why = run("./tokenizer", "encode", "--tokenizer", out, "--pad", "left", "--length", "40",
                          stdin="\n".join(lines).encode())
    if ok:
        rows = [json.loads(line) for line in padded.splitlines()]
        ok, why = all([row[key] for row in rows] == wanted[key] for key in wanted), f"not {wanted}"
    if not check(ok, "tokenizer encode --pad", why):
        return
    with open(WORK + "/padded.jsonl", "wb") as file:
        file.write(padded)

    folder, dump = WORK + "/reference-out", WORK + "/reference-out/dump.safetensors"
    make_reference(["--model", out, "--batch", WORK + "/padded.jsonl"], folder)
    ok, _, why = run("./test_gpt2", "--reference", folder, "--dump", dump)
    if check(ok, "test_gpt2 --reference, the model folder", why):
        inputs = load_file(folder + "/reference.safetensors")
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: torch.tensor(inputs[name]) for name in names}
        logits = model(**inputs).logits * inputs["attention_mask"][:, :, None]
        error = np.abs(load_file(dump)["logits"] - logits.numpy()).max()
        check(error <= 1e-4, "logits of the model folder", f"worst error {error:.1e}")

    # Of a prompt and its completion only the completion is scored, and the <|endoftext|> behind it.
    rows, examples = [], WORK + "/examples.jsonl"
    with open(examples, "w") as file:
        for prompt, completion in EXAMPLES:
            print(json.dumps({"prompt": prompt, "completion": completion}), file=file)
            start, end = tokenizer.encode(prompt), tokenizer.encode(completion) + [tokenizer.eos_token_id]
            rows.append((torch.tensor(start + end), torch.tensor([-100] * len(start) + end)))
    ids, labels = (torch.nn.utils.rnn.pad_sequence(column, True, -100) for column in zip(*rows))
    wanted = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=labels).loss.item()
    ok, printed, why = run("./train_gpt2", "--init", out, "--eval", "--val", examples, "--quiet")
    if check(ok, "train_gpt2 --eval", why):
        loss = float(re.search(r"loss ([0-9.]+)", printed.decode()).group(1))
        check(abs(loss - wanted) <= 1e-4 * wanted, "loss of completions", f"{loss} is not {wanted}")

    prompt = "The river"
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False,
                         pad_token_id=tokenizer.eos_token_id)
    wanted = tokenizer.decode(ids[0], skip_special_tokens=True)
    ok, printed, why = run("./train_gpt2", "--init", out, "--generate", "40", "--prompt", prompt,
                           "--temperature", "0", "--quiet")
    if check(ok, "train_gpt2 --generate", why):
        printed = printed.decode(errors="replace").removesuffix("\n")
        check(printed == wanted, "greedy text", f"{printed!r} is not {wanted!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", time.time())), help="repeats a run")
    parser.add_argument("--count", type=int, default=8, help="random references")
    args = parser.parse_args()
    print(f"dev/compare_test.py --seed {args.seed} --count {args.count}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    compare_references(random.Random(args.seed), args.count)
    folders = sorted(glob.glob("dev/fixtures/*/"))
    ok, _, why = run(sys.executable, "dev/compare_bfloat16.py", *folders, show=True)
    check(ok and folders, "dev/compare_bfloat16.py: closer to float32 than PyTorch's bfloat16", why)
    compare_with("dev/compare_tokenizer.py")
    compare_tokens.compare(args.seed)
    compare_with("dev/compare_convert.py")
    if train_model_folder(WORK + "/out"):
        compare_model_folder(WORK + "/out")
        compare_folders.compare_silence(WORK + "/out")
    compare_folders.compare()
    compare_words.compare(args.seed)
    compare_gguf.compare_all(args.seed)
    compare_plot.compare()
    compare_finetune.compare()
    compare_greedy.compare()
    compare_lora.compare(args.seed)
    compare_answers.compare()
    ok, _, why = run(sys.executable, "dev/compare_pytorch.py", "--quick", show=True)
    check(ok, "dev/compare_pytorch.py --quick", why)
    ok, _, why = run("sh", "dev/recipe/run.sh", "--quick")
    check(ok, "dev/recipe/run.sh --quick: every experiment runs", why)
    checks.finish()


if __name__ == "__main__":
    main()
