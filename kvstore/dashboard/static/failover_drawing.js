// A failover on a line of time: the process, the lease, the silence, the primary, and every write of a client.

import { html } from "./lib/preact-htm.js";
import { colourOf } from "./widgets.js";

const WIDTH = 800;
const LEFT = 128;
const RIGHT = 14;
const ROW = 34;
const TOP = 10;
const BEFORE_MS = 1000;
const AFTER_MS = 1200; // the first write, that the close look still shows
const CLOSE_MS = 4200; // at least

/** The first step of that kind, for that shard if one is named. */
function at(failover, kind, shard = undefined) {
  return failover.steps.find((step) => step.kind === kind && (shard === undefined || step.shard === shard))?.at_ms ?? null;
}

function nodeIn(step) {
  return /^Node (\S+)/.exec(step.says)?.[1];
}

/** Bars of the process: alive, dead, alive. */
function processBars(failover, end) {
  const back = at(failover, "back");
  const bars = [
    { from: 0, to: failover.killed_ms, kind: "good", label: failover.node },
    { from: failover.killed_ms, to: back ?? end, kind: "dead", label: "dead" },
  ];
  if (back !== null) bars.push({ from: back, to: end, kind: "good", label: failover.node });
  return bars;
}

/** Bars of who answers for the shard. */
function primaryBars(failover, shard, end) {
  const promoted = failover.steps.find((step) => step.kind === "promoted" && step.shard === shard);
  const home = at(failover, "home", shard);
  const bars = [{ from: 0, to: failover.killed_ms, node: failover.node }];
  bars.push({ from: failover.killed_ms, to: promoted?.at_ms ?? end, kind: "dead", label: "no primary" });
  if (promoted) bars.push({ from: promoted.at_ms, to: home ?? end, node: nodeIn(promoted) });
  if (home !== null) bars.push({ from: home, to: end, node: failover.node });
  return bars;
}

function rowsOf(failover, end, isClose) {
  const died = failover.killed_ms;
  const rows = [{ name: `process of ${failover.node}`, bars: processBars(failover, end) }];
  if (isClose) {
    const lease = Math.min(end, died + failover.lease_s * 1000);
    const silent = Math.min(end, at(failover, "silent") ?? end);
    rows.push({ name: "lease granted", bars: [{ from: died, to: lease, kind: "wait", label: `${failover.lease_s} s at most` }] });
    rows.push({ name: "silence", bars: [{ from: died, to: silent, kind: "wait", label: `${failover.failover_after_s} s, then it is held for dead` }] });
  }
  for (const shard of failover.led) rows.push({ name: `primary of ${shard}`, bars: primaryBars(failover, shard, end) });
  return rows;
}

function Bar({ bar, x, y }) {
  const [from, to] = [x(bar.from), x(bar.to)];
  if (to - from < 0.5) return null;
  const label = bar.label ?? `node ${bar.node}`;
  const style = bar.node ? `o${colourOf(bar.node)}` : bar.kind;
  return html`<g class="bar ${bar.node ? "node" : bar.kind}">
    <rect class=${style} x=${from} y=${y} width=${to - from} height=${ROW - 10} rx="4"><title>${label}</title></rect>
    ${to - from > 7.5 * label.length && html`<text x=${(from + to) / 2} y=${y + 16}>${label}</text>`}
  </g>`;
}

function Writes({ writes, from, to, x, y }) {
  return html`<g class="writes">
    ${writes
      .filter(([began, took]) => began + took >= from && began <= to)
      .map(([began, took, state]) => {
        const [left, right] = [x(Math.max(began, from)), x(Math.min(began + took, to))];
        return took > 150
          ? html`<rect class="waited ${state}" x=${left} y=${y + 9} width=${Math.max(2, right - left)} height="6" /><line class=${state} x1=${right} x2=${right} y1=${y + 2} y2=${y + 22} />`
          : html`<line class=${state} x1=${left} x2=${left} y1=${y + 4} y2=${y + 20} />`;
      })}
  </g>`;
}

function Axis({ failover, from, to, x, height }) {
  const span = (to - from) / 1000;
  const step = span > 12 ? 5 : 1;
  const marks = [];
  for (let s = 0; failover.killed_ms + s * 1000 <= to; s += step) marks.push(s);
  return html`<g class="axis">
    ${marks.map((s) => {
      const place = x(failover.killed_ms + s * 1000);
      return html`<line class=${s ? "" : "kill"} x1=${place} x2=${place} y1=${TOP - 4} y2=${height - 22} />
        <text x=${place} y=${height - 6}>${s ? `+${s} s` : "kill -9"}</text>`;
    })}
  </g>`;
}

function Strip({ failover, title, from, to, isClose }) {
  const x = (ms) => LEFT + ((Math.min(Math.max(ms, from), to) - from) / (to - from)) * (WIDTH - LEFT - RIGHT);
  const end = Math.min(to, failover.now_ms);
  const rows = rowsOf(failover, end, isClose);
  const height = TOP + ROW * (rows.length + (isClose ? 1 : 0)) + 26;
  return html`<figure class="strip">
    <figcaption class="muted">${title}</figcaption>
    <svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${title}; the steps are also listed below">
      <${Axis} failover=${failover} from=${from} to=${to} x=${x} height=${height} />
      ${rows.map((row, i) => {
        const y = TOP + ROW * i;
        return html`<text class="name" x=${LEFT - 10} y=${y + 16}>${row.name}</text>
          ${row.bars.map((bar) => html`<${Bar} bar=${bar} x=${x} y=${y} />`)}`;
      })}
      ${isClose &&
      html`<text class="name" x=${LEFT - 10} y=${TOP + ROW * rows.length + 16}>a client’s writes</text>
        <${Writes} writes=${failover.writes} from=${from} to=${to} x=${x} y=${TOP + ROW * rows.length} />`}
    </svg>
  </figure>`;
}

export function Timeline({ failover }) {
  const from = Math.max(0, failover.killed_ms - BEFORE_MS);
  const answered = at(failover, "acknowledged");
  const close = Math.max(failover.killed_ms + CLOSE_MS, answered === null ? failover.now_ms : answered + AFTER_MS);
  const isLater = failover.now_ms > close + 500;
  return html`<${Strip} failover=${failover} title="Close up: the takeover" from=${from} to=${close} isClose=${true} />
    ${isLater && html`<${Strip} failover=${failover} title="The whole story: the node comes back, catches up, and its shard goes home" from=${from} to=${Math.max(failover.now_ms, failover.killed_ms + failover.away_s * 1000 + 3000)} isClose=${false} />`}`;
}
