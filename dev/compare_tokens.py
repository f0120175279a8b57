#!/usr/bin/env python3
"""Compares ./tokenizer with AutoTokenizer on folders with added tokens, which are new in every run.

  dev/compare_tokens.py [--seed N] [--folders N] [--first N]     usually through dev/compare_test.sh

A folder has 0 to 30 added tokens, now and then thousands, with any of the flags lstrip, rstrip, single_word,
normalized and special; some begin, end or contain one another, are white space, or are in the vocabulary
already. Named tokens (eos, pad, ...) are chosen at random. It is written as transformers or tokenizers saves
it, or in the older files: vocab.json, merges.txt, added_tokens.json, special_tokens_map.json,
tokenizer_config.json. 20 texts full of these tokens must become the ids that AutoTokenizer gives, with --plain
those that it gives without added tokens, and the ids the same text.

Vocabularies are learned here, small ones; every fortieth folder has GPT-2's own, where compare_tokenizer.py
finds it. Of what differs, the smallest folder and text that still differ are printed, and kept in build/compare.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import checks
import compare_tokenizer  # it turns off the network
import tokenizers
import transformers
from tokenizers import AddedToken

END = "<|endoftext|>"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
OTHER_NAMES = ("image_token", "user_token")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEXTS = 20
# fmt: off
CONTENTS = ["<|user|>", "<|bot|>", "<|pad|>", "<pad>", "<s>", "</s>", "<mask>", "[R]", "[CLS]", "<|", "|>",
            "resto_bombay", "ab", "abc", "bcd", "b", "QZ", "QZJ", "ZJ", "zebra", "bra", "the", "\u0120the",
            "\u0120", "the cat", " the", "the ", " ", "  ", "   ", "\n", "\t", "\n\n", " x", "x ", "1",
            "12", "_", "a_b", "'s", ".", "...", "e\u0301", "\u0301", "\u00e9", "\u00e9t\u00e9",
            "\u65e5\u672c", "\u672c", "\U0001f642", "\u00bd", "\u2163", "\u24b6", "\u3000", "\u00a0",
            "\u00a0x", "\u200d", "caf\u00e9", "\\", '"', "/", "{}", "\u0438", "\u0434\u0430",
            "<|endoftext", END]
FILLERS = ["a", "b", "z", "x", "Q", "J", "1", "2", "_", "-", ".", "'s", "'", "s", "the", " the", "The",
           "cat", "zebras", "ca", "\u00e9", "e\u0301", "\u0301", "\u65e5", "\u00bd", "\u2163", "\u24b6",
           "\u24d0", "\U0001f642", "\u0438", "\u200d", "<", "|", ">", "\u0120", "\\", '"', "word",
           "hello world", "don't", "3.14", "and so on, ", "\u4e16\u754c", "\u203f", "\u093e"]
SPACES = [" ", " ", " ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\r", "\v", " \t ",
          "\u200b", "\ufeff"]
# fmt: on
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not take the processor from others


# ---- Folders: a dict says all about one, so that it can be written again with less in it ----


class Base:
    """A vocabulary: {token: id}, merges, and the same as tokenizers has it."""

    def __init__(self, vocabulary, merges):
        self.vocabulary, self.merges = vocabulary, merges
        self.model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
        self.vocab_json = json.dumps(vocabulary)
        self.merges_txt = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)

    def tokenizer(self):
        tokenizer = tokenizers.Tokenizer(self.model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer


def learn_bases(rng):
    """Vocabularies of 300 to 900 tokens: END first, END last, no END, and <pad> <s> </s> instead of it."""
    text = "".join(
        compare_tokenizer.random_text(rng, 20000) + " the cat, abc zebra \u00e9t\u00e9 " for _ in range(4)
    )
    bases = []
    for specials, last in (([END], False), ([], True), ([], False), (["<pad>", "<s>", "</s>"], False)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            [text],
            tokenizers.trainers.BpeTrainer(
                vocab_size=rng.randrange(300, 900),
                special_tokens=specials,
                show_progress=False,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        model = json.loads(tokenizer.to_str())["model"]
        vocabulary = model["vocab"] | ({END: len(model["vocab"])} if last else {})
        bases.append(Base(vocabulary, [tuple(merge) for merge in model["merges"]]))
    return bases


def gpt2_base(work):
    if not compare_tokenizer.find_gpt2(work / "gpt2"):
        return None
    lines = (work / "gpt2/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((work / "gpt2/vocab.json").read_text(encoding="utf-8"))
    return Base(vocabulary, [tuple(line.split(" ")) for line in lines])


def random_content(rng, before, base):
    kind = rng.randrange(12)
    if kind < 5:
        return rng.choice(CONTENTS)
    if kind < 7 and before:  # a part of another one, or more than it
        other = rng.choice(before)
        cut = rng.randrange(len(other) + 1)
        return rng.choice(
            [
                other[:cut],
                other[cut:],
                other + rng.choice(FILLERS + SPACES),
                rng.choice(FILLERS + SPACES) + other,
                other + other,
            ]
        )
    if kind == 7:
        return rng.choice(list(base.vocabulary))
    if kind == 8:
        return f"<extra_{rng.randrange(50)}>"
    return "".join(rng.choice(FILLERS + SPACES + ["\n"]) for _ in range(rng.randrange(1, 4)))


def random_tokens(rng, base):
    """Added tokens, each content once."""
    count = rng.choice([0, 1, 2, 3, 5, 8, 15, 30])
    tokens, many = {}, rng.random() < 0.01
    favourite = {flag: rng.random() < 0.3 for flag in FLAGS}  # so that now and then all have a flag, or none
    for number in range(rng.randrange(1000, 4000) if many else count):
        content = (
            f"<{number}>" if many and rng.random() < 0.9 else random_content(rng, list(tokens)[-30:], base)
        )
        if content:
            tokens[content] = {
                flag: rng.random() < 0.2 if rng.random() < 0.7 else favourite[flag] for flag in FLAGS
            }
    return [{"content": content, **flags} for content, flags in tokens.items()]


def random_folder(rng, bases):
    base = rng.choice(bases)
    tokens = random_tokens(rng, base)
    contents = [token["content"] for token in tokens] or ["<new>"]
    named = {}
    for name, chance in zip(NAMES + OTHER_NAMES, (0.4, 0.6, 0.4, 0.1, 0.5, 0.1, 0.1, 0.2, 0.1)):
        if rng.random() < chance:
            named[name] = rng.choice(contents + ["</s>", "<pad>", f"<{name}>", END])
    extra = [rng.choice(contents + ["<extra>", "<|more|>"]) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    return {
        "base": base,
        "tokens": tokens,
        "named": named,
        "extra": list(dict.fromkeys(extra)),
        "form": rng.choice(["saved", "library", "files", "files with decoder", "all files"]),
        "class": rng.choice(
            ["GPT2Tokenizer", "GPT2Tokenizer", "GPT2TokenizerFast", None, "PreTrainedTokenizerFast"]
        ),
        "flags of named": rng.random() < 0.3,
        "unsaid": rng.random() < 0.3,
        "map": rng.random() < 0.7,
        "extra in": rng.choice(["config", "map", "both"]),
        "extra as": rng.choice(["additional_special_tokens", "extra_special_tokens"]),
        "post_processor": rng.random() < 0.3,
        "clean": rng.random() < 0.3,
    }


def with_ids(base, tokens):
    """Ids as they are given one by one: a token of the vocabulary keeps its own, others get the next one."""
    free, ids = len(base.vocabulary), {}
    for token in tokens:
        ids[token["content"]] = base.vocabulary.get(token["content"], free)
        free += ids[token["content"]] == free
    return ids


def write_folder(folder, path):
    """Writes the files; what they mean is for AutoTokenizer to say."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    base, tokens, named = folder["base"], folder["tokens"], folder["named"]

    def write(name, value):
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")

    write("config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    added = [AddedToken(**token) for token in tokens]
    if folder["form"] == "saved":
        tokenizer = transformers.GPT2Tokenizer(vocab=base.vocabulary, merges=base.merges)
        tokenizer.add_tokens(added)
        tokenizer.add_special_tokens(
            {name: content for name, content in named.items() if name in NAMES}
            | ({"extra_special_tokens": folder["extra"]} if folder["extra"] else {})
        )
        tokenizer.save_pretrained(path)
        return
    flags_of = {token["content"]: token for token in tokens}
    config = {
        "model_max_length": 1024,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": folder["clean"],
    }
    config |= named
    if folder["extra"] and folder["extra in"] != "map":
        config[folder["extra as"]] = folder["extra"]
    if folder["class"]:
        config["tokenizer_class"] = folder["class"]
    if folder["flags of named"]:
        config |= {
            name: {"__type": "AddedToken", **flags_of[content]}
            for name, content in named.items()
            if content in flags_of
        }
    ids = with_ids(base, tokens)
    if folder["form"] in ("library", "all files"):
        tokenizer = base.tokenizer()
        tokenizer.add_tokens(added)
        if folder["post_processor"]:
            tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        tokenizer.save(str(path / "tokenizer.json"))
    elif config.get("tokenizer_class") == "PreTrainedTokenizerFast":
        del config["tokenizer_class"]  # it needs a tokenizer.json
    if folder["form"] != "library":
        write("vocab.json", base.vocab_json)
        write("merges.txt", base.merges_txt)
        new = {content: number for content, number in ids.items() if number >= len(base.vocabulary)}
        write("added_tokens.json", new if folder["unsaid"] else ids)
        special_map = {name: content for name, content in named.items() if name in NAMES}
        if folder["extra"] and folder["extra in"] != "config":
            special_map[folder["extra as"]] = folder["extra"]
        if folder["flags of named"]:
            special_map |= {
                name: {key: value for key, value in flags_of[content].items() if key != "special"}
                for name, content in special_map.items()
                if name in NAMES and content in flags_of
            }
        if folder["map"]:
            write("special_tokens_map.json", special_map)
    if folder["form"] in ("files with decoder", "all files"):
        config["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in tokens}
    write("tokenizer_config.json", config)


def random_text(rng, folder, pieces):
    contents = [token["content"] for token in rng.sample(folder["tokens"], min(40, len(folder["tokens"])))]
    contents += [*folder["named"].values(), *folder["extra"], END]
    parts = []
    for _ in range(rng.randrange(pieces)):
        kind = rng.random()
        if kind < 0.5:
            content = rng.choice(contents)
            cut = rng.randrange(len(content) + 1)
            parts.append(content if rng.random() < 0.8 else rng.choice([content[:cut], content[cut:]]))
        elif kind < 0.75:
            parts.append(rng.choice(SPACES))
        else:
            parts.append(rng.choice(FILLERS) if rng.random() < 0.95 else compare_tokenizer.piece(rng))
    return "".join(parts)


# ---- Comparing ----


def ids_by(tokenizer, texts):
    """AutoTokenizer's ids of each text; None where tokenizers itself crashes (white space that a token with rstrip
    has taken, and that another one with lstrip begins in: "AddedVocabulary bad split")."""
    standard_error = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)  # where it would say so at length
    try:
        return tokenizer(texts)["input_ids"] if texts else []
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return [None] if len(texts) == 1 else [ids for text in texts for ids in ids_by(tokenizer, [text])]
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nothing)


