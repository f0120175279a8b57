#!/usr/bin/env python3
"""Makes the Unicode class table of train_gpt2.c, and checks it.

    python3 dev/unicode_table.py                        prints the lines of letter_and_number_runs[]
    python3 dev/unicode_table.py --check train_gpt2.c   fails unless that file holds exactly these lines

Which characters are letters (\\p{L}) and numbers (\\p{N}) changes with every Unicode version, so the table is
asked from the programs we must agree with: tiktoken (Rust's regex tables) decides, and tokenizers (through
GPT-2's own pre-tokenizer) must say the same of every code point. Python's `regex` package may know a newer
Unicode, and its `unicodedata` an older one: how far they differ is said, and is no failure.
White space is not in the table: \\s has been the same 25 code points for years; that, too, is checked.

The lines hold pairs: how many characters are neither letter nor number, then how many letters follow; a
negative count means that many numbers.
"""

import argparse
import re
import sys
import unicodedata

import regex
import tiktoken
from tokenizers import pre_tokenizers

CODES = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
SPACES = [
    *range(9, 14),
    0x20,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
]
# One letter that each Unicode version brought, oldest first: the last one known tells the version.
NEW_LETTERS = {"14.0": 0x0870, "15.0": 0x11240, "15.1": 0x2EBF0, "16.0": 0x1C89, "17.0": 0x088F}


def tiktoken_classes():
    ranks = {bytes([i]): i for i in range(256)}
    found = {}
    for name, pattern in (("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s")):
        encoding = tiktoken.Encoding("one class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for code in CODES:
            if encoding.encode_ordinary(chr(code)):
                found[code] = name
    return found


def tokenizers_class(split, code):
    """The class whose run the character continues."""
    for name, first in (("L", "a"), ("N", "1"), ("S", "\n")):
        if len(split.pre_tokenize_str(first + chr(code))) == 1:
            return name
    return None


def runs(found):
    values, code, skipped = [], 0, 0
    while code < 0x110000:
        name, start = found.get(code), code
        while code < 0x110000 and found.get(code) == name:
            code += 1
        if name in ("L", "N"):
            values.append(f"{skipped},{code - start if name == 'L' else start - code},")
            skipped = 0
        else:
            skipped += code - start
    lines, line = [], "    "
    for value in values:
        if len(line) + len(value) > 110:
            lines.append(line)
            line = "    "
        line += value
    return lines + [line]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", metavar="FILE", help="compare with the table in this C file")
    arguments = parser.parse_args()

    found = tiktoken_classes()
    letters = sum(name == "L" for name in found.values())
    numbers = sum(name == "N" for name in found.values())
    version = "older"
    for name, letter in NEW_LETTERS.items():
        version = name if found.get(letter) == "L" else version
    print(
        f"tiktoken {tiktoken.__version__}: {letters} letters, {numbers} numbers: Unicode {version}",
        file=sys.stderr,
    )
    failures = 0
    if sorted(code for code, name in found.items() if name == "S") != SPACES:
        print("tiktoken's white space is not the 25 code points of GPT-2's rules", file=sys.stderr)
        failures += 1

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    different = [code for code in CODES if tokenizers_class(split, code) != found.get(code)]
    print(f"tokenizers differs in {len(different)} code points", file=sys.stderr)
    failures += bool(different)

    matchers = {
        name: regex.compile(pattern) for name, pattern in (("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s"))
    }
    newer = [
        code
        for code in CODES
        if next((name for name, m in matchers.items() if m.match(chr(code))), None) != found.get(code)
    ]
    print(
        f"regex {regex.__version__} differs in {len(newer)} code points, "
        f"{sum(code in found for code in newer)} of which tiktoken knows (0 when regex is only newer)",
        file=sys.stderr,
    )
    older = [
        code
        for code in CODES
        if unicodedata.category(chr(code)) != "Cn"
        and {"L": "L", "N": "N"}.get(unicodedata.category(chr(code))[0])
        != (found.get(code) if found.get(code) != "S" else None)
    ]
    print(
        f"Python's unicodedata {unicodedata.unidata_version} differs in {len(older)} code points that it has",
        file=sys.stderr,
    )

    lines = runs(found)
    if not arguments.check:
        print("\n".join(lines))
        return failures
    with open(arguments.check, encoding="utf-8") as file:
        table = re.search(r"letter_and_number_runs\[\] = \{\n(.*?)\n\};", file.read(), re.S)
    same = table is not None and table.group(1) == "\n".join(lines)
    print(f"{arguments.check}: the table is {'the same' if same else 'NOT the same'}")
    return failures + (not same)


if __name__ == "__main__":
    sys.exit(main())
