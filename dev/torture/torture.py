#!/usr/bin/env python3
"""Kills, errors, full disks and power cuts at every place of a run, and what must hold after each of them.

    make torture MINUTES=5             or, as long as it takes: make torture KILLS=1000 FAULTS=1000

A run of about 0.1 s is disturbed in one way. Then the same command, with --resume, must reach the same files, to the
bit, as a run that nobody disturbed: weights, moments, log.csv (but for its columns of time), and nothing left over.
An error must be told in one line, with exit status 1. shim.c makes the trouble, replay.py the states of a disk after
a power cut. SEED=n repeats a campaign, OPTIONS="--matmul builtin" adds options.
"""
import glob, itertools, os, random, re, resource, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from errno import errorcode

from replay import crash_states, read_trace, tree

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.abspath(os.environ.get("PROGRAM", f"{HERE}/../../train_gpt2"))
SEED = int(os.environ.get("SEED", "0")) or int.from_bytes(os.urandom(3), "big") + 1
OUT = "runs/out"  # the shim watches runs/: a new folder must be durable, too
RANDOM = "--init d4 --n-layer 1 --n-embd 8 --n-head 2 --n-positions 16 --tokenizer".split()
ADAPTER = "--init ../base --lora-rank 2 --lora-target c_".split()  # base: a model that the campaign trains first
OPTIONS = f"""--train ../train.txt --val ../val.txt
    --out {OUT} --resume --steps 12 --val-every 4 --keep 1 --threads 2 --learning-rate 1e-2 --batch-size 2
    --dropout 0.1 --quiet {os.environ.get("OPTIONS", "")}""".split()
ERRORS = {"create": "EACCES EMFILE ENOSPC EIO", "open": "EACCES EMFILE EIO", "write": "ENOSPC EIO EDQUOT",
          "fsync": "EIO ENOSPC", "ftruncate": "EIO", "rename": "EIO ENOSPC EACCES", "mkdir": "ENOSPC EACCES",
          "opendir": "EACCES EMFILE EIO", "readdir": "EIO", "read": "EIO", "unlink": "EIO EACCES", "rmdir": "EIO EBUSY", "close": "EIO"}
