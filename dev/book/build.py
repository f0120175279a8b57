"""Makes the book: one page of HTML from train_gpt2.c and the texts that explain it.

    python3 dev/book/build.py --numbers numbers.json --out index.html [--root DIR]     (`make book` does all of it)

The page is a list of rows, words left and code right. A comment that begins a line of train_gpt2.c is words, all else is
code. Other texts come in where the functions are that they name, so that nothing has to be kept in step by hand:

    dev/derivations.md   a section stands beside the last function that its first sentence names
    dev/tour.md          a passage stands behind the first function that it names; its blocks are printed anew
    dev/performance.md   behind Part V
    README.md            the tables of questions and changes, and the sections that they link to

Names that no longer exist, links to nothing, derivations without a layer and layers without one end the build.
"""
import argparse
import json
import re
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.lexers import CLexer
from pygments.token import Comment, Keyword, Literal

HERE = Path(__file__).parent
# Each picture: the function that it stands behind, its title, what it shows. Its numbers are in numbers.json, its drawing in
# book.js.
PICTURES = {
    "rows": ("batch_add_row", "The same batch, padded and packed",
             "The tour's three sequences as a rectangle with PAD, and as rows one behind the other."),
    "attention": ("attention_forward", "What each head looks at",
                  "A row asks, columns are asked. The tour's model: 2 blocks, 2 heads, before and while it learns one batch by heart."),
    "loss": ("cross_entropy", "The loss of each token", "While the tour's model learns one batch by heart. Who knows nothing has the loss log(V)."),
    "memory": ("block_at", "What is kept for the backward pass",
               "GPT-2 with 124M parameters in training, one thread: the arrays that the functions above lay out."),
    "schedule": ("schedule_factor", "The learning rate", "What this function returns for a run of 200 updates."),
    "merges": ("merge_piece", "From bytes to tokens, merge by merge",
               "Pieces of a sentence in the tour's small vocabulary; _ is a space."),
}
README_SECTIONS = ["Questions", "Change something"]  # those that are there; the first one must be
problems = []


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- the source ----

