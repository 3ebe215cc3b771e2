// Changes of the cluster: each is asked for with ?plan=true first, shown, and done only when it is confirmed.

import { html, useState } from "./lib/preact-htm.js";
import { call } from "./api.js";
import { bytes, count, milliseconds, plural } from "./format.js";
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

/** Ask for the plan, show it, and do it if it is wanted. */
function Change({ change, onDone, onClose }) {
  const [plan, setPlan] = useState(null);
  const [problem, setProblem] = useState(null);
  const [isBusy, setBusy] = useState(false);
  useState(() => {
    if (change === CANCEL) return;
    call(change.method, `${change.path}?plan=true`, change.body).then(setPlan, setProblem);
  });
  const go = async () => {
    setBusy(true);
    try {
      await call(change.method, change.path, change.body);
      onDone({ ok: `${change.title}: it is written down, and goes on whatever happens.` });
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  const isReady = change === CANCEL || (plan && !problem);
  return html`<${Dialog}
    title=${change.title}
    confirm=${isReady ? change.confirm : null}
    isBusy=${isBusy}
    isDangerous=${change.isDangerous}
    onConfirm=${go}
    onClose=${onClose}
  >
    ${!plan && !problem && change !== CANCEL && html`<p role="status">Asking what would move…</p>`}
    ${plan && html`<${Plan} plan=${plan} />`}
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

export function Changes({ map, cluster, moves }) {
  const [change, setChange] = useState(null);
  const [answer, setAnswer] = useState(null);
  const [id, setId] = useState("");
  const proposed = id || nextId(map);
  const begin = (what) => {
    setAnswer(null);
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
      <button type="button" class="quiet" disabled=${!moves?.moves.length && !moves?.wanted?.length} onClick=${() => begin(CANCEL)}>Cancel moves…</button>
    </form>
    <${Answer} answer=${answer} />
    <${Members} map=${map} cluster=${cluster} onChange=${begin} />
    <p class="muted">Promoting a copy comes with copies, which this version does not have.</p>
    ${change &&
    html`<${Change}
      change=${change}
      onClose=${() => setChange(null)}
      onDone=${(done) => {
        setChange(null);
        setId("");
        setAnswer(done);
      }}
    />`}
  </section>`;
}

const STEPS = ["queued", "copy", "tail", "fence", "commit"];
const MEANING = {
  queued: "not begun",
  waiting: "waits",
  copy: "copies the rows",
  tail: "catches up with what was written since",
  fence: "frozen: nobody answers for these partitions, for some milliseconds",
  done: "compared and equal: commits",
  failed: "failed: it is begun again",
  unknown: "the controller does not answer",
};

function Steps({ step }) {
  const place = STEPS.indexOf(step === "done" ? "commit" : step === "fence" ? "fence" : step);
  return html`<ol class="steps" aria-hidden="true">
    ${STEPS.map((name, i) => html`<li class=${i < place ? "past" : i === place ? "now" : ""}>${name === "fence" ? "freeze" : name}</li>`)}
  </ol>`;
}

export function Moves() {
  const { moves, map, arrivals } = useLive();
  if (!moves || !map) return null;
  const underWay = moves.moves.filter((move) => move.step !== "queued");
  const queued = moves.moves.length - underWay.length;
  const { last } = moves;
  return html`<section aria-labelledby="moves-title">
    <h2 id="moves-title">What moves</h2>
    <div role="status" aria-live="polite">
      ${moves.wanted?.length > 0 && html`<p>Shard ${moves.wanted.join(", ")} is being started.</p>`}
      ${moves.ending?.length > 0 && html`<p>The process of ${moves.ending.join(", ")} is ending.</p>`}
      ${!moves.moves.length && html`<p class="muted">${arrivals.length ? "Nothing moves any more. What has changed hands:" : "Nothing moves. Add a shard, and watch its partitions come."}</p>`}
    </div>
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
    ${last &&
    html`<p>
      ${moves.moves.length ? "So far" : "The last change"}: ${plural(last.partitions, "partition")} in ${plural(last.groups, "group")},
      ${" "}${count(last.keys)} rows (${bytes(last.bytes)}) in ${last.seconds.toFixed(1)} s; longest write pause${" "}
      <b>${milliseconds(last.write_pause_ms_max)}</b>.
    </p>`}
  </section>`;
}
