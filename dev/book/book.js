"use strict";
// The page's own behaviour: contents that follow the reader, search, light and dark, and the pictures. Without it the
// page still reads: only pictures are missing.
const numbers = JSON.parse(document.getElementById("ui-numbers").textContent);
const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];

// Makes an element: make("p", {class: "x", onclick: f}, "text", child, ...); names of SVG begin with "svg:".
function make(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
                                          : document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    key.startsWith("on") ? element.addEventListener(key.slice(2), value) : element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// ---- light and dark ----
const darkness = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
try { chosenTheme = localStorage.getItem("theme"); } catch { /* a page from a file may have no storage */ }
function setTheme() { document.documentElement.dataset.theme = chosenTheme || (darkness.matches ? "dark" : "light"); }
darkness.addEventListener("change", setTheme);
setTheme();
$("#ui-theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", chosenTheme); } catch { /* then it lasts as long as the page */ }
  setTheme();
});

// ---- contents ----
const contents = $("#ui-contents");
const entries = $$("a", contents).map(link => ({link, heading: document.getElementById(link.hash.slice(1))}));
let current = null;
function follow() {
  let low = -1, high = entries.length; // the last heading above the reading line; headings are in the page's order
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (entries[middle].heading.getBoundingClientRect().top < innerHeight * 0.3) low = middle; else high = middle;
  }
  const entry = entries[Math.max(low, 0)];
  if (entry === current) return;
  if (current) current.link.removeAttribute("aria-current");
  current = entry;
  current.link.setAttribute("aria-current", "true");
  $$("li.open", contents).forEach(item => item.classList.remove("open"));
  for (let item = current.link.closest("li"); item; item = item.parentElement.closest("li")) item.classList.add("open");
  const box = current.link.getBoundingClientRect(), frame = contents.getBoundingClientRect();
  if (box.top < frame.top + 20 || box.bottom > frame.bottom - 20) contents.scrollTop += box.top - frame.top - frame.height / 3;
}
let waiting = false;
addEventListener("scroll", () => {
  if (!waiting) requestAnimationFrame(() => { waiting = false; follow(); });
  waiting = true;
}, {passive: true});
addEventListener("resize", follow);
function showContents(shown) {
  contents.classList.toggle("shown", shown);
  $("#ui-menu").setAttribute("aria-expanded", shown);
}
$("#ui-menu").addEventListener("click", () => showContents(!contents.classList.contains("shown")));
contents.addEventListener("click", event => event.target.closest("a") && showContents(false));

// A link into a folded part opens it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details:not([open])");
  if (folded) { folded.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => $$("main details").forEach(details => { details.open = true; }));

