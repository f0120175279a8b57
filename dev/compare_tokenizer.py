#!/usr/bin/env python3
"""Compares ./tokenizer with tiktoken, tokenizers and transformers, live, on text that is new in every run.

    python3 dev/compare_tokenizer.py [--megabytes 20] [--seed N] [--program ./tokenizer]

GPT-2's vocabulary is taken from the folder DATA_MIRROR or ../shared/mirror (vocab.bpe and encoder.json), or
from an installed openai-whisper or mlx-whisper (gpt2.tiktoken); where there is none, those tests are skipped,
and the others use a vocabulary that tokenizers trains here. Needs tiktoken, tokenizers and transformers.
"""

import argparse
import base64
import importlib.util
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import GPT2Tokenizer  # noqa: E402

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = (
    "\t\n\v\f\r\x1c\x1f \x85\xa0\u1680\u180e"
    + "".join(map(chr, range(0x2000, 0x2010)))
    + "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
SCRIPTS = [
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x250, 0x370),
    (0x370, 0x400),
    (0x400, 0x530),
    (0x530, 0x590),
    (0x590, 0x600),
    (0x600, 0x700),
    (0x700, 0x7C0),
    (0x7C0, 0x900),
    (0x900, 0x980),
    (0x980, 0xE00),
    (0xE00, 0xF00),
    (0xF00, 0x1000),
    (0x1000, 0x10A0),
    (0x10A0, 0x1100),
    (0x1100, 0x1200),
    (0x1200, 0x13A0),
    (0x13A0, 0x1700),
    (0x1700, 0x1800),
    (0x1800, 0x1B00),
    (0x1B00, 0x1E00),
    (0x1E00, 0x2000),
    (0x2000, 0x2100),
    (0x2100, 0x2C00),
    (0x2C00, 0x2E80),
    (0x2E80, 0x3040),
    (0x3040, 0x3100),
    (0x3100, 0x3400),
    (0x3400, 0x4E00),
    (0x4E00, 0xA000),
    (0xA000, 0xA500),
    (0xA500, 0xAC00),
    (0xAC00, 0xD7A4),
    (0xD7A4, 0xD800),
    (0xE000, 0xF900),
    (0xF900, 0x10000),
    (0x10000, 0x11000),
    (0x11000, 0x12000),
    (0x12000, 0x17000),
    (0x17000, 0x1D000),
    (0x1D000, 0x1E000),
    (0x1E000, 0x1F000),
    (0x1F000, 0x20000),
    (0x20000, 0x32400),
    (0xE0000, 0xE0200),
    (0x10FF00, 0x110000),
]
ENDINGS = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "'l",
    "'v",
    "'r",
    "'e",
    "\u2019s",
    "''s",
    "'st",
    "' s",
]
EMOJI = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44b\U0001f3fd",
    "\u2764\ufe0f",
    "\U0001f1eb\U0001f1f7",
    "1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
]
WORDS = "the of and a to in is you that it he was for on are as with his they I at be this have".split()

counts = {"passed": 0, "failed": 0, "skipped": 0}


def result(name, ok, detail=""):
    counts["passed" if ok else "failed"] += 1
    print(f"{'ok     ' if ok else 'FAILED '} {name}{': ' + detail if detail else ''}", flush=True)


def skip(name, why):
    counts["skipped"] += 1
    print(f"skipped {name}: {why}", flush=True)


# ---- text ----


def run_boundaries():
    """Every code point beside which the class changes, from the table in train_gpt2.c."""
    source = (HERE.parent / "train_gpt2.c").read_text(encoding="utf-8")
    values = [
        int(v)
        for v in re.search(r"letter_and_number_runs\[\] = \{(.*?)\}", source, re.S).group(1).split(",")
        if v.strip()
    ]
    codes, code = set(), 0
    for value in values:
        code += abs(value)
        codes.update((code - 1, code))
    return sorted(c for c in codes if c < 0x110000 and not 0xD800 <= c < 0xE000)


