"""train_gpt2.c as the book sees it: what it defines, where that is used, its headings, its words and code as HTML."""
import re
from collections import defaultdict
from html import escape

from pygments.lexers import CLexer
from pygments.token import Comment, Keyword, Literal

problems = []  # what ends the build, in one line each
CODE_CLASSES = [(Comment.Preproc, "p"), (Comment, "c"), (Keyword.Type, "t"), (Keyword, "k"), (Literal.Number, "n"),
                (Literal, "s")]
# What is set apart in plain words: `code`, --option or a->b, section 5, Part V, name or name(), and HTML's signs.
INLINE = re.compile(r"`([^`\n]+)`|(?<![\w-])(--[a-z][a-z-]+|\w+->\w+)|\b([Ss]ection) (\d+)(?!\.?\d)|\bPart ([IVX]+)\b"
                    r"|([A-Za-z_]\w*)(\(\))?|[&<>]")


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Source:
    def __init__(self, text):
        self.text, self.lines, self.words = text, text.split("\n"), set(re.findall(r"\w+", text))
        self.kinds, self.line_of = {}, {}  # of each name that is defined: function, type, constant, ...; its line
        self.functions = []  # (first line, last line, name)
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
            m = re.fullmatch(r"// (?:PART ([IVX]+)|(\d+))\. (.+)", line)
            smaller = re.fullmatch(r"// ---- (.+) ----", line)
            if m and re.fullmatch(r"// [=#]{20,}", self.lines[i - 1]):
                section = f"part-{m[1].lower()}" if m[1] else f"section-{m[2]}"
                yield i + 1, 2 if m[1] else 3, section, f"{m[1] or m[2]}. {m[3]}"
            elif smaller:
                yield i + 1, 4 if section else 3, f"{section or 'opening'}-{slug(smaller[1])}", smaller[1]

    def section_of(self, name):
        """The number of the section that defines this."""
        before = [anchor for line, level, anchor, _ in self.headings if level == 3 and line < self.line_of[name]]
        return before[-1].split("-")[1] if before else None

    def highlight(self):
        """Each line of the file as HTML."""
        out, at, before = [], 0, ""
        for kind, value in CLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            css = next((css for token, css in CODE_CLASSES if kind in token), "")
            if css == "c":
                html = self.inline(value, in_code=True)
            elif css == "s":
                html = escape(value, quote=False)
            else:
                html = re.sub(r"[A-Za-z_]\w*|[&<>]", lambda m: self.name(m, value, at, before), value)
            out += "\n".join(f'<i class="{css}">{p}</i>' if css and p.strip() else p for p in html.split("\n"))
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
        place = next((f for first, last, f in self.functions if first <= line <= last), f"line {line}")
        self.uses[name].setdefault(place, line)
        return f'<a href="#{name}">{name}</a>'

    def inline(self, text, in_code=False):
        """Plain words as HTML. A comment within code keeps its letters as they are."""
        def replace(m):
            code, option, section, number, part, name, call = m.groups()
            if code or option:
                link = f'<a href="#{code}">{code}</a>' if code in self.kinds else escape(code or option)
                return f"<code>{link}</code>" if not in_code else f"`{link}`" if code else link
            if section or part:
                return f'<a href="#{"section-" + number if section else "part-" + part.lower()}">{m[0]}</a>'
            kind = self.kinds.get(name)
            is_type = kind == "type" and name[0].isupper() and re.search(r"[a-z,;:] $", text[:m.start()])
            if kind and (call or "_" in name or is_type):
                return f'<a href="#{name}">{m[0]}</a>'
            if call and not kind and "_" in name and not name.startswith("X_"):  # X_free() stands for any
                problems.append(f"train_gpt2.c: a comment names {name}(), which does not exist")
            return escape(m[0], quote=False)
        return INLINE.sub(replace, text)

    def prose(self, lines):
        """The lines of a comment as HTML: paragraphs, lists, and line by line what is indented or has gaps."""
        groups, kind = [], None
        for line in lines:
            item = re.match(r"(- |\d+\. )(.*)", line)
            before, kind = kind, None
            if item:
                kind = "ul" if item[1] == "- " else "ol"
            elif before in ("ul", "ol") and line.startswith("  "):
                kind = before
            elif line.strip():
                kind = "pre" if line.startswith("  ") or re.search(r"\S {3,}\S", line) else "p"
            if kind and (kind != before or item):
                groups.append((kind, []))
            if kind:
                groups[-1][1].append(item[2] if item else line if kind == "pre" else line.strip())
        html = ""
        for kind, content in groups:
            if kind == "pre":  # pieces between gaps stay whole where a line must be broken
                indent = min(len(line) - len(line.lstrip()) for line in content)
                pieces = [re.sub(r"\S+(?: {1,2}\S+)*", lambda m: f"<u>{self.inline(m[0])}</u>", line[indent:])
                          for line in content]
                html += "<pre>" + "".join(f"<span>{line}\n</span>" for line in pieces) + "</pre>"
            else:
                text = self.inline("\n".join(content))
                html += f"<p>{text}</p>" if kind == "p" else f"<{kind}><li>{text}</li></{kind}>"
        return html.replace("</li></ul><ul>", "</li>").replace("</li></ol><ol>", "</li>")

    def rows(self):
        """Cuts the file into rows: (words, first and last line of code or None), one for each comment that begins a
        line and the code below it, and one for each further definition. Headings come between: (line, level, anchor,
        title)."""
        headings = {heading[0]: heading for heading in self.headings}
        comment, code = [], []

        def row():
            while code and not self.lines[code[-1] - 1].strip():
                code.pop()
            if len(comment) >= 12 and code and len(comment) > 1.5 * (code[-1] - code[0] + 1):
                yield list(comment), None  # much to say of little code: the words take the whole width
                comment.clear()
            if comment or code:
                yield list(comment), (code[0], code[-1]) if code else None
            comment.clear(), code.clear()

        for number, line in enumerate(self.lines, 1):
            if re.match(r"// clang-format o|// [=#]{20,}$", line):
                continue
            if number in headings:
                yield from row()
                yield headings[number]
            elif line.startswith("//"):
                if code:
                    yield from row()
                comment.append(line[3:])
            elif line.strip() or code:
                if code and line[:1].isalpha() and not self.lines[number - 2].strip():
                    yield from row()
                code.append(number)
            else:  # a comment with nothing directly below it stands alone
                yield from row()
        yield from row()
