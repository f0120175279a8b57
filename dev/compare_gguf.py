#!/usr/bin/env python3
"""Compares the .gguf that data/convert.py writes with the folder it came from, on random models.

  dev/compare_gguf.py [--seed N] [FOLDER...]     usually through dev/compare_test.sh, which sets all up

gguf's reader must find each tensor, token and setting. Where llama_cpp is installed (pip install llama-cpp-python
compiles llama.cpp, so nothing here does it), llama.cpp itself must give the same ids of texts, and the same greedy
text as train_gpt2 and transformers. FOLDERs are compared like the random models.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import gguf
import reference  # noqa: F401, it turns off the network
import numpy as np
import torch
import transformers
from checks import WORK, check, finish, must_run, run, skip, stories

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import convert  # noqa: E402

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

TEXTS = ["Anna lives in the old mill.", "<|user|> Where is  Anna?\n\n<|end|>We'll seed<|user|>", "seedling reseed  ",
         "Über Ärger, Привет, 世界! \U0001f642\u00a0x", "'s 've\t 12 345,67 ... (a)"]


def converted(*words):
    """data/convert.py in this process, since importing transformers takes longer than all the rest: (ok, errors)."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        sys.argv = ["convert.py", *words]
        try:
            convert.main()
        except SystemExit as end:
            return False, str(end)
    return not errors.getvalue(), errors.getvalue()


def make_folder(folder, vocabulary, rng, *, rows=0, added=True, dtype=torch.float32, generation=None, **settings):
    """A random model with `rows` rows more than tokens; weights so large that greedy texts have no ties."""
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(vocabulary)
    if added:
        special = ["<|user|>", "<|end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.add_tokens([transformers.AddedToken("seed", normalized=False)])
    tokenizer.save_pretrained(folder)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64} | settings
    config = transformers.GPT2Config(vocab_size=len(tokenizer) + rows, bos_token_id=tokenizer.eos_token_id,
                                     eos_token_id=tokenizer.eos_token_id, **sizes)
    torch.manual_seed(int(rng.integers(1 << 30)))
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.generation_config.eos_token_id = generation or tokenizer.eos_token_id
    model.to(dtype).save_pretrained(folder)


def check_read(what, path, folder, half):
    """Each tensor and setting, by gguf's own reader."""
    reader = gguf.GGUFReader(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, state, count = model.config, dict(model.named_parameters()), len(tokenizer)
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
             "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    found, wrong = {tensor.name: tensor for tensor in reader.tensors}, []
    for name, value in state.items():
        place, kind = name.removeprefix("transformer.").rsplit(".", 1)
        layer, _, inner = place.removeprefix("h.").partition(".") if place.startswith("h.") else ("", "", place)
        stored = found.pop(f"blk.{layer}.{names[inner]}.{kind}" if layer else f"{names[inner]}.{kind}", None)
        value = value.detach().numpy()
        value = value[:count] if inner in ("wte", "lm_head") else value.T
        is_half = half and value.ndim == 2 and inner != "wpe"
        value = value if inner != "wpe" else value.T
        if stored is None or not np.array_equal(stored.data, value.astype("<f2") if is_half else value):
            wrong.append(name)
    check(not wrong and not found, f"{what}: tensors", f"wrong {wrong}, too many {list(found)}")
    field = {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    added = tokenizer.added_tokens_decoder
    wanted = {
        "general.architecture": "gpt2", "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd, "gpt2.block_count": config.n_layer,
        "gpt2.feed_forward_length": config.n_inner or 4 * config.n_embd,
        "gpt2.attention.head_count": config.n_head, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(list(range(count))),
        "tokenizer.ggml.token_type": [1 if i not in added else 3 if added[i].special else 4 for i in range(count)],
        "tokenizer.ggml.add_bos_token": False}
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    wanted |= {f"tokenizer.ggml.{name}_token_id": end for name, end in zip(("eos", "eot", "eom"), ends)}
    wrong = {key: (value, field.get(key)) for key, value in wanted.items() if field.get(key) != value}
    epsilon = field["gpt2.attention.layer_norm_epsilon"]
    check(not wrong and abs(epsilon / config.layer_norm_epsilon - 1) < 1e-6, f"{what}: settings and tokens",
          f"{wrong}, epsilon {epsilon}"[:300])
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    check([tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]] == [tuple(pair) for pair in rules],
          f"{what}: {len(rules)} merges")


def check_llama(what, path, folder, half, prompts):
    """llama.cpp's ids of texts, logits, and greedy texts beside transformers' and train_gpt2's."""
    llama = llama_cpp.Llama(path, n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends, count = model.generation_config.eos_token_id, len(tokenizer)
    ends = set(ends if isinstance(ends, list) else [ends])
    wrong = [text for text in TEXTS + prompts
             if llama.tokenize(text.encode(), add_bos=False, special=True) != tokenizer(text).input_ids]
    check(not wrong, f"{what}: llama.cpp has AutoTokenizer's ids", repr(wrong))
    worst, close, differ, total = 0.0, 0, [], 0
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        printed = must_run("./train_gpt2", "--init", folder, "--generate", "40", "--temperature", "0",
                           "--prompt", prompt, "--quiet").decode(errors="replace")
        first = len(ids)
        while len(ids) < min(first + 40, model.config.n_positions):  # transformers' greedy ids
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, :count].argmax()))
            if ids[-1] in ends:
                break
        llama.reset()
        llama.eval(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :, :count].numpy()
        error = np.abs(llama.scores[:len(ids)] - logits).max()
        worst = max(worst, error / np.abs(logits).max())
        for i in range(first, len(ids)):  # what llama.cpp draws behind the same text
            best = int(llama.scores[i - 1].argmax())
            total += 1
            gap = logits[i - 1, ids[i]] - np.partition(logits[i - 1], -2)[-2]
            if best != ids[i]:
                close += gap < 2 * error
                differ += [(prompt, i - first)] if gap >= 2 * error else []
        text = tokenizer.decode(ids if ids[-1] not in ends else ids[:-1])
        if not printed.strip().startswith(text.strip()):
            differ.append((prompt, "train_gpt2", text, printed))
        eog = [i for i in range(count) if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(
            llama.model), i)]
        if not set(ends) <= set(eog):
            differ.append(("ends", ends, eog))
    print(f"       llama.cpp's logits: worst deviation {worst:.1e} of the largest; {total} greedy tokens, "
          f"{close} at a tie within that")
    check(not differ and worst < (2e-2 if half else 5e-3), f"{what}: llama.cpp's greedy text is transformers' and "
          "train_gpt2's", f"{differ} {worst:.1e}"[:600])


