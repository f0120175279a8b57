"""Tests the book: what is on the page, that a break in the sources shows, and how it behaves in headless Chromium.

    make book-test        CHROMIUM=/path/to/chromium chooses another; where there is none, that half is skipped, and said
"""
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html import unescape
from pathlib import Path

from browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "build/book"
PAGE, NUMBERS = BOOK / "index.html", BOOK / "numbers.json"
TEXTS = ["train_gpt2.c", "README.md", "dev/derivations.md", "dev/tour.md", "dev/performance.md"]
html = PAGE.read_text()
body = html[html.index("<main"):html.index("</main>")]
source = (ROOT / "train_gpt2.c").read_text()
numbers = json.loads(NUMBERS.read_text())
passed = failed = 0


def check(name, problems):
    """One line: `problems` is a list, empty when all is well."""
    global passed, failed
    problems = [p for p in problems if p]
    passed, failed = passed + (not problems), failed + bool(problems)
    print(f"{'FAILED' if problems else 'ok':6} {name}" + "".join(f"\n       {p}" for p in problems[:5]), flush=True)


def plain(text):
    return unescape(re.sub(r"<[^>]*>", "", text))


def squeeze(text):
    return re.sub(r"\W+", " ", text)


# ---- the page ----

def test_page():
    lines = {int(n): plain(text) for n, text in re.findall(r'<span id="L(\d+)">(.*?)\n</span>', body, re.S)}
    wrong = [n for n, text in lines.items() if source.split("\n")[n - 1] != text]
    check("page: each line of code is the source's", [f"line {n}: {lines[n]}" for n in wrong] + ["too few"] * (len(lines) < 2000))
    words, missing = squeeze(plain(body)), []
    for n, line in enumerate(source.split("\n"), 1):
        if line.startswith("//") and "clang-format" not in line:
            text = squeeze(re.sub(r"^// (- |\d+\. |PART )?|^//|`", "", line)).strip()
            missing += [f"line {n}: {text}"] * (text not in words)
        elif line.strip() and n not in lines and "clang-format" not in line:
            missing.append(f"line {n}: {line}")
    check("page: no line of the source is missing, neither comment nor code", missing)

    anchors = set(re.findall(r' id="([^"]+)"', html))
    with tempfile.TemporaryDirectory() as folder:
        compiled = subprocess.run(["cc", "-std=gnu11", "-O0", "-fopenmp", "-w", "-c", "-o", f"{folder}/x.o", ROOT / "train_gpt2.c"])
        symbols = subprocess.run(["nm", f"{folder}/x.o"], capture_output=True, text=True).stdout if compiled.returncode == 0 else ""
    functions = set(re.findall(r" [tT] (\w+)$", symbols, re.M))
    structs = set(re.findall(r"^\} (\w+);", source, re.M))
    check("page: every function that the compiler sees, and every struct, is an anchor", ["nothing compiled"] * (len(functions) < 100) +
          sorted((functions | structs) - anchors))
    calls = [name for name in functions if len(re.findall(rf"\b{name}\b", source)) > 1 and f'href="#{name}"' not in body and name != "main"]
    check("page: names are links", calls)

    links = set(re.findall(r'href="([^"]*)"', html))
    check("page: every link resolves", sorted(link for link in links if not re.match(r"https?:", link) and link[1:] not in anchors))
    outside = re.findall(r'(?:<link\b|<img\b|<iframe\b|\bsrc=|@import|url\()[^>]{0,40}', html) + [x for x in links if x.startswith("http:")]
    check("page: nothing is loaded from elsewhere", outside)
    check("page: under 3 MB", [f"{len(html.encode())} bytes"] * (len(html.encode()) >= 3_000_000))

    formulas = 0
    for path in ("dev/derivations.md", "dev/tour.md"):
        text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / path).read_text(), flags=re.S)
        for tex in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S):
            formulas += 1 + tex[0].count("\\qquad")
    maths = re.findall(r"<math.*?</math>", body, re.S)
    check("page: every formula is MathML, and none has a word of TeX left", [f"{len(maths)} of {formulas}"] * (len(maths) != formulas) +
          [m for m in maths if "\\" in plain(m) or "merror" in m] + re.findall(r".{20}\$\$?\\.{20}", plain(body)))

    blocks = re.findall(r"<!-- (\w+) -->\n+```\n(.*?)```", (ROOT / "dev/tour.md").read_text(), re.S)
    digits = re.compile(r"[\d.]+")  # another processor may print other last digits
    check("page: the tour's blocks are there", [name for name, text in blocks if digits.sub("", text.strip()) not in digits.sub("", plain(body))])
    for name in re.findall(r'data-picture="(\w+)"', body):
        anchors.discard(f"picture-{name}")
    check("page: parts of memory add up to what the program lays out",
          [str(m) for m in numbers["memory"] if sum(part[1] for part in m["parts"]) != m["activations"]])
    printed = [float(line.split()[-1]) for line in numbers["blocks"]["attention"].split("\n")[2:-2]]
    shown = numbers["learning"][0]["probability"][0][0][13]
    check("page: attention in the picture is that of the tour", [f"{printed} {shown}"] * (max(abs(a - b) for a, b in zip(printed, shown)) > 1e-4
                                                                                       or len(printed) != len(shown)))