class Source:
    """train_gpt2.c: what it defines, where that is used, and each of its lines as HTML with every name a link."""

    def __init__(self, text):
        self.text, self.lines, self.words = text, text.split("\n"), set(re.findall(r"\w+", text))
        self.kinds, self.line_of, self.functions = {}, {}, []  # functions: (first line, last line, name)
        self.uses, self.mentions = defaultdict(dict), defaultdict(dict)  # name -> {place: line}, {anchor: title}
        self.find_definitions()
        self.headings = list(self.find_headings())  # (line, level 2 to 4, anchor, title)
        self.anchored = set()
        self.html = self.highlight()

    def line_at(self, offset):
        return self.text.count("\n", 0, offset) + 1

    def define(self, kind, name, offset):
        if name not in self.kinds:
            self.kinds[name], self.line_of[name] = kind, self.line_at(offset)

    def find_definitions(self):
        text = self.text
        for m in re.finditer(r"^(?:static|int main)\b[^;{=]*([;{=])", text, re.M):
            head = re.sub(r"__attribute__\(\(\w+(\([^)]*\))?\)\)", lambda a: " " * len(a[0]), m[0])
            call = re.search(r"(\w+)\(", head)
            if m[1] == "{" and call:
                self.define("function", call[1], m.start() + call.start())
                one_line = text[m.end():].split("\n", 1)[0].endswith("}")
                end = m.end() if one_line else text.index("\n}", m.end()) + 1
                self.functions.append((self.line_at(m.start()), self.line_at(end), call[1]))
            elif m[1] == "{":
                name = re.compile(r"^\} (\w+)", re.M).search(text, m.end())
                self.define("variable", name[1], name.start(1))
            elif not call:
                name = re.search(r"(\w+)(?:\[[^\]]*\])* *[;=]$", head)
                self.define("variable", name[1], m.start() + name.start(1))
        for m in re.finditer(r"^(?:typedef )?(struct|union|enum)(?: (\w+))? \{(.*?)\} *(\w*)[^;]*;", text, re.M | re.S):
            if m[4] or m[2]:
                self.define("type", m[4] or m[2], m.start(4) if m[4] else m.start(2))
            for c in re.finditer(r"\b[A-Z][A-Z0-9_]{2,}\b(?= *(?:[,=\n]|$))", m[3] if m[1] == "enum" else ""):
                self.define("constant", c[0], m.start(3) + c.start())
        for m in re.finditer(r"^typedef [^{};]*?\b(\w+)\)?(?:\([^;]*| __attribute__[^;]*)?;", text, re.M):
            self.define("type", m[1], m.start(1))
        for m in re.finditer(r"^#define (\w+)", text, re.M):
            self.define("macro", m[1], m.start(1))

    def find_headings(self):
        section = ""
        for i, line in enumerate(self.lines):
            part, numbered, smaller = (re.fullmatch(form, line) for form in (
                r"// PART ([IVX]+)\. (.+)", r"// (\d+)\. (.+)", r"// ---- (.+) ----"))
            banner = i > 0 and re.fullmatch(r"// [=#]{20,}", self.lines[i - 1])
            if banner and (part or numbered):
                m = part or numbered
                section = f"{'part' if part else 'section'}-{m[1].lower()}"
                yield i + 1, 2 if part else 3, section, f"{m[1]}. {m[2]}"
            elif smaller:
                yield i + 1, 4 if section else 3, f"{section or 'opening'}-{slug(smaller[1])}", smaller[1]

    def section_of(self, name):
        """The number of the section that defines this."""
        before = [anchor for line, level, anchor, _ in self.headings if level == 3 and line < self.line_of[name]]
        return before[-1].split("-")[1] if before else None

    def inside(self, line):
        return next((name for first, last, name in self.functions if first <= line <= last), None)

    def highlight(self):
        classes = [(Comment.Preproc, "p"), (Comment, "c"), (Keyword.Type, "t"), (Keyword, "k"), (Literal.Number, "n"), (Literal, "s")]
        out, at, before = [], 0, ""
        for kind, value in CLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            css = next((c for k, c in classes if kind in k), "")
            if css == "c":
                body = words(self, value, in_code=True)
            elif css == "s":
                body = escape(value, quote=False)
            else:
                body = re.sub(r"[A-Za-z_]\w*|[&<>]", lambda m: self.name(m, value, at, before), value)
            out += "\n".join(f'<i class="{css}">{part}</i>' if css and part.strip() else part for part in body.split("\n"))
            at, before = at + len(value), value if value.strip() else before
        return "".join(out).split("\n")

    def name(self, match, value, at, before):
        """One name in code: a link to its definition, or the definition itself."""
        name, kind = match[0], self.kinds.get(match[0])
        called = self.text[at + match.end():at + match.end() + 2].lstrip()[:1] == "("
        member = (value[:match.start()] or before).rstrip().endswith((".", "->"))
        if not kind or member or (kind == "function" and not called and "_" not in name):
            return escape(name)
        line = self.line_at(at + match.start())
        if line == self.line_of[name] and name not in self.anchored:
            self.anchored.add(name)
            return f'<b id="{name}">{name}</b>'
        self.uses[name].setdefault(self.inside(line) or f"line {line}", line)
        return f'<a href="#{name}">{name}</a>'


# ---- words ----

INLINE = re.compile(r"`([^`\n]+)`|(?<![\w-])(--[a-z][a-z-]+|\w+->\w+)|\b([Ss]ection) (\d+)|\bPart ([IVX]+)\b|([A-Za-z_]\w*)(\(\))?|([&<>])")


def words(source, text, in_code=False):
    """Plain words as HTML: `code` and --options set as code, names of functions, sections and parts as links. A comment
    within code keeps its letters."""
    def replace(m):
        code, option, section, number, part, name, call, sign = m.groups()
        if code or option:
            link = f'<a href="#{code}">{code}</a>' if code in source.kinds else escape(code or option)
            return f"<code>{link}</code>" if not in_code else f"`{link}`" if code else link
        if section or part:
            return f'<a href="#{"section-" + number if section else "part-" + part.lower()}">{m[0]}</a>'
        kind = source.kinds.get(name)
        type_in_sentence = kind == "type" and name[0].isupper() and re.search(r"[a-z,;:] $", text[:m.start()])
        if kind and (call or "_" in name or type_in_sentence):
            return f'<a href="#{name}">{m[0]}</a>'
        if call and not kind and "_" in name and not name.startswith("X_"):  # X_free() stands for any
            problems.append(f"train_gpt2.c: a comment names {name}(), which does not exist")
        return escape(m[0], quote=False)
    return INLINE.sub(replace, text)


