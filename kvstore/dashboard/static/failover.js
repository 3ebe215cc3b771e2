// A node dies: who takes over, when, and what a client notices of it.

import { html, useState } from "./lib/preact-htm.js";
import { call } from "./api.js";
import { Change } from "./changes.js";
import { CopyChanges, CopyTable, replication } from "./copies.js";
import { Timeline } from "./failover_drawing.js";
import { count, milliseconds, seconds } from "./format.js";
import { useLive } from "./live.js";
import { Answer, Terminal } from "./widgets.js";

const AWAY_S = 8;
const KINDS = {
  killed: ["killed", "warning"],
  silent: ["held for dead", "busy"],
  lease: ["lease over", "busy"],
  promoted: ["promoted", "ok"],
  serves: ["serves", "ok"],
  acknowledged: ["first write", "ok"],
  out: ["out", "busy"],
  back: ["back", "ok"],
  "in-sync": ["in sync", "ok"],
  home: ["home again", "ok"],
};

/** Whether a copy could take over all that the node answers for. */
function canDie(node, shards) {
  return shards.every((shard) => shard.primary !== node.id || shard.copies.some((copy) => copy.state === "in-sync"));
}

function leads(node, shards) {
  const led = shards.filter((shard) => shard.primary === node.id).map((shard) => shard.id);
  return led.length ? `primary of ${led.join(", ")}` : "only copies";
}

function Kill({ cluster, failover }) {
  const [answer, setAnswer] = useState(null);
  const isBusy = failover?.state === "running";
  const kill = async (node) => {
    setAnswer(null);
    try {
      await call("POST", "/v1/demo/kill", { node, away_s: AWAY_S });
    } catch (problem) {
      setAnswer({ problem });
    }
  };
  return html`<p>
      One press sends <code>kill -9</code> to the process of that node. <code>kvstore up</code> would start it again at
      once; here it waits for ${AWAY_S} s, so that the failover is seen. Ten writes a second go on all the while.
    </p>
    <div class="buttons">
      ${cluster.nodes.map(
        (node) => html`<button type="button" class="danger" disabled=${isBusy || node.state === "down" || !canDie(node, cluster.shards)} onClick=${() => kill(node.id)}>
          Kill ${node.id} <small>${leads(node, cluster.shards)}</small>
        </button>`,
      )}
    </div>
    <${Answer} answer=${answer} />`;
}

function Positions({ failover }) {
  const rows = failover.led.flatMap((shard) => (failover.positions[shard] ?? []).map((position) => ({ shard, ...position })));
  if (!rows.length) return null;
  return html`<div class="wide">
    <table class="cards">
      <caption class="muted">The end of each log, as its node told last</caption>
      <thead>
        <tr><th scope="col">shard</th><th scope="col">node</th><th scope="col">role</th><th scope="col" class="number">term</th><th scope="col" class="number">last record</th><th scope="col" class="number">its primary unheard for</th><th scope="col" class="number">told</th></tr>
      </thead>
      <tbody>
        ${rows.map((row) => {
          const isDead = row.told_s > failover.failover_after_s;
          return html`<tr key=${`${row.shard} ${row.node}`} class=${isDead ? "over" : ""}>
            <th scope="row" data-label="shard">${row.shard}</th>
            <td data-label="node">${row.node}</td>
            <td data-label="role">${isDead ? "dead" : row.role}${row.serves && !isDead ? ", serves" : ""}</td>
            <td class="number" data-label="term">${row.term}</td>
            <td class="number" data-label="last record">${count(row.number)}</td>
            <td class="number" data-label="its primary unheard for">${row.role === "copy" ? seconds(row.silent_s) : "–"}</td>
            <td class="number" data-label="told">${seconds(row.told_s)} ago</td>
          </tr>`;
        })}
      </tbody>
    </table>
  </div>`;
}

function since(failover, at) {
  const after = at - failover.killed_ms;
  return after <= 0 ? "0 s" : after < 1000 ? `+${milliseconds(after)}` : `+${(after / 1000).toFixed(1)} s`;
}

function Steps({ failover }) {
  return html`<ol class="story" aria-live="polite" aria-label="What was seen">
    ${failover.steps.map((step) => {
      const [word, level] = KINDS[step.kind] ?? [step.kind, ""];
      return html`<li>
        <span class="when muted">${since(failover, step.at_ms)}</span>
        <span class="badge ${level}">${word}</span>
        <span>${step.says}</span>
      </li>`;
    })}
  </ol>`;
}

