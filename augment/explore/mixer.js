// Sliders and triangle: either sets the weights, and both show them.
const corners = () => [...element.querySelector("polygon").points].map(p => [p.x, p.y]);
const inputs = () => [...element.querySelectorAll('input')];
const update = () => {
  const raw = inputs().map(x => +x.value), total = raw.reduce((a, b) => a + b, 0);
  const weights = raw.map(x => total > 0 ? x / total : 1 / raw.length);
  element.querySelectorAll('output').forEach(
    (x, i) => x.textContent = Math.round(100 * weights[i]) + '%');
  const dot = element.querySelector('circle');
  if (dot) ['cx', 'cy'].forEach((name, axis) => dot.setAttribute(
    name, corners().reduce((sum, corner, i) => sum + weights[i] * corner[axis], 0)));
  trigger('mix', {weights});
};
const drag = e => {
  const svg = element.querySelector('svg');
  const at = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const [[ax, ay], [bx, by], [cx, cy]] = corners();
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const a = ((by - cy) * (at.x - cx) + (cx - bx) * (at.y - cy)) / area;
  const b = ((cy - ay) * (at.x - cx) + (ax - cx) * (at.y - cy)) / area;
  const inside = [a, b, 1 - a - b].map(w => Math.max(w, 0));
  const total = inside.reduce((a, b) => a + b, 0);
  inputs().forEach((input, i) => input.value = inside[i] / total);
  update();
};
let held = false;
element.addEventListener('input', update);
element.addEventListener('pointerdown', e => {
  if (e.target.closest('svg')) { held = true; e.preventDefault(); drag(e); }
});
window.addEventListener('pointermove', e => { if (held) drag(e); });
window.addEventListener('pointerup', () => { held = false; });