def prose(source, lines):
    """The lines of a comment as HTML: paragraphs, lists, and line by line what is indented or has gaps."""
    groups, kind = [], None
    for line in lines:
        item = re.match(r"(- |\d+\. )(.*)", line)
        now = None if not line.strip() else ("ul" if item[1] == "- " else "ol") if item else \
            kind if kind in ("ul", "ol") and line.startswith("  ") else "pre" if line.startswith("  ") or re.search(r"\S {3,}\S", line) else "p"
        if now and (now != kind or item):
            groups.append((now, []))
        if now:
            groups[-1][1].append(item[2] if item else line if now == "pre" else line.strip())
        kind = now
    html = ""
    for kind, content in groups:
        if kind == "pre":
            indent = min(len(line) - len(line.lstrip()) for line in content)
            lines = (re.sub(r"\S+(?: {1,2}\S+)*", lambda m: f"<u>{words(source, m[0])}</u>", line[indent:]) for line in content)
            html += "<pre>" + "".join(f"<span>{line}\n</span>" for line in lines) + "</pre>"
        else:
            text = words(source, "\n".join(content))
            html += f"<p>{text}</p>" if kind == "p" else f"<{kind}><li>{text}</li></{kind}>"
    return html.replace("</li></ul><ul>", "</li>").replace("</li></ol><ol>", "</li>")


# ---- other texts ----

def math(tex, display):
    """A formula as MathML. Sums in displayed formulas have their limits below and above."""
    html = re.sub(r' xmlns="[^"]*"', "", convert(tex.strip(), display=display))
    if display == "block":
        html = re.sub(r"<(/?)msub(sup)?>(?=<mo>&#x02211;)", r"<\1munder\2>", html)
    return html


class Text:
    """A text in Markdown. Its formulas become MathML, its names links; what it names is checked."""

    def __init__(self, root, path, source, numbers=None):
        self.path, self.source, self.blocks, self.here = path, source, numbers and numbers["blocks"], None
        self.md = MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin)
        for rule in ("math_inline", "math_block", "code_inline", "link_open", "text", "html_block"):
            self.md.renderer.rules[rule] = getattr(self, rule)
        raw = (root / path).read_text()
        self.tokens = self.md.parse(raw)
        for m in re.finditer(r"`(\w+)`[^`|;.]{0,25}in section (\d+)|[Ss]ection (\d+)[^`|;.]{0,25}`(\w+)`", raw):
            name, number = m[1] or m[4], m[2] or m[3]
            if path != "dev/derivations.md" and source.kinds.get(name) and source.section_of(name) != number:
                problems.append(f"{path}: `{name}` is in section {source.section_of(name)}, not in section {number}")

    def sections(self):
        """[title, tokens] for each heading of the second level; the first is what stands before them."""
        found = [[None, []]]
        for i, token in enumerate(self.tokens):
            if token.type == "heading_open" and token.tag == "h2":
                found.append([self.tokens[i + 1].content, []])
            found[-1][1].append(token)
        return [[title, tokens[3:]] for title, tokens in found]

    def names(self, tokens, sentence=False):
        """The functions that these tokens name, or that their first sentence does."""
        text = " ".join(t.content for t in tokens if t.type == "inline")
        text = re.split(r"\.(?:\s|$)", text)[0] if sentence else text
        return [name for name in re.findall(r"`(\w+)`", text) if self.source.kinds.get(name) == "function"]

    def render(self, tokens, anchor, title):
        self.here = (anchor, title)
        return self.md.renderer.render(tokens, self.md.options, {})

    def math_inline(self, tokens, i, options, env):
        return math(tokens[i].content, "inline")

    def math_block(self, tokens, i, options, env):
        pieces = re.split(r"\\qquad", tokens[i].content)
        return '<div class="formulas">' + "".join(math(piece, "block") for piece in pieces) + "</div>"

    def code_inline(self, tokens, i, options, env):
        name = tokens[i].content
        if name in self.source.kinds:
            self.source.mentions[name].setdefault(*self.here)
            return f'<code><a href="#{name}">{name}</a></code>'
        if re.fullmatch(r"[a-z]\w*_\w+", name) and name not in self.source.words:
            problems.append(f"{self.path}: there is no `{name}` in train_gpt2.c")
        return f"<code>{escape(name)}</code>"

    def text(self, tokens, i, options, env):
        prefix = "derivation-" if self.path == "dev/derivations.md" else "section-"
        html = re.sub(r"\b([Ss]ection) (\d+)", rf'<a href="#{prefix}\2">\1 \2</a>', escape(tokens[i].content, quote=False))
        if i > 2 and tokens[i - 1].type == "link_close" and html.startswith(", part "):  # "derivations, part 2"
            target = self.target(tokens[i - 3].attrGet("href")).removesuffix("0")
            html = re.sub(r"part (\d+)", rf'<a href="{target}\1">part \1</a>', html, count=1)
        return html

    def target(self, href):
        """Where on the page a link of this text leads; "#" when it leads to another file."""
        path, _, anchor = href.partition("#")
        inside = {"train_gpt2.c": "book", "derivations.md": "derivation-0", "tour.md": "tour-0", "performance.md": "measured-0"}
        return href if re.match(r"https?:", href) else "#" + (anchor or inside.get(path.split("/")[-1], ""))

    def link_open(self, tokens, i, options, env):
        href, target = tokens[i].attrGet("href"), self.target(tokens[i].attrGet("href"))
        return f'<a href="{target}">' if target != "#" else f'<a class="file" title="{href}">'

    def html_block(self, tokens, i, options, env):
        return ""


