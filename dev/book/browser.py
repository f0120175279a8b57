"""A headless Chromium, driven through its debugging pipe: no package is needed for that.

    python3 dev/book/browser.py build/book/index.html FOLDER     takes screenshots of some places, to be looked at
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def find_chromium():
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


class Browser:
    def __init__(self, program):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   "--disable-dev-shm-usage", f"--user-data-dir={self.folder.name}", "about:blank"]
        # It reads commands from 3 and writes answers to 4, each ended by a zero byte.
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "-"]
        self.process = subprocess.Popen([*shell, program, *options], pass_fds=(commands, answers),
                                        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.rest, self.count, self.events = b"", 0, []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def receive(self):
        while b"\0" not in self.rest:
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise RuntimeError("Chromium has gone")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width=1440, height=900, dark=False):
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def run(self, expression):
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def errors(self):
        """What the console has shown of errors and warnings since the page was opened."""
        self.run("1")
        def is_error(method, params):
            level = params.get("type") if method == "Runtime.consoleAPICalled" else \
                params["entry"]["level"] if method == "Log.entryAdded" else ""
            return method == "Runtime.exceptionThrown" or level in ("error", "warning", "assert")
        return [str(e["params"])[:300] for e in self.events if is_error(e.get("method"), e.get("params"))]

    def settle(self):
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()


def main():
    page, folder = sys.argv[1], Path(sys.argv[2])
    places = sys.argv[3:] or ["book", "section-4", "section-5-layernorm", "attention_backward_tile",
                              "picture-attention", "picture-memory", "section-17", "questions"]
    folder.mkdir(parents=True, exist_ok=True)
    browser = Browser(find_chromium())
    for width, height, dark in ((1440, 900, False), (1440, 900, True), (390, 844, False), (390, 844, True)):
        browser.open(page, width, height, dark)
        for place in places:
            browser.run(f"document.getElementById('{place}').scrollIntoView()")
            browser.settle()
            browser.screenshot(folder / f"{place}-{width}-{'dark' if dark else 'light'}.png")
    browser.close()


if __name__ == "__main__":
    main()
