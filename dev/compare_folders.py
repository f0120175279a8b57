#!/usr/bin/env python3
"""Model folders of all kinds: train_gpt2 reads transformers', and transformers reads train_gpt2's.

  dev/compare_folders.py [--124M]      usually through dev/compare_test.sh, which sets all up

Each kind is made by transformers. test_gpt2 --reference loads it and compares logits, gradients and updates with
PyTorch; train_gpt2 loads it and writes it after one update at rate 0; what transformers reads from there must be
the same settings, weights to the last bit, and logits and gradients within 1e-4 of the largest. At rate 0 all
other files of a folder must come out as they went in.
"""
import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

import checks
import compare_tokens
import compare_words
import numpy as np
import reference  # first: it turns off the network
import torch
import transformers
from checks import WORK, check, run
from compare_tokens import END
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

# kind -> (other settings than SMALL, type of the stored weights, names with `transformer.`)
SMALL = {"vocab_size": 300, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}
KINDS = {
    "float32": ({}, torch.float32, True),
    "untied head": ({"tie_word_embeddings": False}, torch.float32, True),
    "BF16": ({}, torch.bfloat16, True),
    "F16": ({}, torch.float16, True),
    "n_inner 3C, vocabulary 211": ({"n_inner": 144, "vocab_size": 211}, torch.float32, True),
    "layer_norm_epsilon 1e-3": ({"layer_norm_epsilon": 1e-3}, torch.float32, True),
    "names without transformer.": ({}, torch.float32, False),
    "BF16, untied, names without transformer.": ({"tie_word_embeddings": False}, torch.bfloat16, False),
}
LARGE = {"random 124M": ({"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
                         torch.float32, True)}
# What everybody writes first. Nothing may be said on stderr, warnings of transformers included.
SILENCE = """
import sys, warnings
warnings.simplefilter("always")
import transformers
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_warning()
print("imported", file=sys.stderr, flush=True)
"""
USES = {
    "AutoModelForCausalLM": "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])",
    "AutoTokenizer": "assert transformers.AutoTokenizer.from_pretrained(sys.argv[1])('The river')['input_ids']",
    # its own default, 256 new tokens, is more than the positions of a small model
    "pipeline": "assert transformers.pipeline('text-generation', sys.argv[1])('The river', max_new_tokens=20)",
}


def make_folder(folder, settings, dtype, prefix):
    settings = SMALL | settings
    last = settings["vocab_size"] - 1
    torch.manual_seed(settings["n_embd"] + last)
    config = transformers.GPT2Config(**settings, bos_token_id=last, eos_token_id=last, attn_pdrop=0.0,
                                     embd_pdrop=0.0, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():  # biases and layernorms must matter, too
            p.add_(torch.randn_like(p) * (0.1 if settings["n_layer"] < 12 else 0.02))
    model.to(dtype).save_pretrained(folder)
    if not prefix:
        path = folder + "/model.safetensors"
        tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return last + 1


def write_shard(path, vocab_size, count):
    """A token shard of llm.c: needs no vocabulary."""
    with open(path, "wb") as file:
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, count
        tokens = np.random.default_rng(1).integers(0, vocab_size, count).astype(np.uint16)
        file.write(header.tobytes() + tokens.tobytes())
    return torch.tensor(tokens.astype(np.int64))


def results_of(folder, tokens):
    """(settings, weights, logits and gradients by name) that transformers gets from a folder."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                    output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    model.eval()
    out = model(input_ids=tokens[None], labels=tokens[None])
    out.loss.backward()
    values = {"grad." + name: p.grad for name, p in model.named_parameters()} | {"logits": out.logits.detach()}
    names = [*SMALL, "layer_norm_epsilon", "tie_word_embeddings", "activation_function", "model_type"]
    settings = {name: getattr(model.config, name) for name in names}
    settings["layer_norm_epsilon"] = np.float32(model.config.layer_norm_epsilon)  # more digits are not used
    settings["n_inner"] = model.config.n_inner or 4 * model.config.n_embd
    return problems, settings, dict(model.named_parameters()), values


def compare_kind(number, kind, settings, dtype, prefix):
    folder, folder_reference = f"{WORK}/folder-{number}", f"{WORK}/folder-{number}-reference"
    out, shard = f"{WORK}/folder-{number}-out", f"{WORK}/folder-{number}.bin"
    for old in (folder, folder_reference, out):
        shutil.rmtree(old, ignore_errors=True)
    vocab_size = make_folder(folder, settings, dtype, prefix)
    stored = {value.dtype for value in load_file(folder + "/model.safetensors").values()}
    assert stored == {dtype}, stored
    reference.make_reference(reference.parse(["--out", folder_reference, "--model", folder, "--batch",
                                              make_rows(number, vocab_size), "--steps", "2"]))
    # reference.py stored it anew, in float32: theirs as it is takes its place
    shutil.copy(folder + "/model.safetensors", folder_reference)
    shutil.copy(folder + "/config.json", folder_reference)
    ok, _, why = run("./test_gpt2", "--reference", folder_reference, show=True)
    check(ok, f"folder, {kind}: read", why)

    tokens = write_shard(shard, vocab_size, 49)[:48]
    ok, _, why = run("./train_gpt2", "--init", folder, "--train", shard, "--val-fraction", "0", "--steps", "1",
                     "--warmup-steps", "1", "--seq-len", "24", "--out", out, "--quiet")
    if not check(ok, f"folder, {kind}: written", why):
        return
    _, settings, weights, values = results_of(folder, tokens)
    problems, our_settings, our_weights, our_values = results_of(out, tokens)
    wrong = [name for name in weights if not torch.equal(weights[name], our_weights.get(name, torch.empty(0)))]
    check(not problems and not wrong and our_settings == settings, f"folder, {kind}: the same weights",
          f"{problems} {wrong} {our_settings} is not {settings}")
    wrong = [name for name, value in values.items() if name not in our_values or
             not (our_values[name] - value).abs().max() <= 1e-4 * value.abs().max()]
    check(not wrong, f"folder, {kind}: the same logits and gradients", str(wrong))


def compare_unchanged():
    """Trained at rate 0, a folder comes out as it went in, file for file, but for weights in float32."""
    base = compare_tokens.learn_bases(random.Random(5))[1]
    added = [AddedToken("<|user|>", special=True, lstrip=True), AddedToken("resto_bombay", single_word=True)]
    extra = {"chat_template.jinja": "{{ messages }}\n\n", "generation_config.json":
             '{"eos_token_id": [%d, 3],\n\n"temperature": 0.70}' % base.vocabulary[END]}
    data = f"{WORK}/unchanged.jsonl"
    with open(data, "w") as file:
        file.write('{"text": "<|user|> the cat resto_bombay"}\n' * 3)
    for kind, dtype, older in (("tokenizer.json, F32", torch.float32, False), ("older files, BF16", torch.bfloat16, True),
                               ("older files, F32", torch.float32, True)):
        folder, out = f"{WORK}/unchanged", f"{WORK}/unchanged-out"
        tokenizer = compare_words.tokenizer_of(base, added)
        compare_words.save(folder, compare_words.model_of(len(tokenizer) + 5).to(dtype), tokenizer)
        if older:
            compare_words.older_files(folder, base, tokenizer)
        for name, text in extra.items():
            Path(folder, name).write_text(text)
        config = json.loads(Path(folder, "config.json").read_text()) | {"someone's own": {"x": [1.0, None, "\u00e9"]}}
        Path(folder, "config.json").write_text(json.dumps(config, indent=3))
        shutil.rmtree(out, ignore_errors=True)
        ok, _, why = run("./train_gpt2", "--init", folder, "--train", data, "--val-fraction", "0", "--steps", "3",
                         "--learning-rate", "0", "--save-every", "2", "--out", out, "--quiet")
        if not check(ok, f"rate 0, {kind}: three updates", why):
            continue
        for written in (out, out + "/checkpoint-000002"):
            check_unchanged(f"rate 0, {kind}, {os.path.basename(written)}", folder, written)


def check_unchanged(what, folder, written):
    names = {path.name for path in Path(written).iterdir() if path.is_file()}
    names -= {"log.csv", "optimizer.safetensors", "trainer_state.json"}
    wanted = {path.name for path in Path(folder).iterdir()}
    check(names == wanted, f"{what}: the same files", str(names ^ wanted))
    wrong = [name for name in names & wanted - {"config.json", "model.safetensors"}
             if Path(folder, name).read_bytes() != Path(written, name).read_bytes()]
    check(not wrong, f"{what}: the same bytes", str(wrong))
    before, after = (json.loads(Path(f, "config.json").read_text()) for f in (folder, written))
    types = {key: "float32" for key in ("dtype", "torch_dtype") if key in before}
    check(after == before | types, f"{what}: the same config.json but for its type",
          str({key: (before.get(key), after.get(key)) for key in before.keys() | after.keys()
               if before.get(key) != after.get(key)}))
    before, after = (load_file(f + "/model.safetensors") for f in (folder, written))
    wrong = [name for name in before.keys() | after.keys()
             if name not in after or not torch.equal(after[name], before.get(name, torch.empty(0)).float())]
    check(not wrong and {value.dtype for value in after.values()} == {torch.float32}, f"{what}: the same weights",
          str(wrong))


def make_rows(number, vocab_size):
    """Two rows of random ids, the second padded at its left."""
    path, rng = f"{WORK}/folder-{number}.jsonl", np.random.default_rng(number)
    with open(path, "w") as file:
        for length in (20, 11):
            ids, mask = rng.integers(0, vocab_size, 20).tolist(), [0] * (20 - length) + [1] * length
            print(f'{{"input_ids": {ids}, "attention_mask": {mask}}}', file=file)
    return path


def compare_silence(folder):
    """Loading what train_gpt2 wrote, with a vocabulary, in the ways that users do: no warning at all."""
    for name, use in USES.items():
        ok, _, why = run(sys.executable, "-c", f"{SILENCE}{use}", folder)
        check(ok and why.endswith(", imported"), f"{name} says nothing of our folder", why)


def compare(kinds=KINDS):
    os.makedirs(WORK, exist_ok=True)
    for number, (kind, arguments) in enumerate(kinds.items()):
        compare_kind(number, kind, *arguments)
    compare_unchanged()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--124M", dest="large", action="store_true", help="a random model of 124M as well (slow)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compare(KINDS | LARGE if args.large else KINDS)
    checks.finish()