# ---- the page ----

def read_rows(source):
    """Cuts train_gpt2.c into rows: (first line, words, first and last line of code or None), one for each comment that
    begins a line and the code below it, and one for each further definition. A heading is (line, level, anchor, title)."""
    headings = {line: heading for heading in source.headings for line in [heading[0]]}
    comment, start, code = [], 1, []

    def row():
        while code and not source.lines[code[-1] - 1].strip():
            code.pop()
        if comment or code:
            yield start, list(comment), (code[0], code[-1]) if code else None
        comment.clear(), code.clear()

    for number, line in enumerate(source.lines, 1):
        if re.match(r"// clang-format o|// [=#]{20,}$", line):
            continue
        if line.startswith("//"):
            if code or number in headings:
                yield from row()
            if number in headings:
                yield headings[number]
            else:
                start = start if comment else number
                comment.append(line[3:])
        elif line.strip() or code:
            if code and line[:1].isalpha() and not source.lines[number - 2].strip():
                yield from row()
            start = start if comment or code else number
            code.append(number)
        elif comment:  # a comment with nothing directly below it stands alone
            yield from row()
    yield from row()


def code_cell(source, first, last):
    lines = (f'<span id="L{n}">{source.html[n - 1]}\n</span>' for n in range(first, last + 1)
             if not source.lines[n - 1].startswith("// clang-format o"))
    cell = f'<pre class="code" style="counter-reset:line {first - 1}">{"".join(lines)}</pre>'
    table = max(len(line) for line in source.lines[first - 1:last]) < 120 and \
        sum(bool(re.fullmatch(r" *(-?\d+,)+-?\d*,?", line)) for line in source.lines[first - 1:last]) > 30
    return f"<details><summary>a table of {last - first + 1} lines</summary>{cell}</details>" if table else cell


def row_html(left, right="", css=""):
    return f'<div class="row {css}"><div class="words">{left}</div>' + (f'<div class="right">{right}</div>' if right else "") + "</div>"


def uses_html(source, names):
    """For each function and type: the places that use it, and the texts that tell of it."""
    html = ""
    for name in names:
        places = [f'<a href="#L{line}">{place}</a>' for place, line in source.uses[name].items() if place != name]
        texts = [f'<a href="#{anchor}">{title}</a>' for anchor, title in source.mentions[name].items()]
        used = f"used in {', '.join(places)}" if places else "used nowhere else"
        told = f"; see {', '.join(texts)}" if texts else ""
        if len(places) + len(texts) > 6:
            summary = f"used in {len(places)} places" + (f", see {len(texts)} texts" if texts else "")
            html += f"<details><summary><b>{name}</b> {summary}</summary>{used}{told}</details>"
        else:
            html += f"<p><b>{name}</b> {used}{told}</p>"
    return f'<div class="uses">{html}</div>' if html else ""


