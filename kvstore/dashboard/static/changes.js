// Changes of the cluster: each is planned first (?plan=true, or `shown`), and done only when it is confirmed.

import { html, useState } from "./lib/preact-htm.js";
import { beginChange, call } from "./api.js";
import { CopyChanges } from "./copies.js";
import { bytes, count, milliseconds, plural, seconds } from "./format.js";
import { useLive } from "./live.js";
import { Answer, Dialog, Field, Plan, Shard } from "./widgets.js";

function nextId(map) {
  const taken = new Set(map.members.map((member) => member.id));
  let number = map.members.length + 1;
  while (taken.has(`s${number}`)) number += 1;
  return `s${number}`;
}

function addition(id, weight) {
  return { title: `Add shard ${id}`, confirm: `Add ${id}`, method: "POST", path: "/v1/shards", body: { id, weight }, line: `kvstore shard add ${id}${weight === 1 ? "" : ` --weight ${weight}`}` };
}

function removal(id) {
  return { title: `Remove shard ${id}`, confirm: `Remove ${id}`, isDangerous: true, method: "DELETE", path: `/v1/shards/${id}`, line: `kvstore shard remove ${id}`, note: `Its partitions move to the others first; then its process ends, and its file is kept as shard-${id}.db.removed.` };
}

function weighing(id, weight) {
  return { title: `Give ${id} the weight ${weight}`, confirm: `Set weight ${weight}`, method: "PATCH", path: `/v1/shards/${id}`, body: { weight }, line: `kvstore shard weight ${id} ${weight}` };
}

const REBALANCE = { title: "Rebalance", confirm: "Rebalance", method: "POST", path: "/v1/moves", line: "kvstore shard rebalance" };
const CANCEL = { title: "Cancel what has not moved yet", confirm: "Cancel the moves", isDangerous: true, method: "DELETE", path: "/v1/moves", line: "kvstore shard cancel", note: "What has moved stays where it is. A shard that was joining and has nothing yet is no member any more; one that was leaving stays." };