def tokenizer(command, path, data, *options):
    """What ./tokenizer prints, or why it fails."""
    ok, output, why = checks.run("./tokenizer", command, "--tokenizer", str(path), *options, stdin=data)
    return output if ok else why


def encode(path, text, *options):
    output = tokenizer("encode", path, text.encode(), *options)
    return output if isinstance(output, str) else [int(word) for word in output.split()]


def encode_lines(path, lines, length, *options):
    """The ids of each line in one call, which pads them; without a token to pad with, in a call each."""
    output = tokenizer("encode", path, "".join(line + "\n" for line in lines).encode(), "--pad", "right", "--length",
                       str(length), *options)  # fmt: skip
    if isinstance(output, str):
        return [encode(path, line, *options) for line in lines] if "pad token" in output else output
    rows = [json.loads(line) for line in output.splitlines()]
    return [row["input_ids"][: sum(row["attention_mask"])] for row in rows]


def compare_lines(path, lines, wanted, *options):
    """Lines of text in one call; wanted are AutoTokenizer's ids. No line is left where tokenizers crashed on each."""
    if not lines:
        return None
    ours = encode_lines(path, lines, 8 + max(map(len, wanted)), *options)
    if isinstance(ours, str) or len(ours) != len(lines):
        return None, ours, "AutoTokenizer loads it"
    for text, ids, right in zip(lines, ours, wanted):
        if ids != right:
            return " ".join([*options, text]), ids, right
    return None