def derivations(text, source):
    """{function: HTML to stand beside it}; the introduction is under None."""
    beside = {}
    for title, tokens in text.sections():
        names = text.names(tokens, sentence=True) if title else [None]
        number = re.match(r"(\d+)\.", title or "0.")
        anchor = f"derivation-{number[1] if number else slug(title)}"
        if not names:
            problems.append(f"dev/derivations.md: the first sentence of \"{title}\" names no function of train_gpt2.c")
            continue
        label = f"Derivation {title}" if title else "The derivations: one rule"
        html = text.render(tokens, anchor, f"derivation {number[1]}" if number else label.replace("D", "d", 1))
        beside[names[-1]] = beside.get(names[-1], "") + f'<section class="derivation" id="{anchor}"><h5>{label}</h5>{html}</section>'
    named = set(text.names(text.tokens))
    for name in [name for _, _, name in source.functions if "_backward" in name]:
        if name not in named:
            problems.append(f"dev/derivations.md: {name} has no derivation")
    layers = [h for h in source.headings if h[1] == 3 and h[3].endswith("Layers")]
    if not layers:
        problems.append("train_gpt2.c: there is no section Layers, whose layers need derivations")
    for line, _, anchor, title in (h for h in source.headings if layers and h[1] == 4 and h[2].startswith(layers[0][2] + "-")):
        end = next((h[0] for h in source.headings if h[0] > line), len(source.lines))
        if not any(line < source.line_of[name] < end for name in beside if name):
            problems.append(f"dev/derivations.md: the layer {title} has no derivation")
    return beside


def tour(text):
    """{function: HTML of rows to stand behind it}; the introduction is under None. A paragraph that introduces a block and
    names a function begins a new passage."""
    behind = defaultdict(str)
    for title, tokens in text.sections():
        if not title:
            behind[None] = row_html(f'<h5 id="tour-0">The tour</h5>{text.render(tokens, "tour-0", "the tour")}', css="tour wide")
            continue
        anchor, place, left, block = f"tour-{title.split('.')[0]}", None, "", None
        label = f'<h5 id="{anchor}">The tour: {title}</h5>'
        items = [tokens[i:i + 3] if t.type == "paragraph_open" else [t] for i, t in enumerate(tokens)
                 if t.type in ("paragraph_open", "html_block", "fence")]
        for i, item in enumerate(items):
            if item[0].type == "html_block":
                block = re.search(r"<!-- (\w+)", item[0].content)[1]
            elif item[0].type == "fence":
                if block not in text.blocks:
                    problems.append(f"dev/tour.md: the tour prints no block {block}")
                behind[place] += row_html(label + left, f"<pre>{escape(text.blocks.get(block, ''), quote=False)}</pre>", "tour")
                label, left = "", ""
            else:
                names, opens = text.names(item), i + 1 < len(items) and items[i + 1][0].type == "html_block"
                if names and (place is None or (opens and not label)):
                    if left:
                        behind[place] += row_html(left, css="tour wide")
                    label = label or f"<h5>The tour, from {title}</h5>"
                    place, left = names[0], ""
                left += text.render(item, anchor, f"tour {title.split('.')[0]}")
        if place is None:
            problems.append(f"dev/tour.md: \"{title}\" names no function of train_gpt2.c")
        if left:
            behind[place] += row_html(label + left, css="tour wide")
    return behind


def article(text, prefix, level, wanted=None):
    """Whole sections of a text, as (heading, HTML)."""
    for title, tokens in text.sections():
        if wanted is None or title in wanted:
            number = re.match(r"(\d+)\.", title or "0.")
            anchor = f"{prefix}{number[1] if number else slug(title)}"
            html = text.render(tokens, anchor, f"{'measurements' if wanted is None else 'README'}: {title or 'the opening'}")
            yield (0, level if title else 3, anchor, (title or "What was measured").replace("`", "")), f'<div class="row wide article"><div class="words">{html}</div></div>'


def with_bars(html):
    """Numbers of a table's column get a bar in their cell when the whole column is numbers: on one scale for the table, or on
    one for each column where they differ too much."""
    def table(m):
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", m[0], re.S)]
        rows = [row for row in rows if row]
        columns = list(zip(*rows))
        value = lambda cell: float(cell.replace(",", "")) if re.fullmatch(r"[\d,.]+", cell) else None
        top = [max(map(value, c)) if i > 0 and all(value(x) is not None for x in c) else None for i, c in enumerate(columns)]
        scales = [t for t in top if t]
        if scales and max(scales) < 10 * min(scales):
            top = [t and max(scales) for t in top]
        cells = iter((value(x) / top[i] if top[i] else None) for row in rows for i, x in enumerate(row))

        def cell(td):
            share = next(cells)
            return td[0] if share is None else f'<td class="bar" style="--share:{100 * share:.1f}%">'
        return re.sub(r"<td[^>]*>", cell, m[0])
    return re.sub(r"<table>.*?</table>", table, html, flags=re.S)


