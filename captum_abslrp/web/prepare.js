// Prepares a picture for the model, with the same result in every bit as torchvision's Resize, CenterCrop, ToTensor and
// Normalize for pictures of Pillow 13. Older versions of Pillow always resize horizontally first, which changes some
// values of tall pictures by one level of 255.
//
// A picture is {width, height, channels, data}: data is a Uint8Array with `channels` (1 or 3) values per pixel, row by row.

const PRECISION_BITS = 32 - 8 - 2;

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

/** Filters of Pillow: half of the width, and the weight at a distance from the center. */
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [
    2,
    (signed) => {
      const a = -0.5;
      const x = Math.abs(signed);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  ],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Compute the first input and the fixed-point weights of every output of a resized axis. */
function weightsOf(from, to, [support, filter]) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const last = Math.min(from, Math.trunc(center + reach + 0.5));
    const weights = new Float64Array(last - first);
    let total = 0;
    for (let j = 0; j < weights.length; j++) {
      weights[j] = filter((j + first - center + 0.5) * (1 / stretch));
      total += weights[j];
    }
    const fixed = Int32Array.from(weights, (weight) => {
      const share = (total === 0 ? weight : weight / total) * 2 ** PRECISION_BITS;
      return Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    });
    return [first, fixed];
  });
}

/** Resize one axis: `outer` lines of `from` elements that are `step` values apart. */
function resizeAxis(data, outer, from, to, step, filter) {
  const weights = weightsOf(from, to, filter);
  const resized = new Uint8ClampedArray(outer * to * step);
  let at = 0;
  for (let line = 0; line < outer; line++) {
    for (const [first, fixed] of weights) {
      const start = (line * from + first) * step;
      for (let inner = 0; inner < step; inner++) {
        let sum = 1 << (PRECISION_BITS - 1);
        for (let j = 0, k = start + inner; j < fixed.length; j++, k += step) sum += data[k] * fixed[j];
        resized[at++] = sum >> PRECISION_BITS;
      }
    }
  }
  return resized;
}

/** Compute the input of every output of an axis, by adding the scale up as Pillow does. */
function nearest(from, to) {
  const scale = from / to;
  const inputs = new Int32Array(to);
  for (let i = 0, at = scale * 0.5; i < to; i++, at += scale) inputs[i] = Math.trunc(at);
  return inputs;
}

/** Resize a picture with a filter of Pillow; each of the two passes returns 8-bit values. */
export function resize(picture, width, height, interpolation) {
  const { channels } = picture;
  let { data } = picture;
  if (width === picture.width && height === picture.height) return picture;
  if (interpolation === "nearest") {
    const columns = nearest(picture.width, width);
    const resized = new Uint8ClampedArray(width * height * channels);
    let at = 0;
    for (const row of nearest(picture.height, height)) {
      for (const column of columns) {
        const from = (row * picture.width + column) * channels;
        for (let c = 0; c < channels; c++) resized[at++] = data[from + c];
      }
    }
    return { width, height, channels, data: resized };
  }
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`The interpolation ${interpolation} is not supported.`);
  // Vertically first if that saves many rows: a pass is skipped if the size does not change.
  let across = picture.width;
  const vertically = () => {
    if (height !== picture.height) data = resizeAxis(data, 1, picture.height, height, across * channels, filter);
  };
  const verticalFirst = picture.height - height > 2 * Math.max(0, picture.width - width);
  if (verticalFirst) vertically();
  const rows = verticalFirst ? height : picture.height;
  if (width !== picture.width) data = resizeAxis(data, rows, picture.width, width, channels, filter);
  across = width;
  if (!verticalFirst) vertically();
  return { width, height, channels, data };
}

/** Compute the size to which a picture is resized: `to` is null, the length of the shorter edge, or [height, width]. */
export function sizeOf({ width, height }, to) {
  if (to === null || to === undefined) return [width, height];
  if (Array.isArray(to)) return to.length === 2 ? [to[1], to[0]] : sizeOf({ width, height }, to[0]);
  return width <= height ? [to, Math.trunc((to * height) / width)] : [Math.trunc((to * width) / height), to];
}

/** Round as Python does, halves to the even neighbor. */
const roundHalfEven = (x) => (x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** Crop the center; a smaller picture gets black borders. `rounding` is for borders of half a pixel: "even" or "down". */
export function cropCenter(picture, width, height, rounding = "even") {
  const { channels } = picture;
  const round = rounding === "down" ? Math.floor : roundHalfEven;
  const offset = (has, wants) => (wants > has ? -Math.floor((wants - has) / 2) : round((has - wants) / 2));
  const left = offset(picture.width, width);
  const top = offset(picture.height, height);
  if (left === 0 && top === 0 && width === picture.width && height === picture.height) return picture;
  const data = new Uint8ClampedArray(width * height * channels);
  for (let y = Math.max(0, -top); y < Math.min(height, picture.height - top); y++) {
    const from = Math.max(0, -left);
    const to = Math.min(width, picture.width - left);
    const start = ((y + top) * picture.width + from + left) * channels;
    data.set(picture.data.subarray(start, start + (to - from) * channels), (y * width + from) * channels);
  }
  return { width, height, channels, data };
}

/** Convert pixels of a canvas (RGBA) to "RGB" or "L", on a black ground. `transparent` is true if any pixel was. */
export function fromCanvas(pixels, mode) {
  const { width, height, data: rgba } = pixels;
  const channels = mode === "L" ? 1 : 3;
  const data = new Uint8ClampedArray(width * height * channels);
  let transparent = false;
  for (let i = 0, at = 0; i < rgba.length; i += 4) {
    const opacity = rgba[i + 3];
    if (opacity < 255) {
      transparent = true;
      for (let c = i; c < i + 3; c++) rgba[c] = Math.round((rgba[c] * opacity) / 255);
    }
    const r = rgba[i];
    const g = rgba[i + 1];
    const b = rgba[i + 2];
    if (channels === 1) data[at++] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else {
      data[at++] = r;
      data[at++] = g;
      data[at++] = b;
    }
  }
  return { picture: { width, height, channels, data }, transparent };
}

/** Resize and crop a picture. */
export function shape(picture, { resize: to, interpolation, crop, rounding }) {
  const resized = resize(picture, ...sizeOf(picture, to), interpolation);
  return crop ? cropCenter(resized, crop[1], crop[0], rounding) : resized;
}

/** Normalize a picture with the mean and the standard deviation of each channel, to (C, H, W). */
export function normalize({ width, height, channels, data }, { mean, std }) {
  const count = width * height;
  const values = new Float32Array(channels * count);
  for (let c = 0; c < channels; c++) {
    const [shift, scale] = [Math.fround(mean[c]), Math.fround(std[c])];
    const normalized = Float32Array.from({ length: 256 }, (_, value) =>
      Math.fround(Math.fround(Math.fround(value / 255) - shift) / scale),
    );
    for (let i = 0; i < count; i++) values[c * count + i] = normalized[data[i * channels + c]];
  }
  return values;
}
