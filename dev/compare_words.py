#!/usr/bin/env python3
"""The model's own words: added tokens, ends of text, heads and encodings, one named case after another.

  dev/compare_words.py      usually through dev/compare_test.sh, which sets all up

Each case is a folder or a file as people have them, made here by transformers, tokenizers or json, and the
right value is what these make of it. dev/compare_tokens.py has random folders, for token ids alone.
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import checks
import compare_tokens  # first: it turns off the network
import numpy as np
import torch
import transformers
from checks import WORK, check, run, skip
from compare_tokens import END
from safetensors.torch import load_file, save_file, save_model
from tokenizers import AddedToken

POSITIONS = 64
ADDED = [
    AddedToken("<|pad|>", special=True),
    AddedToken("<|user|>", special=True),
    AddedToken("<|bot|>", special=True),
    AddedToken("resto_bombay", normalized=True),
]
TALK = "<|user|>hi resto_bombay<|bot|>"
TEXT = "the cat, " + TALK + " a zebra" + END + "\nhi<|bot|> the<|pad|>the  <|user|>"


def tokenizer_of(base, tokens=(), **named):
    """A tokenizer as transformers makes it, with added tokens; its pad_token is the first of them."""
    tokenizer = transformers.GPT2Tokenizer(vocab=base.vocabulary, merges=base.merges, **named)
    tokenizer.add_tokens(list(tokens))
    if tokens:
        tokenizer.pad_token = str(tokens[0])
    return tokenizer


def model_of(rows, always=None, **settings):
    """A random model; with `always`, one whose largest logits are these ids', the first one's above all."""
    config = transformers.GPT2Config(
        vocab_size=rows,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **{"bos_token_id": 0, "eos_token_id": 0, **settings},
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    if always is not None:  # logits are wte's first column
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1
        for place, number in enumerate(always):
            model.transformer.wte.weight[number, 0] = 20 - place
    return model


def save(folder, model, tokenizer):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def older_files(folder, base, tokenizer):
    """Writes the tokenizer anew as transformers 3 and 4 did without tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{folder}/{name}")
    added = {
        content: number
        for content, number in tokenizer.get_added_vocab().items()
        if number >= len(base.vocabulary)
    }
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    files = {
        "vocab.json": base.vocab_json,
        "merges.txt": base.merges_txt,
        "added_tokens.json": json.dumps(added),
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": '{"model_max_length": 64}',
    }
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def write(name, text):
    """A file of data; bytes, a text, or a list of examples."""
    path = Path(WORK, name)
    path.parent.mkdir(exist_ok=True)
    if isinstance(text, list):
        text = "".join(json.dumps(example) + "\n" for example in text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_shard(name, ids):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return write(name, header.tobytes() + np.array(ids, "<u2").tobytes())


def evaluate(folder, path, *options):
    """((loss, scored tokens), "") or (None, why there are none)."""
    ok, printed, why = run("./train_gpt2", "--init", folder, "--eval", "--val", path, "--quiet", *options)
    found = re.search(r"loss ([0-9.]+).* of (\d+) tokens", printed.decode())
    return ((float(found.group(1)), int(found.group(2))), "") if ok and found else (None, why)


def expected(folder, rows):
    """The same of rows (ids, labels with -100 for what is not scored), by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss, count = 0.0, 0
    for ids, labels in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
        count += sum(label >= 0 for label in labels[1:])
    return loss / count, count


def check_loss(what, folder, path, wanted, *options):
    got, why = evaluate(folder, path, *options)
    ok = got and abs(got[0] - wanted[0]) <= 1e-4 * wanted[0] and got[1] == wanted[1]
    check(ok, what, f"{got or why} is not {wanted}")


def train(folder, data, out, steps, *options):
    shutil.rmtree(out, ignore_errors=True)
    ok, _, why = run("./train_gpt2", "--init", folder, "--train", data, "--val-fraction", "0", "--steps", steps,
                     "--out", out, *options)
    return ok, why


def check_ids(what, folder, text):
    """Ids of a text, and the text of these ids; AutoTokenizer's are right."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = theirs(text)["input_ids"]
    ids = compare_tokens.encode(folder, text)
    check(ids == wanted, f"{what}: ids", f"{ids} is not {wanted}")
    ok, output, why = run(
        "./tokenizer", "decode", "--tokenizer", folder, stdin=" ".join(map(str, wanted)).encode()
    )
    check(ok and output.decode() == theirs.decode(wanted), f"{what}: text", f"{output} {why}")
    return wanted


def check_refused(what, pattern, *command):
    """One line on standard error that matches, and exit status 1."""
    ok, _, why = run(*command)
    check(
        not ok and why.startswith("exit status 1, ") and re.search(pattern, why),
        f"refused: {what}",
        "it was taken" if ok else why,
    )


def label_all(tokenizer, text):
    ids = [tokenizer.eos_token_id] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return ids, [-100] + ids[1:]


# ---- The cases ----


def compare_added_tokens(name, base):
    """Four added tokens; tokenizer.json, older files, and what train_gpt2 makes of either."""
    tokenizer, folder = tokenizer_of(base, ADDED), f"{WORK}/words-{name}"
    data = write(f"words-{name}.jsonl", [{"text": TALK + " the cat"}, {"text": "zebra <|bot|>resto_bombay"}])
    for form in ("tokenizer.json", "older files"):
        what = f"{name}, {form}"
        save(folder, model_of(len(tokenizer), pad_token_id=len(base.vocabulary)), tokenizer)
        if form == "older files":
            older_files(folder, base, tokenizer)
        ids = check_ids(what, folder, TALK)
        check({len(base.vocabulary) + i for i in (1, 2, 3)} < set(ids), f"{what}: as added tokens", str(ids))
        check_ids(f"{what}, more", folder, TEXT)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        rows = [label_all(theirs, json.loads(line)["text"]) for line in open(data)]
        check_loss(f"{what}: loss", folder, data, expected(folder, rows))
        plain = [
            ([theirs.eos_token_id] + ids + [theirs.eos_token_id])
            for ids in (base.tokenizer().encode(json.loads(line)["text"]).ids for line in open(data))
        ]
        check_loss(
            f"{what}: loss, --plain",
            folder,
            data,
            expected(folder, [(ids, [-100] + ids[1:]) for ids in plain]),
            "--plain",
        )
        out = folder + "-out"
        ok, why = train(folder, data, out, "2")
        if check(ok, f"{what}: two updates", why):
            written = transformers.AutoTokenizer.from_pretrained(out)
            check(
                written(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
                and written.pad_token == theirs.pad_token
                and written.eos_token == theirs.eos_token,
                f"{what}: AutoTokenizer reads the same from what is written",
                f"{written.pad_token}, {written.eos_token}, {written(TEXT)['input_ids']}",
            )


def compare_other_end(base):
    """A vocabulary with <pad> <s> </s>, whose end of text is 2."""
    tokenizer = tokenizer_of(base, bos_token="<s>", eos_token="</s>", unk_token="<s>", pad_token="<pad>")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = save(f"{WORK}/words-end", model_of(len(tokenizer), [2], **ends), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    ok, printed, why = run(
        "./train_gpt2", "--init", folder, "--generate", "5", "--prompt", "the cat", "--quiet"
    )
    text = tokenizer.decode(wanted[0], skip_special_tokens=True)
    check(
        ok
        and printed.decode().rstrip("\n") == text
        and wanted.shape[1] == 1 + len(tokenizer("the cat")["input_ids"]),
        "</s> ends what is generated",
        f"{printed} {why} is not {text!r}",
    )
    pairs = [("the", "cat zebra"), ("a", "12")]
    rows = []
    for prompt, completion in pairs:
        start, rest = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"] + [2]
        rows.append((start + rest, [-100] * len(start) + rest))
    data = write("words-end.jsonl", [dict(zip(("prompt", "completion"), pair)) for pair in pairs])
    check_loss("</s> is scored behind completions", folder, data, expected(folder, rows))
    check_loss(
        "</s> begins and ends a text",
        folder,
        write("words-end-text.jsonl", [{"text": "the cat"}]),
        expected(folder, [label_all(tokenizer, "the cat")]),
    )
    talk = [("user", "the"), ("assistant", "cat zebra"), ("user", "a"), ("assistant", "12 abc")]
    ids, labels = [], []
    for role, content in talk:
        turn = tokenizer(content)["input_ids"] + [2]
        ids, labels = ids + turn, labels + (turn if role == "assistant" else [-100] * len(turn))
    data = write("words-talk.jsonl", [{"messages": [{"role": role, "content": text} for role, text in talk]}])
    check_loss(
        "messages: the assistant's turns and their ends", folder, data, expected(folder, [(ids, labels)])
    )
    out = folder + "-out"
    ok, why = train(folder, data, out, "1")
    if check(ok, "</s>: an update", why):
        config = json.loads(Path(out, "config.json").read_text())
        check(
            all(config.get(key) == value for key, value in ends.items()),
            "</s>: config.json says so",
            str(config),
        )

    model = model_of(len(tokenizer), [5], eos_token_id=2)
    model.generation_config.eos_token_id = [3, 5]
    save(folder, model, tokenizer)
    ok, printed, why = run(
        "./train_gpt2", "--init", folder, "--generate", "5", "--prompt", "the cat", "--quiet"
    )
    check(
        ok and printed.decode().rstrip("\n") == "the cat",
        "any of generation_config's ends stops",
        f"{printed} {why}",
    )


def compare_more_rows(name, base, rows):
    """More rows in wte than there are tokens: an id without a token is never drawn."""
    tokenizer = tokenizer_of(base)
    first = base.vocabulary["a"]
    always = [rows - 1, len(tokenizer), len(tokenizer) + 3, first]  # the best ones have no token
    folder = save(
        f"{WORK}/words-rows", model_of(rows, always, eos_token_id=tokenizer.eos_token_id), tokenizer
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = model.generate(
        **tokenizer("the cat", return_tensors="pt"),
        max_new_tokens=5,
        do_sample=False,
        suppress_tokens=list(range(len(tokenizer), rows)),
    )
    text = tokenizer.decode(wanted[0])
    for what, options in (("greedy", ["--temperature", "0"]), ("drawn", ["--samples", "1"])):
        ok, printed, why = run(
            "./train_gpt2", "--init", folder, "--generate", "5", "--prompt", "the cat", "--quiet", *options
        )
        good = printed.decode().rstrip("\n") == text if what == "greedy" else printed.startswith(b"the cat")
        check(ok and good, f"{name}, {rows} rows: {what}", f"{printed} {why} is not {text!r}")
    data, out = write("words-rows.jsonl", [{"text": "the cat"}] * 4), folder + "-out"
    check_loss(
        f"{name}, {rows} rows: loss over all rows",
        folder,
        data,
        expected(folder, [label_all(tokenizer, "the cat")] * 4),
    )
    ok, why = train(folder, data, out, "2", "--sample-every", "1", "--sample-tokens", "8")
    check(
        ok and load_file(out + "/model.safetensors")["transformer.wte.weight"].shape[0] == rows,
        f"{name}, {rows} rows: samples while training",
        why,
    )


def compare_heads(base):
    tokenizer = tokenizer_of(base)
    folder, data = f"{WORK}/words-head", write("words-head.jsonl", [{"text": "the cat, a zebra"}])
    for what, change in (
        ("another lm_head.weight beside a tied wte", "both"),
        ("only lm_head.weight is stored", "head"),
    ):
        model = model_of(len(tokenizer))
        save(folder, model, tokenizer)
        weights = folder + "/model.safetensors"
        if change == "both":
            save_file(
                load_file(weights) | {"lm_head.weight": torch.randn(len(tokenizer), 32)},
                weights,
                metadata={"format": "pt"},
            )
        else:
            save_model(model, weights)
            check(
                "transformer.wte.weight" not in load_file(weights),
                "save_model of safetensors stores only the head",
            )
        check_loss(
            f"{what}: loss", folder, data, expected(folder, [label_all(tokenizer, "the cat, a zebra")])
        )
        out = folder + "-out"
        ok, why = train(folder, data, out, "1", "--warmup-steps", "1")  # the first update is at rate 0
        if check(ok, f"{what}: an update at rate 0", why):
            ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (out, folder))
            wrong = [
                name
                for name, value in theirs.state_dict().items()
                if not torch.equal(value, ours.state_dict()[name])
            ]
            check(not wrong, f"{what}: written", str(wrong))


def compare_switches(base):
    """What tokenizer.json can say besides GPT-2's rules is obeyed, or refused by its name."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END: {"id": END, "ids": [base.vocabulary[END]], "tokens": [END]}},
    }
    digits = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    cases = [
        ("pre_tokenizer", "use_regex", False),
        ("pre_tokenizer", "add_prefix_space", True),
        ("pre_tokenizer", None, digits),
        ("pre_tokenizer", None, None),
        ("normalizer", None, {"type": "Lowercase"}),
        ("normalizer", None, {"type": "NFKC"}),
        ("post_processor", None, template),
        ("model", "ignore_merges", True),
        ("model", "dropout", 0.5),
        ("model", "type", "WordLevel"),
        ("decoder", None, None),
    ]
    for part, key, value in cases:
        folder = f"{WORK}/words-switch"
        save(folder, model_of(len(base.vocabulary)), tokenizer_of(base))
        saved = json.loads(Path(folder, "tokenizer.json").read_text())
        if key:
            saved[part][key] = value
        else:
            saved[part] = value
        Path(folder, "tokenizer.json").write_text(json.dumps(saved))
        config = json.loads(Path(folder, "tokenizer_config.json").read_text())
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        )
        text = "The cat's  12 \ufb01  zebras, abc"
        ids = compare_tokens.encode(folder, text)
        what = f"tokenizer.json with {part}{' ' + key if key else ''} {json.dumps(value)[:40]}"
        named = (
            isinstance(ids, str) and ids.startswith("exit status 1") and (part in ids or key and key in ids)
        )
        if not isinstance(ids, str):
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            obeyed = ids == theirs(text)["input_ids"]
        check(named or not isinstance(ids, str) and obeyed, f"{what}: obeyed, or refused by name", str(ids))


def compare_many(base):
    tokenizer = tokenizer_of(base, [AddedToken(f"<tok_{i}>") for i in range(20000)])
    folder = save(f"{WORK}/words-many", model_of(len(tokenizer)), tokenizer)
    begin = time.time()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    between = time.time()
    ids = compare_tokens.encode(folder, "<tok_7><tok_19999> the <tok_20000>")
    end = time.time()
    print(
        f"       20,000 added tokens: AutoTokenizer {between - begin:.2f} s, tokenizer {end - between:.2f} s"
    )
    check(
        ids == tokenizer("<tok_7><tok_19999> the <tok_20000>")["input_ids"]
        and end - between <= between - begin,
        "20,000 added tokens, no slower than AutoTokenizer",
        str(ids)[:200],
    )


def compare_data(base):
    """Files of examples and texts that are not quite what they should be."""
    tokenizer = tokenizer_of(base)
    folder = save(
        f"{WORK}/words-data", model_of(len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer
    )
    line = b'{"prompt": "the cat", "completion": " a zebra"}\n'
    good, why = evaluate(folder, write("words-good.jsonl", line))
    check(good, "a prompt and its completion", why)
    for what, text in (
        ("a byte order mark", b"\xef\xbb\xbf" + line),
        ("null is absent", b'{"text": null, "prompt": "the cat", "completion": " a zebra"}\n'),
        ("Windows' line ends", line.replace(b"\n", b"\r\n")),
    ):
        check_loss(f"JSONL, {what}", folder, write("words-data.jsonl", text), good)
    path = write("words-data.jsonl", b'{"prompt": "x", "prompt": "the cat", "completion": " a zebra"}\n')
    got, why = evaluate(folder, path)
    check(
        got == good or re.search("twice|again|duplicate", why),
        "JSONL, a key twice: the last one, or refused",
        f"{got} {why}",
    )
    eval_ = ("./train_gpt2", "--init", folder, "--eval", "--quiet", "--val")
    messages = set()
    for what, text, pattern in (
        ("a JSON array", b'[{"text": "a"}, {"text": "b"}]\n', "array|\\["),
        ("pretty-printed JSON", b'{\n  "text": "a"\n}\n', "line"),
        ("instruction and output", b'{"instruction": "a", "output": "b"}\n', "instruction|output|prompt"),
        ("a number as completion", b'{"prompt": "a", "completion": 5}\n', "completion"),
        ("UTF-16", line.decode().encode("utf-16"), "UTF-16.*iconv|iconv.*UTF-16"),
        ("Latin-1", '{"text": "caf\u00e9 zebra"}\n'.encode("latin-1"), "UTF-8|iconv"),
    ):
        path = write("words-bad.jsonl", text)
        check_refused(f"JSONL, {what}", pattern, *eval_, path)
        messages.add(run(*eval_, path)[2])
    check(len(messages) == 6, "JSONL: each shape has its own message", str(messages))
    text = "the cat\na zebra, abc\u00e9\n"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32"):
        check_refused(f".txt in {encoding}", "iconv", *eval_, write("words-bad.txt", text.encode(encoding)))
    for what, text in (
        ("inside a line", f"the cat{END}a zebra"),
        ("at the end of a line", f"the cat{END}\na zebra"),
        ("twice", f"{END}{END}abc"),
        ("nearly", "<|endoftext> zebra"),
    ):
        ids = [tokenizer.eos_token_id] + tokenizer(text)["input_ids"]
        by_shard, why = evaluate(folder, write_shard("words-end.bin", ids))
        got, other = evaluate(folder, write("words-end.txt", text))
        check(
            got and got == by_shard,
            f"{END} {what}, as AutoTokenizer",
            f"{got} {other} is not {by_shard} {why}",
        )
    write("g/part1.txt", "abc abc abc abc")
    path = write("g/part[1].txt", "the cat, a zebra")
    by_shard, _ = evaluate(
        folder,
        write_shard("words-glob.bin", [tokenizer.eos_token_id] + tokenizer("the cat, a zebra")["input_ids"]),
    )
    got, why = evaluate(folder, path)
    check(
        got and got == by_shard,
        "g/part[1].txt is read while g/part1.txt exists",
        f"{got} {why} is not {by_shard}",
    )
    ok, output, why = run("./tokenizer", "encode", "--tokenizer", folder, path)
    check(
        ok and [int(word) for word in output.split()] == tokenizer("the cat, a zebra")["input_ids"],
        "./tokenizer reads g/part[1].txt",
        why,
    )


def compare(seed=None):
    os.makedirs(WORK, exist_ok=True)
    torch.manual_seed(1)
    bases = compare_tokens.learn_bases(random.Random(seed or 1))
    compare_added_tokens("own vocabulary", bases[0])
    compare_other_end(bases[3])
    compare_more_rows("own vocabulary", bases[1], len(bases[1].vocabulary) + 47)
    compare_heads(bases[1])
    compare_switches(bases[0])
    compare_many(bases[0])
    compare_data(bases[1])
    with tempfile.TemporaryDirectory() as work:
        gpt2 = compare_tokens.gpt2_base(Path(work))
    if not gpt2:
        skip("added tokens and 50304 rows with GPT-2's vocabulary: set DATA_MIRROR or install openai-whisper")
        return
    compare_added_tokens("GPT-2's vocabulary", gpt2)
    ids = transformers.AutoTokenizer.from_pretrained(f"{WORK}/words-GPT-2's vocabulary")(TALK)["input_ids"]
    check(
        ids == [50258, 5303, 220, 50260, 50259], "transformers gives the ids that are written down", str(ids)
    )
    compare_more_rows("GPT-2's vocabulary", gpt2, 50304)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compare()
    checks.finish()