// ---- search ----
// Names that are defined come first, then headings, then words and lines of code.
const field = $("#ui-search input"), results = $("#ui-search ol");
let places = null;
function collect() {
  const title = element => { const row = element.closest(".row"); let at = row; while (at && !/^H[234]$/.test(at.tagName)) at = at.previousElementSibling;
                             return at ? at.textContent : ""; };
  places = $$(".code b[id]").map(b => ({text: b.id, where: title(b), target: b.id, name: true}));
  entries.forEach(entry => places.push({text: entry.link.textContent, where: "", target: entry.link.hash.slice(1), heading: true}));
  $$(".words p, .words li, .words > pre, td, .right > pre:not(.code), .code > span").forEach(element => {
    if (!element.closest(".uses")) places.push({text: element.textContent.trim(), where: title(element), element});
  });
}
function score(place, query) {
  const text = place.text.toLowerCase(), at = text.indexOf(query);
  if (at < 0) return Infinity;
  return place.name ? (text === query ? 0 : at === 0 ? 1 : 2) : place.heading ? 3 : place.element.closest(".code") ? 5 : 4;
}
function find() {
  const query = field.value.trim().toLowerCase();
  results.replaceChildren();
  results.hidden = query.length < 2;
  if (results.hidden) return;
  if (!places) collect();
  const found = places.map(place => [score(place, query), place]).filter(([rank]) => rank < Infinity).sort((a, b) => a[0] - b[0]);
  for (const [, place] of found.slice(0, 40)) {
    const at = Math.max(0, place.text.toLowerCase().indexOf(query) - 30);
    const link = make("a", {href: place.target ? "#" + place.target : "#"}, (at ? "…" : "") + place.text.slice(at, at + 90),
                      make("small", {}, place.where));
    link.addEventListener("click", event => {
      results.hidden = true;
      if (!place.element) return;
      event.preventDefault();
      place.element.scrollIntoView({block: "center"});
      place.element.animate([{background: "var(--mark)"}, {background: "transparent"}], 2500);
    });
    results.append(make("li", {}, link));
  }
  if (!found.length) results.append(make("p", {}, "Nothing has these letters in this order."));
  const first = $("a", results);
  if (first) first.classList.add("chosen");
}
field.addEventListener("input", find);
field.addEventListener("keydown", event => {
  const links = $$("a", results), at = links.findIndex(link => link.classList.contains("chosen"));
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step && links.length) {
    links[at].classList.remove("chosen");
    const next = links[(at + step + links.length) % links.length];
    next.classList.add("chosen");
    next.scrollIntoView({block: "nearest"});
  } else if (event.key === "Enter" && links[at]) {
    links[at].click();
    field.blur();
  } else if (event.key === "Escape") {
    results.hidden = true;
    field.blur();
  } else return;
  event.preventDefault();
});
addEventListener("keydown", event => {
  if (event.key !== "/" || event.target.matches("input") || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  field.focus();
  field.select();
});
addEventListener("click", event => { if (!event.target.closest("#ui-search")) results.hidden = true; });

// ---- pictures ----
// How wide they may be: all are equal, and asking each after drawing another would lay out the whole page again.
const stage = $("figure .right");
let stageWidth = stage.clientWidth;
const room = () => stageWidth;
// A picture has choices (rows of buttons), a drawing and a line that says what is pointed at. `draw` is called again when
// a choice changes.
function picture(name, choices, draw) {
  const figure = $(`[data-picture="${name}"]`), words = $(".words", figure), right = $(".right", figure);
  const chosen = {}, readout = make("p", {class: "readout", "aria-live": "polite"});
  const redraw = () => right.replaceChildren(...draw(chosen, text => readout.replaceChildren(...[text].flat()), room()));
  for (const [label, options, first = 0] of choices) {
    const row = make("div", {class: "choices", role: "group", "aria-label": label}, make("span", {}, label));
    chosen[label] = options[first][1];
    options.forEach(([text, value], i) => row.append(make("button", {"aria-pressed": i === first, onclick: event => {
      chosen[label] = value;
      $$("button", row).forEach(button => button.setAttribute("aria-pressed", button === event.target));
      redraw();
    }}, text)));
    words.append(row);
  }
  words.append(readout);
  redraw();
  redraws.push(redraw);
}
const redraws = [];
addEventListener("resize", () => {
  if (stageWidth === stage.clientWidth) return;
  stageWidth = stage.clientWidth;
  redraws.forEach(redraw => redraw());
});
// An area that answers to mouse, finger and keyboard.
function hit(shape, attributes, answer) {
  const element = make(shape, {class: "hit", tabindex: 0, role: "img", ...attributes});
  const tell = () => {
    $$(".chosen", element.parentElement).forEach(other => other.classList.remove("chosen"));
    element.classList.add("chosen");
    answer();
  };
  ["pointerenter", "focus", "click"].forEach(event => element.addEventListener(event, tell));
  return element;
}
const bold = text => make("b", {}, text);
const rows = numbers.rows;
const round = (value, digits) => value.toPrecision(digits).replace(/\.?0+$/, "");
const learned = numbers.learning.map((step, i) => [String(step.updates), i]);

picture("rows", [], (chosen, tell) => {
  const cells = {}, lengths = [];
  rows.forEach((row, r) => { (lengths[row.sequence] ||= []).push(r); });
  const longest = Math.max(...lengths.map(list => list.length));
  const token = r => {
    const row = rows[r], element = hit("span", {class: ""}, () => {
      Object.values(cells).flat().forEach(cell => cell.classList.remove("chosen"));
      cells[r].forEach(cell => cell.classList.add("chosen"));
      tell([bold(`row ${r}`), ` reads ${row.reads} at position ${row.position} of sequence ${row.sequence}, sees rows ${row.first} to ${r}, `,
            row.says ? `and should say ${row.says}.` : "and is not scored."]);
    });
    element.textContent = row.reads;
    (cells[r] ||= []).push(element);
    return element;
  };
  const pad = () => {
    const element = hit("span", {class: "pad"}, () => tell([bold("PAD"), " has a row in every layer of a padded batch. Packed, it does not exist."]));
    element.textContent = "PAD";
    return element;
  };
  const strip = make("div", {class: "strip"});
  lengths.forEach((list, s) => strip.append(make("span", {}, `padded, sequence ${s}`), make("div", {class: "tokens"}, ...list.map(token),
                                            ...Array.from({length: longest - list.length}, pad))));
  const packed = rows.map((row, r) => token(r));
  lengths.forEach(list => packed[list[0]].classList.add("first"));
  strip.append(make("span", {}, `packed, rows 0 to ${rows.length - 1}`), make("div", {class: "tokens"}, ...packed));
  tell(`${rows.length} rows packed, ${lengths.length * longest} padded: point at one.`);
  return [strip];
});

picture("attention", [["block", [["0", 0], ["1", 1]]], ["head", [["0", 0], ["1", 1]]], ["updates", learned, learned.length - 1]], (chosen, tell, room) => {
  const probability = numbers.learning[chosen.updates].probability[chosen.block][chosen.head];
  const left = 74, top = 62, n = rows.length, size = Math.max(14, Math.min(24, Math.floor((room - left - 4) / n)));
  const svg = make("svg:svg", {viewBox: `0 0 ${left + n * size + 4} ${top + n * size + 4}`, width: left + n * size + 4});
  rows.forEach((row, r) => {
    svg.append(make("svg:text", {x: left - 8, y: top + (r + 0.5) * size + 4, "text-anchor": "end"}, `${row.reads}  ${r}`),
               make("svg:text", {x: 0, y: 0, transform: `translate(${left + (r + 0.5) * size + 4} ${top - 6}) rotate(-90)`}, row.reads));
    for (let j = 0; j < n; j++) {
      const seen = j >= row.first && j <= r, p = seen ? probability[r][j - row.first] : 0;
      svg.append(make("svg:rect", {class: seen ? "cell" : "masked", x: left + j * size + 1, y: top + r * size + 1, width: size - 2, height: size - 2, rx: 2,
                                   ...(seen ? {"fill-opacity": 0.06 + 0.94 * p ** 0.7} : {})}));
    }
  });
  rows.forEach((row, r) => svg.append(hit("svg:rect", {x: 0, y: top + r * size, width: left + n * size, height: size, "aria-label": `row ${r}`}, () => {
    const seen = probability[r].map((p, j) => `${rows[row.first + j].reads} ${p.toFixed(3)}`).join(", ");
    tell([bold(`row ${r}`), `, ${row.reads}, sees ${r - row.first + 1} of ${n} rows: ${seen}. The other ${n - 1 - r + row.first} are masked: later rows and other sequences.`]);
  })));
  tell("Point at a row: the colour says how much of each earlier row's value it takes. Grey is masked.");
  return [svg];
});

picture("loss", [["updates", learned, 0]], (chosen, tell, room) => {
  const scored = rows.map((row, r) => r).filter(r => rows[r].target >= 0), loss = numbers.learning[chosen.updates].loss;
  const left = 24, end = 62, width = Math.max(14, Math.min(34, (room - left - end) / scored.length)), height = 190, top = 12, most = Math.max(6, ...loss), y = value => top + height * (1 - value / most);
  const svg = make("svg:svg", {viewBox: `0 0 ${left + scored.length * width + end} ${top + height + 48}`, width: left + scored.length * width + end});
  const vocabulary = Math.log(270);
  for (let value = 0; value <= most; value += 2)
    svg.append(make("svg:line", {class: "axis", x1: left, x2: left + scored.length * width, y1: y(value), y2: y(value)}),
               make("svg:text", {class: "soft", x: left - 8, y: y(value) + 4, "text-anchor": "end"}, value));
  scored.forEach((r, i) => {
    const x = left + i * width;
    svg.append(make("svg:rect", {class: "cell", x: x + width / 8, width: width * 0.75, y: y(loss[i]), height: Math.max(1, y(0) - y(loss[i])), rx: 2}),
               make("svg:text", {class: "soft", x: 0, y: 0, transform: `translate(${x + width / 2 + 4} ${y(0) + 8}) rotate(90)`}, rows[r].says));
  });
  svg.append(make("svg:line", {x1: left, x2: left + scored.length * width, y1: y(vocabulary), y2: y(vocabulary), stroke: "var(--derivation)", "stroke-dasharray": "4 3"}),
             make("svg:text", {x: left + scored.length * width + 6, y: y(vocabulary) + 4}, "log(270)"));
  scored.forEach((r, i) => svg.append(hit("svg:rect", {x: left + i * width, y: top, width, height: height + 50, "aria-label": `row ${r}`}, () =>
    tell([bold(`row ${r}`), ` reads ${rows[r].reads}, should say ${rows[r].says}: loss ${loss[i].toFixed(4)}, probability ${Math.exp(-loss[i]).toFixed(4)}.`]))));
  const mean = loss.reduce((a, b) => a + b, 0) / loss.length;
  tell(`After ${numbers.learning[chosen.updates].updates} updates the mean is ${mean.toFixed(4)}. Point at a bar.`);
  return [svg];
});

picture("memory", [["batch", [["4 × 64", 64], ["4 × 1024", 1024]], 1], ["keeps", [["all", 0], ["inputs (--recompute)", 1]]]], (chosen, tell, room) => {
  const choice = numbers.memory.find(m => m.length === chosen.batch && m.recompute === chosen.keeps);
  const fixed = ["weights", "gradients", "first moments", "second moments"].map(name => [name, choice.parameters, 0]);
  const all = [...fixed, ...choice.parts], most = Math.max(...numbers.memory.flatMap(m => [m.parameters, ...m.parts.map(part => part[1])]));
  const total = all.reduce((sum, part) => sum + part[1], 0), height = 26, left = 130, width = Math.max(80, Math.min(480, room - left - 66));
  const svg = make("svg:svg", {viewBox: `0 0 ${left + width + 66} ${all.length * height + 4}`, width: left + width + 66});
  all.forEach(([name, bytes, kept], i) => {
    const length = Math.max(1, width * bytes / most), y = i * height;
    svg.append(make("svg:text", {x: left - 8, y: y + 17, "text-anchor": "end"}, name),
               make("svg:rect", {x: left, y: y + 3, width: length, height: height - 6, rx: 2, class: "cell", "fill-opacity": kept ? 1 : 0.35}),
               make("svg:text", {class: "soft", x: left + length + 6, y: y + 17}, `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`),
               hit("svg:rect", {x: 0, y, width: left + width + 60, height, "aria-label": name}, () =>
                 tell([bold(name), `: ${(bytes / 1e6).toFixed(1)} MB, ${(100 * bytes / total).toFixed(1)} % of ${(total / 1e9).toFixed(2)} GB; `,
                       i < 4 ? "its size is the model's, whatever the batch." : kept ? "kept from forward to backward." : "used again by each block or chunk, not kept."])));
  });
  const kept = choice.parts.filter(part => part[2]).reduce((sum, part) => sum + part[1], 0);
  tell(`${(total / 1e9).toFixed(2)} GB in all, ${(kept / 1e9).toFixed(2)} GB of it kept for the backward pass (full colour). Point at a bar.`);
  return [svg];
});

picture("schedule", [["schedule", ["linear", "cosine", "constant"].map(name => [name, name])], ["warm-up", [0, 20, 40, 60].map(n => [String(n), n]), 1],
                     ["final-lr", [0, 0.1, 0.2].map(x => [String(x), x])]], (chosen, tell, room) => {
  const {factor} = numbers.schedules.find(s => s.schedule === chosen.schedule && s.warmup === chosen["warm-up"] && s.final === chosen["final-lr"]);
  const left = 30, top = 10, width = Math.max(200, Math.min(560, room - left - 20)), height = 200, x = step => left + width * step / (factor.length - 1), y = value => top + height * (1 - value);
  const svg = make("svg:svg", {viewBox: `0 0 ${left + width + 20} ${top + height + 30}`, width: left + width + 20});
  for (const value of [0, 0.5, 1])
    svg.append(make("svg:line", {class: "axis", x1: left, x2: left + width, y1: y(value), y2: y(value)}),
               make("svg:text", {class: "soft", x: left - 6, y: y(value) + 4, "text-anchor": "end"}, value));
  for (let step = 0; step < factor.length; step += 50)
    svg.append(make("svg:text", {class: "soft", x: x(step), y: top + height + 18, "text-anchor": "middle"}, step));
  svg.append(make("svg:path", {class: "curve", d: "M" + factor.map((value, step) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}));
  const dot = make("svg:circle", {class: "dot", r: 5, cx: x(0), cy: y(factor[0])});
  const tellStep = step => {
    dot.setAttribute("cx", x(step));
    dot.setAttribute("cy", y(factor[step]));
    tell([bold(`update ${step}`), ` of ${factor.length}: ${factor[step].toFixed(3)} of the highest rate; with --learning-rate 5e-5 that is ${round(5e-5 * factor[step], 3)}.`]);
  };
  let at = 0;
  const area = make("svg:rect", {class: "hit", x: left, y: 0, width, height: top + height + 20, tabindex: 0, role: "slider", "aria-label": "update", "aria-valuenow": 0});
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect();
    tellStep(at = Math.max(0, Math.min(factor.length - 1, Math.round((event.clientX - box.left) / box.width * (factor.length - 1)))));
  });
  area.addEventListener("keydown", event => {
    const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (move) tellStep(at = Math.max(0, Math.min(factor.length - 1, at + move)));
  });
  svg.append(dot, area);
  tellStep(0);
  return [svg];
});

