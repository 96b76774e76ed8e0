// Loads the explainer and explains images, without blocking the page.
//
// Messages to this worker: {kind: "start", about}, {kind: "image", id, file}, {kind: "class", id, target}, where `id` is
// that of the image. Messages from it: "ready", "broken" (nothing can be explained), "working", "explained", "failed".

import { fromCanvas, normalize, shape } from "./prepare.js";

let about = null;
let ort = null;
let session = null;
let busy = true; // until the explainer is loaded
let current = null; // the image that classes are explained for
const waiting = { image: null, class: null }; // the newest message of each kind, others are dropped

async function load(file) {
  const response = await fetch(file, { cache: "no-cache" });
  if (!response.ok) throw new Error(`the server answered ${response.status} ${response.statusText}`.trim());
  return new Uint8Array(await response.arrayBuffer());
}

/** Run a step of the start; an error names the files and the remedy. */
async function step(files, run) {
  try {
    return await run();
  } catch (error) {
    throw new Error(`${files} could not be loaded: ${error.message ?? error}. Write the page again, or serve all of its files.`);
  }
}

async function start() {
  if (typeof WebAssembly === "undefined" || typeof OffscreenCanvas === "undefined") {
    throw new Error("This browser is too old for the page: it needs WebAssembly and OffscreenCanvas.");
  }
  checkCanvas();
  await step("ort.js and ort-wasm-simd-threaded.wasm", async () => {
    const [runtime, binary] = await Promise.all([import("./ort.js"), load("ort-wasm-simd-threaded.wasm")]);
    ort = runtime;
    ort.env.logLevel = "error";
    ort.env.wasm.wasmBinary = binary.buffer;
    if (!self.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  });
  // Optimizing the graph takes seconds in a browser, and gains a fraction of a second per map.
  const options = { graphOptimizationLevel: "disabled" };
  session = await step("explainer.onnx", async () => ort.InferenceSession.create(await load("explainer.onnx"), options));
}

/** Explain a black image while the user looks for one: the first run is slow, because the browser compiles. */
async function warmUp() {
  const size = about.inputs.image;
  const black = new ort.Tensor("float32", new Float32Array(size.reduce((a, b) => a * b)), size);
  await run({ image: black, scores: null, maps: new Map() }, 0).catch(() => {}); // an image will have the error
}

/** Some browsers protect against fingerprints by noise in all pixels that a page reads. */
function checkCanvas() {
  const context = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
  const written = context.createImageData(16, 16);
  written.data.forEach((_, i) => (written.data[i] = i % 4 === 3 ? 255 : (7 * i) % 256));
  context.putImageData(written, 0, 0);
  const read = context.getImageData(0, 0, 16, 16).data;
  if (!read.every((value, i) => value === written.data[i])) {
    throw new Error(
      "This browser changes the pixels that a page reads (protection against fingerprints), so the model would get " +
        "another image. Allow this page to read canvas data, or use another browser.",
    );
  }
}

/** Let newer messages in. */
const pause = () => new Promise((done) => setTimeout(done));

async function prepared({ id, file }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name || "The image"} could not be decoded. The file may be damaged. Save it as PNG or JPEG.`);
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { picture: whole, transparent } = fromCanvas(context.getImageData(0, 0, width, height), about.preprocessing.mode);
  const picture = shape(whole, about.preprocessing);
  const [, , rows, columns] = about.inputs.image;
  if (picture.height !== rows || picture.width !== columns) {
    throw new Error(
      `Expected an image of ${columns} \u00d7 ${rows} pixels, but got ${picture.width} \u00d7 ${picture.height}. ` +
        "The explainer was exported without resizing.",
    );
  }
  const image = new ort.Tensor("float32", normalize(picture, about.preprocessing), about.inputs.image);
  return { id, picture, transparent, image, scores: null, maps: new Map() };
}

/** Compute the scores and the map of a class, and remember both. */
async function run(image, target) {
  if (!image.maps.has(target)) {
    const class_ = new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]);
    const { scores, relevance } = await session.run({ image: image.image, target: class_ });
    image.scores ??= scores.data;
    image.maps.set(target, relevance.data);
  }
  return image.maps.get(target);
}

async function explain({ kind, id, file, target }) {
  const began = performance.now();
  if (kind === "class" && current?.id !== id) return;
  postMessage({ kind: "working", id, target });
  try {
    let wanted = target;
    let image = current;
    if (kind === "image") {
      image = await prepared({ id, file });
      await run(image, 0); // the scores, and a map that may be asked for later
      wanted = image.scores.indexOf(image.scores.reduce((a, b) => Math.max(a, b)));
      if (wanted < 0) wanted = 0; // scores that are not finite
      await pause();
      if (waiting.image) return;
    }
    const relevance = await run(image, wanted);
    current = image;
    const { picture, transparent, scores } = image;
    const seconds = (performance.now() - began) / 1000;
    postMessage({ kind: "explained", id, target: wanted, picture, transparent, scores, relevance, seconds });
  } catch (error) {
    postMessage({ kind: "failed", id, text: String(error.message ?? error) });
  }
}

async function work() {
  if (busy) return;
  busy = true;
  for (;;) {
    await pause();
    const kind = waiting.image ? "image" : "class";
    const message = waiting[kind];
    if (!message) break;
    waiting[kind] = null;
    await explain(message);
  }
  busy = false;
}

addEventListener("message", async ({ data: message }) => {
  if (message.kind !== "start") {
    waiting[message.kind] = message;
    return work();
  }
  about = message.about;
  try {
    await start();
  } catch (error) {
    return postMessage({ kind: "broken", text: error.message });
  }
  postMessage({ kind: "ready" });
  await pause();
  if (!waiting.image) await warmUp();
  busy = false;
  work();
});
