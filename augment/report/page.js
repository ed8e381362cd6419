"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const table = document.getElementById("table");
const dialog = document.getElementById("detail");
const KINDS = {
  real: "Real image",
  back: "Sampled back from its latent",
  rule: "Centroid",
  kept: "Synthetic image, kept",
  refused: "Synthetic image, refused",
};
const [FIRST, NEXT] = [40, 240]; // rows at once
const STRIP = 16; // classes with a picture beside the verdict

/** An element with properties or attributes, and children. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** A number as it is read; a dash for none. */
function shown(value, digits) {
  if (value === null || value === undefined) return "–";
  return value.toFixed(digits).replace(/^-/, "−");
}

/** A tile of a class's sprite. */
function view(record, place, alt) {
  const image = el("img", { src: record.sprite, alt, draggable: false, decoding: "async" });
  const box = el("span", { className: "view" }, image);
  box.style.setProperty("--place", place);
  return box;
}

/** The score that came nearest to being too low. */
function leastScore(tile) {
  const left = Object.entries(tile.scores || {}).filter(([, value]) => value !== null);
  left.sort(([a, x], [b, y]) => x - (data.minima[a] ?? 0) - (y - (data.minima[b] ?? 0)));
  return left.length ? shown(left[0][1], 2) : "";
}

function captionOf(tile) {
  if (tile.kind === "back") return tile.psnr === undefined ? "" : `${tile.psnr.toFixed(1)} dB`;
  return tile.scores ? leastScore(tile) : "";
}

function nameOf(record, tile) {
  const what = tile.kind === "rule" ? `${KINDS.rule} by ${tile.rule}` : KINDS[tile.kind];
  const score = tile.scores && leastScore(tile);
  return `${what}, ${record.name}${score ? `, score ${score}` : ""}`;
}

function button(record, place) {
  const tile = record.tiles[place];
  const node = el(
    "button",
    { type: "button", className: `tile ${tile.kind}`, title: nameOf(record, tile), tabIndex: -1 },
    view(record, place, nameOf(record, tile)),
    el("span", { className: "score", "aria-hidden": "true" }, captionOf(tile)),
  );
  node.addEventListener("click", () => open(record, place));
  return node;
}

/** The places of a kind's tiles in the sprite. */
function placesOf(record, kind) {
  return record.tiles.flatMap((tile, place) => (tile.kind === kind ? [place] : []));
}

/** Pictures under a heading, in two rows; undefined leaves a place empty. */
function group(record, title, places) {
  if (!places.length) return [];
  const grid = el("div", { className: "grid" });
  let last = null;
  for (const place of places) {
    const tile = record.tiles[place];
    if (tile && tile.kind === "rule" && tile.rule !== last) {
      grid.classList.add("columns");
      grid.append(el("span", { className: "rule", title: tile.rule }, (last = tile.rule)));
    }
    grid.append(tile ? button(record, place) : el("span"));
  }
  const label = `${title}, ${record.name}`;
  const box = el("div", { className: "group", role: "group", "aria-label": label });
  if (last === null) box.append(el("p", {}, title)); // else the rules are headings
  box.append(grid);
  return [box];
}

/** Real images, each above what is sampled back from its latent; alone if nothing was. */
function pairs(record) {
  const [real, back] = [placesOf(record, "real"), placesOf(record, "back")];
  if (!back.length) return real.slice(0, 2 * data.pairs);
  const of = (id) => real.find((place) => record.tiles[place].id === id);
  return back.flatMap((place) => [of(record.tiles[place].id), place]);
}

/** Fill a class's gallery, once. */
function fill(record) {
  if (record.filled) return;
  record.filled = true;
  const [kept, refused] = [placesOf(record, "kept"), placesOf(record, "refused")];
  const back = placesOf(record, "back").length;
  record.gallery.append(
    ...group(record, back ? "real, and sampled back" : "real", pairs(record)),
    ...group(record, "centroids by rule", placesOf(record, "rule")),
    ...group(record, `synthetic: ${kept.length} of ${record.synthetic} kept`, kept),
    ...group(record, `${refused.length} of ${record.refused} refused`, refused),
  );
  const first = record.gallery.querySelector("button");
  if (first) first.tabIndex = 0;
}

/** Arrow keys go from picture to picture; Tab goes on to the next class. */
function steer(event) {
  const all = [...event.currentTarget.querySelectorAll("button")];
  const here = all.indexOf(document.activeElement);
  const last = all.length - 1;
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last };
  if (["ArrowUp", "ArrowDown"].includes(event.key)) {
    const from = all[here].getBoundingClientRect();
    const same = all.filter((node) => node.getBoundingClientRect().left === from.left);
    to[event.key] = all.indexOf(same[same.indexOf(all[here]) + (event.key === "ArrowUp" ? -1 : 1)]);
  }
  if (!(to[event.key] in all)) return;
  event.preventDefault();
  all[here].tabIndex = -1;
  all[to[event.key]].tabIndex = 0;
  all[to[event.key]].focus();
}

