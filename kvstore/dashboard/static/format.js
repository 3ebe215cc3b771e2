// Numbers and texts for people. Whatever comes from a client of the store is text, and shown as such.

const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const HIDDEN_BUT_LINES = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

function escaped(character) {
  return `\\u{${character.codePointAt(0).toString(16)}}`;
}

/** One line in which nothing is hidden and nothing turns the direction of writing. */
export function printable(text, most = 2000) {
  const whole = String(text);
  const shown = whole.length > most ? `${whole.slice(0, most)}…` : whole;
  return shown.replace(HIDDEN, escaped);
}

/** The same, but lines stay lines. */
export function printableLines(text) {
  return String(text).replace(HIDDEN_BUT_LINES, escaped);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export function count(number) {
  return number === null || number === undefined ? "?" : whole.format(number);
}

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

export function rate(number) {
  if (number === null || number === undefined) return "–";
  return number >= 10 ? whole.format(number) : tenth.format(number);
}

export function milliseconds(number) {
  if (number === null || number === undefined) return "–";
  return number >= 100 ? `${whole.format(number)} ms` : `${number.toFixed(number >= 10 ? 1 : 2)} ms`;
}

export function bytes(number) {
  if (number === null || number === undefined) return "?";
  let left = number;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (left < 1024) return `${unit === "B" ? left : left.toFixed(left < 10 ? 1 : 0)} ${unit}`;
    left /= 1024;
  }
  return `${left.toFixed(1)} TiB`;
}

export function seconds(number) {
  if (number === null || number === undefined) return "–";
  if (number < 10) return `${Math.max(0, number).toFixed(1)} s`;
  if (number < 120) return `${Math.round(number)} s`;
  return `${Math.round(number / 60)} min`;
}

/** Bytes as a hex dump of sixteen to a line. */
export function hexDump(array, most = 16384) {
  const lines = [];
  for (let at = 0; at < Math.min(array.length, most); at += 16) {
    const part = [...array.slice(at, at + 16)];
    const hex = part.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const text = part.map((byte) => (byte >= 32 && byte < 127 ? String.fromCharCode(byte) : ".")).join("");
    lines.push(`${at.toString(16).padStart(6, "0")}  ${hex.padEnd(47)}  ${text}`);
  }
  if (array.length > most) lines.push(`… ${bytes(array.length - most)} more`);
  return lines.join("\n");
}

/** A word for a shell, in quotes when it needs them. */
export function shellWord(text) {
  const word = printable(text, 200);
  return /^[A-Za-z0-9_./:=@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