NUMBERS = {name: number for number, name in errorcode.items()}
GRAVE = ["create", "read", "write", "fsync", "ftruncate", "rename", "mkdir"]  # their errors must never pass unsaid
base = tempfile.mkdtemp(prefix="torture.", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


class Failure(Exception):
    pass


def need(condition, message):
    if not condition:
        raise Failure(message)


def start(folder, tokenizer, options=(), stdout=subprocess.DEVNULL, before=None, **settings):
    """Starts the program in a folder, with TORTURE_NAME=value for each of the settings."""
    more = {f"TORTURE_{name}": str(value) for name, value in settings.items()}
    if more:
        more |= {"TORTURE_OUT": "runs", "LD_PRELOAD": f"{base}/shim.so"}
    words = [PROGRAM, *(RANDOM + [f"../{tokenizer}.txt"] if tokenizer else ADAPTER), *OPTIONS, *options]
    return subprocess.Popen([w for w in words if w != "--quiet" or stdout == subprocess.DEVNULL], cwd=folder, text=True,
                            stdout=stdout, stderr=subprocess.PIPE, preexec_fn=before,
                            env={**os.environ, "OMP_WAIT_POLICY": "passive", **more})


def end(process):
    try:
        error = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure(f"hangs: {process.communicate()[1][-200:]}")
    return process.returncode, error


def content(folder):
    """All that is in a folder, to compare: without the lock, and what only time puts in."""
    files = {name: data for name, data in tree(folder).items() if not name.endswith("lock")}
    for name in files:
        if name.endswith("log.csv"):
            files[name] = re.sub(rb"(?m)^((?:[^,\n]*,){7})[^,\n]*,[^,\n]*", rb"\1", files[name])
        if name.endswith("trainer_state.json"):
            files[name] = re.sub(rb'"seconds": [\d.]+', b"", files[name])
    return files


def difference(found, wanted):
    kinds = {"left over": sorted(found.keys() - wanted), "missing": sorted(wanted.keys() - found),
             "different": sorted(n for n in found.keys() & wanted if found[n] != wanted[n])}
    return "; ".join(f"{kind}: {' '.join(names[:3])}{' ...' * (len(names) > 3)}" for kind, names in kinds.items() if names)


class Scene:
    """A beginning: no folder yet; a run stopped half way; or the result of another run, with another vocabulary.
    Without a tokenizer an adapter (LoRA) of a trained model is learned."""

    def __init__(self, name, tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self.before, self.trace = f"{base}/{name}-before", f"{base}/{name}-trace"
        os.makedirs(f"{self.before}/runs")

    def learn(self):
        """Runs it once undisturbed and once traced, to know how it ends and what it does on the way."""
        results = []
        for settings in ({}, {"TRACE": self.trace}):
            folder = self.copy()
            status, error = end(start(folder, self.tokenizer, **settings))
            need(status == 0 and not error, f"{self.name}: undisturbed: exit {status}: {error}")
            results.append(content(f"{folder}/runs"))
        need(results[0] == results[1], f"{self.name}: two undisturbed runs: {difference(*results)}")
        self.wanted, records = results[0], read_trace(self.trace)
        self.old = self.models(self.before)
        self.calls = [record[1:] for record in records if record[0] == "call"]
        self.states = crash_states(self.before, records)
        os.remove(self.trace)

    def copy(self, name="case"):
        """A fresh folder that is as this scene begins."""
        shutil.rmtree(f"{base}/{name}", ignore_errors=True)
        return shutil.copytree(self.before, f"{base}/{name}")

    def check(self, folder):
        """Whatever happened in the folder, the same command reaches the wanted result."""
        self.check_mix(folder)
        status, error = end(start(folder, self.tokenizer))
        need(status == 0, f"--resume: exit {status}: {error.strip()}")
        self.check_result(folder, "--resume: ")

    def check_result(self, folder, when, passed_over=".no"):
        found = {n: d for n, d in content(f"{folder}/runs").items() if passed_over not in n}
        need(found == self.wanted, f"{when}{difference(found, self.wanted)}")

    @staticmethod
    def models(folder):
        """The files of OUT's own model and of OUT/merged."""
        return {n: d for n, d in content(f"{folder}/{OUT}").items()
                if d is not None and n != "log.csv" and ("/" not in n or n.startswith("merged/") and n.count("/") == 1)}

    def check_mix(self, folder):
        """OUT's own model is all old or all new, or does not load. The same for OUT/merged, and whatever loads there
        belongs to the adapter in OUT if that loads."""
        found, ages = self.models(folder), []
        for part in ("", "merged/"):
            now = {n: d for n, d in found.items() if n in self.old and ("/" in n) == bool(part)}
            old = {n: d for n, d in self.old.items() if ("/" in n) == bool(part)}
            new = {n: self.wanted.get(f"out/{n}") for n in now}
            words = [PROGRAM, "--init", f"{OUT}/{part}", "--generate", "1", "--prompt", "the"]
            loads = old and subprocess.run(words, cwd=folder, capture_output=True).returncode == 0
            need(not loads or now == old or now == new, f"a mix of two models loads: {difference(now, old)}")
            ages += ["old" if now == old else "new"] if loads else []
        need(len(set(ages)) < 2, f"OUT and OUT/merged do not belong together: {' and '.join(ages)}")


# ---- kinds of trouble: each yields its cases, (words that name it, function, its arguments) ----


def disturbed(scene, expected, **settings):
    """Runs a scene with trouble, checks exit status and words, and that the next run makes all good."""
    folder = scene.copy()
    status, error = end(start(folder, scene.tokenizer, **settings))
    need(status in expected, f"exit {status}: {error.strip()}")
    need(status != 1 or (error.count("\n") == 1 and error.startswith("train_gpt2: ")), f"not one line: {error!r}")
    if status == 0 and not error:  # what cannot be deleted may stay until the next run, but not unsaid
        scene.check_result(folder, "exit 0, not a word, but ")
    scene.check(folder)


def kill_cases(scene):
    for n, (kind, path) in enumerate(scene.calls, 1):
        if kind not in ("readdir", "open", "read", "close"):
            yield f"before call {n}: {kind} {path}", disturbed, [-9], {"KILL": n}
        if kind == "write":
            yield f"amid call {n}: write {path}", disturbed, [-9], {"TORN": n}


def error_cases(scene):
    for n, (kind, path) in enumerate(scene.calls, 1):
        name, sticky = random.choice(ERRORS[kind].split()), random.randrange(2)
        strict = kind in GRAVE or (path == OUT and kind in ("opendir", "readdir"))
        yield (f"call {n}: {kind} {path} fails with {name}{', and all later ones' * sticky}", disturbed,
               [1] if strict else [0, 1], {"FAIL": n, "ERRNO": NUMBERS[name], "STICKY": sticky})
        if kind == "write" and random.random() < 0.3:
            yield f"call {n}: short write", disturbed, [0], {"SHORT": n}


def disk_cases(scene):
    for room in random.sample(range(1, 200000), 30):
        yield f"room for {room} bytes", disturbed, [0, 1], {"DISK": room}
    size = random.randrange(40000)
    yield (f"ulimit -f, {size} bytes", disturbed, [0, 1, -signal.SIGXFSZ],
           {"before": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))})


