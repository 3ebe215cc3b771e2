// How the cluster is, in one sentence, and the figures behind it.

import { html } from "./lib/preact-htm.js";
import { Chart } from "./chart.js";
import { CopyState } from "./copies.js";
import { bytes, count, milliseconds, plural, rate, seconds } from "./format.js";
import { useLive } from "./live.js";
import { Shard, Terminal } from "./widgets.js";

const MARKS = { ok: "✓", busy: "↻", warning: "!" };
const STATES = { up: "ok", joining: "busy", leaving: "busy", down: "warning" };

function others(sample) {
  return sample.listings + sample.batches + sample.transactions + sample.locks;
}

const RATES = [
  { name: "reads", colour: "--c0", value: (sample) => sample.reads },
  { name: "writes", colour: "--c1", value: (sample) => sample.writes },
  { name: "other calls", colour: "--c2", value: others },
];
const LATENCIES = [
  { name: "read p50", colour: "--c0", value: (sample) => sample.read_p50_ms },
  { name: "read p99", colour: "--c3", value: (sample) => sample.read_p99_ms },
  { name: "write p50", colour: "--c1", value: (sample) => sample.write_p50_ms },
  { name: "write p99", colour: "--c4", value: (sample) => sample.write_p99_ms },
];
const ERRORS = [
  { name: "errors (429, 5xx)", colour: "--c6", value: (sample) => sample.errors },
  { name: "refused (other 4xx)", colour: "--c5", value: (sample) => sample.refused },
];

/** `commands` in backticks look like commands. */
function withCode(sentence) {
  return sentence.split("`").map((part, i) => (i % 2 ? html`<code>${part}</code>` : part));
}

export function Advice({ advice }) {
  if (!advice) return html`<p class="advice busy" role="status"><span class="mark" aria-hidden="true">↻</span> Waiting for the router…</p>`;
  return html`<p class="advice ${advice.level}" role="status" aria-live="polite">
    <span class="mark" aria-hidden="true">${MARKS[advice.level]}</span><span>${withCode(advice.sentence)}</span>
  </p>`;
}

