"""Makes the book: one page of HTML from train_gpt2.c and the texts that explain it.

    python3 dev/book/build.py --numbers numbers.json --out index.html [--root DIR]     (`make book` does all of it)

The page is a list of rows, words left and code right. A comment that begins a line of train_gpt2.c is words, all else
is code. Other texts come in where the functions are that they name, so that nothing has to be kept in step by hand:

    dev/derivations.md   a section stands beside the last function that its first sentence names
    dev/tour.md          a passage stands behind the first function that it names; its blocks are printed anew
    dev/performance.md   behind Part V
    README.md            the tables of questions and changes, and the PAD section that they link to

Names that no longer exist, links to nothing, derivations without a layer and layers without one end the build.
"""
import argparse
import json
import re
import sys
from html import escape
from pathlib import Path

from source import Source, problems
from texts import Text, derivations, number_of, row_html, tour

HERE = Path(__file__).parent
README_SECTIONS = ["PAD and the causal mask", "Questions", "Change something"]  # those that are there
# Each picture: the function that it stands behind, its title, what it shows. Its numbers are in numbers.json, its
# drawing in book.js.
PICTURES = {
    "rows": ("batch_add_row", "The same batch, padded and packed",
             "The tour's three sequences as a rectangle with PAD, and as rows one behind the other."),
    "attention": ("attention_forward", "What each head looks at",
                  "A row asks, columns are asked. The tour's model: 2 blocks, 2 heads, before and while it learns one "
                  "batch by heart."),
    "loss": ("cross_entropy", "The loss of each token",
             "While the tour's model learns one batch by heart. Who knows nothing has the loss log(V)."),
    "memory": ("block_at", "What is kept for the backward pass",
               "GPT-2 with 124M parameters in training, one thread: the arrays that the functions above lay out."),
    "schedule": ("schedule_factor", "The learning rate", "What this function returns for a run of 200 updates."),
    "merges": ("merge_piece", "From bytes to tokens, merge by merge",
               "Pieces of a sentence in the tour's small vocabulary; _ is a space."),
}


def code_html(source, first, last):
    numbers = [n for n in range(first, last + 1) if not source.lines[n - 1].startswith("// clang-format o")]
    lines = "".join(f'<span id="L{n}">{source.html[n - 1]}\n</span>' for n in numbers)
    html = f'<pre class="code" style="counter-reset:line {first - 1}">{lines}</pre>'
    table = sum(bool(re.fullmatch(r" *(-?\d+,)+(-?\d+,?)?", source.lines[n - 1])) for n in numbers) > 30
    return f"<details><summary>a table of {len(numbers)} lines</summary>{html}</details>" if table else html


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


def articles(text, prefix, level, told, wanted=None):
    """Whole sections of a text: (heading, HTML)."""
    for title, tokens in text.sections():
        if wanted is None or title in wanted:
            anchor = prefix + number_of(title)
            html = text.render(tokens, anchor, f"{told}: {title or 'the opening'}".replace("`", ""))
            heading = (0, level if title else 3, anchor, (title or "What was measured").replace("`", ""))
            yield heading, row_html(html, css="wide article")


def check_answers(readme):
    html = "".join(html for heading, html in readme if heading[2] == "questions")
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>(.*?)</tr>", html, re.S)
    if not rows:
        problems.append("README.md: the table of questions is missing")
    problems.extend(f'README.md: the answer to "{question}" leads nowhere on the page' for question, answer in rows
                    if 'href="#' not in answer)


def check_links(html):
    ids = re.findall(r' id="([^"]+)"', html)
    if len(ids) != len(set(ids)):
        problems.extend(f"the anchor #{i} stands twice on the page" for i in sorted(set(ids)) if ids.count(i) > 1)
    for anchor in sorted(set(re.findall(r'href="#([^"]*)"', html)) - set(ids) - {"book"}):
        problems.append(f"a link leads to #{anchor}, which is not on the page")


def assemble(root, numbers):
    """The page's body and its contents: a list of (level, anchor, title)."""
    source = Source((root / "train_gpt2.c").read_text())
    beside = derivations(Text(root, "dev/derivations.md", source), source)
    behind = tour(Text(root, "dev/tour.md", source), numbers["blocks"])
    for name, (function, title, caption) in PICTURES.items():
        if source.kinds.get(function) != "function":
            problems.append(f'dev/book/build.py: the picture "{name}" stands behind {function}(), which does not exist')
        behind[function] += f'<figure class="row" id="picture-{name}" data-picture="{name}"><div class="words">' \
                            f'<h5>{title}</h5><p>{caption}</p></div><div class="right"></div></figure>'
    measured = list(articles(Text(root, "dev/performance.md", source), "measured-", 4, "measurements"))
    readme = list(articles(Text(root, "README.md", source), "", 3, "README", README_SECTIONS))
    check_answers(readme)

    body, contents = "", [(2, "book", "Opening")]

    def heading(line, level, anchor, title):
        contents.append((level, anchor, title))
        return f'<h{level} id="{anchor}"><a href="#{anchor}">{escape(title)}</a></h{level}>'

    for item in source.rows():
        if len(item) == 4:
            if item[2] == "part-i":  # the tour's introduction ends the opening
                body += behind.pop(None, "")
            if item[1] == 4 and contents[-1][2].endswith("Layers"):  # that of the derivations stands before the layers
                body += row_html(beside.pop(None, ""), css="wide")
            body += heading(*item)
            continue
        comment, code = item
        names = [n for n in source.kinds if code and code[0] <= source.line_of[n] <= code[1]]
        left = source.prose(comment) + "".join(beside.pop(n) for n in names if n in beside)
        left += uses_html(source, [n for n in names if source.kinds[n] in ("function", "type")])
        body += row_html(left, code and code_html(source, *code), "" if code else "wide")
        body += "".join(behind.pop(n) for n in names if n in behind)
    problems.extend(f"the text for {name or 'the opening'} found no place" for name in [*beside, *behind])
    for item, html in [*measured, ((0, 2, "questions-and-changes", "Questions and changes"), ""), *readme]:
        body += heading(*item) + html
    check_links(body)
    return body, contents


def contents_html(contents):
    html, depth = "", 1
    for level, anchor, title in contents:
        html += "<ul>" * (level - depth) if level > depth else "</li>" + "</ul></li>" * (depth - level)
        html += f'<li><a href="#{anchor}">{escape(title)}</a>'
        depth = level
    return html + "</li></ul>" * (depth - 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, default=HERE.parent.parent)
    parser.add_argument("--numbers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    numbers = json.loads(options.numbers.read_text())
    body, contents = assemble(options.root, numbers)
    for problem in dict.fromkeys(problems):
        print(f"build.py: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    parts = {"contents": contents_html(contents), "body": body,
             "numbers": json.dumps(numbers, separators=(",", ":")).replace("</", "<\\/"),
             "style": (HERE / "book.css").read_text(), "script": (HERE / "book.js").read_text()}
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (HERE / "page.html").read_text())
    options.out.write_text(page)
    print(f"{options.out}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