def test_questions():
    """README's questions: one step is the link in the contents, the second a link in the answer."""
    table = re.search(r'id="questions".*?<table>(.*?)</table>', body, re.S)
    answers = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", table[1], re.S) if table else []
    bad = [plain(q) for q, a in answers if not re.search(r'href="#', a)]
    contents = html[html.index("<nav"):html.index("</nav>")]
    check(f"questions: all {len(answers)} of README's table are answered in two steps",
          bad + ["fewer than 20"] * (len(answers) < 20) + ["not in the contents"] * ('href="#questions"' not in contents))


# ---- breaks in the sources ----

def build(changes):
    """Builds the page from a copy of the sources with changes (file, old, new). Returns (status, stderr, page)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in TEXTS:
            (root / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, root / path)
        for path, old, new in changes:
            text = (root / path).read_text()
            changed = re.sub(old, new, text, flags=re.S)
            if changed == text:
                return 0, f"the test itself finds nothing to change in {path}: {old}", ""
            (root / path).write_text(changed)
        run = subprocess.run([sys.executable, ROOT / "dev/book/build.py", "--root", root, "--numbers", NUMBERS, "--out", root / "x.html"],
                             capture_output=True, text=True)
        return run.returncode, run.stderr, (root / "x.html").read_text() if run.returncode == 0 else ""


def test_breaks():
    fails = [
        ("a layer's function is renamed", ("train_gpt2.c", r"\blayernorm_backward\b", "layernorm_reverse"), "dev/derivations.md: there is no `layernorm_backward`"),
        ("a function that the tour names is renamed", ("train_gpt2.c", r"\bfind_piece\b", "next_piece"), "dev/tour.md: there is no `find_piece`"),
        ("a function with a picture is renamed", ("train_gpt2.c", r"\bmerge_piece\b", "join_piece"), 'the picture "merges" stands behind merge_piece()'),
        ("a comment names what is gone", ("train_gpt2.c", r"(// Ends the sequence)", r"// See batch_close(). \1"), "names batch_close(), which does not exist"),
        ("a derivation is taken out", ("dev/derivations.md", r"## 5\. Gelu.*?(?=## 6)", ""), "the layer gelu has no derivation"),
        ("a derivation names no function", ("dev/derivations.md", r"`dropout_add`\. ", ""), 'the first sentence of "7. Dropout'),
        ("a layer is added", ("train_gpt2.c", r"// ---- gelu ----", "// ---- relu ----\n// Half of x.\nstatic float half(float x) { return x / 2; }\n\n// ---- gelu ----"),
         "the layer relu has no derivation"),
        ("a link leads nowhere", ("dev/tour.md", r"\(\.\./train_gpt2\.c\)", "(#nowhere)"), "a link leads to #nowhere"),
        ("a text says another section", ("dev/tour.md", r"[Ss]ection \d+, `model_forward`", "Section 2, `model_forward`"), "`model_forward` is in section"),
        ("a question has no answer", ("README.md", r"(\| How is a token drawn\? \|)[^\n]*", r"\1 by chance |"), "leads nowhere on the page"),
        ("the tour has a block that is not printed", ("dev/tour.md", "<!-- rows -->", "<!-- columns -->"), "the tour prints no block columns"),
    ]
    for name, change, message in fails:
        status, said, _ = build([change])
        check(f"breaks: the build fails when {name}", [f"status {status}, {said or 'nothing said'}"] * (status == 0 or message not in said))
    shows = [
        ("a formula of a derivation", ("dev/derivations.md", r"db_n = \\sum_r dy_\{rn\}\$\$", r"db_n = \\prod_r dy_{rn}$$"), "&#x0220F;"),
        ("a formula above a function", ("train_gpt2.c", r"dx \+= rstd · \(g - average\(g\)", "dx += rstd · (g + average(g)"), "(g + average(g)"),
        ("a line of code", ("train_gpt2.c", r"factor > final \? factor", "factor >= final ? factor"), "factor &gt;= final ? factor"),
    ]
    for name, change, text in shows:
        status, said, page = build([change])
        check(f"breaks: the page shows a change of {name}", [f"status {status}, {said}"] * (status != 0) + ["unchanged"] * (text not in page or text in html))


# ---- in the browser ----

CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const under = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c; } };
  return ["body", ".code i.k", ".code i.t", ".code i.c", ".code i.s", ".code i.n", ".code i.p", ".words a", ".uses", ".derivation p", ".derivation h5",
          ".derivation a", ".tour p", ".tour h5", "nav li a", "nav a[aria-current]", "th", ".readout", ".choices span"].flatMap(selector => {
    const e = document.querySelector(selector);
    if (!e) return [selector + " is not there"];
    const a = light(getComputedStyle(e).color), b = light(under(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return ratio < 4.5 ? [`${selector}: ${ratio.toFixed(1)}`] : [];
  });
})()"""
FOLLOW = """(async () => {
  const wrong = [];
  for (const link of document.querySelectorAll("#ui-contents a")) {
    const heading = document.querySelector(link.hash);
    heading.scrollIntoView();
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    const current = document.querySelector("#ui-contents a[aria-current]"), frame = document.querySelector("#ui-contents").getBoundingClientRect();
    const box = current.getBoundingClientRect(), reached = heading.getBoundingClientRect().top < innerHeight * 0.3;
    if (reached && current !== link) {  // a heading with another directly below it is passed over
      const next = document.querySelector(current.hash);
      if (next.getBoundingClientRect().top > innerHeight * 0.3 || next.getBoundingClientRect().top < heading.getBoundingClientRect().top) wrong.push(link.hash);
    }
    if (box.top < frame.top || box.bottom > frame.bottom) wrong.push(link.hash + " out of sight");
  }
  return wrong;
})()"""


