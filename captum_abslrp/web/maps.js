// Draws and describes maps as the reports do, and writes them as NumPy files.
//
// A map is a Float64Array with H x W values, row by row.

/** Sum relevance (C, H, W) over its channels. */
export function sumChannels(relevance, channels) {
  const count = relevance.length / channels;
  const map = new Float64Array(count);
  for (let i = 0; i < relevance.length; i++) map[i % count] += relevance[i];
  return map;
}

/** Average lines of `length` elements, which are `step` values apart, with a triangular window; borders are mirrored. */
function smoothAxis(map, outer, length, step, smoothing) {
  const pad = smoothing - 1;
  const smooth = new Float64Array(map.length);
  const padded = new Float64Array(length + 2 * pad);
  for (let line = 0; line < outer; line++) {
    for (let inner = 0; inner < step; inner++) {
      const start = line * length * step + inner;
      for (let i = 0; i < padded.length; i++) {
        const at = (((i - pad) % (2 * length)) + 2 * length) % (2 * length);
        padded[i] = map[start + (at < length ? at : 2 * length - 1 - at) * step];
      }
      for (let i = 0; i < length; i++) {
        let sum = 0;
        for (let j = -pad; j <= pad; j++) sum += (smoothing - Math.abs(j)) * padded[i + pad + j];
        smooth[start + i * step] = sum / smoothing ** 2;
      }
    }
  }
  return smooth;
}

/** Smooth a map over a number of pixels: two averages in a row amount to a triangular window. */
export function smoothMap(map, width, height, smoothing) {
  if (smoothing <= 1) return map;
  return smoothAxis(smoothAxis(map, height, width, 1, smoothing), 1, height, width, smoothing);
}

/** Compute the magnitude at the ends of the color scale: a percentile of the magnitudes, 1 for a zero map. */
export function colorLimit(map, percentile = 99) {
  const magnitudes = Float64Array.from(map, Math.abs).sort();
  const place = ((magnitudes.length - 1) * percentile) / 100;
  const [low, high] = [Math.floor(place), Math.ceil(place)];
  const limit = magnitudes[low] + (magnitudes[high] - magnitudes[low]) * (place - low);
  const tiny = 2 ** -1021; // the smallest normal number, twice
  return [limit, magnitudes.at(-1)].find((value) => value > tiny) ?? 1;
}

/** Write two digits of a number, with a power of ten for tiny and huge values. */
export function inDigits(value) {
  const [digits, power] = value.toExponential(1).split("e");
  if (Number(power) > -3 && Number(power) < 4) return String(Number(`${digits}e${power}`));
  const raised = [...String(Number(power))].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
  return `${digits} \u00d7 10${raised.join("")}`;
}

const PLACES = [
  ["upper left", "upper middle", "upper right"],
  ["middle left", "center", "middle right"],
  ["lower left", "lower middle", "lower right"],
];

/** Split a length into three parts as NumPy does, the longer ones first: the part of each index. */
function thirds(length) {
  const sizes = [0, 1, 2].map((i) => Math.floor(length / 3) + (i < length % 3 ? 1 : 0));
  return sizes.flatMap((size, i) => Array(size).fill(i));
}

/** Describe a map: the shares of positive and negative relevance, and the cell of a 3 x 3 grid with the largest part. */
export function inWords(map, width, height) {
  const [rows, columns] = [thirds(height), thirds(width)];
  const total = map.reduce((sum, value) => sum + Math.abs(value), 0);
  if (total === 0) return "no relevance";
  const parts = [];
  for (const [name, sign] of [["positive", 1], ["negative", -1]]) {
    const cells = new Float64Array(9);
    let sum = 0;
    for (let i = 0; i < map.length; i++) {
      const value = Math.max(0, sign * map[i]);
      cells[3 * rows[Math.floor(i / width)] + columns[i % width]] += value;
      sum += value;
    }
    if (sum === 0) continue;
    const largest = cells.indexOf(Math.max(...cells));
    const place = PLACES[Math.floor(largest / 3)][largest % 3];
    const [share, most] = [sum / total, cells[largest] / sum].map((part) => `${(100 * part).toFixed(0)}%`);
    parts.push(`${share} of the relevance is ${name}, the largest part (${most}) in the ${place}`);
  }
  return parts.join("; ");
}

/** Color a map with a palette, whose entries are [red, green, blue, opacity]: pixels (RGBA), transparent at zero. */
export function colorMap(map, limit, palette) {
  const levels = (palette.length - 1) / 2;
  const pixels = new Uint8ClampedArray(4 * map.length);
  map.forEach((value, i) => {
    const share = Math.min(1, Math.max(-1, value / limit));
    pixels.set(palette[Math.round(share * levels) + levels], 4 * i);
  });
  return pixels;
}

/** Lay a colored map over the gray picture on white, as the page does: pixels (RGBA). */
export function overGray({ channels, data }, colored, opacity) {
  const pixels = new Uint8ClampedArray(colored.length);
  for (let i = 0; i < colored.length / 4; i++) {
    const [r, g, b] = [0, 1, 2].map((c) => data[i * channels + Math.min(c, channels - 1)]);
    const gray = 0.6 * (0.2126 * r + 0.7152 * g + 0.0722 * b) + 0.4 * 255;
    const share = (opacity * colored[4 * i + 3]) / 255;
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = share * colored[4 * i + c] + (1 - share) * gray;
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}

/** Compute probabilities from scores. */
export function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Float64Array.from(scores, (score) => Math.exp(score - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

/** Write a Float32Array as a NumPy file. */
export function toNpy(values, shape) {
  const description = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const length = Math.ceil((10 + description.length + 1) / 64) * 64;
  const file = new Uint8Array(length + 4 * values.length);
  file.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, (length - 10) & 255, (length - 10) >> 8]);
  file.set(new TextEncoder().encode(description.padEnd(length - 11) + "\n"), 10);
  const view = new DataView(file.buffer, length);
  values.forEach((value, i) => view.setFloat32(4 * i, value, true));
  return file;
}