function row(record) {
  const name = el("th", { scope: "row" }, record.name);
  if (record.prompt) name.append(el("small", {}, record.prompt));
  const line = el("tr", {}, name);
  for (const column of data.columns) {
    const cell = el("td", {}, shown(record[column.key], column.digits));
    if (column.beside) cell.append(el("small", {}, `real ${shown(record[column.beside], column.digits)}`));
    if (column.key === "bias" && record.biased) cell.title = "significant";
    if (column.key === "fix/0 bias" && record.biased && record[column.key] >= data.threshold) {
      cell.className = "much";
      cell.title = "so large that images suffer: take a rule with /chm";
    }
    if (column.key === "refused") {
      cell.title = Object.entries(record.why).map(([who, count]) => `${who}: ${count}`).join(", ");
    }
    line.append(cell);
  }
  const body = el("tbody", {}, line);
  if (record.tiles.length) {
    record.gallery = el("div", { className: "gallery" });
    record.gallery.record = record;
    record.gallery.addEventListener("keydown", steer);
    watcher.observe(record.gallery);
    const cell = el("td", { className: "pictures", colSpan: data.columns.length + 1 }, record.gallery);
    body.append(el("tr", {}, cell));
  }
  return body;
}

/** A real image of each of the first classes, above one that was made of them. */
function strip() {
  const kinds = ["kept", "rule", "back"];
  const last = (record, kind) => placesOf(record, kind).at(kind === "rule" ? -1 : 0);
  const made = kinds.find((kind) => data.classes.some((record) => placesOf(record, kind).length));
  const names = { kept: "a synthetic one", rule: "a centroid", back: "one sampled back" };
  for (const record of data.classes.slice(0, STRIP)) {
    const places = [last(record, "real"), made && last(record, made)];
    const views = places.flatMap((place) =>
      place === undefined ? [] : [view(record, place, nameOf(record, record.tiles[place]))]);
    if (views.length) document.getElementById("strip").append(el("div", { title: record.name }, ...views));
  }
  const title = `A real image a class${made ? `, and below it ${names[made]}` : ""}`;
  if (document.querySelector("#strip div")) document.getElementById("strip-title").textContent = title;
}

/* sort and search */

function sortBy(heading, key) {
  const was = heading.getAttribute("aria-sort");
  const first = key === "name" ? "ascending" : "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  const way = was === first ? other : first;
  for (const node of table.tHead.querySelectorAll("th")) node.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", way);
  const sign = way === "ascending" ? 1 : -1;
  const known = (value) => value !== null && value !== undefined;
  const words = new Intl.Collator("en", { numeric: true }).compare;
  data.classes.sort((a, b) => {
    if (key === "name") return sign * words(a.name, b.name);
    if (!known(a[key]) || !known(b[key])) return known(b[key]) - known(a[key]);
    return sign * (a[key] - b[key]) || a.label - b.label;
  });
  search();
}

function search() {
  const words = document.getElementById("search").value.trim().toLowerCase();
  const found = data.classes.filter((record) => record.words.includes(words));
  const [count, all] = [found.length, data.classes.length];
  document.getElementById("count").value = words ? `${count} of ${all} classes` : `${all} classes`;
  show(found);
}

let waiting = []; // records whose rows are still to be put into the table
let call = 0;

/** Put rows into the table: what is seen first now, the others as the browser finds the time. */
function show(records) {
  for (const body of [...table.tBodies]) body.remove();
  waiting = [...records];
  more(FIRST);
}

function more(count) {
  clearTimeout(call);
  table.append(...waiting.splice(0, count).map((record) => (record.body ??= row(record))));
  if (waiting.length) call = setTimeout(more, 30, NEXT);
}

function heading(key, title, hint) {
  const press = el("button", { type: "button", title: hint }, title);
  const node = el("th", { scope: "col" }, press);
  press.addEventListener("click", () => sortBy(node, key));
  return node;
}

/* detail */

let current = null;

