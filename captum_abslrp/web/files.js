// Reads from the first bytes of a file what an <img> does not say.

const startsWith = (bytes, text, at = 0) => [...text].every((letter, i) => bytes[at + i] === letter.charCodeAt(0));

/** True if the file is a GIF, PNG or WebP with several frames. */
export function isAnimated(bytes) {
  if (startsWith(bytes, "GIF8")) return framesOfGif(bytes) > 1;
  if (startsWith(bytes, "PNG\r\n", 1)) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (let at = 8; at + 8 <= bytes.length; at += 12 + view.getUint32(at)) {
      if (startsWith(bytes, "acTL", at + 4)) return true;
      if (startsWith(bytes, "IDAT", at + 4)) return false;
    }
  }
  return startsWith(bytes, "RIFF") && startsWith(bytes, "WEBPVP8X", 8) && (bytes[20] & 2) !== 0;
}

/** Count the frames of a GIF, up to two. */
function framesOfGif(bytes) {
  const colors = (flags) => (flags & 0x80 ? 3 * 2 ** ((flags & 7) + 1) : 0);
  const afterBlocks = (at) => {
    while (at < bytes.length && bytes[at] !== 0) at += bytes[at] + 1;
    return at + 1;
  };
  let frames = 0;
  let at = 13 + colors(bytes[10]);
  while (at < bytes.length && frames < 2) {
    if (bytes[at] === 0x21) at = afterBlocks(at + 2); // an extension
    else if (bytes[at] === 0x2c) {
      frames += 1;
      at = afterBlocks(at + 11 + colors(bytes[at + 9])); // an image
    } else break;
  }
  return frames;
}
