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
    if (entries[middle].heading.getBoundingClientRect().top < innerHeight * 0.3) low = middle;
    else high = middle;
  }
  const entry = entries[Math.max(low, 0)];
  if (entry === current) return;
  if (current) current.link.removeAttribute("aria-current");
  current = entry;
  current.link.setAttribute("aria-current", "true");
  $$("li.open", contents).forEach(item => item.classList.remove("open"));
  for (let item = current.link.closest("li"); item; item = item.parentElement.closest("li"))
    item.classList.add("open");
  const box = current.link.getBoundingClientRect(), frame = contents.getBoundingClientRect();
  if (box.top < frame.top + 20 || box.bottom > frame.bottom - 20)
    contents.scrollTop += box.top - frame.top - frame.height / 3;
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
  const titles = new Map(), spots = ".words p, .words li, .words > pre, td, .right > pre:not(.code), .code > span";
  let title = "";
  for (const child of $("main").children) {
    if (/^H[234]$/.test(child.tagName)) title = child.textContent;
    titles.set(child, title);
  }
  const where = element => titles.get(element.closest("main > *"));
  places = $$(".code b[id]").map(b => ({text: b.id, where: where(b), target: b.id, name: true}));
  for (const {link} of entries) places.push({text: link.textContent, where: "", target: link.hash.slice(1)});
  for (const element of $$(spots))
    if (!element.closest(".uses")) places.push({text: element.textContent.trim(), where: where(element), element});
}
function score(place, query) {
  const text = place.text.toLowerCase(), at = text.indexOf(query);
  if (at < 0) return Infinity;
  if (place.name) return text === query ? 0 : at === 0 ? 1 : 2;
  return place.target ? 3 : place.element.closest(".code") ? 5 : 4;
}
function find() {
  const query = field.value.trim().toLowerCase();
  results.replaceChildren();
  results.hidden = query.length < 2;
  if (results.hidden) return;
  if (!places) collect();
  const found = places.map(place => [score(place, query), place]).filter(([rank]) => rank < Infinity);
  found.sort((a, b) => a[0] - b[0]);
  for (const [, place] of found.slice(0, 40)) {
    const at = Math.max(0, place.text.toLowerCase().indexOf(query) - 30);
    const shown = (at ? "…" : "") + place.text.slice(at, at + 90);
    const link = make("a", {href: "#" + (place.target || "")}, shown, make("small", {}, place.where));
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
const stage = $("figure .right"), redraws = [];
let room = stage.clientWidth;
addEventListener("resize", () => {
  if (room === stage.clientWidth) return;
  room = stage.clientWidth;
  redraws.forEach(redraw => redraw());
});

// A picture has choices (rows of buttons: label, [[text, value], ...], which one at first), a drawing and a line that
// says what is pointed at. draw(chosen, tell) returns the drawing; it is called again when a choice changes.
function picture(name, choices, draw) {
  const figure = $(`[data-picture="${name}"]`), words = $(".words", figure), right = $(".right", figure);
  const chosen = {}, readout = make("p", {class: "readout", "aria-live": "polite"});
  const tell = (...parts) => readout.replaceChildren(...parts);
  const redraw = () => right.replaceChildren(...draw(chosen, tell));
  for (const [label, options, first = 0] of choices) {
    const row = make("div", {class: "choices", role: "group", "aria-label": label}, make("span", {}, label));
    chosen[label] = options[first][1];
    options.forEach(([text, value], i) => {
      const choose = event => {
        chosen[label] = value;
        $$("button", row).forEach(button => button.setAttribute("aria-pressed", button === event.target));
        redraw();
      };
      row.append(make("button", {"aria-pressed": i === first, onclick: choose}, text));
    });
    words.append(row);
  }
  words.append(readout);
  redraw();
  redraws.push(redraw);
}

const svg = (width, height, ...children) =>
  make("svg:svg", {viewBox: `0 0 ${width} ${height}`, width}, ...children);
const rect = (x, y, width, height, attributes) => make("svg:rect", {x, y, width, height, rx: 2, ...attributes});
const line = (x1, x2, y, attributes = {class: "axis"}) => make("svg:line", {x1, x2, y1: y, y2: y, ...attributes});
// Text that ends at x (anchor "end"), begins there, or is turned by an angle around its beginning.
const text = (x, y, content, anchor = "start", angle = 0, css = "") =>
  make("svg:text", {transform: `translate(${x} ${y}) rotate(${angle})`, "text-anchor": anchor, class: css}, content);
const bold = content => make("b", {}, content);
const round = (value, digits) => value.toPrecision(digits).replace(/\.?0+$/, "");
const sum = values => values.reduce((a, b) => a + b, 0);
const between = (low, x, high) => Math.max(low, Math.min(x, high));

// Makes an element answer to mouse, finger and keyboard.
function answering(element, answer) {
  element.classList.add("hit");
  element.setAttribute("tabindex", 0);
  const choose = () => {
    $$(".chosen", element.parentElement).forEach(other => other.classList.remove("chosen"));
    element.classList.add("chosen");
    answer();
  };
  ["pointerenter", "focus", "click"].forEach(event => element.addEventListener(event, choose));
  return element;
}

const rows = numbers.rows, learning = numbers.learning;
const updates = learning.map((step, i) => [String(step.updates), i]);

picture("rows", [], (chosen, tell) => {
  const cells = rows.map(() => []), sequences = [];
  rows.forEach((row, r) => { (sequences[row.sequence] ||= []).push(r); });
  const longest = Math.max(...sequences.map(list => list.length));
  const token = r => {
    const row = rows[r], cell = make("span", {}, row.reads);
    cells[r].push(answering(cell, () => {
      cells.flat().forEach(other => other.classList.remove("chosen"));
      cells[r].forEach(same => same.classList.add("chosen"));
      tell(bold(`row ${r}`), ` reads ${row.reads} at position ${row.position} of sequence ${row.sequence}, sees rows ` +
           `${row.first} to ${r}, ` + (row.says ? `and should say ${row.says}.` : "and is not scored."));
    }));
    return cell;
  };
  const pad = () => answering(make("span", {class: "pad"}, "PAD"), () =>
    tell(bold("PAD"), " has a row in every layer of a padded batch. Packed, it does not exist."));
  const strip = make("div", {class: "strip"});
  sequences.forEach((list, s) => {
    const filler = Array.from({length: longest - list.length}, pad);
    strip.append(make("span", {}, `padded, sequence ${s}`),
                 make("div", {class: "tokens"}, ...list.map(token), ...filler));
  });
  const packed = rows.map((row, r) => token(r));
  sequences.forEach(list => packed[list[0]].classList.add("first"));
  strip.append(make("span", {}, `packed, rows 0 to ${rows.length - 1}`), make("div", {class: "tokens"}, ...packed));
  tell(`${rows.length} rows packed, ${sequences.length * longest} padded: point at one.`);
  return [strip];
});

picture("attention", [["block", [["0", 0], ["1", 1]]], ["head", [["0", 0], ["1", 1]]],
                      ["updates", updates, updates.length - 1]], (chosen, tell) => {
  const probability = learning[chosen.updates].probability[chosen.block][chosen.head];
  const left = 74, top = 62, n = rows.length, size = between(14, Math.floor((room - left - 4) / n), 24);
  const shapes = [], areas = [];
  rows.forEach((row, r) => {
    const middle = (r + 0.5) * size + 4, y = top + r * size;
    shapes.push(text(left - 8, top + middle, `${row.reads}  ${r}`, "end"),
                text(left + middle, top - 6, row.reads, "start", -90));
    rows.forEach((asked, j) => {
      const seen = j >= row.first && j <= r, shade = seen ? 0.06 + 0.94 * probability[r][j - row.first] ** 0.7 : 1;
      shapes.push(rect(left + j * size + 1, y + 1, size - 2, size - 2,
                       {class: seen ? "cell" : "masked", "fill-opacity": shade}));
    });
    areas.push(answering(rect(0, y, left + n * size, size, {"aria-label": `row ${r}`}), () => {
      const seen = probability[r].map((p, j) => `${rows[row.first + j].reads} ${p.toFixed(3)}`);
      tell(bold(`row ${r}`), `, ${row.reads}, sees ${seen.length} of ${n} rows: ${seen.join(", ")}. The other ` +
           `${n - seen.length} are masked: later rows and other sequences.`);
    }));
  });
  tell("Point at a row: the colour says how much of each earlier row's value it takes. Grey is masked.");
  return [svg(left + n * size + 4, top + n * size + 4, ...shapes, ...areas)];
});

picture("loss", [["updates", updates]], (chosen, tell) => {
  const scored = rows.map((row, r) => r).filter(r => rows[r].target >= 0), loss = learning[chosen.updates].loss;
  const left = 24, end = 62, top = 12, height = 190, width = between(14, (room - left - end) / scored.length, 34);
  const right = left + scored.length * width, most = Math.max(6, ...loss), vocabulary = Math.log(270);
  const y = value => top + height * (1 - value / most), shapes = [], areas = [];
  for (let value = 0; value <= most; value += 2)
    shapes.push(line(left, right, y(value)), text(left - 8, y(value) + 4, value, "end", 0, "soft"));
  scored.forEach((r, i) => {
    const x = left + i * width;
    shapes.push(rect(x + width / 8, y(loss[i]), width * 0.75, Math.max(1, y(0) - y(loss[i])), {class: "cell"}),
                text(x + width / 2 - 4, y(0) + 8, rows[r].says, "start", 90, "soft"));
    areas.push(answering(rect(x, top, width, height + 42, {"aria-label": `row ${r}`}), () =>
      tell(bold(`row ${r}`), ` reads ${rows[r].reads}, should say ${rows[r].says}: loss ${loss[i].toFixed(4)}, ` +
           `probability ${Math.exp(-loss[i]).toFixed(4)}.`)));
  });
  shapes.push(line(left, right, y(vocabulary), {stroke: "var(--derivation)", "stroke-dasharray": "4 3"}),
              text(right + 6, y(vocabulary) + 4, "log(270)"));
  const mean = (sum(loss) / loss.length).toFixed(4);
  tell(`After ${learning[chosen.updates].updates} updates the mean is ${mean}. Point at a bar.`);
  return [svg(right + end, top + height + 48, ...shapes, ...areas)];
});

picture("memory", [["batch", [["4 × 64", 64], ["4 × 1024", 1024]], 1],
                   ["keeps", [["all", 0], ["inputs (--recompute)", 1]]]], (chosen, tell) => {
  const choice = numbers.memory.find(m => m.length === chosen.batch && m.recompute === chosen.keeps);
  const fixed = ["weights", "gradients", "first moments", "second moments"].map(name => [name, choice.parameters, 0]);
  const parts = [...fixed, ...choice.parts], total = sum(parts.map(part => part[1]));
  const most = Math.max(...numbers.memory.flatMap(m => [m.parameters, ...m.parts.map(part => part[1])]));
  const height = 26, left = 130, width = between(80, room - left - 66, 480), shapes = [], areas = [];
  parts.forEach(([name, bytes, kept], i) => {
    const length = Math.max(1, width * bytes / most), y = i * height, megabytes = bytes / 1e6;
    const kind = i < 4 ? "its size is the model's, whatever the batch." :
      kept ? "kept from forward to backward." : "used again by each block or chunk, not kept.";
    shapes.push(text(left - 8, y + 17, name, "end"),
                rect(left, y + 3, length, height - 6, {class: "cell", "fill-opacity": kept ? 1 : 0.35}),
                text(left + length + 6, y + 17, `${megabytes.toFixed(megabytes < 10 ? 1 : 0)} MB`, "start", 0, "soft"));
    areas.push(answering(rect(0, y, left + width + 60, height, {"aria-label": name}), () =>
      tell(bold(name), `: ${megabytes.toFixed(1)} MB, ${(100 * bytes / total).toFixed(1)} % of ` +
           `${(total / 1e9).toFixed(2)} GB; ${kind}`)));
  });
  const kept = sum(choice.parts.filter(part => part[2]).map(part => part[1]));
  tell(`${(total / 1e9).toFixed(2)} GB in all, ${(kept / 1e9).toFixed(2)} GB of it kept for the backward pass ` +
       "(full colour). Point at a bar.");
  return [svg(left + width + 66, parts.length * height + 4, ...shapes, ...areas)];
});

const same = values => values.map(value => [String(value), value]);
picture("schedule", [["schedule", same(["linear", "cosine", "constant"])], ["warm-up", same([0, 20, 40, 60]), 1],
                     ["final-lr", same([0, 0.1, 0.2])]], (chosen, tell) => {
  const {factor} = numbers.schedules.find(s => s.schedule === chosen.schedule && s.warmup === chosen["warm-up"] &&
                                               s.final === chosen["final-lr"]);
  const left = 30, top = 10, height = 200, width = between(200, room - left - 20, 560), last = factor.length - 1;
  const x = step => left + width * step / last, y = value => top + height * (1 - value), shapes = [];
  for (const value of [0, 0.5, 1])
    shapes.push(line(left, left + width, y(value)), text(left - 6, y(value) + 4, value, "end", 0, "soft"));
  for (let step = 0; step <= last; step += 50)
    shapes.push(text(x(step), top + height + 18, step, "middle", 0, "soft"));
  const points = factor.map((value, step) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
  const dot = make("svg:circle", {class: "dot", r: 5});
  const area = rect(left, 0, width, top + height + 20,
                    {class: "hit", tabindex: 0, role: "slider", "aria-label": "update", "aria-valuemax": last});
  let at = 0;
  const go = step => {
    at = between(0, step, last);
    dot.setAttribute("cx", x(at));
    dot.setAttribute("cy", y(factor[at]));
    area.setAttribute("aria-valuenow", at);
    tell(bold(`update ${at}`), ` of ${last + 1}: ${factor[at].toFixed(3)} of the highest rate. When that is 5e-5, it ` +
         `is ${round(5e-5 * factor[at], 3)}.`);
  };
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect();
    go(Math.round((event.clientX - box.left) / box.width * last));
  });
  area.addEventListener("keydown", event => {
    const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (move) { go(at + move); event.preventDefault(); }
  });
  go(0);
  return [svg(left + width + 20, top + height + 30, ...shapes,
              make("svg:path", {class: "curve", d: "M" + points.join("L")}), dot, area)];
});

const pieces = numbers.merges.map((piece, i) => [piece.piece.replaceAll(" ", "_"), i]);
picture("merges", [["piece", pieces, pieces.length - 2]], (chosen, tell) => {
  const {steps, ids} = numbers.merges[chosen.piece], tokens = steps.map(step => step.slice(1));  // first comes the rank
  const joined = at => tokens[at].findIndex((token, i) => token !== tokens[at - 1][i]);  // which token this step made
  const holder = make("div", {class: "tokens"});
  let at = 0;
  const back = make("button", {onclick: () => go(at - 1)}, "← back");
  const forth = make("button", {onclick: () => go(at + 1), class: "forth"}, "next merge →");
  const go = step => {
    at = between(0, step, steps.length - 1);
    const first = at === 0, final = at === steps.length - 1;
    const made = first ? -1 : joined(at), next = final ? -2 : joined(at + 1);
    holder.replaceChildren(...tokens[at].map((token, i) =>
      make("span", {class: i === made ? "new" : i === next || i === next + 1 ? "next" : ""}, token)));
    back.disabled = first;
    forth.disabled = final;
    if (first && final) return tell(`A single byte, id ${ids[0]}: there is nothing to merge.`);
    if (first) return tell(`${tokens[0].length} bytes, a token each. The violet pair has the lowest rank.`);
    const [left, right] = tokens[at - 1].slice(made);
    const end = `. No pair is in the vocabulary any more: id${ids.length > 1 ? "s" : ""} ${ids.join(", ")}.`;
    tell(`Merge of rank ${steps[at][0]}: ${left} + ${right} → `, bold(tokens[at][made]), final ? end : ".");
  };
  go(0);
  return [holder, make("div", {class: "choices"}, back, forth)];
});

// In tables of measurements, numbers get bars: on one scale for the table, or one for each column where they differ too
// much. The row under the pointer is compared with the first one.
const value = cell => /^[\d,.]+$/.test(cell.textContent) ? parseFloat(cell.textContent.replace(/,/g, "")) : NaN;
$$(".article table").forEach(table => {
  const heads = $$("th", table).map(cell => cell.textContent), lines = $$("tbody tr", table);
  const top = heads.map((head, i) => i > 0 ? Math.max(...lines.map(line => value(line.cells[i]))) : NaN);
  const scales = top.filter(Number.isFinite), most = Math.max(...scales), one = most < 10 * Math.min(...scales);
  if (!scales.length) return;
  const readout = make("p", {class: "readout"}, "Point at a row.");
  table.after(readout);
  for (const line of lines) {
    [...line.cells].forEach((cell, i) => {
      if (!Number.isFinite(top[i])) return;
      cell.classList.add("bar");
      cell.style.setProperty("--share", `${100 * value(cell) / (one ? most : top[i])}%`);
    });
    const compare = () => readout.replaceChildren(bold(line.cells[0].textContent), ": " + $$(".bar", line).map(cell => {
      const times = round(value(cell) / value(lines[0].cells[cell.cellIndex]), 3);
      return `${heads[cell.cellIndex]} ${cell.textContent}, ${times} times the first row's`;
    }).join("; ") + ".");
    ["pointerenter", "click"].forEach(event => line.addEventListener(event, compare));
  }
});

// Pictures drawn in letters keep their columns and scroll; formulas may wrap.
$$(".words > pre").forEach(pre => {
  const gaps = pre.textContent.split("\n").filter(line => /\S {4,}\S/.test(line)).length;
  if (gaps > (pre.closest(".wide") ? 0 : 2)) pre.classList.add("picture");
});
follow();
unfold();
document.documentElement.dataset.ready = Math.round(performance.now());
