#!/usr/bin/env python3
"""Compares data/convert.py with torch and transformers, and tries the download scripts on its own server.

  dev/compare_convert.py [--seed N]     usually through dev/compare_test.sh, which sets all up

All inputs are made here; llm.c's files are written by numpy from their layout, not by convert.py. GPT-2's own
vocabulary is taken from the folder DATA_MIRROR or ../shared/mirror; without it those tests are skipped.
"""
import argparse
import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file, save_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
V, P, L, H, C = 300, 24, 2, 4, 32
PADDED = 384
counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(ok, what, why=""):
    counts["passed" if ok else "failed"] += 1
    print(f"{'ok    ' if ok else 'FAILED'} {what}" + (f": {why}" if why and not ok else ""), flush=True)


def run(*command, env=None):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT,
                            timeout=120, env=env)
    return result.returncode, result.stdout, result.stderr


def convert(*words):
    return run(sys.executable, "data/convert.py", *words)


def check_convert(what, *words):
    status, _, errors = convert(*words)
    check(status == 0 and not errors, what, f"exit status {status}, {errors.strip()[-200:]}")


def tree(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def check_refused(work, what, pattern, *words, without=None):
    """One line on standard error that matches, exit status 1, and every file as it was. without: a package that
    cannot be imported."""
    before = tree(work)
    if without:
        words = ["-c", f"import sys, runpy; sys.modules['{without}'] = None; sys.argv[0] = 'convert.py'; "
                 "runpy.run_path('data/convert.py', run_name='__main__')", *words]
    status, _, errors = run(sys.executable, *words) if without else convert(*words)
    ok = status == 1 and errors.count("\n") == 1 and re.search(pattern, errors) and tree(work) == before
    check(ok, f"refused: {what}", f"exit status {status}, {errors.strip()[-200:]!r}, files "
          + ("as they were" if tree(work) == before else "changed"))


# ---- Weights ----


def llmc_weights(rng, bits):
    """llm.c's tensors at random, as float32: [(Hugging Face's name with # for the layer, array), ...]."""
    shapes = [("wte.weight", PADDED, C), ("wpe.weight", P, C), ("h.#.ln_1.weight", L, C),
              ("h.#.ln_1.bias", L, C), ("h.#.attn.c_attn.weight", L, 3 * C, C),
              ("h.#.attn.c_attn.bias", L, 3 * C),
              ("h.#.attn.c_proj.weight", L, C, C), ("h.#.attn.c_proj.bias", L, C), ("h.#.ln_2.weight", L, C),
              ("h.#.ln_2.bias", L, C), ("h.#.mlp.c_fc.weight", L, 4 * C, C), ("h.#.mlp.c_fc.bias", L, 4 * C),
              ("h.#.mlp.c_proj.weight", L, C, 4 * C), ("h.#.mlp.c_proj.bias", L, C), ("ln_f.weight", C),
              ("ln_f.bias", C)]
    tensors = [(name, rng.normal(0, 0.3, shape).astype("<f4")) for name, *shape in shapes]
    tensors[0][1][V:] = 0
    for _, value in tensors:
        if bits == 16:
            value.view("<u4")[...] &= 0xFFFF0000  # a float32 that bfloat16 holds exactly
    return tensors


def llmc_file(tensors, version):
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, P, V, L, H, C, PADDED
    data = np.concatenate([value.ravel() for _, value in tensors])
    return header.tobytes() + (data if version == 3 else (data.view("<u4") >> 16).astype("<u2")).tobytes()


def model_of(tensors):
    """The same model in transformers, put together tensor by tensor."""
    config = transformers.GPT2Config(vocab_size=V, n_positions=P, n_embd=C, n_layer=L, n_head=H,
                                     embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
                                     bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    parameters = dict(model.transformer.named_parameters())
    for name, value in tensors:
        for i, part in enumerate(value if "#" in name else [value]):
            if name == "wte.weight":
                part = part[:V]
            elif "#" in name and part.ndim == 2:
                part = part.T
            parameters[name.replace("#", str(i))].copy_(torch.tensor(part.copy()))
    return model


def check_folder(what, folder, model, shard):
    """transformers loads the folder without a complaint, to the same bits; train_gpt2 gets the same loss."""
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
                                                                     dtype=torch.float32)
    problems = {key: value for key, value in info.items() if value}
    check(not problems, f"{what}: transformers loads it", str(problems))
    ids = torch.tensor(np.fromfile(shard, "<u2", offset=1024).astype(np.int64))[None]
    with torch.no_grad():
        logits, wanted = (m.eval()(input_ids=ids[:, :-1]).logits for m in (loaded, model))
        loss = torch.nn.functional.cross_entropy(wanted[0], ids[0, 1:]).item()
    check(torch.equal(logits, wanted), f"{what}: logits, to the bit", f"{(logits - wanted).abs().max():.1e}")
    status, printed, errors = run("./train_gpt2", "--init", folder, "--eval", "--val", shard, "--seq-len", P,
                                  "--quiet")
    found = re.search(r"loss ([0-9.]+)", printed)
    ok = status == 0 and found and abs(float(found.group(1)) - loss) <= 1e-4 * loss
    check(ok, f"{what}: train_gpt2 --eval, loss {loss:.4f}", (printed + errors).strip()[-200:])


def dtypes(folder, name="model.safetensors"):
    with safe_open(folder / name, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}, sorted(file.keys())


def test_llmc(work, rng, shard):
    for version, dtype in ((3, "F32"), (5, "BF16")):
        tensors = llmc_weights(rng, 32 if version == 3 else 16)
        source, folder, back = work / f"v{version}.bin", work / f"v{version}", work / f"v{version}-back.bin"
        source.write_bytes(llmc_file(tensors, version))
        what = f"llm.c version {version}"
        check_convert(what, source, folder)
        model = model_of(tensors)
        check_folder(what, folder, model, shard)
        found, names = dtypes(folder)
        wanted = sorted("transformer." + name for name, _ in model.transformer.named_parameters())
        check(found == {dtype} and names == wanted, f"{what}: names and {dtype}", f"{found}, {names}")
        check_convert(f"{what}: and back", folder, back)
        check(back.read_bytes() == llmc_file(tensors, 3), f"{what}: and back, byte for byte as version 3")
    good = (work / "v3.bin").read_bytes()
    for what, data, pattern in (
            ("llm.c weights cut off", good[:-1], "its header promises"),
            ("llm.c weights with a byte too many", good + b"x", "its header promises"),
            ("llm.c weights cut off in the header", good[:500], "1024 expected"),
            ("llm.c weights of another version", good[:4] + b"\4" + good[5:], "version 4"),
            ("llm.c weights without layers", good[:16] + bytes(4) + good[20:], "n_layer is 0"),
            ("llm.c weights with huge sizes", good[:8] + b"\xff\xff\xff\x7f" * 4 + good[24:], "channels"),
            ("token shard", shard.read_bytes(), "token shard"), ("unknown file", b"hello", "neither")):
        (work / "bad.bin").write_bytes(data)
        check_refused(work, what, pattern, work / "bad.bin", work / "bad")
    check_refused(work, "existing output", "--force", work / "v3.bin", work / "v5")
    check_refused(work, "existing .bin", "--force", work / "v3", work / "v5-back.bin")
    check_refused(work, "missing input", "No such file", work / "nothing.bin", work / "bad")
    check_convert("--force", "--force", work / "v3", work / "v5-back.bin")
    check((work / "v5-back.bin").read_bytes() == good, "--force replaces the file")
    check(convert("one")[0] == 2, "a wrong command line has exit status 2")


def test_hugging_face(work, rng, shard):
    model = model_of(llmc_weights(rng, 32))
    config = work / "v3" / "config.json"
    bare = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    stray = {f"h.{i}.attn.{name}": value for i in range(L) for name, value in (
        ("bias", torch.ones(1, 1, P, P, dtype=torch.bool).tril()), ("masked_bias", torch.tensor(-1e4)))}
    for what, state in (("bare names, masks", {**bare, **stray}),
                        ("transformer. names, lm_head", dict(model.state_dict()))):
        source, folder = work / ("torch " + what), work / ("folder " + what)
        source.mkdir()
        shutil.copy(config, source)
        torch.save(state, source / "pytorch_model.bin")
        what = "pytorch_model.bin, " + what
        check_convert(what, source, folder)
        check_folder(what, folder, model, shard)
        check(not {"lm_head.weight"} & set(dtypes(folder)[1]) and len(dtypes(folder)[1]) == 4 + 12 * L,
              f"{what}: masks and head dropped", str(dtypes(folder)[1]))
    status, _, errors = run("./train_gpt2", "--init", source, "--eval", "--val", shard, "--quiet")
    check(status == 1 and f"data/convert.py {source} " in errors,
          "train_gpt2 names the command", errors)
    check_convert("pytorch_model.bin, in place", source, source)
    check_folder("pytorch_model.bin, in place", source, model, shard)
    check_refused(work, "in place, nothing to do", "already", source, source)

    sharded = work / "sharded"
    model.save_pretrained(sharded, max_shard_size="30KB")
    files = len(list(sharded.glob("model-*.safetensors")))
    check(files > 1, "transformers writes shards", f"{files} of them")
    check_convert(f"safetensors in {files} shards", sharded, work / "whole")
    check_folder("safetensors in shards", work / "whole", model, shard)
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    check_refused(work, "a shard cut off", f"{last.name}: .*bytes? ", sharded, work / "bad")
    last.unlink()
    check_refused(work, "a shard missing", f"{last.name}: No such file", sharded, work / "bad")

    half = work / "half"
    half.mkdir()
    shutil.copy(config, half)
    torch.save({name: value.half() for name, value in bare.items()}, half / "pytorch_model.bin")
    check_convert("float16", half, half)
    check_folder("float16", half, loaded_half(model), shard)
    check(dtypes(half)[0] == {"F16"}, "float16 stays F16")

    def variant(name, edit, state):
        folder = work / name
        folder.mkdir()
        settings = json.loads(config.read_text())
        settings.update(edit)
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(state, folder / "model.safetensors")
        return folder

    untied = variant("untied", {"tie_word_embeddings": False}, {**bare, "lm_head.weight": torch.randn(V, C)})
    check_refused(work, "untied head to llm.c", "not tied", untied, work / "bad.out.bin")
    check_convert("untied head to a folder", untied, work / "untied-2")
    check("lm_head.weight" in dtypes(work / "untied-2")[1], "untied head is kept")
    wide = {name: torch.cat([value, value], 1 if "c_fc.weight" in name else 0)
            if "c_fc" in name or "mlp.c_proj.weight" in name else value for name, value in bare.items()}
    wide = variant("wide", {"n_inner": 8 * C}, wide)
    check_refused(work, "n_inner 8C to llm.c", "n_inner is 256", wide, work / "bad.out.bin")
    without = {name: value for name, value in bare.items() if name != "h.1.ln_2.bias"}
    check_refused(work, "missing tensor", "h.1.ln_2.bias is missing", variant("m", {}, without), work / "bad")
    shape = {**bare, "wpe.weight": torch.zeros(P, C + 1)}
    check_refused(work, "misshaped tensor", r"\[24, 33\].*\[24, 32\]", variant("s", {}, shape), work / "bad")
    extra = {**bare, "h.2.ln_1.bias": torch.zeros(C)}
    check_refused(work, "unknown tensor", "h.2.ln_1.bias is not one", variant("x", {}, extra), work / "bad")
    twice = {**bare, "transformer.wpe.weight": torch.zeros(P, C)}
    check_refused(work, "a tensor under two names", "wpe.weight is there twice", variant("d", {}, twice),
                  work / "bad")
    for key, value in (("layer_norm_epsilon", 0.01), ("activation_function", "gelu"),
                       ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)):
        check_refused(work, f"{key} {value} to llm.c", f"{key} is {json.dumps(value)}; llm.c knows only",
                      variant(key, {key: value}, bare), work / "bad.out.bin")
    tanh = variant("tanh", {"activation_function": "gelu_pytorch_tanh"}, bare)
    check_convert("gelu_pytorch_tanh to llm.c", tanh, work / "tanh.out.bin")
    (half / "pytorch_model.bin").write_bytes(b"PK\3\4 no zip file")
    (half / "model.safetensors").unlink()
    check_refused(work, "damaged pytorch_model.bin", "PyTorch cannot load it", half, work / "bad")
    (half / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b"{" * 100)
    check_refused(work, "damaged safetensors", "damaged header", half, work / "bad")
    (half / "config.json").unlink()
    check_refused(work, "no config.json", "config.json: is missing", half, work / "bad")


