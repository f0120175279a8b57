"""What the live comparisons share: counted checks, running the built programs, text to train on."""
import os
import re
import subprocess
import sys

WORK = "build/compare"
counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(ok, what, why=""):
    counts["passed" if ok else "failed"] += 1
    print(f"{'ok    ' if ok else 'FAILED'} {what}" + (f": {why}" if why and not ok else ""), flush=True)
    return ok


def skip(what):
    counts["skipped"] += 1
    print(f"skipped {what}", flush=True)


def finish():
    """The closing line, and the exit status that goes with it."""
    print(f"{counts['passed']} passed, {counts['failed']} failed"
          + (f", {counts['skipped']} skipped" if counts["skipped"] else ""))
    sys.exit(counts["failed"] > 0)


def run(*command, stdin=None, show=False):
    """Runs a program: (exit status 0, standard output, a reason when it failed)."""
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=900)
    if show:
        for line in result.stdout.decode(errors="replace").splitlines():
            print("      ", line)
    why = (result.stderr or result.stdout).decode(errors="replace").strip().splitlines()[-1:]
    return result.returncode == 0, result.stdout, f"exit status {result.returncode}, {''.join(why)}"


def must_run(*command):
    """Runs a program without which nothing can be compared; returns its output."""
    ok, output, why = run(*command)
    if not ok:
        sys.exit(f"{' '.join(command)}: {why}")
    return output


def stories(name, separated=True):
    """A text of made-up stories (0.2 MB) and a vocabulary of 512 learned from it: (file, folder)."""
    text, vocabulary = f"{WORK}/{name}.txt", f"{WORK}/{name}-tokenizer"
    os.makedirs(WORK, exist_ok=True)
    stories = must_run("./data/stories", "text", "--seed", "3", "--megabytes", "0.2").decode()
    with open(text, "w") as file:
        file.write(stories if separated else re.sub(r"<\|endoftext\|>\n", "", stories))
    must_run("./tokenizer", "train", "--vocab-size", "512", "--out", vocabulary, text)
    return text, vocabulary
