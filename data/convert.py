#!/usr/bin/env python3
"""Turns other formats of GPT-2 into a model folder that train_gpt2 and transformers load, and back.

  python3 data/convert.py [--force] INPUT OUTPUT

  python3 data/convert.py gpt2_124M.bin gpt2             llm.c's weights, float32 or bfloat16, to a folder
  python3 data/convert.py gpt2_tokenizer.bin gpt2        llm.c's tokenizer: adds vocab.json and merges.txt
  python3 data/convert.py gpt2.tiktoken gpt2             the same from tiktoken's base64 lines
  python3 data/convert.py downloaded gpt2                a folder with pytorch_model.bin, or in shards
  python3 data/convert.py downloaded downloaded          the same in place: adds model.safetensors
  python3 data/convert.py out mine.bin                   a folder to llm.c's weights, float32

INPUT is known by its content, the direction by OUTPUT: a name that ends in .bin, or a folder, which may exist
already. No file is overwritten without --force, and none is ever left half written. bfloat16 and float16
stay what they are in a folder and become float32 in a .bin. A gpt2_tokenizer.bin that lies beside llm.c's
weights is converted along with them. Needs numpy, and PyTorch for pytorch_model.bin.
"""
import argparse
import base64
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


def fail(*words):
    sys.exit("convert.py: " + " ".join(map(str, words)))


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON: {error}")
    if not isinstance(value, dict):
        fail(f"{path}: an object {{...}} expected")
    return value


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
    end = vocab - 1 if vocab == 50257 else None
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab,
              "n_positions": positions, "n_embd": channels, "n_layer": layers, "n_head": heads,
              "n_inner": 4 * channels, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
              "bos_token_id": end, "eos_token_id": end}
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


def read_pytorch(path):
    try:
        import torch
    except ImportError:
        fail(f"{path}: needs PyTorch to be read: pip install torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever pickle and zip files can be wrong about
        fail(f"{path}: PyTorch cannot load it: {(str(error).splitlines() or [repr(error)])[0]}")
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
        return read_safetensors(path) if path.endswith(".safetensors") else read_pytorch(path)
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
                 "pytorch_model.bin.index.json"):
        if os.path.exists(path := os.path.join(folder, name)):
            return path
    fail(f"{folder}: has no model.safetensors, pytorch_model.bin, or index of shards (… .index.json)")


def read_model(weights):
    """A model from its file of weights, and the config.json beside it."""
    path = os.path.join(os.path.dirname(weights), "config.json")
    if not os.path.exists(path):
        fail(f"{path}: is missing; it says what model {weights} is")
    config = read_json(path)
    stored = {name.removeprefix("transformer."): value for name, value in read_stored(weights).items()}
    expected, tensors = expected_tensors(config, path), {}
    for name, shape in expected.items():
        dtype, value = stored.pop(name, (None, None))
        if value is None:
            fail(f"{weights}: tensor {name} is missing")
        if dtype not in NUMPY_TYPES:
            fail(f"{weights}: tensor {name} is {dtype}; F32, F16 or BF16 expected")
        if value.shape != shape:
            fail(f"{weights}: tensor {name} is {list(value.shape)}; config.json makes it {list(shape)}")
        tensors[name] = dtype, value
    if "lm_head.weight" in stored and not np.array_equal(stored.pop("lm_head.weight")[1],
                                                         tensors["wte.weight"][1]):
        fail(f"{weights}: lm_head.weight is not wte.weight, but config.json does not say "
             '"tie_word_embeddings": false')
    for name in stored:
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # causal masks, stored by old versions
            fail(f"{weights}: tensor {name} is not one of this GPT-2's ({config['n_layer']} layers)")
    return config, tensors


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


def write_llmc_weights(file, config, tensors, source):
    n = dimensions(config, source)
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


# ---- What is to be done ----


def kind_of(path):
    """What INPUT is, by its content; and of a folder, which file in it has the weights."""
    if os.path.isdir(path):
        return "model", find_weights(path)
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
    fail(f"{path}: neither llm.c's weights or tokenizer, .tiktoken, .safetensors nor PyTorch's")


def copy_tokenizer(output, source):
    """Copies what else a model folder has, renaming what OpenAI calls encoder.json and vocab.bpe."""
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe", "tokenizer_config.json": "",
             "tokenizer.json": "", "generation_config.json": ""}
    for name, other in names.items():
        for found in (os.path.join(source, name), os.path.join(source, other or name)):
            if os.path.isfile(found):
                target = os.path.join(output.folder, name)
                if not (os.path.exists(target) and os.path.samefile(found, target)):
                    with open(found, "rb") as file:
                        output.write(name, file.read())
                break


def convert(kind, path, output, bin_name):
    if kind == "llm.c tokens":
        fail(f"{path}: token shard of llm.c: train_gpt2 --train reads it as it is")
    if kind in ("llm.c tokenizer", "tiktoken"):
        if bin_name:
            fail(f"{path}: a tokenizer; OUTPUT must be a folder")
        tokens, end = (read_tiktoken if kind == "tiktoken" else read_llmc_tokenizer)(path)
        config = os.path.join(output.folder, "config.json")  # of the model that the tokenizer is added to
        positions = read_json(config).get("n_positions", 1024) if os.path.exists(config) else 1024
        return write_tokenizer(output, tokens, end, path, positions)
    config, tensors = (read_llmc_weights if kind == "llm.c weights" else read_model)(path)
    if bin_name:
        with output.create(bin_name) as file:
            return write_llmc_weights(file, config, tensors, path)
    source = os.path.dirname(path) or "."
    in_place = kind == "model" and os.path.isdir(output.folder) and os.path.samefile(source, output.folder)
    if in_place and os.path.basename(path) == "model.safetensors":
        fail(f"{source}: has model.safetensors already")
    with output.create("model.safetensors") as file:
        write_safetensors(file, tensors)
    if kind == "model":
        copy_tokenizer(output, source)
        if not in_place:
            output.write_json("config.json", config)
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
    args = parser.parse_args()
    to_bin = args.output.endswith(".bin") and not os.path.isdir(args.output)
    output = Output((os.path.dirname(args.output) or ".") if to_bin else args.output, args.force)
    try:
        convert(*kind_of(args.input), output, to_bin and os.path.basename(args.output))
        output.commit()
    except OSError as error:
        fail(f"{error.filename or args.output}: {error.strerror or error}")
    finally:
        output.discard()


if __name__ == "__main__":
    main()