def test_heads(work, rng, shard):
    """lm_head.weight beside or instead of wte.weight, and other spellings of names."""
    model = model_of(llmc_weights(rng, 32))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = torch.randn(V, C)
    tied = {name: value for name, value in state.items() if name != "lm_head.weight"}
    headed = {name: value for name, value in state.items() if name != "transformer.wte.weight"}
    spelled = lambda how: {how(name): value for name, value in tied.items()}  # noqa: E731
    cases = {  # what -> (tensors stored, tie_word_embeddings, whether lm_head.weight is written, a note)
        "another head beside a tied wte": ({**state, "lm_head.weight": other}, True, True, "is not wte"),
        "another head, not said whether tied": ({**state, "lm_head.weight": other}, None, True, "is not wte"),
        "the same head beside wte": (state, True, False, ""),
        "only lm_head.weight": (headed, True, False, ""),
        "an untied head that is the same": (state, False, True, ""),
        "names with _orig_mod.": (spelled(lambda name: "_orig_mod." + name), True, False, ""),
        "names with module.": (spelled(lambda name: "module." + name), None, False, ""),
        "names with module._orig_mod. and without transformer.": (
            spelled(lambda name: "module._orig_mod." + name.removeprefix("transformer.")), True, False, ""),
        "blocks compiled one by one": (
            spelled(lambda name: re.sub(r"(h\.\d+)", r"\1._orig_mod", name)), True, False, "")}
    for number, (what, (stored, tie, has_head, pattern)) in enumerate(cases.items()):
        source, folder = work / f"source-{number}", work / f"folder-{number}"
        settings = json.loads(model.config.to_json_string())
        settings |= {"tie_word_embeddings": tie, "someone's": [1, None]}
        if tie is None:
            del settings["tie_word_embeddings"]
        source.mkdir()
        (source / "config.json").write_text(json.dumps(settings))
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        status, _, errors = convert(source, folder)
        ok = status == 0 and errors.count("\n") == bool(pattern) and pattern in errors
        check(ok, what, f"exit status {status}, {errors.strip()[-200:]}")
        reference = model
        if "names" not in what and "blocks" not in what:  # transformers knows these itself
            reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            kept = torch.equal(reference.lm_head.weight, other)
            check(kept == ("another" in what), f"{what}: transformers' head is what we think")
        check_folder(what, folder, reference, shard)
        written = json.loads((folder / "config.json").read_text())
        wanted = settings | {"tie_word_embeddings": False} if pattern else settings
        check(written == wanted and ("lm_head.weight" in dtypes(folder)[1]) == has_head,
              f"{what}: config.json and head", f"{written}, {dtypes(folder)[1]}")
    save_model(model, work / "folder-0" / "saved.safetensors")
    check(set(dtypes(work / "folder-0", "saved.safetensors")[1]) == set(headed),
          "save_model of safetensors stores only the head")
    lost = work / "lost"
    lost.mkdir()
    (lost / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    save_file(headed, lost / "model.safetensors", metadata={"format": "pt"})
    check_refused(work, "an untied model without wte", "wte.weight is missing", lost, work / "bad")


# ---- nanoGPT ----


class Block(torch.nn.Module):
    """A block with nanoGPT's names and layout: Linear has [out, in], and biases only if they are wanted."""

    def __init__(self, bias, gelu):
        super().__init__()
        norm, linear = torch.nn.LayerNorm, torch.nn.Linear
        self.ln_1, self.ln_2 = norm(C, bias=bias), norm(C, bias=bias)
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.c_attn, self.attn.c_proj = linear(C, 3 * C, bias), linear(C, C, bias)
        self.mlp.c_fc, self.mlp.c_proj = linear(C, 4 * C, bias), linear(4 * C, C, bias)
        self.gelu = gelu

    def forward(self, x):
        heads = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3 * H, C // H)).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(*heads.chunk(3, 1), is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(torch.nn.Module):
    def __init__(self, vocab, bias, gelu):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({
            "wte": torch.nn.Embedding(vocab, C), "wpe": torch.nn.Embedding(P, C),
            "h": torch.nn.ModuleList(Block(bias, gelu) for _ in range(L)),
            "ln_f": torch.nn.LayerNorm(C, bias=bias)})
        self.lm_head = torch.nn.Linear(C, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.3)

    def forward(self, input_ids):
        x = self.transformer.wte(input_ids) + self.transformer.wpe.weight[:input_ids.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def test_nanogpt(work, shard):
    for number, (vocab, bias, prefix, gelu) in enumerate((
            (50304, False, "_orig_mod.", "none"), (V, True, "", "none"), (V, False, "", "tanh"),
            (50257, True, "_orig_mod.", "tanh"))):
        what = f"nanoGPT, {vocab} rows, bias {bias}, gelu by {'tanh' if gelu == 'tanh' else 'erf'}"
        model = NanoGPT(vocab, bias, torch.nn.GELU(gelu)).eval().requires_grad_(False)
        state = {prefix + name: value for name, value in model.state_dict().items()}
        mask = torch.ones(1, 1, P, P).tril()  # older versions store it
        state |= {f"{prefix}transformer.h.{i}.attn.bias": mask for i in range(L)}
        source, folder = work / f"nano-{number}", work / f"nano-folder-{number}"
        source.mkdir()
        sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": P, "bias": bias, "vocab_size": vocab,
                 "dropout": 0.1}
        torch.save({"model": state, "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
                    "model_args": sizes, "iter_num": 100, "best_val_loss": torch.tensor(3.0),
                    "config": {"dataset": "openwebtext", "learning_rate": 6e-4}}, source / "ckpt.pt")
        status, _, errors = convert(source / "ckpt.pt" if number % 2 else source, folder)
        check(status == 0 and errors.count("\n") == 1 and "gelu by erf" in errors, what, errors)
        ids = torch.randint(0, vocab, (2, P))
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        check(not any(info.values()), f"{what}: transformers loads it", str(info))
        with torch.no_grad():
            ours, theirs = loaded.eval()(input_ids=ids).logits, model(ids)
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"       logits: worst deviation {error:.1e} of the largest")
        check(error <= (1e-5 if gelu == "tanh" else 2e-3) and ours.shape == theirs.shape, f"{what}: logits",
              f"{error:.1e}")
        config, end = loaded.config, 50256 if vocab > 50256 else None
        check(config.vocab_size == vocab and config.eos_token_id == end
              and loaded.generation_config.eos_token_id == end, f"{what}: config", str(config))
        if vocab == V:
            check_folder(what, folder, loaded, shard)
    status, _, errors = convert(source, source)
    check(status == 0 and (source / "model.safetensors").is_file() and (source / "config.json").is_file(),
          "nanoGPT, in place", errors)
    for name, edit in (("block_size", {"block_size": "x"}), ("heads", {"n_head": 5}),
                       ("n_layer", {"n_layer": L + 1})):
        bad = work / f"nano-bad-{name}.pt"
        torch.save({"model": state, "model_args": sizes | edit}, bad)
        check_refused(work, f"nanoGPT, wrong {name}", "n_positions is|do not divide|is missing", bad,
                      work / "bad")
    torch.save({"model": [1], "model_args": sizes}, work / "nano-bad.pt")
    check_refused(work, "nanoGPT without tensors", "a state dict expected", work / "nano-bad.pt",
                  work / "bad")


