#!/usr/bin/env python3
"""Compares --chat with the same talk in transformers, with and without a repetition penalty, and --predictions with
the loss and the greedy answer that transformers gives for each example.

  dev/compare_answers.py      usually through dev/compare_test.sh, which sets all up

A model is trained on {"messages"}: short talks that data/stories' questions make. The other side joins the turns by
the end of text, as DialoGPT's page does it, and forgets the oldest ones by the rule that section 11 states.
"""
import json
import os
import re
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


def example_in_transformers(model, tokenizer, before, answer, scored):
    """Mean loss of `answer` (ids) behind `before`, as far as scored, whether all of it is the likeliest, and the text
    that is generated behind `before`."""
    eos = tokenizer.eos_token_id
    ids = torch.tensor([before + answer])
    labels = torch.tensor([[-100] * len(before) + [t if s else -100 for t, s in zip(answer, scored)]])
    with torch.no_grad():
        out = model(ids, labels=labels)
    hits = out.logits[0, :-1].argmax(-1) == ids[0, 1:]
    exact = bool(hits[labels[0, 1:] != -100].all())
    begin = len(before) + max((i + 1 for i, s in enumerate(scored) if not s), default=0)
    row = model.generate(ids[:, :begin], attention_mask=torch.ones_like(ids[:, :begin]), max_new_tokens=20,
                         do_sample=False, pad_token_id=eos)[0, begin:].tolist()
    return out.loss.item(), exact, tokenizer.decode(row[:row.index(eos)] if eos in row else row)


def compare_predictions(model, tokenizer, folder):
    """Pairs, texts and talks: what --predictions says of each."""
    def encode(text):
        return tokenizer(text)["input_ids"]
    eos, data, lines = tokenizer.eos_token_id, f"{WORK}/asked.jsonl", []
    wanted = []  # (keys of the line, text behind which it is generated or None, loss, exact, generated)
    pairs = questions(1242)[1212:]
    for number, pair in enumerate(pairs):
        prompt, answer = pair["prompt"].strip(), pair["completion"].strip()
        if number % 5 == 3:
            lines.append({"text": prompt})
            ids = encode(prompt) + [eos]
            wanted.append((prompt, None, *example_in_transformers(model, tokenizer, [eos], ids, [1] * len(ids))))
        elif number % 5 == 4:
            earlier = pairs[number - 1]
            turns = [earlier["prompt"].strip(), earlier["completion"].strip(), prompt, answer]
            lines.append({"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": turn}
                                       for i, turn in enumerate(turns)]})
            coded = [encode(turn) + [eos] for turn in turns]
            scored = [i % 2 for i in range(1, 4) for _ in coded[i]]
            wanted.append((answer, tokenizer.decode(sum(coded[:3], [])),
                           *example_in_transformers(model, tokenizer, coded[0], sum(coded[1:], []), scored)))
        else:  # the end of text behind the question belongs to the prompt: so the model was trained
            lines.append({"prompt": prompt + "<|endoftext|>", "completion": answer})
            ids = encode(answer) + [eos]
            wanted.append((answer, prompt + "<|endoftext|>", *example_in_transformers(
                model, tokenizer, encode(prompt) + [eos], ids, [1] * len(ids))))
    with open(data, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    printed = must_run("./train_gpt2", "--init", folder, "--eval", "--val", data, "--predictions", f"{WORK}/said.jsonl",
                       "--sample-tokens", "20", "--quiet").decode()
    with open(f"{WORK}/said.jsonl") as file:
        said = [json.loads(line) for line in file]
    wrong = []
    for ours, (text, prompt, loss, exact, generated) in zip(said, wanted):
        same = ours["exact_match"] == exact and abs(ours["loss"] - loss) < 1e-4 * loss
        if prompt is None:
            same = same and ours["text"] == text
        else:
            same = same and (ours["prompt"], ours["completion"], ours["prediction"]) == (prompt, text, generated)
        if not same:
            wrong.append(f"{ours} instead of {(text, prompt, loss, exact, generated)}")
    right = sum(line["exact_match"] for line in said)
    check(not wrong and len(said) == len(lines) and 0 < right < len(said),
          f"--predictions: {len(said)} examples, {right} right", "; ".join(wrong[:2]))
    share = float(re.search(r"exact match +([\d.]+) %", printed).group(1))
    check(abs(share - 100 * right / len(said)) < 0.006, f"--predictions: --eval says exact match {share} %")


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
    compare_predictions(model, tokenizer, folder)


if __name__ == "__main__":
    os.makedirs(WORK, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    compare()
    checks.finish()