def compare(what, folder, prompts, *options):
    path = f"{WORK}/compare.gguf"
    ok, why = converted("--force", *options, folder, path)
    if check(ok, f"gguf of {what}: written", why):
        check_read(f"gguf of {what}", path, folder, "--half" in options)
        if llama_cpp:
            check_llama(f"gguf of {what}", path, folder, "--half" in options, prompts)


def refused(what, folder, pattern):
    path = f"{WORK}/refused.gguf"
    Path(path).unlink(missing_ok=True)
    ok, why = converted(folder, path)
    check(not ok and pattern in why and not os.path.exists(path), f"gguf of {what}: refused", why)


def edit(folder, name, change):
    path = Path(folder, name)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def compare_all(seed, folders=()):
    rng = np.random.default_rng(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _, vocabulary = stories("gguf")
    prompts = ["Anna", "The old mill", "<|user|>", "Where is the baker? "]
    end = transformers.GPT2Tokenizer.from_pretrained(vocabulary).eos_token_id
    cases = {"a model": {}, "heads of 11": {"n_head": 3, "n_embd": 33}, "heads of 5, n_inner 37": {
        "n_head": 3, "n_embd": 15, "n_inner": 37}, "an untied head": {"tie_word_embeddings": False},
        "more rows than tokens": {"rows": 61}, "untied, more rows": {"rows": 3, "tie_word_embeddings": False},
        "epsilon 0.01, two ends": {"layer_norm_epsilon": 0.01, "generation": [end, 7]},
        "bfloat16": {"dtype": torch.bfloat16}, "no added tokens": {"added": False}}
    for number, (what, settings) in enumerate(cases.items()):
        folder = f"{WORK}/gguf-{number}"
        make_folder(folder, vocabulary, rng, **settings)
        compare(what, folder, prompts)
    compare("--half", f"{WORK}/gguf-0", prompts, "--half")
    ok, _, why = run(sys.executable, "data/convert.py", f"{WORK}/gguf-0", f"{WORK}/compare.gguf")
    check(not ok and "--force" in why, "gguf: a file that is there stays", why)
    for folder in folders:
        compare(folder, folder, prompts)
    if not llama_cpp:
        skip("gguf: llama.cpp's ids and texts: llama_cpp is not installed")

    folder = f"{WORK}/gguf-bad"
    for what, pattern, name, change in (
            ("relu", "activation_function", "config.json", lambda c: c.update(activation_function="relu")),
            ("no end of text", "no end of text", "config.json", None),
            ("lstrip", "<|user|> is lstrip", "tokenizer.json", lambda t: t["added_tokens"][1].update(lstrip=True)),
            ("a normalizer", "rules that are not GPT-2's", "tokenizer.json",
             lambda t: t.update(normalizer={"type": "Lowercase"})),
            ("a token put in front", "rules that are not GPT-2's", "tokenizer.json", lambda t: t.update(
                post_processor={"type": "TemplateProcessing", "pair": [], "single": [
                    {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}}})),
            ("four ends of text", "at most three", "generation_config.json",
             lambda g: g.update(eos_token_id=[1, 2, 3, 4]))):
        make_folder(folder, vocabulary, rng)
        if name == "tokenizer.json":  # GPT2Tokenizer, the class, would put its own rules above the file's
            edit(folder, "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"))
        if change:
            edit(folder, name, change)
        else:
            for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
                edit(folder, name, lambda value: value.update(eos_token_id=None, eos_token=None))
        refused(what, folder, pattern)
    make_folder(folder, vocabulary, rng, rows=-1)
    refused("more tokens than rows", folder, "the model has only")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    print(f"dev/compare_gguf.py --seed {arguments.seed}")
    compare_all(arguments.seed, arguments.folders)
    finish()
