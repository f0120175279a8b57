"""What a power cut can leave of a folder, from the record that shim.c makes of a run."""
import hashlib, itertools, os


def tree(folder):
    """{name: bytes, None for a folder} of all that is below a folder."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = f"{parent}/{name}"
            found[os.path.relpath(path, folder)] = None if name in folders else open(path, "rb").read()
    return found


def read_trace(path):
    """Records of a trace: lists of words, the last one the bytes of a write."""
    data, at, records = open(path, "rb").read(), 0, []
    while at < len(data):
        stop = data.index(b"\n", at)
        words, at = data[at:stop].decode().replace("\t", " ").split(" "), stop + 1
        if words[0] == "write":
            words.append(data[at:at + int(words[3])])
            at += int(words[3])
        records.append(words)
    return records


class Disk:
    """What is in runs/, and what of it would survive a power cut: names as of the last sync of a folder (file systems
    keep the order of names), bytes of a file as of its own last sync."""

    def __init__(self, folder):
        files = tree(folder)
        self.names = {path: path for path in files}  # path -> file
        self.data = {path: data for path, data in files.items() if data is not None}
        self.synced, self.synced_names, self.open = dict(self.data), dict(self.names), {}

    def apply(self, number, words):
        what, *rest = words
        if what == "open":
            descriptor, creates, truncates, path = rest[0], int(rest[1]), int(rest[2]), rest[3]
            if creates and path not in self.names:
                self.names[path] = number
                self.data[number] = self.synced[number] = b""
            self.open[descriptor] = self.names[path]
            if truncates:
                self.data[self.names[path]] = b""
        elif what == "write":
            file, offset = self.open[rest[0]], int(rest[1])
            old = self.data[file].ljust(offset, b"\0")
            self.data[file] = old[:offset] + rest[3] + old[offset + len(rest[3]):]
        elif what == "ftruncate":
            self.data[self.open[rest[0]]] = self.data[self.open[rest[0]]][:int(rest[1])]
        elif what == "fsync":
            file = self.open[rest[0]]
            if file in self.data:
                self.synced[file] = self.data[file]
            else:
                self.synced_names = dict(self.names)
        elif what == "rename":
            moved = [p for p in self.names if p == rest[0] or p.startswith(rest[0] + "/")]
            self.names.update({rest[1] + p[len(rest[0]):]: self.names.pop(p) for p in moved})
        elif what == "mkdir":
            self.names[rest[0]] = number
        elif what in ("unlink", "rmdir"):
            del self.names[rest[0]]

    def state(self, keep_names, keep_bytes):
        """{path: bytes, None for a folder} after a power cut that kept all names or only those synced, and of bytes
        that were not synced all ("all"), half ("half"), or none ("none")."""
        files = {}
        for path, file in (self.names if keep_names else self.synced_names).items():
            data, synced = self.data.get(file), self.synced.get(file)
            half = data and data[:(len(synced) + len(data)) // 2]
            files[path] = {"all": data, "half": half, "none": synced}[keep_bytes]
        return files


def crash_states(folder, records):
    """States of a disk after a power cut, each once: (words that name it, files, whether the run had ended). `folder`
    holds what there was before the run."""
    disk, states, seen = Disk(folder), [], set()
    changes = [(i, record) for i, record in enumerate(records) if record[0] not in ("call", "close")]
    for number, record in changes:
        disk.apply(number, record)
        ended = number == changes[-1][0]
        for names, data in itertools.product((True, False), ("all", "half", "none")):
            files = disk.state(names, data)
            mark = hashlib.sha1(repr(sorted(files.items())).encode()).digest()
            if mark not in seen or ended:
                words = f"record {number}, {record[0]}, {'all' if names else 'synced'} names, "
                states.append((words + f"{data} of the bytes that were not synced", files, ended))
            seen.add(mark)
    return states
