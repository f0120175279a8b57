#!/usr/bin/env python3
"""Turns other formats of GPT-2 into a model folder that train_gpt2 and transformers load, and back.

  python3 data/convert.py [--force] INPUT OUTPUT

  python3 data/convert.py gpt2_124M.bin gpt2             llm.c's weights, float32 or bfloat16, to a folder
  python3 data/convert.py gpt2_tokenizer.bin gpt2        llm.c's tokenizer: adds vocab.json and merges.txt
  python3 data/convert.py gpt2.tiktoken gpt2             the same from tiktoken's base64 lines
  python3 data/convert.py downloaded gpt2                a folder with pytorch_model.bin, or in shards
  python3 data/convert.py downloaded downloaded          the same in place: adds model.safetensors
  python3 data/convert.py ckpt.pt mine                   nanoGPT's checkpoint to a folder
  python3 data/convert.py out mine.bin                   a folder to llm.c's weights, float32
  python3 data/convert.py out mine.gguf                  a folder to what llama.cpp and ollama read
  python3 data/convert.py pairs.csv pairs.jsonl          a table (.csv, .tsv, .json, .parquet, .jsonl) to examples

INPUT is known by its content, the direction by OUTPUT: a name that ends in .bin, .gguf or .jsonl, or a folder,
which may exist already. No file is overwritten without --force, and none is ever left half written. bfloat16
and float16 stay what they are in a folder and become float32 in a .bin or .gguf (--half: the matrices float16).
From folder to folder, config.json and all files of the tokenizer go along byte for byte. A gpt2_tokenizer.bin
that lies beside llm.c's weights is converted along with them. Names may begin with `transformer.`, and have
`module.` and `_orig_mod.` in them, which DataParallel and torch.compile put there. Needs numpy; PyTorch for
pytorch_model.bin and ckpt.pt, gguf and transformers for .gguf, pyarrow for .parquet.

A table has the columns prompt and completion, or text, or messages (in JSON), or instruction and output (input
may be there too), or question and answer. These last become prompt and completion, with a line feed where two
columns meet. With --messages a pair becomes a talk of two turns, which is what train_gpt2 --chat continues; so a .jsonl
of pairs can be INPUT too.
"""
import argparse
import base64
import csv
import importlib
import json
import math
import os
import re
import sys
import zipfile

import numpy as np

END = "<|endoftext|>"
LLMC_WEIGHTS, LLMC_TOKENIZER, LLMC_TOKENS = 20240326, 20240328, 20240520
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16 travels as its 16 bits
SIZES = {"V": "vocab_size", "P": "n_positions", "C": "n_embd", "F": "n_inner", "L": "n_layer", "H": "n_head"}
# Every tensor in llm.c's order, with its shape: C channels, Q = 3C, F = 4C. h.# stands for each layer; its
# matrices are [in, out] in a model folder and [out, in] in llm.c's files.
LAYOUT = [("wte.weight", "VC"), ("wpe.weight", "PC"),
          ("h.#.ln_1.weight", "C"), ("h.#.ln_1.bias", "C"),
          ("h.#.attn.c_attn.weight", "CQ"), ("h.#.attn.c_attn.bias", "Q"),
          ("h.#.attn.c_proj.weight", "CC"), ("h.#.attn.c_proj.bias", "C"),
          ("h.#.ln_2.weight", "C"), ("h.#.ln_2.bias", "C"),
          ("h.#.mlp.c_fc.weight", "CF"), ("h.#.mlp.c_fc.bias", "F"),
          ("h.#.mlp.c_proj.weight", "FC"), ("h.#.mlp.c_proj.bias", "C"),
          ("ln_f.weight", "C"), ("ln_f.bias", "C")]

