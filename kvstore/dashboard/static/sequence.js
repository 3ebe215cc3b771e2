// The messages of a transfer, drawn as they happened, in slow motion: milliseconds take a second each.

import { html, useEffect, useState } from "./lib/preact-htm.js";
import { milliseconds, printable } from "./format.js";

const WIDTH = 800;
const TOP = 56;
const STEP = 46;
const STEP_MS = 700; // in slow motion

const NAMES = { "router-demo": "coordinator" };

function columnsOf(play) {
  const anchor = play.accounts.find((account) => account.key === play.from)?.shard;
  const other = play.accounts.find((account) => account.key === play.to)?.shard;
  return ["client", "router-demo", anchor, other];
}

function words(step) {
  if (step.kind === "sent") return step.message;
  if (step.kind === "answered") return step.message === "prepare" ? `vote: ${step.says}` : step.says;
  return step.says;
}

/** How many steps are shown by now: one more after each pause. */
function useSlowMotion(play) {
  const [shown, setShown] = useState(0);
  useEffect(() => setShown(0), [play?.number]);
  useEffect(() => {
    if (!play || shown >= play.steps.length) return undefined;
    const quick = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const timer = setTimeout(() => setShown(shown + 1), quick ? 0 : shown === 0 ? 50 : STEP_MS);
    return () => clearTimeout(timer);
  }, [play?.number, play?.steps.length, shown]);
  return shown;
}

function Arrow({ from, to, y, step }) {
  const right = to > from;
  const end = to + (right ? -6 : 6);
  const middle = (from + to) / 2;
  return html`<g class="message ${step.kind}">
    <line x1=${from} y1=${y} x2=${end} y2=${y} />
    <path d=${right ? `M${end} ${y}l-8 -5v10z` : `M${end} ${y}l8 -5v10z`} />
    <text x=${middle} y=${y - 7}>${printable(words(step), 40)}</text>
  </g>`;
}

function Mark({ x, y, step }) {
  const word = { killed: "kill -9", intent: "in doubt", resolved: "recovered" }[step.kind] ?? step.kind;
  const width = 8 * word.length + 22;
  return html`<g class="mark ${step.kind}">
    <rect x=${x - width / 2} y=${y - 15} width=${width} height="24" rx="12" />
    <text x=${x} y=${y + 2}>${word}</text>
  </g>`;
}

function Drawing({ play, shown }) {
  const columns = columnsOf(play);
  const x = (name) => 60 + (Math.max(0, columns.indexOf(name)) * (WIDTH - 240)) / 3;
  const steps = play.steps.slice(0, shown);
  const height = TOP + STEP * Math.max(play.steps.length, 6) + 20;
  const killed = steps.findIndex((step) => step.kind === "killed");
  const labels = columns.map((name, i) => [NAMES[name] ?? name, i === 2 ? "anchor" : i === 3 ? "participant" : ""]);
  return html`<svg class="sequence" viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="The messages, which are also listed below">
    ${columns.map((name, i) => {
      const end = name === "router-demo" && killed >= 0 ? TOP + STEP * (killed + 1) : height - 8;
      return html`<line class="life" x1=${x(name)} x2=${x(name)} y1=${TOP - 6} y2=${end} />
        <text class="name" x=${x(name)} y="20">${labels[i][0]}</text>
        <text class="role" x=${x(name)} y="38">${labels[i][1]}</text>`;
    })}
    ${steps.map((step, i) => {
      const y = TOP + STEP * (i + 1) - 10;
      const time = html`<text class="time" x=${WIDTH - 4} y=${y + 4}>${milliseconds(step.at_ms)}</text>`;
      if (step.from === step.to) return html`<${Mark} x=${x(step.from)} y=${y} step=${step} />${time}`;
      return html`<${Arrow} from=${x(step.from)} to=${x(step.to)} y=${y} step=${step} />${time}`;
    })}
  </svg>`;
}

const ENDS = { committed: "ok", aborted: "wanted", failed: "warning" };

export function Sequence({ play }) {
  const shown = useSlowMotion(play);
  const isShown = shown >= play.steps.length && play.says;
  return html`<div class="played" data-state=${isShown ? play.state : "running"}>
    <div class="wide"><${Drawing} play=${play} shown=${shown} /></div>
    <div aria-live="polite" role="status">
      ${isShown && html`<p class="said ${ENDS[play.state] ?? "busy"}"><b>${play.state}</b> ${play.says}</p>`}
    </div>
    <details>
      <summary>The same as a list</summary>
      <ol class="log">
        ${play.steps.slice(0, shown).map(
          (step) => html`<li>
            <span class="muted">${milliseconds(step.at_ms)}</span>${" "}
            ${step.from === step.to ? `${NAMES[step.from] ?? step.from}: ${step.message}` : `${NAMES[step.from] ?? step.from} → ${NAMES[step.to] ?? step.to}: ${step.message}`}
            ${step.says && html`<span class="muted"> ${printable(step.says)}</span>`}
          </li>`,
        )}
      </ol>
    </details>
  </div>`;
}
