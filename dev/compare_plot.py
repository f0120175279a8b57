#!/usr/bin/env python3
"""Tests dev/plot.sh: what it reads from logs (with a program in gnuplot's place), and what gnuplot draws of them.

  dev/compare_plot.py     after `make`, from anywhere; without gnuplot the second part is skipped
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import check, finish, must_run, skip, stories

HEAD = "step,epoch,split,loss,accuracy,learning_rate,grad_norm,tokens_per_second,seconds"
LOGS = {  # what -> (lines of log.csv, what gnuplot must be told)
    "without validation": (HEAD, "1,0,train,3,0.25,0,9,1,1", "2,0,train,2,0.5,1e-3,0,1,1",
                           "low_loss = 2; high_loss = 3; low_accuracy = 25; high_accuracy = 50; high_step = 2; "
                           "low_grad_norm = 1e-06; high_grad_norm = 9; counts = ' 2'; with_val = ''; with_exact = ''"),
    "exact match": (HEAD + ",exact_match", "0,0,val,4,0.125,0,,,1,0", "1,0,train,3,0.25,0,9,1,1,",
                    "1,0,val,0,1,1e-3,,,1,0.75",
                    "low_loss = 1e-06; high_loss = 4; low_accuracy = 12.5; high_accuracy = 100; "
                    "low_exact_match = 0; high_exact_match = 75; counts = ' 1'; with_val = ' 1'; with_exact = ' 1'"),
    "columns in another order": ("loss,split,new,step,accuracy,exact_match,grad_norm,learning_rate",
                                 "0.5,train,7,1,0.75,,2,3e-5", "0.25,val,7,1,0.5,,,3e-5",
                                 "low_loss = 0.25; high_loss = 0.5; low_accuracy = 50; high_accuracy = 75; "
                                 "high_learning_rate = 3e-05; counts = ' 1'; with_val = ' 1'; with_exact = ''")}


def plot(*folders, **environment):
    result = subprocess.run(["/bin/sh", "dev/plot.sh", *map(str, folders)], capture_output=True, text=True,
                            env={**os.environ, **environment}, timeout=60)
    return result.returncode, result.stdout, result.stderr


def test_reading(work):
    """A program named gnuplot that writes down the variables it was given."""
    programs = work / "programs"
    programs.mkdir()
    (programs / "gnuplot").write_text('#!/bin/sh\necho "$2" > "$6"\n')
    (programs / "gnuplot").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    for number, (what, (*lines, wanted)) in enumerate(LOGS.items()):
        run = work / f"run {number}"
        run.mkdir()
        (run / "log.csv").write_text("\n".join(lines) + "\n")
        status, printed, errors = plot(run, PATH=path)
        told = (run / "log.png").read_text() if status == 0 else ""
        missing = [word for word in wanted.replace("'", '"').split("; ") if word not in told]
        check(status == 0 and printed == f"{run}/log.png\n" and not errors and not missing,
              f"plot: log {what}", f"{missing} not in {told}{errors}")
    runs = sorted(work.glob("run *"))
    status, _, errors = plot(*runs, PATH=path)
    told = (runs[0] / "runs.png").read_text() if status == 0 else ""
    check(all(word in told for word in ('counts = " 2 1 1"', 'with_val = " 2 3"', 'with_exact = " 2"',
                                        "low_loss = 1e-06", "high_loss = 4")),
          "plot: several runs in one picture", told + errors)
    (work / "empty").mkdir()
    status, _, errors = plot(work / "empty", PATH=path)
    check(status == 1 and "no log.csv" in errors and errors.count("\n") == 1, "plot: no log", errors)
    for name in ("sh", "dirname", "grep", "awk", "mv"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "gnuplot").unlink()
    status, _, errors = plot(runs[0], PATH=str(programs))
    check(status == 1 and "install the package gnuplot" in errors and errors.count("\n") == 1,
          "plot: no gnuplot", errors)


def marks(picture):
    """The texts of an SVG: titles, legends, marks of axes."""
    return {text.strip() for text in re.findall(r"<text>([^<]*)<", picture.read_text())}


def test_drawing(work):
    """gnuplot draws each without a complaint, and a real run as well."""
    if not shutil.which("gnuplot"):
        return skip("plot: gnuplot is not installed, no picture drawn")
    text, vocabulary = stories("plot")
    must_run("./train_gpt2", "--init", "d4", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--n-positions",
             "32", "--tokenizer", vocabulary, "--train", text, "--steps", "7", "--val-every", "3", "--quiet",
             "--out", str(work / "run real"))
    (work / "run rate").mkdir()
    (work / "run rate" / "find-rate.csv").write_text("step,learning_rate,loss\n" + "".join(
        f"{i},{1e-6 * 1.15 ** i:g},{4 - 0.02 * i + 1e-9 * 1.25 ** i:g}\n" for i in range(100)))
    for run in sorted(work.glob("run *")):
        status, printed, errors = plot(run)
        check(status == 0 and not errors and Path(printed.strip()).stat().st_size > 10000,
              f"plot: gnuplot draws {run.name}", errors)
    status, printed, errors = plot(*sorted(work.glob("run [0-9r]*")))
    check(status == 0 and not errors, "plot: gnuplot draws all of them in one", errors)
    for run, wanted, unwanted in (("run 0", {"2.2", "2.8", "50", "training"}, {"validation", "100"}),
                                  ("run 1", {"exact match", "validation", "100", "0.01"}, {"120"}),
                                  ("run rate", {"suggested: 0.008"}, set()), ("run real", {"training", "validation"}, {"exact match"})):
        status, printed, errors = plot(work / run, FORMAT="svg")
        found = marks(Path(printed.strip())) if status == 0 else set()
        check(wanted <= found and not found & unwanted, f"plot: titles and marks of {run}", str(found))


def compare():
    with tempfile.TemporaryDirectory() as folder:
        test_reading(Path(folder))
        test_drawing(Path(folder))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    compare()
    finish()