def boundary_text():
    return "".join(
        f"a{c}a {c}1{c}1 !{c}! {c}{c}\n{c} \n" for c in map(chr, [*run_boundaries(), *map(ord, SPACES)])
    )


def piece(rng):
    kind = rng.randrange(16)
    if kind < 4:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
    if kind < 9:
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 12)))
    if kind == 9:
        return "".join(rng.choices(SPACES, k=rng.randrange(1, 5)))
    if kind == 10:
        return (
            rng.choice(["", " ", "a", "1", "!", "\n"])
            + rng.choice(ENDINGS)
            + rng.choice(["", " ", "a", "1", "'"])
        )
    if kind == 11:
        return "".join(
            chr(
                rng.choice(
                    [rng.randrange(97, 123), rng.randrange(0x300, 0x370), rng.randrange(0x20D0, 0x20FF)]
                )
            )
            for _ in range(rng.randrange(1, 10))
        )
    if kind == 12:
        return rng.choice(EMOJI) * rng.randrange(1, 4)
    if kind == 13:
        return "".join(rng.choices(" \n\r\t", weights=[4, 3, 1, 1], k=rng.randrange(1, 10)))
    if kind == 14:
        unit = rng.choice(
            ["a", " ", "\n", "0", "=", "-", "\u3042", "ab", "\u0301", "\U0001f600", "\xa0", "A", "\r\n"]
        )
        return unit * rng.randrange(1, 60 if rng.random() < 0.98 else 2000)
    return str(rng.randrange(10 ** rng.randrange(1, 12))) + rng.choice(
        ["", ".", ",", "%", "\xbd", "\u0664", "\u216b"]
    )


def random_text(rng, size):
    """About `size` bytes."""
    parts, total = [], 0
    while total < size:
        part = piece(rng) + rng.choice(["", "", " ", " ", "\n", "  "])
        parts.append(part)
        total += len(part.encode())
    return "".join(parts)


# ---- vocabularies ----


def bytes_spelled():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in spelled:
            spelled[byte] = chr(256 + len(spelled) - len(printable))
    return spelled


def merges_of_ranks(path):
    """merges and vocabulary from base64 lines: a token's two parts are what lower ranks make of its bytes."""
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(str.split, open(path, encoding="ascii"))
    }
    spelled = bytes_spelled()
    spell = lambda token: "".join(spelled[byte] for byte in token)  # noqa: E731
    lines = ["#version: 0.2"]
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            lines.append(f"{spell(parts[0])} {spell(parts[1])}")
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    return "\n".join(lines) + "\n", {**vocabulary, END: len(vocabulary)}