# What llm.c computes, and a file of its weights cannot say. Both names of gelu are the formula with tanh.
LLMC_SETTINGS = {"layer_norm_epsilon": (1e-5,), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                 "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                 "add_cross_attention": (False,)}


def fail(*words):
    sys.exit("convert.py: " + " ".join(map(str, words)))


def note(*words):
    print("convert.py: note:", *words, file=sys.stderr)


def needed(path, *modules):
    """The modules that this file needs and many others do not."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        fail(f"{path}: needs {error.name}: pip install {' '.join(module.split('.')[0] for module in modules)}")


def parse_json(text, where, kind=dict, wanted="an object {...}"):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON: {error}")
    if not isinstance(value, kind):
        fail(f"{where}: {wanted} expected")
    return value


def read_json(path, kind=dict, wanted="an object {...}"):
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        fail(f"{path}: not JSON: {error}")
    return parse_json(text, path, kind, wanted)


class Output:
    """Files that appear under their names when all of them are whole, by commit(), or not at all."""

    def __init__(self, folder, force):
        self.folder, self.force, self.names = folder, force, []
        self.is_new = not os.path.isdir(folder)

    def create(self, name):
        path = os.path.join(self.folder, name)
        if os.path.lexists(path) and not self.force:
            fail(f"{path}: exists already; --force replaces it")
        os.makedirs(self.folder, exist_ok=True)
        self.names.append(name)
        return open(path + ".part", "wb")

    def write(self, name, data):
        with self.create(name) as file:
            file.write(data if isinstance(data, bytes) else data.encode())

    def write_json(self, name, value):
        self.write(name, json.dumps(value, indent=2) + "\n")

    def commit(self):
        for name in self.names:
            with open(os.path.join(self.folder, name + ".part"), "rb+") as file:
                os.fsync(file.fileno())
        for name in self.names:
            path = os.path.join(self.folder, name)
            os.replace(path + ".part", path)
        print(", ".join(os.path.join(self.folder, name) for name in self.names))

    def discard(self):
        for name in self.names:
            if os.path.exists(part := os.path.join(self.folder, name + ".part")):
                os.remove(part)
        if self.is_new and os.path.isdir(self.folder) and not os.listdir(self.folder):
            os.rmdir(self.folder)


# ---- Models: a config as in config.json, and tensors as {name: (dtype, array)} with bare names ----


def dimensions(config, path):
    """The letters of LAYOUT, and L for layers, as numbers."""
    if config.get("model_type") != "gpt2":
        fail(f'{path}: model_type must be "gpt2"')
    n = {letter: config.get(key) for letter, key in SIZES.items()}
    if n["F"] is None and isinstance(n["C"], int):
        n["F"] = 4 * n["C"]
    for letter, value in n.items():
        if type(value) is not int or not 0 < value < 2**31:
            fail(f"{path}: {SIZES[letter]} is {value}; a whole number above 0 expected")
    if n["C"] % n["H"]:
        fail(f"{path}: {n['C']} channels do not divide into {n['H']} heads")
    return dict(n, Q=3 * n["C"])


def expected_tensors(config, path):
    """{name: shape} in the order of a model folder: embeddings, layer after layer, the last layernorm."""
    n = dimensions(config, path)
    inside = [row for row in LAYOUT if "#" in row[0]]
    rows = LAYOUT[:2] + [(name.replace("#", str(i)), shape) for i in range(n["L"]) for name, shape in inside]
    rows += LAYOUT[-2:] + [("lm_head.weight", "VC")] * (config.get("tie_word_embeddings", True) is False)
    return {name: tuple(n[letter] for letter in shape) for name, shape in rows}


def new_config(vocab, positions, channels, layers, heads, end):
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab,
            "n_positions": positions, "n_embd": channels, "n_layer": layers, "n_head": heads,
            "n_inner": 4 * channels if isinstance(channels, int) else None, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "resid_pdrop": 0.0, "bos_token_id": end, "eos_token_id": end}


def widen(dtype, array):
    """Any of the three types as float32, exactly."""
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array.astype("<f4", copy=False)


def read_llmc_header(path):
    """The 256 numbers that llm.c's files begin with, or None."""
    with open(path, "rb") as file:
        head = file.read(1024)
    return np.frombuffer(head, "<i4").tolist() if len(head) == 1024 else None


def read_llmc_weights(path):
    header = read_llmc_header(path)
    version, positions, vocab, layers, heads, channels, padded = header[1:8]
    if version not in (3, 5):
        fail(f"{path}: version {version} of llm.c's weights; 3 (float32) or 5 (bfloat16) expected")
    config = new_config(vocab, positions, channels, layers, heads, 50256 if vocab == 50257 else None)
    n = dict(dimensions(config, path), V=padded)
    if padded < vocab:
        fail(f"{path}: {padded} padded rows are fewer than the vocabulary's {vocab}")
    dtype, count = "F32" if version == 3 else "BF16", 0
    places = []
    for name, shape in LAYOUT:
        shape = [n[letter] for letter in shape]
        for i in range(n["L"] if "#" in name else 1):
            places.append((name.replace("#", str(i)), shape, count))
            count += math.prod(shape)
    wanted, size = 1024 + count * (2 if version == 5 else 4), os.path.getsize(path)
    if size != wanted:
        fail(f"{path}: {size} bytes; its header promises {wanted}")
    data, tensors = np.memmap(path, NUMPY_TYPES[dtype], "r", 1024), {}
    for name, shape, start in places:
        is_matrix = name.startswith("h.") and len(shape) == 2
        value = data[start:start + math.prod(shape)].reshape(shape[::-1] if is_matrix else shape)
        tensors[name] = dtype, value.T if is_matrix else value
    tensors["wte.weight"] = dtype, tensors["wte.weight"][1][:vocab]
    return config, tensors


def read_safetensors(path):
    """{stored name: (dtype, array)}; the arrays are parts of the file's mapping."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            fail(f"{path}: not a whole safetensors file: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    data, tensors = np.memmap(path, np.uint8, "r"), {}
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            value = data[8 + length:][begin:end]
            if not 0 <= begin <= end or len(value) != end - begin:
                fail(f"{path}: {name} ends at byte {end} of data; the file has {size - 8 - length}")
            if dtype in NUMPY_TYPES:
                value = value.view(NUMPY_TYPES[dtype]).reshape(shape)
            tensors[name] = dtype, value
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path}: damaged header of safetensors: {error!r}")
    return tensors


def load_pytorch(path):
    """Whatever PyTorch has saved in the file."""
    torch, = needed(path, "torch")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever pickle and zip files can be wrong about
        fail(f"{path}: PyTorch cannot load it: {(str(error).splitlines() or [repr(error)])[0]}")


def tensors_of(path, state):
    """{stored name: (dtype, array)} of PyTorch's {name: tensor}."""
    import torch
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        fail(f"{path}: a state dict expected, {{name: tensor}}")
    tensors = {}
    for name, value in state.items():
        value = value.detach()
        bits = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value
        tensors[name] = types.get(value.dtype, str(value.dtype)), bits.numpy()
        if value.dtype == torch.bfloat16:
            tensors[name] = "BF16", tensors[name][1].view("<u2")
    return tensors


def read_stored(path):
    """The tensors of one file, or of all files that an index of shards names."""
    if not path.endswith(".index.json"):
        return (read_safetensors(path) if path.endswith(".safetensors")
                else tensors_of(path, load_pytorch(path)))
    weight_map, tensors = read_json(path).get("weight_map"), {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        fail(f'{path}: "weight_map": {{tensor: file}} expected')
    for name in sorted(set(weight_map.values())):
        if os.path.basename(name) != name:
            fail(f"{path}: names the shard {name}, which is not in this folder")
        shard = read_stored(os.path.join(os.path.dirname(path), name))
        tensors.update(shard)
    for name in weight_map.keys() - tensors.keys():
        fail(f"{path}: tensor {name} is not in {weight_map[name]}")
    return tensors


def find_weights(folder):
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json", "ckpt.pt"):
        if os.path.exists(path := os.path.join(folder, name)):
            return path
    if os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
        fail(f"{folder}: an adapter (LoRA); train_gpt2 writes the whole model into {os.path.join(folder, 'merged')}")
    fail(f"{folder}: has no model.safetensors, pytorch_model.bin, index of shards (… .index.json) or ckpt.pt")


def bare_names(stored, path):
    """The tensors without what transformers, DataParallel and torch.compile put into their names."""
    tensors = {}
    for name, value in stored.items():
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod")]
        bare = ".".join(parts).removeprefix("transformer.")
        if bare in tensors:
            fail(f"{path}: tensor {bare} is there twice, once as {name}")
        tensors[bare] = value
    return tensors


def settle_head(config, stored, path):
    """Head and wte are one matrix unless config.json says otherwise. A file may have it under either name, or
    under both; if these differ, each counts, as in transformers, and the config that is returned says so."""
    if config.get("tie_word_embeddings", True) is False or "lm_head.weight" not in stored:
        return config
    head = stored["lm_head.weight"]
    wte = stored.get("wte.weight", head)
    if not np.array_equal(widen(*head), widen(*wte)):
        note(f'{path}: lm_head.weight is not wte.weight, so OUTPUT says "tie_word_embeddings": false')
        return dict(config, tie_word_embeddings=False)
    del stored["lm_head.weight"]
    stored["wte.weight"] = wte
    return config


def check_tensors(config, stored, path, config_path):
    """The tensors of the config in a model folder's order; each must be there, in its shape, and no other."""
    expected, tensors = expected_tensors(config, config_path), {}
    for name, shape in expected.items():
        dtype, value = stored.pop(name, (None, None))
        if value is None:
            fail(f"{path}: tensor {name} is missing")
        if dtype not in NUMPY_TYPES:
            fail(f"{path}: tensor {name} is {dtype}; F32, F16 or BF16 expected")
        if value.shape != shape:
            fail(f"{path}: tensor {name} is {list(value.shape)}; {config_path} makes it {list(shape)}")
        tensors[name] = dtype, value
    for name in stored:
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # causal masks, stored by old versions
            fail(f"{path}: tensor {name} is not one of this GPT-2's ({config['n_layer']} layers)")
    return tensors


def read_nanogpt(path, checkpoint):
    """nanoGPT's ckpt.pt: its matrices are [out, in]; trained with bias=False it has none, which is zeros."""
    sizes, state = checkpoint["model_args"], checkpoint.get("model")
    if not isinstance(sizes, dict):
        fail(f"{path}: model_args {{name: value}} expected")
    vocab = sizes.get("vocab_size")
    end = 50256 if vocab in (50257, 50304) else None  # 50304: GPT-2's 50257 tokens, and rows without a token
    config = new_config(vocab, *map(sizes.get, ("block_size", "n_embd", "n_layer", "n_head")), end)
    n, stored = dimensions(config, path), bare_names(tensors_of(path, state), path)
    for name, shape in LAYOUT:
        for i in range(n["L"] if "#" in name else 1):
            layer = name.replace("#", str(i))
            if sizes.get("bias") is False and name.endswith(".bias"):
                stored.setdefault(layer, ("F32", np.zeros([n[letter] for letter in shape], "<f4")))
            elif "#" in name and len(shape) == 2 and layer in stored:
                stored[layer] = stored[layer][0], stored[layer][1].T
    config = settle_head(config, stored, path)
    tensors = check_tensors(config, stored, path, "model_args")
    note(f"{path}: nanoGPT takes gelu by erf, OUTPUT by tanh as GPT-2: logits differ in the fourth digit")
    return config, tensors


def read_model(weights):
    """A model from its file of weights and the config.json beside it; nanoGPT's file has both."""
    is_pytorch = not weights.endswith((".safetensors", ".index.json"))
    loaded = load_pytorch(weights) if is_pytorch else None
    if isinstance(loaded, dict) and "model_args" in loaded:
        return read_nanogpt(weights, loaded)
    path = os.path.join(os.path.dirname(weights), "config.json")
    if not os.path.exists(path):
        fail(f"{path}: is missing; it says what model {weights} is")
    stored = bare_names(tensors_of(weights, loaded) if is_pytorch else read_stored(weights), weights)
    config = settle_head(read_json(path), stored, weights)
    return config, check_tensors(config, stored, weights, path)


def write_safetensors(file, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, value) in tensors.items():
        name = name if name == "lm_head.weight" else "transformer." + name
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data begins at a multiple of 64
    file.write(len(text).to_bytes(8, "little") + text)
    for _, value in tensors.values():
        file.write(np.ascontiguousarray(value).data)


def check_settings(config, source, program, settings):
    """Ends when config.json asks for arithmetic that the program does not know."""
    for key, wanted in settings.items():
        value = wanted[0] if config.get(key) is None else config[key]
        if value not in wanted:
            fail(f"{source}: {key} is {json.dumps(value)}; {program} knows only {json.dumps(wanted[0])}")


def write_llmc_weights(file, config, tensors, source):
    n = dimensions(config, source)
    check_settings(config, source, "llm.c", LLMC_SETTINGS)
    if config.get("tie_word_embeddings", True) is False:
        fail(f"{source}: the head is not tied to wte (tie_word_embeddings false): llm.c has no place for it")
    if n["F"] != 4 * n["C"]:
        fail(f"{source}: n_inner is {n['F']}; llm.c knows only 4 x n_embd = {4 * n['C']}")
    padded = -(-n["V"] // 128) * 128
    header = np.zeros(256, "<i4")
    header[:8] = LLMC_WEIGHTS, 3, n["P"], n["V"], n["L"], n["H"], n["C"], padded
    file.write(header.data)
    for name, shape in LAYOUT:
        for i in range(n["L"] if "#" in name else 1):
            value = widen(*tensors[name.replace("#", str(i))])
            file.write(np.ascontiguousarray(value.T if "#" in name else value).data)
            if name == "wte.weight":
                file.write(bytes(4 * n["C"] * (padded - n["V"])))


# ---- Tokenizers: the bytes of each token, in the order of ids, and which id ends a text ----


def read_llmc_tokenizer(path):
    header = read_llmc_header(path)
    version, count, end = header[1:4]
    if version not in (1, 2):
        fail(f"{path}: version {version} of llm.c's tokenizer; 1 or 2 expected")
    with open(path, "rb") as file:
        data = file.read()[1024:]
    tokens, at = [], 0
    while at < len(data) and len(tokens) < count:
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    if len(tokens) != count or at != len(data):
        fail(f"{path}: its header promises {count} tokens; {len(data)} bytes are not as many")
    end = end if version == 2 else 50256
    if not 0 <= end < count:
        fail(f"{path}: the end of text is token {end} of {count}")
    return tokens, end


def read_tiktoken(path):
    tokens = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except ValueError:
                fail(f"{path}: line {number}: a token in base64 and its rank expected")
    if sorted(tokens) != list(range(len(tokens))):
        fail(f"{path}: the ranks are not 0 to {len(tokens) - 1}, each once")
    return [tokens[rank] for rank in range(len(tokens))] + [END.encode()], len(tokens)


def byte_spellings():
    """How vocab.json spells each byte: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def halves(token, ranks, rank, path):
    """The two tokens that made this one: what byte-pair encoding makes of it with lower ranks alone."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= rank:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        fail(f"{path}: token {rank}, {token!r}, is not made of two tokens above it")
    return parts


def write_tokenizer(output, tokens, end, path, positions):
    ranks = {token: rank for rank, token in enumerate(tokens) if rank != end}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(ranks) != len(tokens) - 1 or b"" in ranks:
        fail(f"{path}: {f'byte {missing[0]} has no token' if missing else 'a token is empty or there twice'}")
    letters = byte_spellings()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    merges = [" ".join(map(spell, halves(token, ranks, rank, path)))
              for token, rank in ranks.items() if len(token) > 1]
    names = [END if rank == end else spell(token) for rank, token in enumerate(tokens)]
    if len(set(names)) != len(names):
        fail(f"{path}: {END} is there twice")
    output.write("vocab.json", json.dumps({name: rank for rank, name in enumerate(names)}))
    output.write("merges.txt", "#version: 0.2\n" + "".join(merge + "\n" for merge in merges))
    output.write_json("tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": positions, "bos_token": END,
        "eos_token": END, "unk_token": END, "add_prefix_space": False})


# ---- llama.cpp's file: GGUF ----


def read_tokenizer(folder, rows):
    """What AutoTokenizer makes of a folder: itself, the names of its tokens by id, its merges, its added tokens
    {id: flags}. Ends when it has what a GGUF cannot say, or more tokens than the model has rows."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    transformers, = needed(folder, "transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever transformers does not like about the folder
        fail(f"{folder}: AutoTokenizer cannot load it: {(str(error).splitlines() or [repr(error)])[0]}")
    before = rules["pre_tokenizer"] or {}
    if (rules["model"]["type"] != "BPE" or rules["normalizer"] or before.get("type") != "ByteLevel"
            or not before.get("use_regex") or before.get("add_prefix_space")
            or tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids):
        fail(f"{folder}: its tokenizer has rules that are not GPT-2's, which llama.cpp would not follow")
    added = {token["id"]: token for token in rules["added_tokens"]}
    for token in added.values():
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                fail(f'{folder}: added token {token["content"]} is {flag}, which llama.cpp does not know')
    vocabulary = {index: name for name, index in tokenizer.get_vocab().items()}
    names = [vocabulary.get(index) for index in range(max(vocabulary) + 1)]
    if len(names) > rows:
        fail(f"{folder}: {len(names)} tokens, but the model has only {rows} rows")
    if None in names:
        fail(f"{folder}: no token has the id {names.index(None)}; llama.cpp might draw it")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    return tokenizer, names, merges, added


def ends_of_text(folder, config, tokenizer):
    """The ids at which a text ends: generation_config.json's, else config.json's, else the tokenizer's."""
    path = os.path.join(folder, "generation_config.json")
    generation = read_json(path) if os.path.exists(path) else {}
    for value in (generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer.eos_token_id):
        ends = [index for index in (value if isinstance(value, list) else [value]) if index is not None]
        if ends:
            return ends
    fail(f"{folder}: names no end of text; llama.cpp would take token 11 for it")


def describe_tokenizer(writer, gguf, config, folder):
    """Tokens, merges and tasks; returns how many tokens there are."""
    tokenizer, names, merges, added = read_tokenizer(folder, config["vocab_size"])
    kind = gguf.TokenType
    ends = ends_of_text(folder, config, tokenizer)
    if len(ends) > 3 or max(ends) >= len(names):
        fail(f"{folder}: ends of text {ends}: at most three, below {len(names)}, are possible")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([kind.NORMAL if index not in added else kind.CONTROL if added[index]["special"]
                            else kind.USER_DEFINED for index in range(len(names))])
    writer.add_token_merges(merges)
    for add, index in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends):
        add(index)
    writer.add_bos_token_id(ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return len(names)


def write_gguf(path, config, tensors, folder, half):
    """Weights, tokenizer and sizes in one file. Matrices are [out, in] there. Rows behind the last token, which
    only fill the matrix up, are left away, so that llama.cpp cannot draw them."""
    gguf, = needed(path.removesuffix(".part"), "gguf")
    n = dimensions(config, folder)
    settings = {key: value for key, value in LLMC_SETTINGS.items() if key != "layer_norm_epsilon"}
    check_settings(config, folder, "llama.cpp", settings)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(os.path.basename(os.path.abspath(folder)))
    writer.add_context_length(n["P"])
    writer.add_embedding_length(n["C"])
    writer.add_feed_forward_length(n["F"])
    writer.add_block_count(n["L"])
    writer.add_head_count(n["H"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    count = describe_tokenizer(writer, gguf, config, folder)
    names, parts = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, n["L"]), []
    for name, (dtype, value) in tensors.items():
        if name in ("wte.weight", "lm_head.weight"):
            value = value[:count]
        elif name.startswith("h.") and value.ndim == 2:
            value = value.T
        kind = np.dtype("<f2" if half and value.ndim == 2 and name != "wpe.weight" else "<f4")
        parts.append((name, dtype, value, kind))
        writer.add_tensor_info(names.get_name(name, (".weight", ".bias")), value.shape, kind,
                               value.size * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dtype, value, kind in parts:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(widen(dtype, value), kind)
        if half and not np.isfinite(stored).all():
            fail(f"{folder}: {name} has values that float16 cannot hold; leave --half away")
        writer.write_tensor_data(stored)
    writer.close()


# ---- Tables of examples ----

# The columns that make an example, what is scored last; the first row of this list that a table has counts.
TABLES = (("messages",), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"), ("text",))


def read_csv(path):
    """The rows of a table in text, {column: text}. The separator is the one that its first line has most of."""
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = csv.DictReader(file, delimiter=separator, strict=True)
            for row in rows:
                if None in row or None in row.values():
                    fail(f"{path}: line {rows.line_num}: {len(rows.fieldnames)} cells expected, as in its head")
                yield row
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 ({error.reason}): iconv -f latin1 -t utf-8 {path} > new.csv converts Latin-1")
    except csv.Error as error:
        fail(f"{path}: line {rows.line_num}: {error}")


def read_parquet(path):
    parquet, = needed(path, "pyarrow.parquet")
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except Exception as error:  # whatever pyarrow finds wrong
        fail(f"{path}: pyarrow cannot read it: {(str(error).splitlines() or [repr(error)])[0]}")


def read_list(path):
    rows = read_json(path, list, "a list of objects [{...}, ...]")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{path}: row {number}: an object {{...}} expected")
    return rows


def read_lines(path):
    for number, line in enumerate(filter(str.strip, open(path, encoding="utf-8-sig")), 1):
        yield parse_json(line, f"{path}: row {number}")


READERS = {".csv": read_csv, ".tsv": read_csv, ".json": read_list, ".parquet": read_parquet, ".jsonl": read_lines}


def cell(row, column, where):
    """A cell as text; an empty one, or one that is not there, is ""."""
    value = row.get(column)
    if value is None or isinstance(value, (str, int, float)):
        return "" if value is None else str(value)
    fail(f"{where}: {column} is neither a text nor a number")


def example_of(row, columns, where):
    """What a row becomes in the .jsonl; None if nothing in it can be scored."""
    if columns == ("messages",):
        talk = row.get("messages")
        try:
            talk = json.loads(talk) if isinstance(talk, str) else talk
            return {"messages": [{key: turn[key] for key in ("role", "content")} for turn in talk]}
        except (ValueError, TypeError, KeyError):
            fail(f'{where}: messages: a list of {{"role": ..., "content": ...}} expected')
    parts = [cell(row, column, where) for column in columns]
    if not parts[-1]:
        return None
    if columns == ("text",):
        return {"text": parts[0]}
    if columns != ("prompt", "completion"):
        more = cell(row, "input", where) if columns[0] == "instruction" else ""
        parts = [parts[0] + ("\n" + more if more else ""), "\n" + parts[1]]
    return {"prompt": parts[0], "completion": parts[1]}


def write_examples(path, rows, file, talks):
    """A line of .jsonl for each row. Columns that are not used, and rows without anything to learn, are named."""
    columns, left_out, number = None, [], 0
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if columns is None:
            columns = next((names for names in TABLES if all(name in row for name in names)), None)
            if columns is None:
                fail(f"{path}: its columns are {', '.join(row)}; expected "
                     + " or ".join(" and ".join(names) for names in TABLES))
            unused = [name for name in row if name not in columns + ("input",) * (columns[0] == "instruction")]
        example = example_of(row, columns, where)
        if talks and example and "prompt" in example:
            example = {"messages": [{"role": "user", "content": example["prompt"]},
                                    {"role": "assistant", "content": example["completion"].lstrip("\n")}]}
        try:
            file.write(json.dumps(example, ensure_ascii=False).encode() + b"\n" if example else b"")
        except UnicodeEncodeError:
            fail(f"{where}: has half a character (a lone surrogate)")
        left_out += [] if example else [number]
    if len(left_out) == number:
        fail(f"{path}: no row with anything to learn")
    if unused:
        note(f"{path}: columns that are not used: {', '.join(unused)}")
    if left_out:
        note(f"{path}: {len(left_out)} of {number} rows are left out, the first is row {left_out[0]}: "
             f"{columns[-1]} is empty")


# ---- What is to be done ----


def kind_of(path):
    """What INPUT is: a table by its name, all else by its content; of a folder, which file in it has the weights."""
    if os.path.isdir(path):
        return "model", find_weights(path)
    if path.lower().endswith(tuple(READERS)) and not path.endswith(".index.json"):
        return "table", path
    with open(path, "rb") as file:
        head = file.read(4)
    known = {LLMC_WEIGHTS: "llm.c weights", LLMC_TOKENIZER: "llm.c tokenizer", LLMC_TOKENS: "llm.c tokens"}
    if kind := known.get(int.from_bytes(head, "little")):
        if kind != "llm.c tokens" and not read_llmc_header(path):
            fail(f"{path}: {os.path.getsize(path)} bytes; a header of 1024 expected")
        return kind, path
    if path.endswith(".tiktoken"):
        return "tiktoken", path
    if path.endswith((".safetensors", ".index.json")) or head[:2] in (b"PK", b"\x80\x02"):
        return "model", path
    fail(f"{path}: neither llm.c's weights or tokenizer, .tiktoken, .safetensors, PyTorch's nor a table "
         f"({', '.join(READERS)})")


def copy_others(output, source):
    """Copies what else a model folder has, renaming what OpenAI calls encoder.json and vocab.bpe."""
    names = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template.jinja", "generation_config.json")
    for name in names:
        other = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.get(name)
        for found in (os.path.join(source, name), os.path.join(source, other or name)):
            if os.path.isfile(found):
                target = os.path.join(output.folder, name)
                if not (os.path.exists(target) and os.path.samefile(found, target)):
                    with open(found, "rb") as file:
                        output.write(name, file.read())
                break


def convert_to_file(kind, path, output, name, args):
    """To llm.c's .bin, llama.cpp's .gguf, or examples in a .jsonl."""
    ending = os.path.splitext(name)[1]
    if (kind == "table") != (ending == ".jsonl"):
        fail(f"{path}: a table; OUTPUT must end in .jsonl" if kind == "table" else
             f"{path}: no table; a .jsonl is made from {', '.join(READERS)}")
    if kind in ("llm.c tokenizer", "tiktoken"):
        fail(f"{path}: a tokenizer; OUTPUT must be a folder")
    if kind == "llm.c weights" and ending == ".gguf":
        fail(f"{path}: has no tokenizer beside it: convert it to a folder first, and that to {name}")
    with output.create(name) as file:
        if kind == "table":
            return write_examples(path, READERS[os.path.splitext(path)[1].lower()](path), file, args.messages)
        config, tensors = (read_llmc_weights if kind == "llm.c weights" else read_model)(path)
        if ending == ".bin":
            return write_llmc_weights(file, config, tensors, path)
        write_gguf(file.name, config, tensors, os.path.dirname(path) or ".", args.half)


def convert(kind, path, output, name, args):
    """name: the file to be made in the folder of OUTPUT, or None for a model folder."""
    if kind == "llm.c tokens":
        fail(f"{path}: token shard of llm.c: train_gpt2 --train reads it as it is")
    if name:
        return convert_to_file(kind, path, output, name, args)
    if kind == "table":
        fail(f"{path}: a table; OUTPUT must end in .jsonl")
    if kind in ("llm.c tokenizer", "tiktoken"):
        tokens, end = (read_tiktoken if kind == "tiktoken" else read_llmc_tokenizer)(path)
        config = os.path.join(output.folder, "config.json")  # of the model that the tokenizer is added to
        positions = read_json(config).get("n_positions", 1024) if os.path.exists(config) else 1024
        return write_tokenizer(output, tokens, end, path, positions)
    config, tensors = (read_llmc_weights if kind == "llm.c weights" else read_model)(path)
    source = os.path.dirname(path) or "."
    in_place = kind == "model" and os.path.isdir(output.folder) and os.path.samefile(source, output.folder)
    if in_place and os.path.basename(path) == "model.safetensors":
        fail(f"{source}: has model.safetensors already")
    with output.create("model.safetensors") as file:
        write_safetensors(file, tensors)
    written = os.path.join(source, "config.json")
    if kind == "model" and os.path.exists(written):
        copy_others(output, source)
        if read_json(written) != config:
            output.write_json("config.json", config)
        elif not in_place:
            with open(written, "rb") as file:
                output.write("config.json", file.read())
        return
    end = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    output.write_json("generation_config.json", end)
    tokenizer = os.path.join(source, "gpt2_tokenizer.bin")
    if os.path.isfile(tokenizer) and kind_of(tokenizer)[0] == "llm.c tokenizer":
        tokens, end = read_llmc_tokenizer(tokenizer)
        if len(tokens) == config["vocab_size"]:
            write_tokenizer(output, tokens, end, tokenizer, config["n_positions"])
    output.write_json("config.json", config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--force", action="store_true", help="overwrite files of OUTPUT")
    parser.add_argument("--half", action="store_true", help="matrices of a .gguf in float16")
    parser.add_argument("--messages", action="store_true", help="pairs become talks of two turns, for --chat")
    args = parser.parse_args()
    is_file = args.output.endswith((".bin", ".gguf", ".jsonl")) and not os.path.isdir(args.output)
    if args.half and not args.output.endswith(".gguf"):
        parser.error("--half is for a .gguf")
    if args.messages and not args.output.endswith(".jsonl"):
        parser.error("--messages is for a .jsonl")
    output = Output((os.path.dirname(args.output) or ".") if is_file else args.output, args.force)
    try:
        convert(*kind_of(args.input), output, is_file and os.path.basename(args.output), args)
        output.commit()
    except OSError as error:
        fail(f"{error.filename or args.output}: {error.strerror or error}")
    finally:
        output.discard()


if __name__ == "__main__":
    main()