def build(root, numbers):
    source = Source((root / "train_gpt2.c").read_text())
    beside = derivations(Text(root, "dev/derivations.md", source), source)
    behind = tour(Text(root, "dev/tour.md", source, numbers))
    for name, (function, title, caption) in PICTURES.items():
        if source.kinds.get(function) != "function":
            problems.append(f"dev/book/build.py: the picture \"{name}\" stands behind {function}(), which does not exist")
        behind[function] += f'<figure class="row" id="picture-{name}" data-picture="{name}"><div class="words"><h5>{title}</h5>' \
            f'<p>{caption}</p></div>' \
            '<div class="right"></div></figure>'
    measured = [(h, with_bars(html)) for h, html in article(Text(root, "dev/performance.md", source), "measured-", 4)]
    readme = Text(root, "README.md", source)
    linked = {t.attrGet("href")[1:] for token in readme.tokens for t in token.children or [] if t.type == "link_open"
              and t.attrGet("href").startswith("#")}
    wanted = [t for t, _ in readme.sections() if t in README_SECTIONS or slug(t or "") in linked & {"pad-and-the-causal-mask"}]
    answers = list(article(readme, "", 3, wanted))
    if "questions" not in [h[2] for h, _ in answers]:
        problems.append("README.md: the section Questions is missing")
    for row in re.findall(r"<tr>\s*<td>(.*?)</tr>", "".join(html for h, html in answers if h[2] == "questions"), re.S):
        if 'href="#' not in row.split("</td>", 1)[1]:
            problems.append(f"README.md: the answer to \"{row.split('</td>')[0]}\" leads nowhere on the page")

    body, toc = "", [(2, "book", "Opening")]

    def heading(line, level, anchor, title):
        toc.append((level, anchor, title))
        return f'<h{level} id="{anchor}"><a href="#{anchor}">{escape(title)}</a></h{level}>'

    for item in read_rows(source):
        if len(item) == 4:
            if item[1] == 4 and item[2].startswith("section") and beside.get(None) and toc[-1][2].endswith("Layers"):
                body += row_html(beside.pop(None), css="wide")
            if item[2] == "part-i":
                body += behind.pop(None, "")
            body += heading(*item)
            continue
        start, comment, code = item
        names = [n for n in source.kinds if code and code[0] <= source.line_of[n] <= code[1]]
        left = prose(source, comment) + "".join(beside.pop(n) for n in names if n in beside)
        left += uses_html(source, [n for n in names if source.kinds[n] in ("function", "type")])
        body += row_html(left, code and code_cell(source, *code), "" if code else "wide")
        body += "".join(behind.pop(n) for n in names if n in behind)
    for left_over in [*beside, *behind]:
        problems.append(f"{left_over} is not shown in any row, so the text beside it is lost")
    for h, html in [*measured, ((0, 2, "questions-and-changes", "Questions and changes"), ""), *answers]:
        body += heading(*h) + html
    check_links(body)
    return body, toc, source


def check_links(html):
    ids = re.findall(r' id="([^"]+)"', html)
    for anchor in sorted({i for i in ids if ids.count(i) > 1} if len(ids) != len(set(ids)) else []):
        problems.append(f"the anchor #{anchor} stands twice on the page")
    for anchor in sorted(set(re.findall(r'href="#([^"]*)"', html)) - set(ids) - {"book"}):
        problems.append(f"a link leads to #{anchor}, which is not on the page")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, default=HERE.parent.parent)
    parser.add_argument("--numbers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    numbers = json.loads(options.numbers.read_text())
    body, toc, source = build(options.root, numbers)
    for problem in dict.fromkeys(problems):
        print(f"build.py: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    contents, depth = "", 1
    for level, anchor, title in toc:
        contents += "<ul>" * (level - depth) if level > depth else "</li>" + "</ul></li>" * (depth - level)
        contents += f'<li><a href="#{anchor}">{escape(title)}</a>'
        depth = level
    contents += "</li></ul>" * (depth - 1)
    parts = {"contents": contents, "body": body, "numbers": json.dumps(numbers, separators=(",", ":")).replace("</", "<\\/"),
             "style": (HERE / "book.css").read_text(), "script": (HERE / "book.js").read_text()}
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (HERE / "page.html").read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page)
    print(f"{options.out}: {len(page.encode()) / 1e6:.2f} MB, {len(source.lines)} lines of code, {len(source.functions)} functions")


if __name__ == "__main__":
    main()
