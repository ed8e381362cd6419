// A walk, to and fro, or frame by frame.
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
