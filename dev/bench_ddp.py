#!/usr/bin/env python3
"""Two processes with one thread each, 124M, 8 x 128: time of an update with MPI here and with PyTorch's
DistributedDataParallel over gloo, in turn.

  build/venv/bin/python dev/bench_ddp.py [MPIRUN] [ROUNDS]     mpirun.mpich and 3 without; needs make MPI=1

PROGRAM=build/mpich/train_gpt2 takes another program, OPTIONS adds options to it. Both begin at random weights, take
the same number of examples an update, clip at norm 1 and use AdamW. Prints each round's medians in seconds, our sums'
share of the time, and the ratio of the medians.
"""
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, LENGTH, UPDATES, RANKS = 8, 128, 5, 2


def worker(rank, port, results):
    import torch
    import torch.distributed as dist
    import transformers
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids, seconds = torch.randint(50257, (BATCH // RANKS, LENGTH)), []
    for _ in range(UPDATES + 1):
        dist.barrier()
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        results.put(statistics.median(seconds[1:]))
    dist.destroy_process_group()


def theirs(number):
    import multiprocessing
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, 29500 + number, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    seconds = results.get()
    for process in processes:
        process.join()
    return seconds


def ours(mpirun, folder):
    data, out = f"{folder}/data.bin", f"{folder}/out"
    shutil.rmtree(out, ignore_errors=True)
    if not os.path.exists(data):  # llm.c's format: 256 numbers, then 16 bits a token
        import numpy
        header = numpy.zeros(256, dtype="<i4")
        tokens = numpy.random.default_rng(1).integers(0, 50257, BATCH * LENGTH * (UPDATES + 2)).astype("<u2")
        header[:3] = 20240520, 1, len(tokens)
        open(data, "wb").write(header.tobytes() + tokens.tobytes())
    program, options = os.environ.get("PROGRAM", "./train_gpt2"), os.environ.get("OPTIONS", "").split()
    said = subprocess.run([mpirun, "-np", str(RANKS), program, "--init", "d12", "--train", data, "--out", out,
                           "--val-fraction", "0", "--batch-size", str(BATCH), "--seq-len", str(LENGTH), "--steps",
                           str(UPDATES + 1), "--threads", "1", "--save-every", "1000", *options],
                          check=True, capture_output=True, text=True).stdout
    sums, updates = map(float, re.search(r"sums of gradients took (\S+) s of the updates' (\S+) s", said).groups())
    with open(f"{out}/log.csv") as file:
        # a line's seconds count from the start: their differences are updates
        at = [float(row["seconds"]) for row in csv.DictReader(file)]
    return statistics.median(b - a for a, b in zip(at, at[1:])), sums / updates


if __name__ == "__main__":
    mpirun = sys.argv[1] if len(sys.argv) > 1 else "mpirun.mpich"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for number in range(rounds):
            seconds, share = ours(mpirun, folder)
            pairs.append((seconds, theirs(number)))
            print("ours %.2f  DDP %.2f" % pairs[-1], f" sums {100 * share:.0f} % of ours", flush=True)
    mine, other = (statistics.median(column) for column in zip(*pairs))
    print(f"medians: ours {mine:.2f} s, DDP {other:.2f} s, ratio {mine / other:.2f}")
