import { choices, element, labelOf, listenToKeys, mapOver, opacityOf, percent } from "./common.js";
import { isAnimated } from "./files.js";
import { colorLimit, colorMap, inDigits, inWords, overGray, smoothMap, softmax, sumChannels, toNpy } from "./maps.js";

const MOST_PIXELS = 50e6;
const MOST_BYTES = 100e6;
const MOST_PROBABLE = 5;

const $ = (id) => document.getElementById(id);
$("unserved").remove();

/** Say in one line what happens; `trouble` is true for errors. */
function say(text, trouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

let about = null;
let names = [];
let broken = false;
let asked = 0; // images that were given
let sent = null; // the newest image that the worker has: {id, name, notes}
let shown = null; // the image with its map that is shown
let ready = false;
let refusal = ""; // the error of an image that was not accepted; it stays while another one is explained

/** Report an error of something that was given. */
function refuse(text) {
  refusal = text;
  say(text, true);
}

/** Report progress, unless an error has to be read. */
function progress(text) {
  if (!refusal) say(text);
}

const worker = new Worker("worker.js", { type: "module" });
worker.addEventListener("error", () => stop("worker.js could not be loaded or run. Reload the page."));
worker.addEventListener("message", ({ data: message }) => {
  if (message.kind === "broken") stop(message.text);
  else if (message.kind === "ready") {
    ready = true;
    if (!sent) progress("Ready for an image.");
  } else if (message.id !== sent?.id) return;
  else if (message.kind === "working") progress(`Computing the map of ${nameOf(message)}\u2026`);
  else if (message.kind === "failed") fail(message.text);
  else show(message);
});

const nameOf = ({ target }) => (target === undefined ? sent.name : names[target]);

function stop(text) {
  broken = true;
  $("choose").disabled = true;
  busy(false);
  say(text, true);
}

/** After an error, the explanation that is shown is current again. */
function fail(text) {
  sent = shown?.image ?? null;
  busy(false);
  if (shown) select(shown.target);
  say(text, true);
}

const busy = (is) => $("shown").setAttribute("aria-busy", String(is));

async function begin() {
  say("Loading the model\u2026");
  try {
    const response = await fetch("about.json", { cache: "no-cache" });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    about = await response.json();
  } catch (error) {
    return stop(`about.json could not be loaded: ${error.message}. Write the page again, or serve all of its files.`);
  }
  try {
    describe();
  } catch (error) {
    return stop(`about.json could not be read: ${error.message}. Write the page again.`);
  }
  const given = about.class_names ?? Array.from({ length: about.outputs.scores[1] }, (_, i) => `class ${i}`);
  const first = new Map(given.map((name, i) => [name, i]).reverse());
  const last = new Map(given.map((name, i) => [name, i]));
  names = given.map((name, i) => (first.get(name) === last.get(name) ? name : `${name} (${i})`));
  worker.postMessage({ kind: "start", about });
}

/** Find the size of an image before it is decoded; null if it is none. */
function sizeOf(file) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  return new Promise((done) => {
    image.onload = () => done([image.naturalWidth, image.naturalHeight]);
    image.onerror = () => done(null);
    image.src = url;
  }).finally(() => URL.revokeObjectURL(url));
}

/** Check what was given, and have it explained. */
async function take(files) {
  if (broken) return;
  if (!about) return refuse("The page is still loading. Choose the image again in a moment.");
  if (files.length === 0) return refuse("Expected an image file, but got something else. Save the image, and drop the file.");
  const id = ++asked;
  const [file] = files;
  const name = file.name || "image";
  const notes = [];
  if (files.length > 1) notes.push(`${files.length} files were given. The first one is explained.`);
  if (file.size > MOST_BYTES) {
    return refuse(`${name} has ${(file.size / 1e6).toFixed(0)} MB. The most is ${MOST_BYTES / 1e6} MB.`);
  }
  say(`Reading ${name}\u2026`);
  let bytes = null;
  let size = null;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
    size = await sizeOf(file);
  } catch {
    // A folder, or a file that has gone
  }
  if (id !== asked) return;
  if (!size) {
    const reason = file.type.startsWith("image/") ? "could not be decoded. The file may be damaged, or of an unknown kind" : "is not an image";
    return refuse(`${name} ${reason}. Choose a PNG, JPEG, GIF or WebP file.`);
  }
  const [width, height] = size;
  if (width * height > MOST_PIXELS) {
    const pixels = `${width} \u00d7 ${height} pixels`;
    return refuse(`${name} has ${pixels}. The most is ${MOST_PIXELS / 1e6} million pixels. Make the image smaller.`);
  }
  if (isAnimated(bytes)) notes.push("The file is an animation. Its first frame is explained.");
  refusal = "";
  sent = { id, name, notes };
  busy(true);
  say(ready ? `Computing the map of ${name}\u2026` : "Loading the model\u2026");
  worker.postMessage({ kind: "image", id, file });
}