# ---- What lies beside the weights ----


def test_carried(work, rng):
    """All files of tokenizer and generation, and config.json with keys that nobody knows, byte for byte."""
    model = model_of(llmc_weights(rng, 32))
    texts = {"vocab.json": '{"a":   0}', "merges.txt": "#version: 0.2\r\n",
             "tokenizer.json": '{"added_tokens": []}\n\n',
             "tokenizer_config.json": '{"x": 1e-5,  "\u00e9": "\\u00e9"}', "special_tokens_map.json": "{ }",
             "added_tokens.json": '{"<é>": 5}', "chat_template.jinja": "{{ messages }}",
             "generation_config.json": '{"eos_token_id": [1, 2]}'}
    settings = json.loads(model.config.to_json_string()) | {"task_specific_params": {"x": 0.10}}
    settings = json.dumps(settings, indent=3)
    state = {"module." + name: value.clone() for name, value in model.state_dict().items()}
    for what, save in (("pytorch_model.bin", torch.save), ("model.safetensors", save_file)):
        source, folder = work / what, work / (what + " folder")
        source.mkdir()
        for name, text in texts.items():
            (source / name).write_text(text, encoding="utf-8", newline="")
        (source / "config.json").write_text(settings + "  \n")
        save(state, source / what)
        check_convert(f"{what} with all that lies beside it", source, folder)
        wrong = [name for name in [*texts, "config.json"] if not (folder / name).is_file()
                 or (folder / name).read_bytes() != (source / name).read_bytes()]
        found = len(list(folder.iterdir()))
        check(not wrong and found == len(texts) + 2, f"{what}: byte for byte", f"{wrong}, {found} files")


