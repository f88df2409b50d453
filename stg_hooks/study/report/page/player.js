// All clips play in step. Only canvases on the screen are drawn, and only their pictures are decoded.
const KEPT = 160;
const player = { frame: 0, frames: 1, playing: false, due: 0 };
const films = new Map(); // canvas -> sample
const visible = new Set();
const pictures = new Map(); // strip -> Image, the one used last at the end

const pictureOf = (strip) => {
  let image = pictures.get(strip);
  if (image) {
    pictures.delete(strip);
  } else {
    const source = byId(`strip-${strip}`);
    if (!source) return null; // the browser is still reading the file
    image = new Image();
    image.addEventListener("load", drawVisible);
    image.src = `data:${source.type};base64,${source.textContent}`;
  }
  pictures.set(strip, image);
  if (pictures.size > Math.max(KEPT, 2 * visible.size)) pictures.delete(pictures.keys().next().value);
  return image;
};

const drawFilm = (canvas) => {
  const sample = films.get(canvas);
  if (!sample) return;
  const image = pictureOf(sample.strip);
  if (!image || !image.complete || !image.naturalWidth) return;
  const frames = Math.max(1, Math.round(image.naturalWidth / sample.width));
  const frame = Math.min(frames - 1, Math.floor((player.frame * frames) / player.frames));
  const shown = `${sample.strip}:${frame}`;
  if (canvas.dataset.shown === shown) return;
  canvas.dataset.shown = shown;
  if (canvas.width !== sample.width || canvas.height !== sample.height) {
    canvas.width = sample.width;
    canvas.height = sample.height;
  }
  const brush = canvas.getContext("2d");
  brush.clearRect(0, 0, sample.width, sample.height);
  brush.drawImage(image, frame * sample.width, 0, sample.width, sample.height, 0, 0, sample.width, sample.height);
};
const drawVisible = () => visible.forEach(drawFilm);

const watchScreen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) visible.add(target);
    else visible.delete(target);
    if (isIntersecting) drawFilm(target);
  }
}, { rootMargin: "100px" });

// Make a canvas; `showFilm` tells it what to play.
const film = () => {
  const canvas = html("canvas", { width: 1, height: 1 });
  watchScreen.observe(canvas);
  return canvas;
};
const showFilm = (canvas, sample, label) => {
  films.set(canvas, sample);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  canvas.style.aspectRatio = `${sample.width} / ${sample.height}`;
  if (visible.has(canvas)) drawFilm(canvas);
};
const dropFilms = (box) => {
  for (const canvas of box.querySelectorAll("canvas")) {
    watchScreen.unobserve(canvas);
    visible.delete(canvas);
    films.delete(canvas);
  }
};

const setFrame = (frame) => {
  player.frame = frame;
  byId("scrub").value = frame;
  drawVisible();
};
const tick = (now) => {
  if (!player.playing) return;
  if (now >= player.due) {
    player.due = now + 1000 / player.rate;
    setFrame((player.frame + 1) % player.frames);
  }
  requestAnimationFrame(tick);
};
const setPlaying = (playing) => {
  const started = playing && !player.playing;
  player.playing = playing;
  byId("play").textContent = playing ? "Pause" : "Play";
  if (started) requestAnimationFrame(tick);
};

if (sweep) {
  player.frames = Math.max(1, ...cells.flatMap((cell) => cell.samples.map((sample) => sample.frames)));
  player.rate = Math.min(30, sweep.fps || 8);
  byId("scrub").max = player.frames - 1;
  byId("transport").hidden = player.frames < 2;
  byId("play").addEventListener("click", () => setPlaying(!player.playing));
  byId("scrub").addEventListener("input", (event) => {
    setPlaying(false);
    setFrame(Number(event.target.value));
  });
  addEventListener("DOMContentLoaded", drawVisible);
  setPlaying(player.frames > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches);
}
