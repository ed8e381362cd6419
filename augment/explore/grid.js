// A click on an image of the class: `element`, `trigger` and `watch` are gradio's.
element.addEventListener('click', e => {
  const button = e.target.closest('button');
  if (button) trigger('pick', {label: +button.dataset.label, row: +button.dataset.row});
});
