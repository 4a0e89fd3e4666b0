// The page's facts and arrays.

const KINDS = {
  int8: Int8Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  float16: Uint16Array,
  float32: Float32Array,
};

export function readContent(doc) {
  const content = JSON.parse(doc.getElementById("content").textContent);
  const element = doc.getElementById("blob");
  const buffer = decoded(element.textContent);
  element.textContent = ""; // the text is a third larger than the bytes, and no longer needed
  const arrays = {};
  for (const [name, place] of Object.entries(content.arrays)) {
    const count = place.shape.reduce((a, b) => a * b, 1);
    const raw = new KINDS[place.dtype](buffer, place.offset, count);
    arrays[name] = place.dtype === "float16" ? fromHalf(raw) : raw;
  }
  return { content, arrays };
}

function decoded(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}

export function fromHalf(raw) {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size =
      exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity)
      : (1 + fraction / 1024) * 2 ** (exponent - 15);
    table[bits] = bits >> 15 ? -size : size;
  }
  return Float32Array.from(raw, (bits) => table[bits]);
}
