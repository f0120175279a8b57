#!/usr/bin/env python3
"""Compares train_gpt2's bfloat16 with PyTorch's: how far from float32 is each, on the same model and batch?

  dev/compare_bfloat16.py FOLDER...      reference folders, as dev/reference.py makes them (dev/fixtures/*)

PyTorch's side is torch.autocast("cpu", torch.bfloat16), as transformers' --bf16 uses it. Both deviate from what
reference.safetensors holds, PyTorch's float32. A table: relative L2 difference of logits, loss, and gradients
(all tensors together, and the worst one). train_gpt2 must be the closer one in logits and gradients of each folder;
in the loss and the worst tensor, single numbers in which either may be lucky, in all folders together.
"""
import os
import subprocess
import sys

import reference  # first: it turns off the network
import checks
import peft
import torch
import transformers
from checks import check
from safetensors import safe_open
from safetensors.torch import load_file

WORK = checks.WORK + "/bfloat16"


def autocast(folder, tensors, options):
    """Logits, loss and gradients in PyTorch's bfloat16, by the names of the reference."""
    adapter = os.path.exists(folder + "/adapter_config.json")
    args = reference.parse(["--out", folder, "--model", folder + "/base" if adapter else folder, *options])
    model = reference.make_model(args).eval()
    if adapter:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    parameters = reference.parameters(model)
    trained = {name: p for name, p in parameters.items() if "grad." + name in tensors}
    for name, p in parameters.items():
        p.requires_grad_(name in trained)
    batch = {key: tensors[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = reference.accumulate(model, batch, args.accumulate)
    results = {"logits": logits.float() * batch["attention_mask"][:, :, None], "loss": torch.tensor([loss])}
    return results | {"grad." + name: p.grad for name, p in trained.items()}


def deviations(results, tensors):
    """Relative L2 differences: logits, loss, all gradients together, the worst gradient."""
    def relative(names):
        wanted = torch.cat([tensors[name].double().flatten() for name in names])
        got = torch.cat([results[name].double().flatten() for name in names])
        return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    # A gradient that is nothing but rounding, as that of a key's bias, says nothing about precision.
    gradients = [name for name in tensors if name.startswith("grad.")]
    largest = max(tensors[name].norm() / tensors[name].numel() ** 0.5 for name in gradients)
    worst = [name for name in gradients if tensors[name].norm() / tensors[name].numel() ** 0.5 > 1e-3 * largest]
    return [relative(["logits"]), relative(["loss"]), relative(gradients), max(relative([name]) for name in worst)]


def compare(folders):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.makedirs(WORK, exist_ok=True)
    dump, sums = WORK + "/dump.safetensors", {1: [0.0, 0.0], 3: [0.0, 0.0]}
    print(f"{'relative deviation from float32':32} {'logits':>17} {'loss':>17} {'gradients':>17} {'worst one':>17}"
          f"\n{'':32}" + " train_gpt2  torch" * 4)
    for folder in folders:
        name = os.path.basename(os.path.normpath(folder))
        tensors = load_file(folder + "/reference.safetensors")
        with safe_open(folder + "/reference.safetensors", "pt") as file:
            options = file.metadata()["options"].split()
        if os.path.exists(dump):
            os.remove(dump)
        subprocess.run(["./test_gpt2", "--reference", folder, "--dump", dump, "--precision", "bfloat16"],
                       capture_output=True)  # its exit status speaks of float32's tolerance
        if not check(os.path.exists(dump), f"{name}: test_gpt2 --precision bfloat16"):
            continue
        ours = deviations(load_file(dump), tensors)
        theirs = deviations(autocast(folder, tensors, options), tensors)
        print(f"{name:32}" + "".join(f"  {a:8.1e} {b:6.0e}" for a, b in zip(ours, theirs)))
        for i in sums:
            sums[i] = [sums[i][0] + ours[i], sums[i][1] + theirs[i]]
        for i, what in ((0, "logits"), (2, "gradients")):
            check(0 < ours[i] < theirs[i], f"{name}, bfloat16: {what} closer to float32 than PyTorch's",
                  f"{ours[i]:.2e} against {theirs[i]:.2e}")
    for i, what in ((1, "losses"), (3, "worst gradients")):
        if len(folders) >= 10:
            check(0 < sums[i][0] < sums[i][1], f"bfloat16: {what} closer to float32 than PyTorch's, together",
                  f"{sums[i][0]:.2e} against {sums[i][1]:.2e}")



if __name__ == "__main__":
    compare(sys.argv[1:])
    checks.finish()