def find_gpt2(folder):
    """Writes GPT-2's vocab.json and merges.txt into the folder; returns where they are from, or None."""
    for mirror in (os.environ.get("DATA_MIRROR"), HERE.parent.parent / "shared" / "mirror"):
        if mirror and (Path(mirror) / "vocab.bpe").is_file() and (Path(mirror) / "encoder.json").is_file():
            folder.mkdir()
            (folder / "merges.txt").write_bytes((Path(mirror) / "vocab.bpe").read_bytes())
            (folder / "vocab.json").write_bytes((Path(mirror) / "encoder.json").read_bytes())
            return str(mirror)
    for package, inside in (("whisper", "assets/gpt2.tiktoken"), ("mlx_whisper", "assets/gpt2.tiktoken")):
        found = importlib.util.find_spec(package)
        if found and found.origin and (path := Path(found.origin).parent / inside).is_file():
            merges, vocabulary = merges_of_ranks(path)
            folder.mkdir()
            (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="")
            (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
            return str(path)
    return None


def train_reference(documents, size, folder):
    """Trains with tokenizers' BpeTrainer, and saves what it learned in the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    return tokenizer


class Reference:
    """One vocabulary in all three libraries."""

    def __init__(self, folder):
        spelled = {character: byte for byte, character in bytes_spelled().items()}
        self.vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self.tokenizers = Tokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
        self.tokenizers.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        end = self.vocabulary[END]
        ranks = {
            bytes(spelled[c] for c in token): rank for token, rank in self.vocabulary.items() if token != END
        }
        # tiktoken takes ids for ranks, which is right only where ids follow the order of merges
        self.tiktoken = (
            tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: end})
            if end == len(self.vocabulary) - 1
            else None
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "GPT2Tokenizer",
                    "bos_token": END,
                    "eos_token": END,
                    "unk_token": END,
                    "add_prefix_space": False,
                }
            )
        )
        self.transformers = GPT2Tokenizer.from_pretrained(str(folder))
        self.transformers.pad_token = END


class Program:
    def __init__(self, path, work):
        self.path, self.work = path, work

    def run(self, *arguments, data=b""):
        return subprocess.run(
            [self.path, *map(str, arguments)], input=data, capture_output=True, check=True
        ).stdout

    def encode(self, tokenizer, text, *options):
        data = text if isinstance(text, bytes) else text.encode()
        return list(map(int, self.run("encode", "--tokenizer", tokenizer, *options, data=data).split()))

    def decode(self, tokenizer, ids):
        return self.run("decode", "--tokenizer", tokenizer, data=" ".join(map(str, ids)).encode())


def first_difference(ours, theirs, show):
    if ours == theirs:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    return (
        f"{len(ours)} and {len(theirs)} ids, at {at}: ours {show(ours[max(0, at - 2):at + 6])} "
        f"theirs {show(theirs[max(0, at - 2):at + 6])}"
    )


def compare_text(
    name, program, folder, reference, text, libraries=("tiktoken", "tokenizers", "transformers")
):
    ours = program.encode(folder, text)
    show = lambda ids: repr(program.decode(folder, ids))  # noqa: E731
    details = (
        [] if program.decode(folder, ours) == text.encode() else ["decoding does not give the text back"]
    )
    if "tiktoken" in libraries and reference.tiktoken:
        details.append(first_difference(ours, reference.tiktoken.encode_ordinary(text), show))
    if "tokenizers" in libraries:
        details.append(first_difference(ours, reference.tokenizers.encode(text).ids, show))
    if "transformers" in libraries:
        details.append(first_difference(ours, reference.transformers(text)["input_ids"], show))
    details = [detail for detail in details if detail]
    result(name, not details, "; ".join(details))


# ---- the tests ----


def test_text(label, program, folder, reference, rng, megabytes):
    compare_text(f"{label}: beside every class boundary", program, folder, reference, boundary_text())
    documents = []
    left = int(megabytes * 1e6)
    while left > 0:
        documents.append(random_text(rng, min(left, 400_000)))
        left -= 400_000
    wrong = []
    for number, text in enumerate(documents):
        ours = program.encode(folder, text)
        difference = first_difference(
            ours, reference.tokenizers.encode(text).ids, lambda ids: repr(program.decode(folder, ids))
        )
        if difference:
            wrong.append(f"document {number}: {difference}")
    size = sum(len(text.encode()) for text in documents) / 1e6
    result(f"{label}: {size:.1f} MB of random text, tokenizers", not wrong, "; ".join(wrong[:3]))
    compare_text(
        f"{label}: random text, transformers", program, folder, reference, documents[0], ("transformers",)
    )
    if reference.tiktoken:
        compare_text(
            f"{label}: {size:.1f} MB of random text as a whole, tiktoken",
            program,
            folder,
            reference,
            "".join(documents),
            ("tiktoken",),
        )
    text = "".join(
        rng.choice([END, "<|endoftext", "|>", "<|", " ", "\n", "hello", "<|endof", "text|>", "'s", "\u3042"])
        for _ in range(20000)
    )
    ours = program.encode(folder, text)
    result(f"{label}: {END} in a text", ours == reference.transformers(text)["input_ids"])
    plain = program.encode(folder, text, "--plain")
    result(f"{label}: --plain", plain == reference.tokenizers.encode(text).ids)
    noise = bytes(rng.randrange(256) for _ in range(200_000))
    result(f"{label}: random bytes come back", program.decode(folder, program.encode(folder, noise)) == noise)
    path = program.work / "whole.txt"
    path.write_text("".join(documents), encoding="utf-8", newline="")
    one = program.run("encode", "--tokenizer", folder, "--threads", 1, path)
    three = program.run("encode", "--tokenizer", folder, "--threads", 3, path)
    result(f"{label}: as many threads as one likes", one == three)


def test_pad(label, program, folder, reference, rng):
    lines = [
        "",
        "Hello world",
        " ",
        "\u3042\u3044",
        "x " * 50,
        *(re.sub(r"\n", " ", random_text(rng, 40)) for _ in range(400)),
    ]
    data = "".join(line + "\n" for line in lines).encode()
    for side in ("right", "left"):
        for length in (1, 7, 32):
            ours = program.run(
                "encode", "--tokenizer", folder, "--pad", side, "--length", length, data=data
            )
            reference.transformers.padding_side = side
            theirs = [
                reference.transformers(line, padding="max_length", truncation=True, max_length=length)
                for line in lines
            ]
            theirs = [
                json.dumps({"input_ids": t["input_ids"], "attention_mask": t["attention_mask"]})
                for t in theirs
            ]
            result(
                f"{label}: --pad {side} --length {length}, transformers", ours.decode().splitlines() == theirs
            )


def compare_training(name, program, documents, size):
    """Same merges, and a folder that tokenizers saves in the same way and transformers loads."""
    theirs, ours, path = program.work / "theirs", program.work / "ours", program.work / "train.txt"
    path.write_text(f"{END}\n".join(documents), encoding="utf-8", newline="")
    train_reference(documents, size, theirs)
    program.run("train", "--vocab-size", size, "--out", ours, path)
    expected, got = (theirs / "merges.txt").read_bytes(), (ours / "merges.txt").read_bytes()
    result(f"training: {name}, {size} tokens, {got.count(10) - 1} merges", expected == got)
    return ours


def test_training(program, rng, texts):
    ours = None
    for name, text in texts.items():
        for size in (300, 1000, 5000):
            ours = compare_training(name, program, [text + "\n"], size)
    for round_number in range(12):
        letters = rng.choice(["ab", "abc", "abcdefgh", "a", " a", "=-", "aA1 ", "\u3042\u3044a "])
        documents = []
        for _ in range(rng.randrange(1, 40)):
            text = "".join(
                rng.choice(letters) * rng.choice([1, 1, 1, 2, 3, rng.randrange(1, 40)])
                for _ in range(rng.randrange(1, 60))
            )
            documents.append(text + "\n")
        compare_training(
            f"few letters {letters!r}, ties and runs", program, documents, rng.choice([270, 300, 400, 1000])
        )
    documents = [random_text(rng, 30000) + "\n" for _ in range(10)]
    ours = compare_training("random text in ten documents", program, documents, 3000)
    reference = Reference(ours)
    saved = program.work / "saved"
    saved.mkdir(exist_ok=True)
    reference.tokenizers.model.save(str(saved))
    for name in ("vocab.json", "merges.txt"):
        result(
            f"training: {name} is what tokenizers saves",
            (saved / name).read_bytes() == (ours / name).read_bytes(),
        )
    compare_text("trained vocabulary: other text", program, ours, reference, random_text(rng, 300_000))
    reference.transformers.save_pretrained(str(program.work / "pretrained"))
    text = random_text(rng, 100_000)
    result(
        "tokenizer.json of transformers' save_pretrained",
        program.encode(program.work / "pretrained", text) == reference.transformers(text)["input_ids"],
    )


def test_shards(program, folder, mirror):
    """The token files of llm.c's starter pack, which have <|endoftext|> before every paragraph."""
    names = ("tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin", "tinyshakespeare.txt")
    if not mirror or not all((Path(mirror) / name).is_file() for name in names):
        skip("shards of llm.c", "no mirror with " + ", ".join(names))
        return
    text = (Path(mirror) / names[2]).read_bytes().replace(b"\n\n", b"\n\n" + END.encode() + b"\n")
    path, prefix = program.work / "paragraphs.txt", program.work / "paragraphs"
    path.write_bytes(text)
    program.run("shard", "--tokenizer", folder, "--val-fraction", 0.1, "--out", prefix, path)
    read = lambda file: struct.unpack(f"<{(len(file) - 1024) // 2}H", file[1024:])  # noqa: E731
    header = lambda file: struct.unpack("<256i", file[:1024])  # noqa: E731
    theirs = read((Path(mirror) / names[0]).read_bytes()) + read((Path(mirror) / names[1]).read_bytes())
    train, val = (Path(f"{prefix}_{part}.bin").read_bytes() for part in ("train", "val"))
    result("shards: the tokens of llm.c's tiny_shakespeare", read(train) + read(val) == theirs)
    result(
        "shards: headers",
        all(
            header(part)[:3] == (20240520, 1, len(read(part))) and not any(header(part)[3:])
            for part in (train, val)
        ),
    )
    share = len(read(val)) / len(theirs)
    result(
        "shards: validation part", read(val)[0] == 50256 and 0.05 < share <= 0.1, f"{share:.4f} of the tokens"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=20, help="how much random text")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="to repeat a run")
    parser.add_argument("--program", default=str(HERE.parent / "tokenizer"))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}, {arguments.program}, tiktoken {tiktoken.__version__}")

    with tempfile.TemporaryDirectory() as work:
        program = Program(arguments.program, Path(work))
        gpt2 = Path(work) / "gpt2"
        source = find_gpt2(gpt2)
        mirror, texts = None, {}
        if source:
            print(f"GPT-2's vocabulary from {source}")
            mirror = source if Path(source).is_dir() else None
            reference = Reference(gpt2)
            known = {"Hello world": [15496, 995], " don't": [836, 470]}
            result("GPT-2: known ids", all(program.encode(gpt2, text) == ids for text, ids in known.items()))
            result(
                "GPT-2: merges alone",
                program.encode(gpt2 / "merges.txt", "hello " + END) == [31373, 220, 50256],
            )
            test_text("GPT-2", program, gpt2, reference, rng, arguments.megabytes)
            test_pad("GPT-2", program, gpt2, reference, rng)
            test_shards(program, gpt2, mirror)
            shakespeare = Path(mirror or "/") / "tinyshakespeare.txt"
            if shakespeare.is_file():
                texts["tinyshakespeare.txt"] = shakespeare.read_text(encoding="utf-8")
                compare_text(
                    "GPT-2: tinyshakespeare.txt", program, gpt2, reference, texts["tinyshakespeare.txt"]
                )
        else:
            for name in ("GPT-2's ids", "GPT-2 text", "GPT-2 --pad", "shards of llm.c"):
                skip(name, "no GPT-2 vocabulary: set DATA_MIRROR or install openai-whisper")
        own = Path(work) / "own"  # <|endoftext|> is 0 there, and bytes have other ids
        train_reference([random_text(rng, 300_000)], 2000, own)
        reference = Reference(own)
        test_text("own vocabulary", program, own, reference, rng, min(arguments.megabytes, 2))
        test_pad("own vocabulary", program, own, reference, rng)
        test_training(program, rng, texts)
    print(", ".join(f"{number} {what}" for what, number in counts.items()), flush=True)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