def compare_decoding(path, ids, theirs):
    decode = lambda some: tokenizer("decode", path, " ".join(map(str, some)).encode())  # noqa: E731
    equal = (
        lambda ours, right: isinstance(ours, bytes) and ours.decode(errors="replace") == right
    )  # noqa: E731
    if equal(decode(ids), theirs.decode(ids)):
        return None
    for number in dict.fromkeys(ids):
        if not equal(decode([number]), theirs.decode([number])):
            return f"decode {number}", decode([number]), theirs.decode([number])
    return "decode", decode(ids), theirs.decode(ids)


def compare_folder(path, texts, plain=None):
    """None, or what differs first: (text, ours, AutoTokenizer's); the text is None if the folder is refused."""
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    pairs = [pair for pair in zip(texts, ids_by(theirs, texts)) if pair[1] is not None]
    lines = [text for text, _ in pairs if "\n" not in text]
    wanted = [ids for text, ids in pairs if "\n" not in text]
    difference = compare_lines(path, lines, wanted)
    if plain and not difference:
        difference = compare_lines(path, lines, [plain.encode(line).ids for line in lines], "--plain")
    for text, right in pairs if not difference else []:
        if "\n" in text and (ids := encode(path, text)) != right:
            return text, ids, right
    return difference or compare_decoding(path, [number for _, ids in pairs for number in ids], theirs)