/** Have another class of the shown image explained. */
function explain(target) {
  if (broken || sent?.id !== shown.image.id) return;
  refusal = "";
  select(target);
  busy(true);
  worker.postMessage({ kind: "class", id: shown.image.id, target });
}

/** Draw pixels (RGBA) into a canvas. */
function draw(pixels, { width, height }) {
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

function opaque({ channels, data }) {
  const pixels = new Uint8ClampedArray((4 * data.length) / channels).fill(255);
  for (let i = 0; i < pixels.length; i++) {
    if (i % 4 < 3) pixels[i] = data[Math.floor(i / 4) * channels + Math.min(i % 4, channels - 1)];
  }
  return pixels;
}

let parts = null; // of the panel

function build() {
  const [, , height, width] = about.inputs.image;
  const size = { width: String(width), height: String(height) };
  const image = element("img", size);
  const map = mapOver(null, size, about.drawing.scale);
  const opacity = opacityOf(map.overlay);
  const title = element("h2");
  const caption = element("figcaption");
  const classes = element("div");
  const notes = element("div");
  const field = element("input", { type: "text", id: "name", list: "names", autocomplete: "off", spellcheck: false });
  const other = element(
    "form",
    { class: "other" },
    element("label", { for: "name" }, "Another class, by name or index"),
    field,
    element("datalist", { id: "names" }, ...names.map((name, i) => element("option", { value: name }, `${i}: ${name}`))),
    element("button", { type: "submit" }, "Explain"),
  );
  other.addEventListener("submit", (event) => {
    event.preventDefault();
    const target = find(field.value);
    if (target !== null) return explain(target);
    const given = field.value.trim() ? `\u201c${field.value.trim()}\u201d` : "nothing";
    say(`Expected the name of a class or an index from 0 to ${names.length - 1}, but got ${given}.`, true);
  });
  const saveMap = element("button", { type: "button" }, "Download the map (.npy)");
  saveMap.addEventListener("click", () => {
    const file = new Blob([toNpy(shown.relevance, about.outputs.relevance.slice(1))]);
    save(file, "npy");
  });
  const savePicture = element("button", { type: "button" }, "Download the picture (.png)");
  savePicture.addEventListener("click", () => {
    const pixels = overGray(shown.picture, shown.colored, Number(opacity.slider.value) / 100);
    const small = draw(pixels, shown.picture);
    const factor = Math.max(1, Math.floor(512 / Math.max(width, height)));
    const canvas = element("canvas", { width: width * factor, height: height * factor });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((file) => save(file, "png"));
  });
  const controls = element(
    "div",
    { class: "controls" },
    classes,
    other,
    element("p", {}, opacity.label),
    element("p", { class: "downloads" }, saveMap, savePicture),
  );
  const panel = element(
    "article",
    { class: "panel", tabindex: "-1" },
    title,
    element(
      "div",
      { class: "pictures" },
      element("figure", {}, image, element("figcaption", {}, "input")),
      element("figure", {}, map.stack, caption, map.bar),
      controls,
    ),
    notes,
  );
  listenToKeys(panel, () => classes.querySelectorAll("input"), opacity.slider);
  $("shown").replaceChildren(panel);
  return { panel, title, image, map, caption, classes, notes, saveMap, savePicture };
}

/** Find a class by its name, its index, or a part of its name that no other class has. */
function find(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return null;
  const all = names.map((name) => name.toLowerCase());
  const index = /^\d+$/.test(wanted) ? Number(wanted) : -1;
  const some = all.flatMap((name, i) => (name.includes(wanted) ? [i] : []));
  const found = [all.indexOf(wanted), index].find((i) => i >= 0 && i < all.length);
  return found ?? (some.length === 1 ? some[0] : null);
}

function save(file, ending) {
  const url = URL.createObjectURL(file);
  const stem = shown.image.name.replace(/\.[^.]*$/, "");
  const name = names[shown.target].split(",")[0].replace(/[^\p{L}\p{N}]+/gu, "-");
  element("a", { href: url, download: `${stem}-${name}-abslrp.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** Check the button of a class; a class that is not among the most probable ones gets the last button. */
function select(target) {
  const { probabilities, classes } = shown;
  if (!classes.includes(target)) shown.classes = [...classes.slice(0, MOST_PROBABLE), target];
  if (shown.classes !== shown.buttons) {
    const labels = shown.classes.map((i) => labelOf(names[i], probabilities?.[i] ?? null));
    parts.classes.replaceChildren(choices("Class", "class", labels, (i) => explain(shown.classes[i])));
    shown.buttons = shown.classes;
  }
  parts.classes.querySelectorAll("input")[shown.classes.indexOf(target)].checked = true;
}

/** Why there is no map, or null. */
function reasonOf(relevance) {
  if (!relevance.every(Number.isFinite)) return "No map: the relevance has values that are not finite numbers.";
  if (relevance.some((value) => value !== 0)) return null;
  return about.combine === "guided"
    ? "The map is zero: nothing at the guiding layer sets this class apart."
    : "The map is zero: no pixel has relevance for this class.";
}

function show({ id, target, picture, transparent, scores, relevance, seconds }) {
  parts ??= build();
  const { width, height, channels } = picture;
  const finite = scores.every(Number.isFinite);
  if (shown?.image.id !== id) {
    const probabilities = finite ? softmax(scores) : null;
    const ranked = Array.from(scores.keys());
    if (finite) ranked.sort((a, b) => scores[b] - scores[a] || a - b);
    shown = { image: sent, picture, probabilities, classes: ranked.slice(0, MOST_PROBABLE), buttons: null };
    parts.panel.setAttribute("aria-label", sent.name);
    parts.title.textContent = sent.name;
    parts.image.src = parts.map.below.src = draw(opaque(picture), picture).toDataURL();
    parts.image.alt = `The image ${sent.name}, as the model gets it`;
  }
  const reason = reasonOf(relevance);
  const map = sumChannels(relevance, channels);
  const drawn = smoothMap(map, width, height, about.smoothing);
  const limit = reason ? 1 : colorLimit(drawn);
  Object.assign(shown, { target, relevance, colored: colorMap(reason ? map.fill(0) : drawn, limit, about.drawing.palette) });
  const name = names[target];
  const probability = finite ? `, ${percent(shown.probabilities[target])}` : "";
  parts.map.show(
    reason
      ? null
      : {
          src: draw(shown.colored, picture).toDataURL(),
          limit: inDigits(limit),
          alt: `${name}, ${meaning()}: ${inWords(map, width, height)}`,
        },
    reason,
  );
  parts.caption.textContent = `${name}${probability}`;
  const notes = [
    ...shown.image.notes,
    ...(transparent ? ["Transparent pixels are black for the model."] : []),
    ...(finite ? [] : ["No probabilities: the scores have values that are not finite numbers."]),
    ...(about.smoothing > 1 && !reason ? [about.drawing.smoothed] : []),
  ];
  parts.notes.replaceChildren(...notes.map((note) => element("p", { class: "note" }, note)));
  select(target);
  busy(false);
  const done = `${shown.image.name}: ${name}${probability}. ${reason ?? `Explained in ${seconds.toFixed(1)} seconds.`}`;
  say([refusal, done, ...shown.image.notes].filter(Boolean).join(" "), Boolean(refusal));
}

/** What a map of a class shows, in words. */
function meaning() {
  const contrast = about.contrast ?? null;
  if (contrast === null) return "relevance of the class";
  const others = Number.isInteger(contrast) ? (about.class_names?.[contrast] ?? `class ${contrast}`) : "the other classes";
  return `relevance of the class compared with ${others}`;
}

/** Describe the explainer at the foot of the page. */
function describe() {
  const { mode, resize, interpolation, crop, mean, std } = about.preprocessing;
  const by = " \u00d7 ";
  const steps = [
    mode === "L" ? "gray image" : "RGB image",
    resize && (Array.isArray(resize) && resize.length === 2
      ? `resized to ${resize[1]}${by}${resize[0]} pixels (${interpolation})`
      : `shorter edge resized to ${resize} pixels (${interpolation})`),
    crop && `center of ${crop[1]}${by}${crop[0]} pixels`,
    `values in [0, 1], minus mean ${mean.join(", ")}, divided by ${std.join(", ")}`,
  ];
  const versions = Object.entries(about.versions ?? {}).map(([name, version]) => `${name} ${version}`);
  const rows = {
    model: about.model,
    method: about.method,
    maps: meaning(),
    preprocessing: steps.filter(Boolean).join("; "),
    versions: versions.join(", "),
  };
  $("about").append(...Object.entries(rows).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, String(text))]));
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = "";
  if (files.length) take(files);
});
const dropping = (is) => document.documentElement.classList.toggle("dropping", is);
addEventListener("dragover", (event) => {
  event.preventDefault();
  dropping(true);
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) dropping(false);
});
addEventListener("drop", (event) => {
  event.preventDefault();
  dropping(false);
  take([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0 && event.target.id === "name") return;
  event.preventDefault();
  take(files);
});

begin();