def signal_cases(scene):
    for number, twice in itertools.product((9, 9, 15, 2, 1), (False, True)):
        seconds = random.uniform(0, 1.1) * duration
        words = f"{signal.Signals(number).name} {'twice ' * twice}after {seconds:.3f} s"
        yield words, signalled, (number, twice, seconds), {}
    yield "stdout into head -1", no_reader, False, {}
    yield "stdout closed", no_reader, True, {}


def signalled(scene, case):
    number, twice, seconds = case
    folder = scene.copy()
    process, log = start(folder, scene.tokenizer), f"{folder}/{OUT}/log.csv"
    time.sleep(seconds)
    trains = scene.name == "fresh" and os.path.exists(log) and b",train," in open(log, "rb").read()
    for _ in range(1 + twice):
        process.send_signal(number)
    status, error = end(process)
    dies = [-number] if twice or number == signal.SIGKILL or not trains else []  # once it trains, it saves and ends
    need(status in [0, 128 + number] + dies, f"exit {status}: {error.strip()}")
    scene.check(folder)


def no_reader(scene, closed):
    folder, (reader, writer) = scene.copy(), os.pipe()
    process = start(folder, scene.tokenizer, stdout=writer, before=(lambda: os.close(1)) if closed else None)
    os.close(writer)
    os.read(reader, 100)
    os.close(reader)
    status, error = end(process)
    need(status in (0, 1, 128 + signal.SIGPIPE), f"exit {status}: {error.strip()}")
    scene.check(folder)


def many_cases(scene):
    for delay, kills in itertools.product((0, 0, random.random() * duration), (False, True)):
        words = f"a second process after {delay:.3f} s{', the first one killed' * kills}"
        yield words, two_processes, (delay, kills), {}
    yield "four equal commands at once, in four folders", equal_commands, 4, {}


def two_processes(scene, case):
    delay, kills = case
    folder = scene.copy()
    processes = [start(folder, scene.tokenizer)]
    time.sleep(delay)
    processes.append(start(folder, scene.tokenizer))
    if kills:
        time.sleep(random.random() * duration / 2)
        processes[0].kill()
    ends = [end(process) for process in processes]
    for (status, error), other in zip(ends, processes[::-1]):
        need(status in (0, 1, -9), f"exit {status}: {error.strip()}")
        need(status != 1 or (error.count("\n") == 1 and str(other.pid) in error), f"names no process: {error!r}")
    if any(status == 0 for status, _ in ends):
        scene.check_result(folder, "after both: ")
    need(kills or any(status == 0 for status, _ in ends), f"both gave up: {ends}")
    scene.check(folder)


def equal_commands(scene, count):
    folders = [scene.copy(f"equal{i}") for i in range(count)]
    processes = [start(folder, scene.tokenizer) for folder in folders]
    for folder, (status, error) in zip(folders, [end(process) for process in processes]):
        need(status == 0, f"exit {status}: {error.strip()}")
        scene.check_result(folder, "")


def cut_cases(scene):
    for words, files, ended in scene.states:
        yield words, power_cut, (files, ended), {}