def hover(browser, selector, index=0):
    """Moves the mouse onto an element."""
    x, y = browser.run(f"(() => {{ const e = document.querySelectorAll({selector!r})[{index}]; e.scrollIntoView({{block: 'center'}});"
                       "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 3, y=y)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.settle()
    return x, y


def click(browser, selector, index=0):
    x, y = hover(browser, selector, index)
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    browser.settle()


def readout(browser, name):
    return browser.run(f"document.querySelector('#picture-{name} .readout').textContent")


def press(browser, key, text=None):
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **({"text": text} if text else {}),
                 windowsVirtualKeyCode={"Enter": 13, "ArrowRight": 39, "Escape": 27}.get(key, ord(key[0])))
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)
    browser.settle()


def test_pictures(browser):
    rows = numbers["rows"]
    hover(browser, "#picture-attention .hit", 13)
    said = readout(browser, "attention")
    mine = [f"{p:.3f}" for p in numbers["learning"][-1]["probability"][0][0][13]]
    check("pictures: attention says what a row sees, with its numbers", [said] * (not all(p in said for p in mine) or "sees 6 of 17" not in said))
    masked = browser.run("document.querySelectorAll('#picture-attention .masked').length")
    seen = sum(r - row["first"] + 1 for r, row in enumerate(rows))
    check("pictures: attention shows the mask", [f"{masked} masked"] * (masked != len(rows) ** 2 - seen))
    before = browser.run("document.querySelector('#picture-attention svg').outerHTML")
    click(browser, "#picture-attention .choices:nth-of-type(2) button", 1)
    check("pictures: attention of another head is another picture", ["unchanged"] * (before == browser.run("document.querySelector('#picture-attention svg').outerHTML")))

    hover(browser, "#picture-rows .tokens span:not(.pad)", 3)
    said = readout(browser, "rows")
    chosen = browser.run("document.querySelectorAll('#picture-rows .chosen').length")
    hover(browser, "#picture-rows .pad")
    check("pictures: rows answer, padded and packed", [said, str(chosen)] * ("reads ea at position 3" not in said or chosen != 2 or "PAD" not in readout(browser, "rows")))
    click(browser, "#picture-loss .choices button", 4)
    hover(browser, "#picture-loss .hit", 3)
    said, loss = readout(browser, "loss"), numbers["learning"][4]["loss"][3]
    check("pictures: loss of a token after 100 updates", [said] * (f"{loss:.4f}" not in said))
    click(browser, "#picture-memory .choices:nth-of-type(2) button", 1)
    total = next(m for m in numbers["memory"] if m["length"] == 1024 and m["recompute"])
    said = readout(browser, "memory")
    check("pictures: memory with --recompute", [said] * (f"{(total['activations'] + 4 * total['parameters']) / 1e9:.2f} GB" not in said))
    click(browser, "#picture-schedule .choices button", 1)
    browser.run("document.querySelector('#picture-schedule .hit').focus()")
    for _ in range(3):
        press(browser, "ArrowRight")
    curve = next(s for s in numbers["schedules"] if (s["schedule"], s["warmup"], s["final"]) == ("cosine", 20, 0))["factor"]
    said = readout(browser, "schedule")
    check("pictures: schedule answers to keys", [said] * ("update 3" not in said or f"{curve[3]:.3f}" not in said))
    hover(browser, "#picture-schedule .hit")
    check("pictures: schedule answers to the mouse", [readout(browser, "schedule")] * (not re.search("update (99|100) ", readout(browser, "schedule"))))
    piece = next(i for i, p in enumerate(numbers["merges"]) if p["piece"] == " like")
    click(browser, "#picture-merges .choices button", piece)
    tokens = []
    for _ in numbers["merges"][piece]["steps"]:
        tokens.append(browser.run("[...document.querySelectorAll('#picture-merges .right .tokens span')].map(e => e.textContent)"))
        click(browser, "#picture-merges .forth")
    check("pictures: merges are stepped through", [str(tokens)] * (tokens != [step[1:] for step in numbers["merges"][piece]["steps"]]))
    hover(browser, ".article tbody tr:has(.bar)", 2)
    said = browser.run("[...document.querySelectorAll('.article .readout')].map(e => e.textContent).join(' ')")
    check("pictures: measurements are compared", [said[:200]] * ("times the first row's" not in said))