function Show({ failover }) {
  const slowest = failover.writes.reduce((most, [, took]) => Math.max(most, took), 0);
  const good = failover.writes.filter(([, , state]) => state === "ok").length;
  return html`<div class="failover" data-state=${failover.state}>
    ${failover.killed_ms === null ? html`<p role="status">Writing for a second, as it should be…</p>` : html`<${Timeline} failover=${failover} />`}
    <dl class="figures">
      <div><dt>writes acknowledged</dt><dd>${count(good)}</dd></div>
      <div><dt>failed, or unknown</dt><dd>${count(failover.writes.length - good)}</dd></div>
      <div><dt>slowest write</dt><dd>${failover.writes.length ? milliseconds(slowest) : "–"}</dd></div>
    </dl>
    <div role="status" aria-live="polite">
      ${failover.says && html`<p class="said ${failover.state === "done" ? "ok" : "warning"}"><b>${failover.state}</b> ${failover.says}</p>`}
    </div>
    <${Steps} failover=${failover} />
    <${Positions} failover=${failover} />
  </div>`;
}

function OneCopy({ cluster, onChange }) {
  return html`<p class="said busy">
      There is one copy of every key now: while a node is down its keys wait for it, and no copy can take over. Two copies
      are made while everything is served. Start with <code>replicas: 2</code> in cluster.yaml, run
      ${" "}<code>kvstore cluster replicas 2</code>, or press:
    </p>
    <div class="buttons">
      <button type="button" class="primary" onClick=${() => onChange(replication(2, cluster))}>Keep two copies of every key…</button>
    </div>`;
}

function WithoutDemo() {
  return html`<p class="said busy">
    This page kills a node only if the cluster was started with <code>kvstore up --demo</code>, on this machine. In a
    terminal it is the second line below; <code>kvstore up</code> starts the node again at once, so that you see a
    failover only if it stays away: <code>kill -STOP</code> instead, and <code>kill -CONT</code> later.
  </p>`;
}

export function Failover() {
  const { cluster, failover, demo } = useLive();
  const [change, setChange] = useState(null);
  const [done, setDone] = useState(null);
  if (!cluster) return html`<h1>Failover</h1><p role="status">Waiting for the router…</p>`;
  const hasCopies = cluster.shards.some((shard) => shard.copies.length);
  return html`<h1>Failover</h1>
    <p class="lead">
      A shard’s primary sends every record of its log to the copies, and answers when all that are in sync have it on
      disk. When it falls silent, the copies’ lease runs out, and the controller makes one of them the primary in a new
      term. Whatever was acknowledged is there.
    </p>
    <section aria-labelledby="copies-title">
      <h2 id="copies-title">Who answers, and who could</h2>
      ${hasCopies || cluster.replicas > 1 ? html`<${CopyTable} cluster=${cluster} />` : html`<${OneCopy} cluster=${cluster} onChange=${setChange} />`}
      ${(hasCopies || cluster.replicas > 1) && html`<div class="forms"><${CopyChanges} cluster=${cluster} onChange=${setChange} /></div>`}
      <${Answer} answer=${done && { ok: "It is written down, and goes on whatever happens: the table above shows how far it is." }} />
    </section>
    <section aria-labelledby="kill-title">
      <h2 id="kill-title">Kill a node</h2>
      ${demo ? html`<${Kill} cluster=${cluster} failover=${failover} />` : html`<${WithoutDemo} />`}
      ${failover && html`<${Show} failover=${failover} />`}
    </section>
    ${change &&
    html`<${Change}
      change=${change}
      onClose=${() => setChange(null)}
      onDone=${(id) => {
        setChange(null);
        setDone(id ?? true);
      }}
    />`}
    <${Terminal}
      lines=${[
        ["who answers for what", `curl ${location.origin}/v1/cluster`],
        ["a node dies", "kill -9 $(cat data/run/shard-s1.pid)"],
        ["see it, as it happens", "kvstore status --watch"],
        ["what has happened", `curl ${location.origin}/v1/changes`],
        ["two copies of every key", "kvstore cluster replicas 2"],
        ["another primary, on purpose", "kvstore shard promote s1 --to s2"],
        ["a node restarted: no call fails", "kvstore shard restart s1"],
        ["this play-through", `curl -X POST ${location.origin}/v1/demo/kill -d '{"node":"s1"}'`],
      ]}
      read=${[
        ["DESIGN.md", "One failover"],
        ["kvstore/replication/failover.py", "who takes over, and when"],
      ]}
    />`;
}
