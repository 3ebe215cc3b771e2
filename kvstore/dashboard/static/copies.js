// Copies: who is whose primary, what each copy lacks, and the two changes that are about them.

import { html, useState } from "./lib/preact-htm.js";
import { bytes, count, plural } from "./format.js";
import { Field, Shard } from "./widgets.js";

const REPLICAS_MAX = 5;

/** What a copy lacks, in words. */
export function lagOf(copy) {
  if (copy.rows_total !== undefined) return `is sent ${count(copy.rows_done)} of ${count(copy.rows_total)} rows`;
  if (copy.lag === null) return "";
  return copy.lag ? `${plural(copy.lag, "record")} behind` : "nothing behind";
}

/** `isBrief`: what it lacks only if it lacks something. */
export function CopyState({ copy, isBrief = false }) {
  const lag = isBrief && !copy.lag && copy.rows_total === undefined ? "" : lagOf(copy);
  return html`<span class="copy"><b>${copy.node}</b>${" "}<span class="badge ${copy.state === "in-sync" ? "ok" : "busy"}">${copy.state === "in-sync" ? "in sync" : copy.state}</span>${" "}<span class="muted">${lag}</span></span>`;
}

function Promotion({ shard, to }) {
  const lag = lagOf(shard.copies.find((copy) => copy.node === to));
  return html`<table class="plan">
      <thead>
        <tr><th scope="col">shard ${shard.id}</th><th scope="col">primary</th><th scope="col">term</th></tr>
      </thead>
      <tbody>
        <tr><th scope="row">now</th><td>node ${shard.primary}</td><td>${shard.term}</td></tr>
        <tr><th scope="row">then</th><td>node ${to}${lag ? html`<span class="muted"> (${lag})</span>` : ""}</td><td>the next epoch</td></tr>
      </tbody>
    </table>
    <p>
      ${shard.primary} hands over as soon as the copy has all that it has, and stays a copy. No acknowledged write is
      lost; calls wait for a moment. The shard stays on ${to} until it is promoted elsewhere.
    </p>`;
}

/** Make the copy on node `to` the primary. */
export function promotion(shard, to) {
  return {
    title: `Promote the copy of ${shard.id} on node ${to}`,
    confirm: `Promote ${to}`,
    shown: html`<${Promotion} shard=${shard} to=${to} />`,
    method: "POST",
    path: `/v1/shards/${shard.id}/promote`,
    body: { to },
    line: `kvstore shard promote ${shard.id} --to ${to}`,
  };
}

function Replication({ number, cluster }) {
  const nodes = cluster.nodes.length;
  const [all, then] = [cluster.shards.reduce((sum, shard) => sum + shard.bytes, 0), Math.min(number, nodes)];
  const now = Math.min(cluster.replicas, nodes);
  return html`<p>
      Each of ${plural(cluster.shards.length, "shard")} is on <b>${plural(now, "node")}</b> now, and will be on
      ${" "}<b>${plural(then, "node")}</b>${number > nodes ? `: there are only ${nodes}` : ""}.
      ${then > now && ` About ${bytes(all * (then - now))} are copied for that.`}
    </p>
    <p>
      ${then > 1
        ? `While all are in sync, ${plural(then - 1, "disk")} may be lost and nothing that was acknowledged is lost with ${then > 2 ? "them" : "it"}; a write waits for all copies in sync.`
        : "Then no copy can take over from a node that dies: its keys wait for it."}
      ${" "}No call fails because of the change.
    </p>`;
}

/** Keep every key on so many nodes. */
export function replication(number, cluster) {
  return {
    title: `Keep ${number === 1 ? "one copy" : `${number} copies`} of every key`,
    confirm: number === 1 ? "Keep one" : `Keep ${number}`,
    isDangerous: number < cluster.replicas,
    shown: html`<${Replication} number=${number} cluster=${cluster} />`,
    method: "PATCH",
    path: "/v1/cluster",
    body: { replicas: number },
    line: `kvstore cluster replicas ${number}`,
  };
}

/** Two forms: another primary for a shard, more or fewer copies. `onChange` is given the change that is wanted. */
export function CopyChanges({ cluster, onChange }) {
  const [chosen, setChosen] = useState("");
  const [wanted, setWanted] = useState("");
  if (!cluster) return null;
  const ways = cluster.shards.flatMap((shard) => shard.copies.filter((copy) => copy.state === "in-sync").map((copy) => ({ shard, to: copy.node })));
  const way = ways.find(({ shard, to }) => `${shard.id} ${to}` === chosen) ?? ways[0];
  const number = Math.floor(Number(wanted || (cluster.replicas === 1 ? 2 : cluster.replicas)));
  const isNumber = number >= 1 && number <= REPLICAS_MAX && number !== cluster.replicas;
  return html`<form
      class="row"
      onSubmit=${(event) => {
        event.preventDefault();
        if (isNumber) onChange(replication(number, cluster));
      }}
    >
      <${Field} label="copies of every key"><input class="tiny" type="number" min="1" max=${REPLICAS_MAX} value=${number} onInput=${(event) => setWanted(event.target.value)} /><//>
      <button disabled=${!isNumber}>Keep so many…</button>
    </form>
    ${way &&
    html`<form
      class="row"
      onSubmit=${(event) => {
        event.preventDefault();
        onChange(promotion(way.shard, way.to));
      }}
    >
      <${Field} label="another primary">
        <select value=${`${way.shard.id} ${way.to}`} onChange=${(event) => setChosen(event.target.value)}>
          ${ways.map(({ shard, to }) => html`<option value=${`${shard.id} ${to}`}>${shard.id}: ${shard.primary} → ${to}</option>`)}
        </select>
      <//>
      <button>Promote…</button>
    </form>`}`;
}

/** Each shard: who answers for it, and its copies. */
export function CopyTable({ cluster }) {
  return html`<div class="wide">
    <table class="cards">
      <thead>
        <tr><th scope="col">shard</th><th scope="col">primary</th><th scope="col" class="number">term</th><th scope="col">copies</th></tr>
      </thead>
      <tbody>
        ${cluster.shards.map(
          (shard) => html`<tr key=${shard.id} class=${shard.state === "down" ? "down" : ""}>
            <th scope="row" data-label="shard"><${Shard} id=${shard.id} /></th>
            <td data-label="primary"><span>node <b>${shard.primary}</b>${shard.primary === shard.id ? "" : html`<span class="muted"> (away from home)</span>`}</span></td>
            <td class="number" data-label="term">${shard.term}</td>
            <td data-label="copies"><span>${shard.copies.length ? shard.copies.map((copy, i) => html`${i ? ", " : ""}<${CopyState} copy=${copy} />`) : html`<span class="muted">none: nothing could take over</span>`}</span></td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}