def differs(folder, path, text):
    """Whether this one text still gets other ids, or the folder still is refused; never a reason to stop."""
    try:
        write_folder(folder, path)
        if text is None:
            theirs = transformers.AutoTokenizer.from_pretrained(str(path))
            return isinstance(encode(path, "a"), str)
        theirs = ids_by(transformers.AutoTokenizer.from_pretrained(str(path)), [text])[0]
    except Exception:
        return False
    return theirs is not None and encode(path, text) != theirs


def smallest(folder, path, text):
    """Takes away tokens, named tokens and characters as long as it still differs, in at most 300 tries."""
    tries = 150

    def attempt(candidate, candidate_text):
        nonlocal folder, text, tries
        tries -= 1
        if tries < 0 or not differs(candidate, path, candidate_text):
            return False
        folder, text = candidate, candidate_text
        return True

    size = max(1, len(folder["tokens"]) // 2)
    while size:  # halves, quarters, ..., single tokens
        at = 0
        while at < len(folder["tokens"]):
            fewer = folder["tokens"][:at] + folder["tokens"][at + size :]
            at += 0 if attempt(folder | {"tokens": fewer}, text) else size
        size //= 2
    for key in list(folder["named"]):
        attempt(folder | {"named": {k: v for k, v in folder["named"].items() if k != key}}, text)
    attempt(folder | {"extra": []}, text)
    for i, token in enumerate(folder["tokens"]):
        for flag in FLAGS:
            if token[flag]:
                tokens = [
                    dict(t, **{flag: False}) if t["content"] == token["content"] else t
                    for t in folder["tokens"]
                ]
                attempt(folder | {"tokens": tokens}, text)
    size, tries = len(text or "") // 2, 150
    while size:
        at = 0
        while at < len(text):
            at += 0 if attempt(folder, text[:at] + text[at + size :]) else size
        size //= 2
    write_folder(folder, path)
    return folder, text


def describe(folder):
    tokens = [
        repr(token["content"]) + "".join(" " + flag for flag in FLAGS if token[flag])
        for token in folder["tokens"]
    ]
    return (
        f"form {folder['form']!r}, class {folder['class']}, vocabulary of {len(folder['base'].vocabulary)}, "
        f"named {folder['named']}, extra {folder['extra']} in {folder['extra in']} as {folder['extra as']}, "
        f"map {folder['map']}, flags of named {folder['flags of named']}, "
        f"unsaid {folder['unsaid']}, added: {'; '.join(tokens[:40])}"
    )


def report(number, folder, path, difference, shrink):
    text, ours, theirs = difference
    kept = Path(checks.WORK) / f"tokens-{number}"
    if shrink and (text is None or not text.startswith(("decode", "--plain "))):
        smaller, smaller_text = smallest(folder, path, text)
        if differs(smaller, path, smaller_text):
            folder, text = smaller, smaller_text
            ours = encode(path, "a" if text is None else text)
            theirs = (
                "loads"
                if text is None
                else transformers.AutoTokenizer.from_pretrained(str(path))(text)["input_ids"]
            )
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(path, kept)
    print(
        f"       folder {number}, {kept}: {describe(folder)}\n         text   {text!r}\n         ours   {ours!r:.600}\n"
        f"         theirs {theirs!r:.600}",
        flush=True,
    )


def compare(seed, count=500, first=0):
    """As many folders, each from a random stream of its own: --first N --folders 1 repeats one."""
    transformers.logging.set_verbosity_error()
    os.makedirs(checks.WORK, exist_ok=True)
    failed, begun = 0, time.time()
    with tempfile.TemporaryDirectory() as work:
        bases, path = learn_bases(random.Random(seed)), Path(work) / "folder"
        gpt2 = gpt2_base(Path(work))
        if not gpt2:
            checks.skip("added tokens in GPT-2's own vocabulary: set DATA_MIRROR or install openai-whisper")
        for number in range(first, first + count):
            rng = random.Random(f"{seed} {number}")
            folder = random_folder(rng, [gpt2] if gpt2 and number % 40 == 39 else bases)
            texts = [random_text(rng, folder, 30) for _ in range(TEXTS - 2)]
            texts.append(random_text(rng, folder, 15) + "\n" + random_text(rng, folder, 15))
            # a long one is cut into spans for threads
            texts.append(random_text(rng, folder, 30000 if number % 25 == 24 else 60))
            write_folder(folder, path)
            plain = folder["base"].tokenizer() if number % 5 == 0 else None
            difference = compare_folder(path, texts, plain)
            failed += bool(difference)
            if difference and failed <= 20:
                report(number, folder, path, difference, failed <= 4)
    took = f"{count * TEXTS} texts, {time.time() - begun:.0f} s"
    checks.check(
        not failed, f"{count - failed} of {count} folders equal, {took}", f"--seed {seed} repeats it"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run")
    parser.add_argument("--folders", type=int, default=500, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    arguments = parser.parse_args()
    print(f"dev/compare_tokens.py --seed {arguments.seed}")
    compare(arguments.seed, arguments.folders, arguments.first)
    checks.finish()
