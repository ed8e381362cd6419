"""The looks of the page, and what a hand does to pieces of its own: CSS and JavaScript."""

CORNERS = ((80.0, 0.0), (0.0, 138.0), (160.0, 138.0))
"""Of the triangle, in the units of its drawing."""

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto; }
.small, figcaption, output { font-size: 12px; color: var(--body-text-color); opacity: 0.7; }
figure { margin: 0; }
figcaption { margin-top: 8px; }
#page img { display: block; margin: 0; }
#page img[data-coarse] { image-rendering: pixelated; }
.grid { display: flex; flex-wrap: wrap; gap: 5px; max-height: 120px; overflow-y: auto; }
.grid button { width: 54px; height: 54px; padding: 2px; border-radius: 8px; cursor: pointer;
  border: 2px solid transparent; font-size: 11px; color: var(--neutral-500);
  background: var(--background-fill-secondary); overflow: hidden; }
.grid button[aria-pressed=true] { border-color: var(--color-accent); }
.grid button:focus-visible { outline: 2px solid var(--color-accent); }
.grid img { width: 100%; height: 100%; object-fit: cover; border-radius: 4px; }
#mixer .row, .player .row { display: flex; align-items: center; gap: 10px; margin: 6px 0; }
#mixer .row img { width: 40px; height: 40px; border-radius: 6px; object-fit: cover; }
#mixer input, .player input { flex: 1; min-width: 60px; accent-color: var(--color-accent); }
#mixer output { width: 42px; text-align: right; font-variant-numeric: tabular-nums; }
#mixer svg { width: 200px; max-width: 100%; display: block; margin: 0 auto 10px; cursor: crosshair;
  touch-action: none; user-select: none; }
#mixer polygon { fill: var(--background-fill-secondary); stroke: var(--border-color-primary);
  stroke-width: 1.5; }
#mixer svg img { width: 34px; height: 34px; border-radius: 6px; pointer-events: none; }
#mixer circle { fill: var(--color-accent); stroke: var(--background-fill-primary);
  stroke-width: 2; }
.centroid img, .player .frame { width: 100%; aspect-ratio: 1; border-radius: 10px; }
.player { max-width: 380px; margin: 0 auto; }
.player .film { display: flex; gap: 3px; margin-top: 10px; }
.player .film img { flex: 1; min-width: 0; cursor: pointer; padding-bottom: 3px;
  border-bottom: 3px solid transparent; }
.player .film img.now { border-color: var(--color-accent); }
.player button { min-width: 56px; padding: 3px 10px; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--border-color-primary); }
.tray { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.tray img { width: 54px; height: 54px; border-radius: 6px; }
"""
"""Colours are the theme's, so that it is dark where the system is."""

GRID = """
element.addEventListener('click', e => {
  const button = e.target.closest('button');
  if (button) trigger('pick', {row: +button.dataset.row});
});
"""
"""A click on an image."""

MIXER = """
const corners = CORNERS;
const inputs = () => [...element.querySelectorAll('input')];
const tell = () => {
  const raw = inputs().map(x => +x.value), total = raw.reduce((a, b) => a + b, 0);
  const weights = raw.map(x => total > 0 ? x / total : 1 / raw.length);
  element.querySelectorAll('output').forEach(
    (x, i) => x.textContent = Math.round(100 * weights[i]) + '%');
  const dot = element.querySelector('circle');
  if (dot) ['cx', 'cy'].forEach((name, axis) => dot.setAttribute(
    name, corners.reduce((sum, corner, i) => sum + weights[i] * corner[axis], 0)));
  trigger('mix', {weights});
};
const drag = e => {
  const svg = element.querySelector('svg');
  const at = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const [[ax, ay], [bx, by], [cx, cy]] = corners;
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const a = ((by - cy) * (at.x - cx) + (cx - bx) * (at.y - cy)) / area;
  const b = ((cy - ay) * (at.x - cx) + (ax - cx) * (at.y - cy)) / area;
  const inside = [a, b, 1 - a - b].map(w => Math.max(w, 0));
  const total = inside.reduce((a, b) => a + b, 0);
  inputs().forEach((input, i) => input.value = inside[i] / total);
  tell();
};
let held = false;
element.addEventListener('input', tell);
element.addEventListener('pointerdown', e => {
  if (e.target.closest('svg')) { held = true; e.preventDefault(); drag(e); }
});
window.addEventListener('pointermove', e => { if (held) drag(e); });
window.addEventListener('pointerup', () => { held = false; });
""".replace("CORNERS", str([list(corner) for corner in CORNERS]))
"""Sliders and triangle: either sets the weights, and both show what they come to."""

PLAYER = """
let timer = null;
const film = () => [...element.querySelectorAll('.film img')];
const slider = () => element.querySelector('input');
const show = place => {
  film().forEach((image, i) => image.classList.toggle('now', i === place));
  element.querySelector('.frame').src = film()[place].src;
  element.querySelector('output').textContent = film()[place].dataset.place;
  slider().value = place;
};
const stop = () => {
  clearInterval(timer);
  timer = null;
  element.querySelector('button').textContent = 'Play';
};
const play = () => {
  let step = 1;
  element.querySelector('button').textContent = 'Stop';
  timer = setInterval(() => {
    const at = +slider().value;
    if (at >= film().length - 1) step = -1; else if (at <= 0) step = 1;
    show(at + step);
  }, 140);
};
element.addEventListener('input', e => { stop(); show(+e.target.value); });
element.addEventListener('click', e => {
  if (e.target.closest('button')) { timer ? stop() : play(); }
  else if (e.target.closest('.film img')) { stop(); show(film().indexOf(e.target)); }
});
watch('value', () => { if (film().length) { stop(); show(0); play(); } });
"""
"""A walk, to and fro, or frame by frame."""