function open(record, place) {
  current = { record, place };
  const tile = record.tiles[place];
  const title = tile.kind === "rule" ? `${KINDS.rule} by ${tile.rule}` : KINDS[tile.kind];
  document.getElementById("detail-title").textContent = `${record.name} · ${title}`;
  const facts = el("dl");
  for (const [name, value] of factsOf(record, tile)) {
    facts.append(el("dt", {}, name), el("dd", {}, value));
  }
  const right = el("div", {}, facts);
  if (tile.members) right.append(el("h3", {}, "Inputs and weights"), membersOf(record, tile));
  const body = el("div", { className: "detail" }, view(record, place, nameOf(record, tile)), right);
  document.getElementById("detail-body").replaceChildren(body, ...codeOf(tile));
  document.getElementById("previous").disabled = place === 0;
  document.getElementById("next").disabled = place === record.tiles.length - 1;
  if (!dialog.open) dialog.showModal();
}

function* factsOf(record, tile) {
  if (tile.id !== undefined) yield ["image", tile.id];
  if (tile.psnr !== undefined) yield ["sampled back", `${tile.psnr.toFixed(1)} dB (PSNR)`];
  if (!tile.members) return;
  yield ["rule", tile.rule];
  yield ["random choices", `seed ${tile.seed}, epoch ${tile.epoch}, index ${tile.index}`];
  if (tile.prompt) yield ["prompt", tile.prompt];
  if (tile.context) yield ["context", tile.context];
  if (tile.level) yield ["level", tile.level.toFixed(3)];
  if (tile.guidance) yield ["guidance", String(tile.guidance)];
  const count = tile.members.length + (tile.rest ? tile.rest[0] : 0);
  yield ["effective count", `${tile.mixed.toFixed(1)} of ${count} members`];
  if (tile.noise) yield ["fresh noise", `${(100 * tile.noise).toFixed(0)} %`];
  for (const [name, value] of Object.entries(tile.scores || {})) {
    const least = data.minima[name] ?? null;
    yield [name, `${shown(value, 3)}${least === null ? "" : ` (at least ${least} is kept)`}`];
  }
  if (tile.refined) yield ["refined", `loss ${tile.refined.map((x) => x.toFixed(3)).join(" → ")}`];
}

function membersOf(record, tile) {
  const list = el("ul", { className: "members" });
  const most = Math.max(...tile.members.map(([, weight]) => weight), 1e-9);
  for (const [id, weight] of tile.members) {
    const place = record.tiles.findIndex((other) => other.kind === "real" && other.id === id);
    const picture = place < 0 ? el("span", { className: "view none" }) : view(record, place, "");
    const bar = el("i");
    bar.style.width = `${(100 * weight) / most}%`;
    list.append(
      el("li", {}, picture, el("span", { className: "id" }, id),
        el("span", { className: "weight" }, bar),
        el("span", { className: "value" }, weight.toFixed(3))),
    );
  }
  if (tile.rest) {
    const [count, weight] = tile.rest;
    list.append(el("li", {}, el("span"), `and ${count} more`, el("span"),
      el("span", { className: "value" }, weight.toFixed(3))));
  }
  return list;
}

/** The Python that makes an image again. */
function codeOf(tile) {
  if (!tile.code) return [];
  const copy = el("button", { type: "button", className: "copy" }, "Copy");
  const caption = el("figcaption", {}, "Python that makes it again", copy);
  return [el("figure", { className: "code" }, caption, el("pre", { tabIndex: 0 }, tile.code))];
}

function step(by) {
  const place = current.place + by;
  if (place in current.record.tiles) open(current.record, place);
}

/** Copy the text of a block; where that is not allowed, select it. */
async function copy(press) {
  const text = press.closest("figure").querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
    press.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    press.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (press.textContent = "Copy"), 2000);
}

/* start */

table.tHead.append(
  el("tr", {}, heading("name", "Class", "by name"),
    ...data.columns.map((column) => heading(column.key, column.title, column.hint))),
);
table.tHead.querySelector("th").className = "title";
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      fill(entry.target.record);
    }
  },
  { rootMargin: "800px" },
);
for (const record of data.classes) {
  record.words = `${record.name}\n${record.prompt}`.toLowerCase();
}
document.body.classList.toggle("small", data.side < 64);
strip();
search();
document.getElementById("search").addEventListener("input", search);
const zoom = document.getElementById("zoom");
const resize = () => document.documentElement.style.setProperty("--size", `${zoom.value}px`);
zoom.value = Math.min(Math.max(data.side, 64), 112);
zoom.addEventListener("input", resize);
resize();
document.addEventListener("click", (event) => {
  if (event.target.matches(".copy")) copy(event.target);
  if (event.target === dialog) dialog.close();
});
document.getElementById("close").addEventListener("click", () => dialog.close());
document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
dialog.addEventListener("keydown", (event) => {
  if (event.target.matches("pre")) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
addEventListener("beforeprint", () => {
  more(Infinity);
  for (const body of table.tBodies) {
    const gallery = body.querySelector(".gallery");
    if (gallery) fill(gallery.record);
  }
});