def loaded_half(model):
    """The model with each weight rounded to float16."""
    rounded = transformers.GPT2LMHeadModel(model.config).requires_grad_(False)
    rounded.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    return rounded


# ---- Tokenizers ----


def llmc_tokenizer(tokens, version, end):
    header = np.zeros(256, "<i4")
    header[:4] = 20240328, version, len(tokens), end
    return header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens)


def test_tokenizers(work):
    """A vocabulary that tokenizers trains, to both formats, and back."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace(END, "")
    text += "Über Ärger, Привет, 世界世界 \U0001f642\U0001f642 " * 20
    bpe.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=letters, show_progress=False, special_tokens=[]))
    wanted = json.loads(bpe.to_str())["model"]
    names = sorted(wanted["vocab"], key=wanted["vocab"].get)
    wanted_merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in wanted["merges"])
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes(byte_of[letter] for letter in name) for name in names]
    tiktoken = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    end = END.encode()
    (work / "t.tiktoken").write_bytes(tiktoken)
    (work / "last.bin").write_bytes(llmc_tokenizer(tokens + [end], 2, len(tokens)))
    (work / "first.bin").write_bytes(llmc_tokenizer([end] + tokens, 2, 0))
    orders = {"t.tiktoken": names + [END], "last.bin": names + [END], "first.bin": [END] + names}
    for name, order in orders.items():
        folder = work / (name + ".folder")
        check_convert(name, work / name, folder)
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        check(vocabulary == {token: i for i, token in enumerate(order)}, f"{name}: vocab.json")
        merges = (folder / "merges.txt").read_text(encoding="utf-8")
        check(merges == wanted_merges, f"{name}: the {len(wanted['merges'])} merges that were learned")
        ids = transformers.AutoTokenizer.from_pretrained(folder).encode(text)
        (work / "text.txt").write_text(text, encoding="utf-8")
        status, printed, errors = run("./tokenizer", "encode", "--tokenizer", folder, work / "text.txt")
        check(status == 0 and [int(word) for word in printed.split()] == ids
              and ids == [i + (name == "first.bin") for i in bpe.encode(text).ids],
              f"{name}: ./tokenizer and AutoTokenizer, {len(ids)} ids", errors)
        status, _, errors = run("./tokenizer", "encode", "--tokenizer", work / name, work / "text.txt")
        check(status == 1 and f"data/convert.py {work / name}" in errors,
              f"{name}: ./tokenizer names the command", errors)
    pairs = [bytes([byte]) for byte in range(256)] + [bytes(divmod(i, 256)) for i in range(50000)]
    (work / "one.bin").write_bytes(llmc_tokenizer(pairs + [end], 1, 0))
    check_convert("version 1", work / "one.bin", work / "one")
    lines = (work / "one/merges.txt").read_text(encoding="utf-8").splitlines()
    letter = {byte: name for name, byte in byte_of.items()}
    wanted = [f"{letter[i // 256]} {letter[i % 256]}" for i in range(50000)]
    check(lines[1:] == wanted, "version 1: 50,000 merges")
    check(json.loads((work / "one/vocab.json").read_text())[END] == 50256, "version 1: end of text 50256")
    good = (work / "last.bin").read_bytes()
    for what, name, data, pattern in (
            ("tokenizer cut off", "b.bin", good[:-1], "promises"),
            ("tokenizer with a byte too many", "b.bin", good + b"x", "promises"),
            ("tokenizer whose end of text is none", "b.bin", llmc_tokenizer(tokens, 2, 5000), "end of text"),
            ("tokenizer of another version", "b.bin", llmc_tokenizer(tokens, 3, 0), "version 3"),
            ("tokenizer that lacks a byte", "b.bin", llmc_tokenizer(tokens[1:] + [end], 2, 899), "byte 33"),
            ("token that nothing makes", "b.tiktoken", tiktoken + b"/v/+//4= 900\n", "not made of two"),
            (".tiktoken with a bad line", "b.tiktoken", tiktoken + b"?? x\n", f"line {len(tokens) + 1}"),
            (".tiktoken with a gap", "b.tiktoken", tiktoken + b"/v/+ 5000\n", "ranks")):
        (work / name).write_bytes(data)
        check_refused(work, what, pattern, work / name, work / "bad")
    check_refused(work, "tokenizer to .bin", "folder", work / "t.tiktoken", work / "bad.bin.bin")


def test_gpt2_vocabulary(work):
    for mirror in (os.environ.get("DATA_MIRROR"), ROOT.parent / "shared" / "mirror"):
        for name in ("gpt2.tiktoken", "gpt2_tokenizer.bin"):
            if mirror and all((Path(mirror) / n).is_file() for n in (name, "vocab.bpe", "encoder.json")):
                folder = work / (name + ".gpt2")
                check_convert(f"GPT-2's {name}", Path(mirror) / name, folder)
                same = (folder / "merges.txt").read_bytes() == (Path(mirror) / "vocab.bpe").read_bytes()
                check(same, f"GPT-2's {name}: merges.txt is vocab.bpe, byte for byte")
                same = (folder / "vocab.json").read_bytes() == (Path(mirror) / "encoder.json").read_bytes()
                check(same, f"GPT-2's {name}: vocab.json is encoder.json, byte for byte")
        if list(work.glob("*.gpt2")):
            return
    counts["skipped"] += 1
    print("skipped GPT-2's vocabulary: no mirror with vocab.bpe, encoder.json, gpt2.tiktoken", flush=True)


# ---- Tables of examples ----


def test_tables(work):
    """Tables of each kind that someone may have, to .jsonl; the values are what csv, json and pyarrow mean by them."""
    pairs = [{"prompt": "Wer ist \"Ü\"?", "completion": " Anna,\nsie"}, {"prompt": "", "completion": " 12"}]
    told = [{"prompt": "Add\n1 2", "completion": "\n3"}, {"prompt": "Say x", "completion": "\nx"}]
    talk = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    written = json.dumps(talk[0]["messages"]).replace('"', '""')
    cases = {  # name: (text of the file, what is to become of it, what is noted)
        "pairs.csv": ('prompt,completion\n"Wer ist ""Ü""?"," Anna,\nsie"\n, 12\n', pairs, ""),
        "bom.csv": ('\ufeffid;completion;prompt\r\n1;" Anna,\nsie";"Wer ist ""Ü""?"\r\n2; 12;\r\n', pairs,
                    "not used: id"),
        "TABS.TSV": ('prompt\tcompletion\n"Wer ist ""Ü""?"\t" Anna,\nsie"\n\t 12\nNA\t\n', pairs,
                     "1 of 3 rows are left out, the first is row 3: completion is empty"),
        "alpaca.json": (json.dumps([{"instruction": "Add", "input": "1 2", "output": 3},
                                    {"instruction": "Say x", "input": None, "output": "x"}]), told, ""),
        "alpaca.csv": ("instruction,input,output\nAdd,1 2,3\nSay x,,x\n", told, ""),
        "asked.csv": ("answer,question\nx,Say x\n", told[1:], ""),
        "text.csv": ("text\nNone\n", [{"text": "None"}], ""),
        "talk.csv": (f'messages\n"{written}"\n', talk, ""),
        "talk.json": (json.dumps([{**talk[0], "prompt": "x", "completion": "y"}]), talk,
                      "not used: prompt, completion")}
    for name, (text, wanted, noted) in cases.items():
        (work / name).write_text(text, encoding="utf-8", newline="")
        status, _, errors = convert(work / name, work / (name + ".jsonl"))
        lines = (work / (name + ".jsonl")).read_text(encoding="utf-8").splitlines() if status == 0 else []
        check([json.loads(line) for line in lines] == wanted and noted in errors
              and errors.count("\n") == bool(noted), name, f"{lines} {errors}")
    for name in "asked.csv", "asked.csv.jsonl":
        status, _, errors = convert("--messages", work / name, work / "talks.jsonl", "--force")
        said = json.loads((work / "talks.jsonl").read_text()) if status == 0 else {}
        check(said == {"messages": [{"role": "user", "content": "Say x"}, {"role": "assistant", "content": "x"}]},
              f"{name} as talks", f"{said} {errors}")
    try:
        import pyarrow
        import pyarrow.parquet
        tables = {"pairs.parquet": ({"prompt": ["Wer ist \"Ü\"?", None], "completion": [" Anna,\nsie", " 12"]}, pairs),
                  "numbers.parquet": ({"question": ["Say x", "1+1"], "answer": pyarrow.array([None, 2])},
                                      [{"prompt": "1+1", "completion": "\n2"}]),
                  "talk.parquet": ({"messages": [talk[0]["messages"]]}, talk)}
        for name, (columns, wanted) in tables.items():
            pyarrow.parquet.write_table(pyarrow.table(columns), work / name)
            status, _, errors = convert(work / name, work / (name + ".jsonl"))
            lines = (work / (name + ".jsonl")).read_text(encoding="utf-8").splitlines() if status == 0 else []
            check([json.loads(line) for line in lines] == wanted, name, f"{lines} {errors}")
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [b"x"], "completion": ["y"]}), work / "b.parquet")
        check_refused(work, "bytes in a table", "prompt is neither a text nor a number", work / "b.parquet",
                      work / "bad.jsonl")
    except ImportError:
        counts["skipped"] += 1
        print("skipped .parquet: pyarrow is not installed", flush=True)
    status, printed, errors = run("./train_gpt2", "--init", "d4", "--tokenizer", work.parent / "t.tiktoken.folder",
                                  "--train", work / "asked.csv.jsonl", "--val-fraction", "0", "--plan")
    check(status == 0, "train_gpt2 takes the examples", errors)
    good = "prompt,completion\na,b\n"
    for what, name, data, pattern, output in (
            ("columns of another table", "b.csv", "a,b\n1,2\n", "columns are a, b; expected messages or prompt", ""),
            ("a row with a cell too few", "b.csv", good + "c\n", "line 3: 2 cells expected", ""),
            ("a row with a cell too many", "b.csv", good + "c,d,e\n", "line 3: 2 cells expected", ""),
            ("an open quote", "b.csv", good + '"c,d\n', "line [23]: unexpected end", ""),
            ("no rows", "b.csv", "prompt,completion\n", "no row with anything to learn", ""),
            ("an empty file", "b.csv", "", "no row with anything to learn", ""),
            ("Latin-1", "b.csv", (good + "é,ü\n").encode("latin1"), "iconv -f latin1", ""),
            ("a list that is none", "b.json", "{}", "a list of objects", ""),
            ("a list of something else", "b.json", '[{"text": "x"}, 1]', "row 2: an object", ""),
            ("no JSON", "b.json", "[", "not JSON", ""),
            ("a talk without roles", "b.json", '[{"messages": [{"content": "x"}]}]', "row 1: messages: a list", ""),
            ("half a character", "b.json", '[{"text": "\\ud800"}]', "row 1: has half a character", ""),
            ("no JSON in a line", "b.jsonl", '{"text": "x"}\n[\n', "row 2: not JSON", ""),
            ("no parquet", "b.parquet", good, "pyarrow cannot read it", ""),
            ("a table to a folder", "b.csv", good, "must end in .jsonl", "folder"),
            ("a table to .gguf", "b.csv", good, "must end in .jsonl", "b.gguf"),
            ("weights to .jsonl", "../v3.bin", None, "no table", "")):
        if data is not None:
            (work / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        check_refused(work, what, pattern, work / name, work / (output or "bad.jsonl"))
    check_refused(work, "a table without its package", r"pip install pyarrow$", work / "pairs.parquet",
                  work / "bad.jsonl", without="pyarrow")
    check_refused(work, "a .gguf without its package", r"pip install gguf$", work.parent / "v3",
                  work / "bad.gguf", without="gguf")
    check(convert("--half", "a", "b.bin")[0] == 2, "--half is for .gguf alone")
    check(convert("--messages", "a", "b.bin")[0] == 2, "--messages is for .jsonl alone")
    (work / "adapter").mkdir()
    (work / "adapter/adapter_model.safetensors").write_bytes(b"")
    check_refused(work, "an adapter", r"an adapter \(LoRA\); train_gpt2 writes the whole model into .*merged$", work / "adapter",
                  work / "bad.gguf")


# ---- Downloads ----


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` {path: bytes} with ranges; a path in `cuts` is cut off in the middle, once."""
    files, cuts, requests, ranges = {}, set(), [], True

    def do_GET(self):
        data, begin = self.files.get(self.path), 0
        self.requests.append((self.path, self.headers.get("Range")))
        if data is None:
            return self.send_error(404)
        if self.ranges and (found := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            begin = int(found.group(1))
            if begin >= len(data):
                return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.path in self.cuts:
            self.cuts.remove(self.path)
            data = data[:begin + (len(data) - begin) // 2]
        self.wfile.write(data[begin:])

    def log_message(self, *_):
        pass


def test_downloads(work, rng, tool):
    """data/download.sh and data/gpt2.sh with curl or wget alone; no home can be reached."""
    if not shutil.which(tool):
        counts["skipped"] += 1
        print(f"skipped downloads with {tool}: it is not installed", flush=True)
        return
    programs = work / "programs"
    programs.mkdir()
    others = "sh cat sed grep cut tail tr wc mkdir mv rm dirname basename dd sha256sum shasum perl"
    for name in [tool, *others.split()]:
        if shutil.which(name):
            (programs / name).symlink_to(shutil.which(name))
    dead = "http://127.0.0.1:9"  # nobody listens there; as the proxy it keeps the scripts off the network
    env = {"PATH": str(programs), "https_proxy": dead, "no_proxy": "127.0.0.1", "LC_ALL": "C"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    data = rng.bytes(1 << 20)
    sha = hashlib.sha256(data).hexdigest()
    Server.files = {"/data.bin": data, "/gpt2/config.json": b'{"n_layer": 12}', "/text.jsonl": b"{}\n"}

    def download(what, ok, *words, script="data/download.sh", pattern="", **more):
        """Exit status 0, or else 1 with one line that matches."""
        Server.requests.clear()
        status, printed, errors = run("sh", script, *words, env={**env, **more})
        right = status == 0 and not errors if ok else status == 1 and errors.count("\n") == 1
        check(right and re.search(pattern, printed + errors), f"{tool}: {what}",
              f"exit status {status}, {(printed + errors).strip()[-300:]!r}")

    target, part = work / "got" / "data.bin", work / "got" / "data.bin.part"
    download("whole file", True, "-s", sha, target, url + "/data.bin", pattern="1048576 bytes, sha256")
    check(target.is_file() and target.read_bytes() == data and not part.exists(), f"{tool}: every byte")
    download("a file that is there is kept", True, "-s", sha, target, url + "/data.bin")
    check(not Server.requests, f"{tool}: and not asked for again", str(Server.requests))
    target.write_bytes(b"mine")
    download("another file of that name", False, "-s", sha, target, url + "/data.bin", pattern="remove it")
    check(target.read_bytes() == b"mine", f"{tool}: it stays")
    target.unlink()
    if tool == "curl":  # wget tries again by itself
        Server.cuts.add("/data.bin")
        download("cut off in the middle", False, "-s", sha, target, url + "/data.bin",
                 pattern="goes on from there")
        check(not target.exists() and part.stat().st_size == len(data) // 2, f"{tool}: half is kept as .part")
    else:
        part.write_bytes(data[:len(data) // 2])
    download("the other half", True, "-s", sha, target, url + "/data.bin")
    check(Server.requests == [("/data.bin", f"bytes={len(data) // 2}-")], f"{tool}: only that",
          str(Server.requests))
    check(target.read_bytes() == data, f"{tool}: every byte of both halves")
    target.unlink()
    part.write_bytes(data)
    download("a whole .part", True, "-s", sha, target, url + "/data.bin")
    check(target.read_bytes() == data, f"{tool}: every byte of it")
    target.unlink()
    if tool == "curl":
        part.write_bytes(data[:1000])
        Server.ranges = False
        download("a server without ranges", True, "-s", sha, target, url + "/data.bin")
        Server.ranges = True
        check(target.read_bytes() == data, f"{tool}: every byte, fetched anew")
        target.unlink()
    download("wrong checksum", False, "-s", "0" * 64, target, url + "/data.bin", pattern="sha256 " + sha)
    check(not target.exists() and not part.exists(), f"{tool}: nothing is left of it")
    download("404", False, target, url + "/nothing", pattern="404")
    download("404, then the next source", True, target, url + "/nothing", url + "/data.bin")
    target.unlink()
    download("a server that is off", False, target, dead + "/data.bin", pattern="DATA_MIRROR")
    download("any URL, from the mirror", True, "https://huggingface.co/datasets/a/b/blob/main/text.jsonl",
             work / "got/text.jsonl", DATA_MIRROR=url, pattern="3 bytes")

    # A mirror folder and a mirror server for a whole model folder; its vocabulary must be GPT-2's own.
    folder, mirror = work / "got" / "gpt2", work / "mirror"
    download("gpt2.sh offline", False, "gpt2", folder, script="data/gpt2.sh",
             pattern="config.json.*DATA_MIRROR")
    mirror.mkdir()
    (mirror / "config.json").write_text('{"n_layer": 24}')
    download("gpt2.sh, another model's config.json", False, "gpt2", folder, script="data/gpt2.sh",
             DATA_MIRROR=str(mirror), pattern="n_layer 12 expected")
    (mirror / "vocab.json").write_text("{}")
    download("gpt2.sh, DATA_MIRROR/gpt2, no vocabulary", False, "gpt2", folder, script="data/gpt2.sh",
             DATA_MIRROR=url, pattern="vocab.json: not downloaded")
    check((folder / "config.json").read_bytes() == b'{"n_layer": 12}', f"{tool}: gpt2.sh, config.json")
    download("gpt2.sh, a vocabulary that is not GPT-2's", False, "gpt2", folder, script="data/gpt2.sh",
             DATA_MIRROR=str(mirror), pattern="vocab.json: what .* sha256")
    real = Path(os.environ.get("DATA_MIRROR") or ROOT.parent / "shared" / "mirror")
    if (real / "vocab.bpe").is_file() and (real / "encoder.json").is_file():
        for name in ("vocab.bpe", "encoder.json"):
            shutil.copy(real / name, mirror)
        (mirror / "vocab.json").unlink()
        (mirror / "generation_config.json").write_text("{}")
        (mirror / "model.safetensors").write_text("<html>")
        download("gpt2.sh, weights that are none", False, "gpt2", folder, script="data/gpt2.sh",
                 DATA_MIRROR=str(mirror), pattern="no safetensors")
        (mirror / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        download("gpt2.sh, all from a mirror folder", True, "gpt2", folder, script="data/gpt2.sh",
                 DATA_MIRROR=str(mirror), pattern="124,439,808")
        check(len(os.listdir(folder)) == 5, f"{tool}: gpt2.sh, five files", str(os.listdir(folder)))
        if (real / "tinyshakespeare.txt").is_file():
            download("tinyshakespeare.sh", True, work / "got/tiny", script="data/tinyshakespeare.sh",
                     DATA_MIRROR=str(real), pattern="1115394 bytes, sha256")
    else:
        counts["skipped"] += 1
        print(f"skipped {tool}: gpt2.sh whole, tinyshakespeare.sh: no mirror with vocab.bpe", flush=True)
    download("tinyshakespeare.sh offline", False, work / "got/none", script="data/tinyshakespeare.sh",
             pattern="DATA_MIRROR")
    check(run("sh", "data/gpt2.sh", "gpt3", env=env)[0] == 2, f"{tool}: a model that is none: exit status 2")
    check(not list(work.rglob("*.part")), f"{tool}: no .part is left", str(list(work.rglob("*.part"))))
    server.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run")
    seed = parser.parse_args().seed
    print(f"dev/compare_convert.py --seed {seed}")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, P + 1
        shard = work / "tokens.bin"
        shard.write_bytes(header.tobytes() + rng.integers(0, V, P + 1).astype("<u2").tobytes())
        for test, *arguments in ((test_llmc, work, rng, shard), (test_hugging_face, work, rng, shard),
                                 (test_heads, work / "heads", rng, shard),
                                 (test_nanogpt, work / "nano", shard),
                                 (test_carried, work / "carried", rng),
                                 (test_tokenizers, work), (test_gpt2_vocabulary, work),
                                 (test_tables, work / "tables"),
                                 (test_downloads, work / "curl", rng, "curl"),
                                 (test_downloads, work / "wget", rng, "wget")):
            try:
                arguments[0].mkdir(exist_ok=True)
                test(*arguments)
            except Exception as error:  # what a failed check left undone
                check(False, test.__name__, f"ended early: {error!r}")
    print(", ".join(f"{number} {what}" for what, number in counts.items()), flush=True)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