picture("merges", [["piece", numbers.merges.map((piece, i) => [piece.piece.replaceAll(" ", "_"), i]), 8]], (chosen, tell) => {
  const {steps, ids} = numbers.merges[chosen.piece], holder = make("div", {class: "tokens"}), line = make("div", {class: "choices"});
  let at = 0;
  const joined = step => steps[step].slice(1).findIndex((token, i) => token !== steps[step - 1][i + 1]); // the token that step made
  const show = move => {
    at = Math.max(0, Math.min(steps.length - 1, at + move));
    const tokens = steps[at].slice(1), made = at > 0 ? joined(at) : -1, next = at + 1 < steps.length ? joined(at + 1) : -2;
    holder.replaceChildren(...tokens.map((token, i) => make("span", {class: i === made ? "new" : i === next || i === next + 1 ? "next" : ""}, token)));
    back.disabled = at === 0;
    forth.disabled = at === steps.length - 1;
    const pair = steps[Math.max(0, at - 1)].slice(1);
    tell(at === 0 && steps.length === 1 ? `A single byte, id ${ids[0]}: there is nothing to merge.`
       : at === 0 ? `${tokens.length} bytes, a token each. The pair with the lowest rank (violet) is joined first.`
       : [`Merge of rank ${steps[at][0]}: ${pair[made]} + ${pair[made + 1]} → `, bold(tokens[made]),
          at === steps.length - 1 ? `. No pair is in the vocabulary any more: id${ids.length > 1 ? "s" : ""} ${ids.join(", ")}.` : "."]);
  };
  const back = make("button", {onclick: () => show(-1)}, "← back"), forth = make("button", {onclick: () => show(1), class: "forth"}, "next merge →");
  line.append(back, forth);
  show(0);
  return [holder, line];
});