def power_cut(scene, state):
    files, ended = state
    folder = scene.copy()
    shutil.rmtree(f"{folder}/runs")
    for path, data in sorted(files.items()):  # a folder before what is in it
        if data is None:
            os.makedirs(f"{folder}/{path}")
        else:
            open(f"{folder}/{path}", "wb").write(data)
    if ended:
        scene.check_result(folder, "the run had ended: ", ".tmp")
    scene.check(folder)


# ---- the campaign ----


def endless(kind, scenes):
    """Passes over all cases of all scenes, each pass in another order."""
    while True:
        cases = [(scene, *case) for scene in scenes for case in kind(scene)]
        random.shuffle(cases)
        yield from cases


def prepare():
    """The shim, the data, and the scenes."""
    global duration
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", f"{base}/shim.so", f"{HERE}/shim.c",
                    "-ldl"], check=True)
    merges = "#version: 0.2\ne r\nt h\nĠ th\na n\nĠth e\n"
    words = "the one another rather than banter earth heat an he tea".split()
    text = " ".join(random.Random(1).choices(words, k=600))
    for name, data in {"a": merges, "b": merges.replace("e r", "h e"), "train": text, "val": text[:300]}.items():
        open(f"{base}/{name}.txt", "w").write(data)
    fresh, half, again, adapter = scenes = [Scene("fresh", "a"), Scene("half", "a"), Scene("again", "b"),
                                            Scene("adapter", None)]
    began = time.time()
    fresh.learn()
    duration = (time.time() - began) / 2
    renames = [n for n, (kind, _) in enumerate(fresh.calls, 1) if kind == "rename"]
    end(start(half.before, "a", KILL=renames[len(renames) // 2]))
    status, error = end(start(again.before, "a", ["--seed", "7"]))
    need(status == 0, f"a first run: exit {status}: {error}")
    for folder in glob.glob(f"{again.before}/{OUT}/checkpoint-*"):
        shutil.rmtree(folder)
    half.learn()
    again.learn()
    shutil.copytree(f"{again.before}/{OUT}", f"{base}/base")
    status, error = end(start(adapter.before, None, ["--seed", "7"]))
    need(status == 0, f"a first adapter: exit {status}: {error}")
    for folder in glob.glob(f"{adapter.before}/{OUT}/checkpoint-*"):
        shutil.rmtree(folder)
    adapter.learn()
    return scenes


def main():
    kinds = {"kills": kill_cases, "errors": error_cases, "full disks": disk_cases, "signals": signal_cases,
             "many processes": many_cases, "power cuts": cut_cases}
    wanted = {"kills": int(os.environ.get("KILLS") or 0), "errors": int(os.environ.get("FAULTS") or 0)}
    seconds = 60 * float(os.environ.get("MINUTES") or (0 if any(wanted.values()) else 5))
    random.seed(SEED)
    began, scenes = time.time(), prepare()
    cases = {name: endless(kind, scenes) for name, kind in kinds.items()}
    passed, failed, told = Counter(), Counter(), set()
    while time.time() - began < seconds or any(passed[kind] + failed[kind] < n for kind, n in wanted.items()):
        for name in kinds:
            scene, words, function, argument, settings = next(cases[name])
            try:
                function(scene, argument, **settings)
                passed[name] += 1
            except Failure as failure:
                failed[name] += 1
                mark = name, re.sub(r"[\d_]+", "", str(failure))
                if mark not in told:  # each kind of failure once
                    print(f"FAILED {name}: {scene.name}, {words}: {failure}", flush=True)
                told.add(mark)
    for name in kinds:
        print(f"{name:15} {passed[name]:5} passed {failed[name]:5} failed")
    print(f"{sum(len(s.calls) for s in scenes)} calls, {sum(len(s.states) for s in scenes)} states of the disk, "
          f"SEED={SEED}, {time.time() - began:.0f} s")
    print(f"{passed.total()} passed, {failed.total()} failed")
    return 1 if failed.total() else 0


try:
    sys.exit(main())
except Failure as failure:
    print(f"FAILED {failure}\n0 passed, 1 failed")
    sys.exit(1)
finally:
    shutil.rmtree(base, ignore_errors=True)
