#!/usr/bin/env python3
"""Compares --chat with the same talk in transformers: greedy answers, with and without a repetition penalty.

  dev/compare_talk.py      usually through dev/compare_test.sh, which sets all up

A model is trained on {"messages"}: short talks that data/stories' questions make. The other side joins the turns by
the end of text, as DialoGPT's page does it, and forgets the oldest ones by the rule that section 10 states.
"""
import json
import os
import shutil
import subprocess

import checks
import reference  # first: it turns off the network
import torch
import transformers
from checks import WORK, check, must_run

MOST = 24  # tokens of an answer
POSITIONS = 96


def questions(count):
    lines = must_run("./data/stories", "questions", "--seed", "5", "--count", str(count)).decode().splitlines()
    return [json.loads(line) for line in lines]


def train(folder, vocabulary):
    """A model that answers some questions rightly, and all of them with an end of text."""
    data = f"{WORK}/talks.jsonl"
    with open(data, "w") as file:
        pairs = questions(1200)
        for i in range(0, len(pairs), 3):
            turns = [{"role": role, "content": pair[key].strip()}
                     for pair in pairs[i:i + 3] for role, key in (("user", "prompt"), ("assistant", "completion"))]
            file.write(json.dumps({"messages": turns}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    must_run("./train_gpt2", "--init", "d4", "--n-layer", "2", "--n-embd", "96", "--n-head", "4", "--n-positions",
             str(POSITIONS), "--tokenizer", vocabulary, "--train", data, "--val-fraction", "0", "--steps", "250",
             "--batch-size", "16", "--learning-rate", "3e-3", "--save-every", "250", "--out", folder, "--quiet")


def talk_in_transformers(model, tokenizer, turns, penalty):
    """The answers, and how often turns were forgotten."""
    eos, talk, answers, forgotten = tokenizer.eos_token_id, [], [], 0  # talk: exchanges, each a list of ids
    for turn in turns:
        if turn == "/reset":
            talk = []
            continue
        talk.append(tokenizer(turn)["input_ids"] + [eos])
        if sum(map(len, talk)) + MOST > POSITIONS:
            forgotten += 1
            while len(talk) > 1 and (sum(map(len, talk)) > POSITIONS // 2 or sum(map(len, talk)) + MOST > POSITIONS):
                talk.pop(0)
            talk[0] = talk[0][max(0, sum(map(len, talk)) + MOST - POSITIONS):]
        ids = torch.tensor([sum(talk, [])])
        row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False,
                             pad_token_id=eos, repetition_penalty=penalty)[0, ids.shape[1]:].tolist()
        row = row[:row.index(eos)] if eos in row else row
        answers.append(tokenizer.decode(row))
        talk[-1] = talk[-1] + row + [eos]
    return answers, forgotten


def compare():
    _, vocabulary = checks.stories("stories")
    folder = f"{WORK}/talker"
    train(folder, vocabulary)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [pair["prompt"].strip() for pair in questions(1212)[1200:]]
    turns[5:5] = ["/reset", "Where is the white hat, and who has been in the forest with Felix, and why? " * 4]
    for penalty in (1, 1.2):
        command = ["./train_gpt2", "--chat", "--init", folder, "--generate", str(MOST), "--temperature", "0",
                   "--repetition-penalty", str(penalty)]
        result = subprocess.run(command, input="\n".join(turns) + "\n", capture_output=True, text=True)
        wanted, forgotten = talk_in_transformers(model, tokenizer, turns, penalty)
        ours = result.stdout.splitlines()
        at = next((i for i, (a, b) in enumerate(zip(ours, wanted)) if a != b), None)
        why = f"{len(ours)} answers, {result.stderr}" if at is None else f"{ours[at]!r} instead of {wanted[at]!r}"
        name = f"--chat, repetition penalty {penalty}"
        check(result.returncode == 0 and ours == wanted and len(set(wanted)) > 3,
              f"{name}: {len(wanted)} answers, {len(set(wanted))} different ones, e.g. {wanted[0]!r}", why)
        check(result.stderr.count("forgotten") == forgotten > 1, f"{name}: the oldest turns went {forgotten} times",
              result.stderr)


if __name__ == "__main__":
    os.makedirs(WORK, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    compare()
    checks.finish()
