// Show `hint` while `box` has more to its right than it shows.
const hintAtOverflow = (box, hint) =>
  new ResizeObserver(() => { hint.hidden = box.scrollWidth <= box.clientWidth + 1; }).observe(box);
