"""Tests the book: what is on the page, that a break in the sources shows, how it behaves in headless Chromium.

    make book-test        CHROMIUM=PROGRAM chooses another; where there is none, that half is skipped, and said
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
PAGE, NUMBERS = ROOT / "build/book/index.html", ROOT / "build/book/numbers.json"
TEXTS = ["train_gpt2.c", "README.md", "dev/derivations.md", "dev/tour.md", "dev/performance.md"]
html, source = PAGE.read_text(), (ROOT / "train_gpt2.c").read_text()
body = html[html.index("<main"):html.index("</main>")]
contents = html[html.index("<nav"):html.index("</nav>")]
numbers = json.loads(NUMBERS.read_text())
passed = failed = 0


def check(name, problems):
    """One line: all is well when the list is empty."""
    global passed, failed
    passed, failed = passed + (not problems), failed + bool(problems)
    shown = "".join(f"\n       {problem}" for problem in problems[:5])
    print(f"{'FAILED' if problems else 'ok':6} {name}{shown}", flush=True)


def expect(name, good, seen=""):
    check(name, [] if good else [str(seen) or "not so"])


def plain(text):
    return unescape(re.sub(r"<[^>]*>", "", text))


def squeeze(text):
    return re.sub(r"\W+", " ", text).strip()


# ---- the page ----

def test_source():
    lines = source.split("\n")
    shown = {int(n): plain(text) for n, text in re.findall(r'<span id="L(\d+)">(.*?)\n</span>', body, re.S)}
    check("page: each line of code is the source's",
          [f"line {n}: {text}" for n, text in shown.items() if lines[n - 1] != text])
    words, missing = squeeze(plain(body)), []
    for n, line in enumerate(lines, 1):
        if "clang-format o" in line:
            continue
        if line.startswith("//"):
            text = squeeze(re.sub(r"^// (- |\d+\. |PART )?|^//|`", "", line))
            missing += [f"line {n}: {text}"] * (text not in words)
        elif line.strip() and n not in shown:
            missing.append(f"line {n}: {line}")
    check("page: no line of the source is missing, neither comment nor code", missing)

    with tempfile.TemporaryDirectory() as folder:
        compiler = ["cc", "-std=gnu11", "-O0", "-fopenmp", "-w", "-c", "-o", f"{folder}/x.o", ROOT / "train_gpt2.c"]
        subprocess.run(compiler, check=True)
        symbols = subprocess.run(["nm", f"{folder}/x.o"], capture_output=True, text=True).stdout
    functions = set(re.findall(r" [tT] (\w+)$", symbols, re.M))
    structs = set(re.findall(r"^\} (\w+);", source, re.M))
    expect("page: the compiler sees functions", len(functions) > 100 and len(structs) > 20, functions)
    check("page: each of them, and each struct, is an anchor", sorted((functions | structs) - anchors()))
    used = [name for name in functions if len(re.findall(rf"\b{name}\b", source)) > 1 and name != "main"]
    check("page: where they are used there are links", [name for name in used if f'href="#{name}"' not in body])


def anchors():
    return set(re.findall(r' id="([^"]+)"', html))


def test_page():
    links = set(re.findall(r'href="([^"]*)"', html))
    check("page: every link resolves",
          sorted(link for link in links if not re.match(r"https?:", link) and link[1:] not in anchors()))
    check("page: nothing is loaded from elsewhere",
          re.findall(r"(?:<link\b|<img\b|<iframe\b|\bsrc=|@import|url\()[^>]{0,40}", html))
    expect("page: under 3 MB", len(html.encode()) < 3_000_000, len(html.encode()))

    formulas = 0
    for path in ("dev/derivations.md", "dev/tour.md"):
        text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / path).read_text(), flags=re.S)
        formulas += sum(1 + tex.count("\\qquad") for tex in re.findall(r"\$\$?.+?\$\$?", text, re.S))
    maths = re.findall(r"<math.*?</math>", body, re.S)
    expect("page: every formula is MathML", len(maths) == formulas, f"{len(maths)} of {formulas}")
    check("page: no formula has a word of TeX left",
          [m for m in maths if "\\" in plain(m) or "merror" in m] + re.findall(r".{20}\$\$?\\.{20}", plain(body)))

    texts, digits = re.sub(r"[\d.]+", "", plain(body)), re.compile(r"[\d.]+")  # other processors, other last digits
    blocks = re.findall(r"<!-- (\w+) -->\n+```\n(.*?)```", (ROOT / "dev/tour.md").read_text(), re.S)
    check("page: the tour's blocks are there", [n for n, text in blocks if digits.sub("", text.strip()) not in texts])
    check("page: parts of memory add up to what the program lays out",
          [m for m in numbers["memory"] if sum(part[1] for part in m["parts"]) != m["activations"]])
    printed = [float(line.split()[-1]) for line in numbers["blocks"]["attention"].split("\n")[2:-2]]
    shown = numbers["learning"][0]["probability"][0][0][13]
    expect("page: attention in the picture is that of the tour",
           len(printed) == len(shown) and max(abs(a - b) for a, b in zip(printed, shown)) < 1e-4, (printed, shown))

    # README's questions: one step is the link in the contents, the second a link in the answer.
    table = re.search(r'id="questions".*?<table>(.*?)</table>', body, re.S)[1]
    answers = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", table, re.S)
    expect("questions: the contents lead to them", 'href="#questions"' in contents and len(answers) >= 20, len(answers))
    check(f"questions: the {len(answers)} answers lead on", [plain(q) for q, a in answers if 'href="#' not in a])


# ---- breaks in the sources ----

def build(path, old, new):
    """Builds the page from a copy of the sources in which one is changed. Returns (status, stderr, page)."""
    with tempfile.TemporaryDirectory() as folder:
        root, page = Path(folder), Path(folder) / "index.html"
        (root / "dev").mkdir()
        for text in TEXTS:
            shutil.copy(ROOT / text, root / text)
        before = (root / path).read_text()
        (root / path).write_text(re.sub(old, new, before, flags=re.S))
        if (root / path).read_text() == before:
            return 0, f"this test finds nothing to change: {old}", ""
        run = subprocess.run([sys.executable, ROOT / "dev/book/build.py", "--root", root, "--numbers", NUMBERS,
                              "--out", page], capture_output=True, text=True)
        return run.returncode, run.stderr, page.read_text() if page.exists() else ""


LAYER = "// ---- relu ----\n// Half of x.\nstatic float half(float x) { return x / 2; }\n\n// ---- gelu ----"
FAILS = [
    ("a function is renamed that a derivation names", "train_gpt2.c", r"\blayernorm_backward\b", "layernorm_reverse",
     "dev/derivations.md: there is no `layernorm_backward`"),
    ("a function is renamed that the tour names", "train_gpt2.c", r"\bfind_piece\b", "next_piece",
     "dev/tour.md: there is no `find_piece`"),
    ("a function is renamed that has a picture", "train_gpt2.c", r"\bmerge_piece\b", "join_piece",
     'the picture "merges" stands behind merge_piece()'),
    ("a comment names what is gone", "train_gpt2.c", r"(// Ends the sequence)", r"// See batch_close(). \1",
     "names batch_close(), which does not exist"),
    ("a derivation is taken out", "dev/derivations.md", r"## 5\. Gelu.*?(?=## 6)", "",
     "the layer gelu has no derivation"),
    ("a derivation names no function", "dev/derivations.md", r"`dropout_add`\. ", "",
     'the first sentence of "7. Dropout'),
    ("a layer is added without one", "train_gpt2.c", r"// ---- gelu ----", LAYER, "the layer relu has no derivation"),
    ("a link leads nowhere", "dev/tour.md", r"\(\.\./train_gpt2\.c\)", "(#nowhere)", "a link leads to #nowhere"),
    ("a text says another section", "dev/tour.md", r"[Ss]ection \d+, `model_forward`", "Section 2, `model_forward`",
     "`model_forward` is in section"),
    ("a question has no answer", "README.md", r"(\| How is a token drawn\? \|)[^\n]*", r"\1 by chance |",
     "leads nowhere on the page"),
    ("the tour has a block that is not printed", "dev/tour.md", "<!-- rows -->", "<!-- columns -->",
     "the tour prints no block columns"),
]
SHOWS = [
    ("a link to a line", "README.md", r"## Change something\n", "## Change something\n\n[this](train_gpt2.c#L1-L9)\n",
     f'<a href="#L{source[:source.index("#ifndef _GNU_SOURCE")].count(chr(10)) + 1}">this'),
    ("a formula of a derivation", "dev/derivations.md", r"db_n = \\sum_r", r"db_n = \\prod_r", "&#x0220F;"),
    ("a formula above a function", "train_gpt2.c", r"rstd · \(g - average\(g\)", "rstd · (g + average(g)",
     "(g + average(g)"),
    ("a line of code", "train_gpt2.c", r"factor > final \? factor", "factor >= final ? factor",
     "factor &gt;= final ? factor"),
]


def test_breaks():
    for name, path, old, new, message in FAILS:
        status, said, _ = build(path, old, new)
        expect(f"breaks: the build fails when {name}", status != 0 and message in said, f"{status}: {said}")
    for name, path, old, new, text in SHOWS:
        status, said, page = build(path, old, new)
        expect(f"breaks: the page shows a change of {name}", status == 0 and text in page and text not in html, said)


# ---- in the browser ----

CONTRAST = """(() => {
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(linear);
                          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const under = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                                                        if (!/, 0\\)|transparent/.test(c)) return c; } };
  return ["body", ".code i.k", ".code i.t", ".code i.c", ".code i.s", ".code i.n", ".code i.p", ".words a", ".uses",
          ".derivation p", ".derivation h5", ".derivation a", ".tour p", ".tour h5", "nav li a", "nav a[aria-current]",
          "th", ".readout", ".choices span"].flatMap(selector => {
    const e = document.querySelector(selector), a = light(getComputedStyle(e).color), b = light(under(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return ratio < 4.5 ? [`${selector}: ${ratio.toFixed(1)}`] : [];
  });
})()"""
# The reading line is at 0.3 of the window. When a heading is at the top, the current one is the last above that line.
FOLLOW = """(async () => {
  const wrong = [], links = [...document.querySelectorAll("#ui-contents a")];
  const headings = links.map(link => document.querySelector(link.hash));
  for (let i = 0; i < links.length; i++) {
    headings[i].scrollIntoView();
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    let last = links.length - 1;
    while (last > 0 && headings[last].getBoundingClientRect().top >= innerHeight * 0.3) last--;
    const current = document.querySelectorAll("#ui-contents a[aria-current]");
    const [box, frame] = [links[last], document.querySelector("#ui-contents")].map(e => e.getBoundingClientRect());
    if (current.length !== 1 || current[0] !== links[last]) wrong.push(links[i].hash);
    if (!box.height || box.top < frame.top || box.bottom > frame.bottom) wrong.push(links[i].hash + " out of sight");
  }
  return wrong;
})()"""
SIDES = """(() => {
  const row = document.querySelector("#matmul_tile").closest(".row");
  const [a, b] = [...row.children].map(e => e.getBoundingClientRect());
  return b.left >= a.right ? "beside" : b.top >= a.bottom ? "below" : "across";
})()"""


def hover(browser, selector, index=0):
    """Moves the mouse onto an element."""
    x, y = browser.run(f"(() => {{ const e = document.querySelectorAll({selector!r})[{index}];"
                       "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
                       "return [b.x + b.width / 2, b.y + b.height / 2]; })()")
    for place in (x - 3, x):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place, y=y)
    browser.settle()
    return x, y


def click(browser, selector, index=0):
    x, y = hover(browser, selector, index)
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    browser.settle()


def press(browser, key, text=""):
    code = {"Enter": 13, "ArrowRight": 39}.get(key, ord(key[0]))
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)
    browser.settle()


def test_pictures(browser):
    def said(name):
        return browser.run(f"document.querySelector('#picture-{name} .readout').textContent")

    rows, learning = numbers["rows"], numbers["learning"]
    hover(browser, "#picture-attention .hit", 13)
    values = [f"{p:.3f}" for p in learning[-1]["probability"][0][0][13]]
    expect("pictures: attention says what a row sees, with its numbers",
           "sees 6 of 17" in said("attention") and all(v in said("attention") for v in values), said("attention"))
    masked = browser.run("document.querySelectorAll('#picture-attention .masked').length")
    seen = sum(r - row["first"] + 1 for r, row in enumerate(rows))
    expect("pictures: attention shows the mask", masked == len(rows) ** 2 - seen, masked)
    drawing = ("[...document.querySelectorAll('#picture-attention .cell')]"
               ".map(e => e.getAttribute('fill-opacity')).join()")
    before = browser.run(drawing)
    click(browser, "#picture-attention .choices:nth-of-type(2) button", 1)
    expect("pictures: another head looks elsewhere", before != browser.run(drawing))

    hover(browser, "#picture-rows .tokens span:not(.pad)", 3)
    chosen = browser.run("document.querySelectorAll('#picture-rows .chosen').length")
    expect("pictures: a row answers, padded and packed", "reads ea at position 3" in said("rows") and chosen == 2,
           (said("rows"), chosen))
    hover(browser, "#picture-rows .pad")
    expect("pictures: PAD answers", said("rows").startswith("PAD"), said("rows"))

    click(browser, "#picture-loss .choices button", 4)
    hover(browser, "#picture-loss .hit", 3)
    expect("pictures: loss of a token after 100 updates", f"{learning[4]['loss'][3]:.4f}" in said("loss"), said("loss"))

    click(browser, "#picture-memory .choices:nth-of-type(2) button", 1)
    memory = next(m for m in numbers["memory"] if m["length"] == 1024 and m["recompute"])
    total = f"{(memory['activations'] + 4 * memory['parameters']) / 1e9:.2f} GB"
    expect("pictures: memory with --recompute", total in said("memory"), said("memory"))

    click(browser, "#picture-schedule .choices button", 1)
    browser.run("document.querySelector('#picture-schedule .hit').focus()")
    for _ in range(3):
        press(browser, "ArrowRight")
    curve = next(s for s in numbers["schedules"] if (s["schedule"], s["warmup"], s["final"]) == ("cosine", 20, 0))
    expect("pictures: schedule answers to keys",
           "update 3" in said("schedule") and f"{curve['factor'][3]:.3f}" in said("schedule"), said("schedule"))
    hover(browser, "#picture-schedule .hit")
    expect("pictures: schedule answers to the mouse", re.search("update (99|100) ", said("schedule")), said("schedule"))

    piece = next(i for i, p in enumerate(numbers["merges"]) if p["piece"] == " like")
    click(browser, "#picture-merges .choices button", piece)
    steps = [step[1:] for step in numbers["merges"][piece]["steps"]]
    shown = []
    for _ in steps:
        shown.append(browser.run("[...document.querySelectorAll('#picture-merges .right .tokens span')]"
                                 ".map(e => e.textContent)"))
        click(browser, "#picture-merges .forth")
    expect("pictures: merges are stepped through", shown == steps, shown)
    hover(browser, ".article tbody tr:has(.bar)", 2)
    told = browser.run("[...document.querySelectorAll('.article .readout')].map(e => e.textContent).join(' ')")
    expect("pictures: measurements are compared", "times the first row's" in told, told)


def test_views(browser):
    """Both widths, both colour schemes. Returns the two colours of the ground."""
    errors, ready, clock, sides, wider, contrast, grounds = [], [], [], [], [], [], []
    browser.call("Performance.enable", timeDomain="threadTicks")  # seconds of work: other programs do not count
    for width, height in ((1440, 900), (390, 844)):
        for dark in (False, True):
            browser.open(PAGE, width, height, dark)
            where = f"{width} {'dark' if dark else 'light'}"
            metrics = {m["name"]: m["value"] for m in browser.call("Performance.getMetrics")["metrics"]}
            ready.append(round(metrics["TaskDuration"], 2))
            clock.append(int(browser.run("document.documentElement.dataset.ready")) / 1000)
            contrast += [f"{where}: {x}" for x in browser.run(CONTRAST)]
            grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
            wider += [where] * browser.run("document.documentElement.scrollWidth > innerWidth")
            sides.append(browser.run(SIDES))
            errors += browser.errors()
    check("browser: no error in the console, wide and narrow, light and dark", errors)
    expect(f"browser: ready in under 2 s of work ({max(ready)} s; on this clock now {min(clock)} to {max(clock)} s)",
           max(ready) < 2, ready)
    expect("browser: code stands beside the words, on a telephone below",
           sides == ["beside"] * 2 + ["below"] * 2, sides)
    check("browser: the page is never wider than the window", wider)
    expect("browser: light and dark differ", len(set(grounds)) == 2, grounds)
    check("browser: every colour has a contrast of 4.5 to its ground", contrast)
    return grounds[:2]


def test_browser(program):
    browser = Browser(program)
    light, dark = test_views(browser)
    browser.open(PAGE)
    check("browser: contents follow", browser.run(FOLLOW))
    click(browser, "#ui-theme")
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    expect("browser: the button makes it dark", ground == dark != light, ground)
    click(browser, "#ui-theme")
    press(browser, "/", "/")
    browser.call("Input.insertText", text="layernorm_backw")
    press(browser, "Enter", "\r")
    place = browser.run("[location.hash, document.querySelector('#layernorm_backward').getBoundingClientRect().top]")
    expect("browser: search finds a function and goes there",
           place[0] == "#layernorm_backward" and 0 < place[1] < 400, place)
    test_pictures(browser)
    hidden = browser.run("""[...document.querySelectorAll('#questions + .row a[href^="#"]')].filter(a => {
        location.hash = a.hash;
        const r = document.querySelector(a.hash).getBoundingClientRect();
        return r.bottom < 0 || r.top > innerHeight; }).map(a => a.hash)""")
    check("questions: each link of an answer brings its place into sight", hidden)
    browser.resize(390, 844)
    click(browser, "#ui-menu")
    shown = browser.run("getComputedStyle(document.querySelector('#ui-contents')).visibility")
    expect("browser: contents open on a telephone", shown == "visible", shown)
    browser.call("Emulation.setEmulatedMedia", media="print")
    printed = browser.run("""[getComputedStyle(document.querySelector("nav")).display,
        [...document.querySelectorAll("pre.code")].filter(e => e.scrollWidth > e.clientWidth + 1).length]""")
    expect("browser: print has no contents and cuts no code off", printed == ["none", 0], printed)
    check("browser: still no error", browser.errors())
    browser.close()


def main():
    began = time.time()
    test_source()
    test_page()
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