def test_browser(program):
    browser, errors, ready = Browser(program), [], []
    overflow, one_column, contrast, schemes, following = [], [], [], [], []
    for width, height in ((1440, 900), (390, 844)):
        for dark in (False, True):
            browser.open(PAGE, width, height, dark)
            ready.append(int(browser.run("document.documentElement.dataset.ready")))
            where = f"{width} {'dark' if dark else 'light'}"
            contrast += [f"{where}: {x}" for x in browser.run(CONTRAST)]
            following += [f"{where}: {x}" for x in browser.run(FOLLOW)] if not (dark or width < 1000) else []
            schemes.append(browser.run("getComputedStyle(document.body).backgroundColor"))
            overflow += [where] * browser.run("document.documentElement.scrollWidth > innerWidth")
            beside = browser.run("(() => { const r = document.querySelector('#matmul_tile').closest('.row'), a = r.children[0].getBoundingClientRect(),"
                                 "b = r.children[1].getBoundingClientRect(); return b.left >= a.right ? 'beside' : b.top >= a.bottom ? 'below' : 'across'; })()")
            one_column += [f"{where}: {beside}"] * (beside != ("beside" if width > 1000 else "below"))
            errors += [str(e)[:300] for e in browser.errors()]
    check("browser: no error in the console, wide and narrow, light and dark", errors)
    check("browser: ready in under 2 s", [f"best of {ready} ms"] * (min(ready) >= 2000))
    check("browser: code stands beside the words, on a telephone below them", one_column)
    check("browser: the page is never wider than the window", overflow)
    check("browser: light and dark differ", [str(schemes)] * (len(set(schemes)) != 2))
    check("browser: every colour has a contrast of 4.5 to its ground", contrast)
    check("browser: contents follow", following)

    browser.open(PAGE)
    click(browser, "#ui-theme")
    check("browser: the button makes it dark", [schemes[0]] * (browser.run("getComputedStyle(document.body).backgroundColor") != schemes[1]))
    click(browser, "#ui-theme")
    press(browser, "/", "/")
    browser.call("Input.insertText", text="layernorm_backw")
    browser.settle()
    press(browser, "Enter", "\r")
    check("browser: search finds a function", [browser.run("location.hash")] * (browser.run("location.hash") != "#layernorm_backward"))
    top = browser.run("document.querySelector('#layernorm_backward').getBoundingClientRect().top")
    check("browser: and goes there", [str(top)] * (not 0 < top < 400))
    test_pictures(browser)

    hidden = browser.run("""[...document.querySelectorAll('#questions ~ .row a[href^="#"]')].filter(a => {
        location.hash = a.hash; const r = document.querySelector(a.hash).getBoundingClientRect(); return r.bottom < 0 || r.top > innerHeight; }).map(a => a.hash)""")
    check("browser: links of the answers bring their place into sight", hidden)
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    click(browser, "#ui-menu")
    shown = browser.run("getComputedStyle(document.querySelector('#ui-contents')).visibility")
    check("browser: contents open on a telephone", [shown] * (shown != "visible"))
    browser.call("Emulation.setEmulatedMedia", media="print")
    printed = browser.run("[getComputedStyle(document.querySelector('nav')).display, [...document.querySelectorAll('pre.code')].filter(e => e.scrollWidth > e.clientWidth + 1).length]")
    check("browser: print has no contents and cuts no code off", [str(printed)] * (printed != ["none", 0]))
    check("browser: still no error", [str(e)[:300] for e in browser.errors()])
    browser.close()


def main():
    began = time.time()
    test_page()
    test_questions()
    test_breaks()
    program = find_chromium()
    if program:
        test_browser(program)
    else:
        print("1 skipped: no Chromium is here, so nothing was tested in a browser (Debian: apt-get install chromium)")
    print(f"book: {time.time() - began:.0f} s\n{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