function Figures({ cluster, locks }) {
  const sum = (name) => cluster.shards.reduce((total, shard) => total + shard[name], 0);
  const figures = [
    ["keys", count(sum("keys"))],
    ["of keys and values", bytes(sum("bytes"))],
    ["shards", count(cluster.shards.length)],
    ["copies of every key", count(cluster.replicas)],
    ["epoch of the map", count(cluster.epoch)],
    ["locks held", count(locks?.count)],
    ["transactions at work or in doubt", count(cluster.in_doubt.count)],
  ];
  return html`<dl class="figures">
    ${figures.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function Row({ shard }) {
  const cell = (name, value, kind = "number") => html`<td class=${kind} data-label=${name}>${value}</td>`;
  return html`<tr class=${shard.state === "down" ? "down" : ""}>
    <th scope="row" data-label="shard"><${Shard} id=${shard.id} /></th>
    ${cell("state", html`<span class="badge ${STATES[shard.state]}">${shard.state}</span>`, "")}
    ${cell("primary", shard.primary, "")}
    ${cell("copies", shard.copies.length ? html`<span>${shard.copies.map((copy, i) => html`${i ? ", " : ""}<${CopyState} copy=${copy} isBrief=${true} />`)}</span>` : html`<span class="muted">none</span>`, "")}
    ${cell("partitions", count(shard.partitions))} ${cell("keys", count(shard.keys))} ${cell("bytes", bytes(shard.bytes))}
    ${cell("reads/s", rate(shard.reads_per_s))} ${cell("writes/s", rate(shard.writes_per_s))}
    ${cell("commit p99", milliseconds(shard.commit_p99_ms))} ${cell("waiting writes", count(shard.waiting_writes))}
    ${cell("file", bytes(shard.file_bytes))} ${cell("log", bytes(shard.log_bytes))} ${cell("rows not yet in the file", count(shard.unapplied_rows))}
    ${cell("weight", count(shard.weight))}
  </tr>`;
}

function Shards({ cluster }) {
  const heads = ["shard", "state", "primary", "copies", "partitions", "keys", "bytes", "reads/s", "writes/s", "commit p99", "waiting", "file", "log", "unapplied", "weight"];
  return html`<section aria-labelledby="shards-title">
    <h2 id="shards-title">Shards</h2>
    <div class="wide">
      <table class="cards">
        <thead>
          <tr>${heads.map((head, i) => html`<th scope="col" class=${i > 3 ? "number" : ""}>${head}</th>`)}</tr>
        </thead>
        <tbody>${cluster.shards.map((shard) => html`<${Row} key=${shard.id} shard=${shard} />`)}</tbody>
      </table>
    </div>
    <p class="muted">
      A shard is a part of the keys; its primary is the node that answers for it.${" "}
      ${cluster.replicas > 1
        ? html`Its copies lie on other nodes, one of which takes over when the primary’s node dies: <a href="#failover">see it</a>.`
        : html`There is one copy of every key: while its node is down a shard’s keys wait for it. <a href="#failover">Two copies</a> end that.`}
      ${" "}A write is acknowledged when it is in the log; rows that the file does not have yet are unapplied. Waiting are
      the writes that are not acknowledged yet.
    </p>
  </section>`;
}

function NodeRow({ node, shards }) {
  const led = shards.filter((shard) => shard.primary === node.id);
  const kept = shards.filter((shard) => shard.copies.some((copy) => copy.node === node.id));
  const list = (found) => (found.length ? found.map((shard, i) => html`${i ? ", " : ""}<${Shard} id=${shard.id} />`) : html`<span class="muted">none</span>`);
  return html`<tr class=${node.state === "down" ? "down" : ""}>
    <th scope="row" data-label="node">${node.id}</th>
    <td data-label="state"><span class="badge ${STATES[node.state]}">${node.state}</span></td>
    <td data-label="answers for"><span>${list(led)}</span></td>
    <td data-label="keeps copies of"><span>${list(kept)}</span></td>
    <td data-label="address"><code>${node.url}</code></td>
    ${node.zone || node.host ? html`<td data-label="place">${[node.zone, node.host].filter(Boolean).join(", ")}</td>` : html`<td data-label="place" class="muted">–</td>`}
  </tr>`;
}

function Nodes({ cluster }) {
  const heads = ["node", "state", "answers for", "keeps copies of", "address", "zone, host"];
  return html`<section aria-labelledby="nodes-title">
    <h2 id="nodes-title">Nodes</h2>
    <div class="wide">
      <table class="cards">
        <thead><tr>${heads.map((head) => html`<th scope="col">${head}</th>`)}</tr></thead>
        <tbody>${cluster.nodes.map((node) => html`<${NodeRow} key=${node.id} node=${node} shards=${cluster.shards} />`)}</tbody>
      </table>
    </div>
    <p class="muted">A node is a process that keeps data. At first each shard is on the node of its own name.</p>
  </section>`;
}

export function Overview() {
  const { cluster, locks, history, router } = useLive();
  const doubt = cluster?.in_doubt;
  const last = history[history.length - 1];
  return html`<h1>Overview</h1>
    <${Advice} advice=${cluster?.advice} />
    ${cluster && html`<${Figures} cluster=${cluster} locks=${locks} />`}
    ${doubt?.oldest_s > 1 && html`<p class="muted">${plural(doubt.count, "transaction")} at work or in doubt, the oldest for ${seconds(doubt.oldest_s)}.</p>`}
    <section aria-labelledby="curves-title">
      <h2 id="curves-title">What router ${router ?? ""} answers</h2>
      ${last && !history.some((sample) => sample.reads + sample.writes + others(sample)) &&
      html`<p class="muted">
        It has not been asked for anything while it was watched. Try <code>kvstore put greeting hello</code>, or the
        views above: what you do there shows here.
      </p>`}
      <div class="charts">
        <${Chart} title="Calls" unit="a second" history=${history} lines=${RATES} format=${rate} />
        <${Chart} title="Latency" unit="about, of the last second" history=${history} lines=${LATENCIES} format=${milliseconds} />
        <${Chart} title="Errors" unit="a second" history=${history} lines=${ERRORS} format=${rate} />
      </div>
    </section>
    ${cluster && html`<${Shards} cluster=${cluster} /><${Nodes} cluster=${cluster} />`}
    <${Terminal}
      lines=${[
        ["all of this, once", `curl ${location.origin}/v1/cluster`],
        ["as it changes", `curl -N ${location.origin}/v1/events`],
        ["for a dashboard of your own", `curl ${location.origin}/metrics`],
        ["on the command line", "kvstore status --watch"],
      ]}
      read=${[
        ["API.md", "The cluster"],
        ["DESIGN.md", "What is promised"],
      ]}
    />`;
}