// The bars in tables of measurements: a row under the pointer is compared with the first one.
$$(".article table").filter(table => $(".bar", table)).forEach(table => {
  const heads = $$("th", table).map(cell => cell.textContent), lines = $$("tbody tr", table), value = cell => parseFloat(cell.textContent.replace(/,/g, ""));
  const readout = make("p", {class: "readout"}, "Point at a row.");
  table.after(readout);
  lines.forEach(line => ["pointerenter", "click"].forEach(event => line.addEventListener(event, () => {
    const compared = [...line.cells].map((cell, i) => cell.classList.contains("bar") && i > 0 &&
      `${heads[i]} ${cell.textContent}, ${round(value(cell) / value(lines[0].cells[i]), 3)} times the first row's`).filter(Boolean);
    readout.replaceChildren(bold(line.cells[0].textContent), ": " + compared.join("; ") + ".");
  })));
});

// Pictures drawn in letters keep their columns and scroll; formulas may wrap.
$$(".words > pre").forEach(pre => {
  const gaps = pre.textContent.split("\n").filter(line => /\S {4,}\S/.test(line)).length;
  if (gaps > (pre.closest(".wide") ? 0 : 2)) pre.classList.add("picture");
});
follow();
unfold();
document.documentElement.dataset.ready = Math.round(performance.now());