/** Ask for the plan, show it, and do it if it is wanted. `shown`: of a change without one, what it does. */
export function Change({ change, onDone, onClose }) {
  const [plan, setPlan] = useState(null);
  const [problem, setProblem] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const hasPlan = change !== CANCEL && !change.shown;
  useState(() => {
    if (!hasPlan) return;
    call(change.method, `${change.path}?plan=true`, change.body).then(setPlan, setProblem);
  });
  const go = async () => {
    setBusy(true);
    try {
      onDone(await beginChange(change.method, change.path, change.body));
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  const isReady = !hasPlan || (plan && !problem);
  return html`<${Dialog}
    title=${change.title}
    confirm=${isReady ? change.confirm : null}
    isBusy=${isBusy}
    isDangerous=${change.isDangerous}
    onConfirm=${go}
    onClose=${onClose}
  >
    ${!plan && !problem && hasPlan && html`<p role="status">Asking what would move…</p>`}
    ${plan && html`<${Plan} plan=${plan} />`}
    ${change.shown}
    ${change.note && html`<p>${change.note}</p>`}
    <p class="muted"><code>${change.line}</code></p>
    <${Answer} answer=${problem && { problem }} />
  <//>`;
}

function Member({ member, shard, weight, onChange }) {
  const [wanted, setWanted] = useState(String(weight));
  const number = Math.floor(Number(wanted));
  return html`<li>
    <span class="who"><${Shard} id=${member.id} />${" "}<span class="muted">${count(shard?.partitions)} partitions</span></span>
    <span class="buttons">
      <label><span class="muted">weight</span>${" "}<input class="tiny" type="number" min="1" max="1000" value=${wanted} onInput=${(event) => setWanted(event.target.value)} aria-label=${`Weight of ${member.id}`} /></label>
      <button type="button" class="quiet small" disabled=${!(number >= 1 && number !== weight)} onClick=${() => onChange(weighing(member.id, number))}>weigh</button>
      <button type="button" class="quiet small" disabled=${member.state === "leaving"} onClick=${() => onChange(removal(member.id))} aria-label=${`Remove ${member.id}`}>remove</button>
    </span>
  </li>`;
}

function Members({ map, cluster, onChange }) {
  const shards = new Map((cluster?.shards ?? []).map((shard) => [shard.id, shard]));
  return html`<ul class="members">
    ${map.members.map(
      (member) => html`<${Member} key=${`${member.id} ${member.weight}`} member=${member} weight=${member.weight} shard=${shards.get(member.id)} onChange=${onChange} />`,
    )}
  </ul>`;
}

const NAMES = {
  add: "Add shard",
  remove: "Remove shard",
  "remove-lost": "Give up shard",
  weight: "Weight of",
  rebalance: "Rebalance",
  cancel: "Cancel",
  "accept-old": "Accept the older copy of",
  recover: "Recover the map",
  promote: "Promote a copy of",
  replicas: "Copies",
  failover: "Failover of",
  rebuild: "Damaged copy rebuilt of",
};

function nameOf(change) {
  const name = change.shard ? `${NAMES[change.kind] ?? change.kind} ${change.shard}` : (NAMES[change.kind] ?? change.kind);
  const wanted = change.weight ?? change.replicas ?? change.to;
  return wanted === null || change.kind === "add" ? name : `${name} → ${wanted}`;
}

/** What became of the change that was asked for here. */
function Begun({ id, items }) {
  if (id === null) return null;
  const change = items.find((item) => item.id === id);
  if (!change) return html`<${Answer} answer=${{ ok: "It is written down, and goes on whatever happens." }} />`;
  return html`<${Answer} answer=${{ ok: `${nameOf(change)}, ${change.state}: ${change.detail}` }} />`;
}

const MOVING = new Set(["add", "remove", "weight", "rebalance"]);

/** Whether there is something that a cancel would end. */
function canCancel(items) {
  return items.some((change) => change.state === "running" && MOVING.has(change.kind));
}

/** `changes`: the document of that kind of event, null before the first. */
export function Changes({ map, cluster, changes }) {
  const [change, setChange] = useState(null);
  const [begun, setBegun] = useState(null); // the id of the change that was asked for here
  const [id, setId] = useState("");
  const proposed = id || nextId(map);
  const begin = (what) => {
    setBegun(null);
    setChange(what);
  };
  return html`<section aria-labelledby="changes-title">
    <h2 id="changes-title">Change the cluster</h2>
    <form
      class="row"
      onSubmit=${(event) => {
        event.preventDefault();
        begin(addition(proposed, 1));
      }}
    >
      <${Field} label="new shard"><input value=${proposed} maxlength="32" size="6" onInput=${(event) => setId(event.target.value)} /><//>
      <button class="primary">Add a shard…</button>
      <button type="button" class="quiet" onClick=${() => begin(REBALANCE)}>Rebalance…</button>
      <button type="button" class="quiet" disabled=${!canCancel(changes?.items ?? [])} onClick=${() => begin(CANCEL)}>Cancel moves…</button>
    </form>
    <${Begun} id=${begun} items=${changes?.items ?? []} />
    <${Members} map=${map} cluster=${cluster} onChange=${begin} />
    <${CopyChanges} cluster=${cluster} onChange=${begin} />
    ${change &&
    html`<${Change}
      change=${change}
      onClose=${() => setChange(null)}
      onDone=${(begunId) => {
        setChange(null);
        setId("");
        setBegun(begunId);
      }}
    />`}
  </section>`;
}

const STEPS = ["queued", "copy", "tail", "freeze", "commit"];
const MEANING = {
  queued: "not begun",
  waiting: "waits",
  copy: "copies the rows",
  tail: "catches up with what was written since",
  freeze: "frozen: no shard answers for these partitions, for some milliseconds",
  done: "compared and equal: commits",
  failed: "failed: it is begun again",
  unknown: "the controller does not answer",
};

function Steps({ step }) {
  const place = STEPS.indexOf(step === "done" ? "commit" : step);
  return html`<ol class="steps" aria-hidden="true">
    ${STEPS.map((name, i) => html`<li class=${i < place ? "past" : i === place ? "now" : ""}>${name}</li>`)}
  </ol>`;
}

function figuresOf(change) {
  const pause = change.write_pause_ms_max ? milliseconds(change.write_pause_ms_max) : "none";
  return `${plural(change.partitions_done, "partition")} in ${plural(change.groups_done, "group")}, ${count(change.keys_done)} rows (${bytes(change.bytes_done)}) in ${seconds(change.seconds)}; longest write pause ${pause}`;
}

function Running({ change }) {
  return html`<li>
    <p><b>${nameOf(change)}</b> <span class="muted">${change.detail}</span></p>
    ${change.progress !== null && html`<progress max="1" value=${change.progress} aria-label=${nameOf(change)}></progress>`}
    ${change.partitions_done > 0 && html`<p class="muted">So far: ${figuresOf(change)}.</p>`}
  </li>`;
}

/** What was asked for and how far it is, then how the last change that moved something ended. */
function ChangesUnderWay({ items }) {
  if (items === null) return html`<p class="muted">The controller does not answer: what runs goes on when it is back.</p>`;
  const running = items.filter((change) => change.state === "running");
  const last = items.find((change) => change.state !== "running" && change.partitions_done > 0);
  return html`${running.length > 0 && html`<ul class="moves" aria-label="Changes under way">${running.map((change) => html`<${Running} key=${change.id} change=${change} />`)}</ul>`}
    ${last && !running.length && html`<p>The last change: ${figuresOf(last)}. <span class="muted">${nameOf(last)}, ${last.state}.</span></p>`}`;
}

export function Moves() {
  const { moves, changes, map, arrivals } = useLive();
  if (!moves || !changes || !map) return null;
  const underWay = moves.moves.filter((move) => move.step !== "queued");
  const queued = moves.moves.length - underWay.length;
  return html`<section aria-labelledby="moves-title">
    <h2 id="moves-title">What moves</h2>
    <div role="status" aria-live="polite">
      ${!moves.moves.length && html`<p class="muted">${arrivals.length ? "Nothing moves any more. What has changed hands:" : "Nothing moves. Add a shard, and watch its partitions come."}</p>`}
    </div>
    <${ChangesUnderWay} items=${changes.items} />
    <ul class="moves">
      ${underWay.slice(0, 8).map(
        (move) => html`<li key=${`${move.from} ${move.to}`}>
          <p>
            <${Shard} id=${move.from} /> → <${Shard} id=${move.to} />${" "}<b>${plural(move.partitions, "partition")}</b>
            <span class="muted"> ${MEANING[move.step]}${move.detail ? `: ${move.detail}` : ""}</span>
          </p>
          <progress max=${Math.max(move.keys_total, 1)} value=${move.keys_done} aria-label=${`Rows of ${move.from} to ${move.to}`}></progress>
          <${Steps} step=${move.step} />
          <p class="muted">${move.keys_total ? `${count(move.keys_done)} of ${count(move.keys_total)} rows, ${bytes(move.bytes_done)}` : "counting its rows"}; write pause ${move.write_pause_ms ? milliseconds(move.write_pause_ms) : "none yet"}</p>
        </li>`,
      )}
    </ul>
    ${queued > 0 && html`<p class="muted">${plural(queued, "group")} of partitions still queued.</p>`}
    ${arrivals.length > 0 &&
    html`<ul class="arrivals" aria-label="What has changed hands in the last minute">
      ${arrivals.slice(-8).map(
        (arrival) => html`<li>epoch ${arrival.epoch}: ${plural(arrival.partitions, "partition")} <${Shard} id=${arrival.from} /> → <${Shard} id=${arrival.to} /></li>`,
      )}
    </ul>`}
  </section>`;
}
