"""The texts in Markdown that the book joins to the source. Formulas become MathML, names links; names are checked."""
import re
from collections import defaultdict
from html import escape

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from source import problems, slug

INSIDE = {"train_gpt2.c": "book", "derivations.md": "derivation-0", "tour.md": "tour-0", "performance.md": "measured-0"}


def math(tex, display):
    """A formula as MathML. Sums in displayed formulas have their limits below and above."""
    html = re.sub(r' xmlns="[^"]*"', "", convert(tex.strip(), display=display))
    return re.sub(r"<(/?)msub(sup)?>(?=<mo>&#x02211;)", r"<\1munder\2>", html) if display == "block" else html


def row_html(left, right="", css=""):
    right = f'<div class="right">{right}</div>' if right else ""
    return f'<div class="row {css}"><div class="words">{left}</div>{right}</div>'


def number_of(title):
    """"4. Layernorm" -> "4"; a title without a number gives its slug, and no title 0."""
    m = re.match(r"(\d+)\.", title or "0.")
    return m[1] if m else slug(title)


class Text:
    def __init__(self, root, path, source):
        self.path, self.source, self.here = path, source, None
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
        """As HTML; names remember that they are told of at this anchor."""
        self.here = (anchor, title)
        return self.md.renderer.render(tokens, self.md.options, {})

    # Rules of the renderer, by the type of token.

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
        html = escape(tokens[i].content, quote=False)
        html = re.sub(r"\b([Ss]ection) (\d+)", rf'<a href="#{prefix}\2">\1 \2</a>', html)
        if i > 2 and tokens[i - 1].type == "link_close" and html.startswith(", part "):  # "derivations, part 2"
            target = self.target(tokens[i - 3].attrGet("href")).removesuffix("0")
            html = re.sub(r"part (\d+)", rf'<a href="{target}\1">part \1</a>', html, count=1)
        return html

    def target(self, href):
        """Where on the page a link of this text leads; "#" when it leads to another file."""
        path, _, anchor = href.partition("#")
        if re.fullmatch(r"L\d+(-L\d+)?", anchor):  # a line of the source: the first of code from there on
            line = int(re.findall(r"\d+", anchor)[0])
            rest = self.source.lines[line - 1:]
            anchor = f"L{line + next((i for i, text in enumerate(rest) if text and not text.startswith('//')), 0)}"
        return href if re.match(r"https?:", href) else "#" + (anchor or INSIDE.get(path.split("/")[-1], ""))

    def link_open(self, tokens, i, options, env):
        href, target = tokens[i].attrGet("href"), self.target(tokens[i].attrGet("href"))
        return f'<a href="{target}">' if target != "#" else f'<a class="file" title="{href}">'

    def html_block(self, tokens, i, options, env):
        return ""


def derivations(text, source):
    """{function: HTML to stand beside it}; the introduction is under None."""
    beside = defaultdict(str)
    for title, tokens in text.sections():
        names = text.names(tokens, sentence=True) if title else [None]
        if not names:
            problems.append(f'{text.path}: the first sentence of "{title}" names no function of train_gpt2.c')
            continue
        anchor, label = f"derivation-{number_of(title)}", f"Derivation {title}" if title else "The derivations"
        html = text.render(tokens, anchor, f"derivation {number_of(title)}".replace("-", " "))
        beside[names[-1]] += f'<section class="derivation" id="{anchor}"><h5>{label}</h5>{html}</section>'
    named = set(text.names(text.tokens))
    problems.extend(f"{text.path}: {name} has no derivation" for _, _, name in source.functions
                    if "_backward" in name and name not in named)
    layers = next((h[2] + "-" for h in source.headings if h[1] == 3 and h[3].endswith("Layers")), None)
    if not layers:
        problems.append("train_gpt2.c: there is no section Layers, whose layers need derivations")
    for heading in [h for h in source.headings if layers and h[2].startswith(layers)]:
        end = next((h[0] for h in source.headings if h[0] > heading[0]), len(source.lines))
        if not any(heading[0] < source.line_of[name] < end for name in beside if name):
            problems.append(f"{text.path}: the layer {heading[3]} has no derivation")
    return beside


def tour(text, blocks):
    """{function: HTML of rows to stand behind it}; the introduction is under None. A passage ends where a paragraph
    that introduces the next block names a function. `blocks` is what the program prints now."""
    behind = defaultdict(str)
    for title, tokens in text.sections():
        anchor, place, left, block = f"tour-{number_of(title)}", None, "", None
        if not title:
            html = text.render(tokens, anchor, "the tour")
            behind[None] = row_html(f'<h5 id="{anchor}">The tour</h5>{html}', css="tour wide")
            continue
        label = f'<h5 id="{anchor}">The tour: {title}</h5>'
        items = [tokens[i:i + 3] if t.type == "paragraph_open" else [t] for i, t in enumerate(tokens)
                 if t.type in ("paragraph_open", "html_block", "fence")]
        for item, following in zip(items, items[1:] + [None]):
            if item[0].type == "html_block":
                block = re.search(r"<!-- (\w+)", item[0].content)[1]
                continue
            if item[0].type == "fence":
                if block not in blocks:
                    problems.append(f"{text.path}: the tour prints no block {block}")
                printed = escape(blocks.get(block, ""), quote=False)
                behind[place] += row_html(label + left, f"<pre>{printed}</pre>", "tour")
                label, left = "", ""
                continue
            names = text.names(item)
            if names and (place is None or (not label and following and following[0].type == "html_block")):
                behind[place] += row_html(left, css="tour wide") if left else ""
                label = label or f"<h5>The tour, from {title}</h5>"
                place, left = names[0], ""
            left += text.render(item, anchor, f"tour {number_of(title)}")
        if place is None:
            problems.append(f'{text.path}: "{title}" names no function of train_gpt2.c')
        behind[place] += row_html(label + left, css="tour wide") if left else ""
    return behind
