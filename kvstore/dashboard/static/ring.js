// Consistent hashing, seen: the real ring, the way of a key, and partitions on their way to another shard.

import { html, useEffect, useState } from "./lib/preact-htm.js";
import { call, pathOf } from "./api.js";
import { Changes, Moves } from "./changes.js";
import { count, plural, shellWord } from "./format.js";
import { useLive } from "./live.js";
import { Ring, stops } from "./ring_drawing.js";
import { Answer, Field, Shard, Terminal, Text } from "./widgets.js";

function Way({ way, map }) {
  const met = stops(map, way.partition, way.owner).map((stop) => stop.id);
  const passed = [...new Set(met.slice(0, -1))];
  return html`<ol class="way">
    <li><b>hash</b> xxh3-64 of the key’s bytes: <code>${way.hash}</code></li>
    <li><b>partition</b> its top bits: ${count(way.partition)} of ${count(way.partitions)}</li>
    <li>
      <b>walk</b> clockwise from the partition’s point
      ${passed.length
        ? html`, past ${passed.map((id, i) => html`${i ? ", " : " "}<${Shard} id=${id} />`)}, which had no room for it when it was placed`
        : ": the first virtual node that it meets is the owner’s"}
    </li>
    <li><b>owner</b> <${Shard} id=${way.owner} />, which is ${way.owner_state}</li>
    <li>
      <b>there</b> ${way.row === "value" ? html`version ${way.version}, ${plural(way.bytes, "byte")}${way.cached ? ", in memory" : ""}` : way.row ?? way.detail}
      ${way.lock && html`; locked by <${Text} text=${way.lock.owner || "(no name)"} /> with token ${way.lock.token}`}
      ${way.intent && html`; an intent of transaction <code>${way.intent.txn}</code>`}
    </li>
    <li>
      <b>copies</b> ${way.copies.length
        ? html`the primary is node ${way.primary}; ${way.copies.length === 1 ? "a copy is" : "copies are"} on ${way.copies.map((node, i) => html`${i ? ", " : ""}node <${Shard} id=${node} />`)}, clockwise on the outer circle from the node named ${way.owner}`
        : "none besides: there is one copy of every key"}
    </li>
  </ol>`;
}

function KeyWalk({ map, way, onWay }) {
  const [key, setKey] = useState("");
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    setProblem(null);
    if (!key) return void onWay(null);
    const controller = new AbortController();
    const timer = setTimeout(async () => {
      try {
        onWay(await call("GET", pathOf("/v1/explain/", key), undefined, {}, controller.signal));
      } catch (error) {
        if (error.name === "AbortError") return;
        onWay(null);
        setProblem(error);
      }
    }, 120);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [key, map.epoch]);
  return html`<section aria-labelledby="walk-title">
    <h2 id="walk-title">The way of a key</h2>
    <${Field} label="key" hint="Type any key: it need not be there."><input id="walk-key" value=${key} placeholder="users/42" onInput=${(event) => setKey(event.target.value)} /><//>
    <div aria-live="polite">${way && key && html`<${Way} way=${way} map=${map} />`}</div>
    <${Answer} answer=${problem && { problem }} />
  </section>`;
}

function Legend({ map }) {
  return html`<ul class="legend shards">
    ${map.members.map((member, i) => {
      const owned = map.owners.reduce((sum, [owner, run]) => sum + (owner === i ? run : 0), 0);
      return html`<li><${Shard} id=${member.id} /> <b>${((100 * owned) / map.partitions).toFixed(1)} %</b></li>`;
    })}
  </ul>`;
}

export function RingView() {
  const { map, cluster, moves, changes, arrivals } = useLive();
  const [way, setWay] = useState(null);
  if (!map) return html`<h1>Ring</h1><p role="status">Waiting for the cluster map…</p>`;
  const steps = moves && moves.epoch === map.epoch ? moves.moves : [];
  return html`<h1>Ring</h1>
    <p class="lead">
      A key’s hash names its partition. Each shard has many points on the ring, its virtual nodes; a partition belongs to
      the first shard that a walk clockwise meets and that still has room.
    </p>
    <div class="halves">
      <div>
        <section aria-label="The ring">
          <${Ring} map=${map} way=${way} steps=${steps} arrivals=${arrivals} />
          <${Legend} map=${map} />
          ${map.lost.map(
            (lost) => html`<p role="status">
              Shard <b>${lost.shard}</b> was given up in epoch ${lost.epoch} with ${count(lost.partitions)} partitions.
              ${lost.opened ? `They are open again since epoch ${lost.opened}, and began empty.` : "They wait until every other shard has heard of it."}
            </p>`,
          )}
          <p class="muted">
            Outer band: partitions by owner. Ticks inside: ${count(map.virtual_nodes.length)} virtual nodes. Outermost, when
            there are any: partitions on their way, or just arrived, in the colour of where they go.
            ${map.replicas > 1 && " The circle around all: each node at the hash of its name; a shard’s copies go to the next nodes clockwise."}
          </p>
        </section>
        <${Moves} />
      </div>
      <div>
        <${KeyWalk} map=${map} way=${way} onWay=${setWay} />
        <${Changes} map=${map} cluster=${cluster} changes=${changes} />
      </div>
    </div>
    <${Terminal}
      lines=${[
        ["the way of a key", `curl ${location.origin}/v1/explain/${encodeURIComponent(way?.key ?? "users/42")}`],
        ["the same, for people", `kvstore explain ${shellWord(way?.key ?? "users/42")}`],
        ["how even the ring is", "kvstore ring"],
        ["what adding a shard would move", `curl -X POST '${location.origin}/v1/shards?plan=true' -d '{"id":"s9"}'`],
        ["add it, with progress", "kvstore shard add s9"],
      ]}
      read=${[
        ["DESIGN.md", "1. The ring"],
        ["DESIGN.md", "6. Moves"],
        ["kvstore/placement/ring.py", "how the ring works, and why"],
      ]}
    />`;
}
