// A curve over the last minutes, drawn by uPlot; its newest values also as text, for people who do not see it.

import { html, useEffect, useRef } from "./lib/preact-htm.js";

const SHOWN_S = 180;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(format) {
  const line = { stroke: colour("--line"), width: 1 };
  const font = "11px system-ui, sans-serif";
  const base = { stroke: colour("--muted"), font, grid: line, ticks: { show: false } };
  return [
    { ...base, grid: { show: false }, size: 24, space: 70, values: (_, marks) => marks.map(clock) },
    { ...base, size: 50, space: 32, values: (_, marks) => marks.map(format) },
  ];
}

function now() {
  return Date.now() / 1000;
}

function clock(seconds) {
  return new Date(seconds * 1000).toTimeString().slice(0, 8);
}

function options(width, lines, format) {
  return {
    width,
    height: 150,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { range: (_, low, high) => [Math.min(low ?? now(), (high ?? now()) - 30), high ?? now()] }, y: { range: (_, low, high) => [0, Math.max(high * 1.15, 1)] } },
    axes: axis(format),
    series: [{}, ...lines.map((line) => ({ stroke: colour(line.colour), width: 2, spanGaps: false, points: { show: false } }))],
  };
}

/** Times and values; a second without a listener is a gap. */
export function columns(history, lines) {
  const end = history.length ? history[history.length - 1].at_ms : Date.now();
  const shown = history.filter((sample) => sample.at_ms > end - SHOWN_S * 1000);
  const rows = [];
  for (const [i, sample] of shown.entries()) {
    if (i && sample.at_ms - shown[i - 1].at_ms > 2500) rows.push({ at_ms: shown[i - 1].at_ms + 1000, isGap: true });
    rows.push(sample);
  }
  return [rows.map((row) => row.at_ms / 1000), ...lines.map((line) => rows.map((row) => (row.isGap ? null : line.value(row))))];
}

/** `lines`: {name, colour, value(sample)}. `format`: of a number. */
export function Chart({ title, history, lines, format, unit }) {
  const place = useRef(null);
  const plot = useRef(null);
  const draw = () => {
    if (!place.current?.clientWidth) return;
    plot.current?.destroy();
    plot.current = new window.uPlot(options(place.current.clientWidth, lines, format), columns(history, lines), place.current);
  };
  useEffect(() => {
    draw();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: place.current.clientWidth, height: 150 }));
    resized.observe(place.current);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", draw);
    addEventListener("kvstore-theme", draw);
    return () => {
      resized.disconnect();
      dark.removeEventListener("change", draw);
      removeEventListener("kvstore-theme", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, []);
  useEffect(() => plot.current?.setData(columns(history, lines)), [history]);
  const last = history[history.length - 1];
  const said = lines.map((line) => `${line.name} ${last ? format(line.value(last)) : "–"}`).join(", ");
  return html`<figure class="chart">
    <figcaption>
      <h3>${title} <small>${unit}</small></h3>
      <ul class="legend">
        ${lines.map(
          (line) => html`<li>
            <i class="line ${line.colour.slice(2)}" aria-hidden="true"></i>${line.name}${" "}
            <b>${last ? format(line.value(last)) : "–"}</b>
          </li>`,
        )}
      </ul>
    </figcaption>
    <div class="plot" ref=${place} role="img" aria-label=${`${title} over the last three minutes; now: ${said}`}></div>
  </figure>`;
}
