// Two-phase commit: what is at work or in doubt now, and a transfer played through, with or without its coordinator.

import { html, useEffect, useState } from "./lib/preact-htm.js";
import { call } from "./api.js";
import { count, plural, seconds } from "./format.js";
import { ageOf, useLive } from "./live.js";
import { Sequence } from "./sequence.js";
import { Answer, Shard, Terminal, Text } from "./widgets.js";

const SHOWN_FOR_MS = 8000;
const ROWS_MAX = 20;
const OVER_MAX = 3;

/** Most transactions are over before they could be seen: those that were there stay for a while, greyed. */
function useRecent(transactions) {
  const [kept, setKept] = useState(new Map());
  useEffect(() => {
    if (!transactions) return;
    const now = performance.now();
    const next = new Map();
    for (const [id, entry] of kept) if (now - entry.seen < SHOWN_FOR_MS) next.set(id, { ...entry, isOver: true });
    for (const item of transactions.items) next.set(item.id, { item, seen: now, isOver: false });
    setKept(next);
  }, [transactions]);
  const entries = [...kept.values()];
  return [...entries.filter((entry) => !entry.isOver).slice(0, ROWS_MAX), ...entries.filter((entry) => entry.isOver).slice(-OVER_MAX)];
}

function AtWork({ transactions }) {
  const recent = useRecent(transactions);
  const age = ageOf("transactions");
  if (!recent.length) {
    return html`<p class="muted">None now. Transactions that touch one shard only are a single commit there, and never appear here.</p>`;
  }
  return html`<div class="wide">
    <table class="cards">
      <thead>
        <tr><th scope="col">transaction</th><th scope="col">state</th><th scope="col" class="number">age</th><th scope="col">anchor</th><th scope="col">holds keys at</th></tr>
      </thead>
      <tbody>
        ${recent.map(
          ({ item, isOver }) => html`<tr key=${item.id} class=${isOver ? "over" : ""}>
            <th scope="row" data-label="transaction"><code>${item.id}</code></th>
            <td data-label="state">
              <span class="badge ${isOver ? "" : item.abandoned ? "warning" : "busy"}">${isOver ? "over" : item.abandoned ? "in doubt: its router is gone" : "at work"}</span>
            </td>
            <td class="number" data-label="age">${isOver ? "" : seconds(item.age_s + age)}</td>
            <td data-label="anchor"><${Text} text=${item.anchor} most=${60} /></td>
            <td data-label="holds keys at">
              ${item.at.map((part, i) => html`${i ? "; " : ""}<${Shard} id=${part.shard} /> ${part.keys.slice(0, 3).map((key, j) => html`${j ? ", " : ""}<${Text} text=${key} most=${40} />`)}${part.keys_count > 3 ? ` and ${count(part.keys_count - 3)} more` : ""}`)}
            </td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

function Accounts({ play }) {
  return html`<dl class="figures accounts">
    ${play.accounts.map(
      (account) => html`<div><dt><${Text} text=${account.key} /> at <${Shard} id=${account.shard} /></dt><dd>${count(account.balance)}</dd></div>`,
    )}
    <div><dt>sum</dt><dd>${count(play.accounts.reduce((sum, account) => sum + account.balance, 0))}</dd></div>
  </dl>`;
}

function PlayThrough({ play }) {
  const [answer, setAnswer] = useState(null);
  const isBusy = play && (play.state === "running" || play.state === "recovering");
  const begin = async (stop) => {
    setAnswer(null);
    try {
      await call("POST", "/v1/demo/transfer", { amount: 10, stop });
    } catch (problem) {
      setAnswer({ problem });
    }
  };
  return html`<div class="buttons">
      <button type="button" class="primary" disabled=${isBusy} onClick=${() => begin("never")}>Transfer 10</button>
      <button type="button" class="danger" disabled=${isBusy} onClick=${() => begin("before-decision")}>Kill the coordinator before it decides</button>
      <button type="button" class="danger" disabled=${isBusy} onClick=${() => begin("after-decision")}>Kill it after it decided</button>
    </div>
    <${Answer} answer=${answer} />
    ${play && html`<${Accounts} play=${play} /><${Sequence} play=${play} />`}
    ${!play && html`<p class="muted">Two accounts with 100 each, on different shards. Every message of the transfer is drawn, with its real time.</p>`}`;
}

function WithoutDemo() {
  return html`<p class="said busy">
    Killing a coordinator needs one to spare: start the cluster with <code>kvstore up --demo</code>, which adds a second
    router on this machine for that. It is not there now; everything else on this page works without it.
  </p>`;
}

export function Transactions() {
  const { transactions, play, demo } = useLive();
  return html`<h1>Transactions</h1>
    <p class="lead">
      All or nothing, over any keys of any shards: each shard prepares and votes, one of them, the anchor, keeps the
      decision, and the others finish. The state is data of the shards, so a router may die at any line.
    </p>
    <section aria-labelledby="work-title">
      <h2 id="work-title">At work and in doubt${transactions?.intents ? `: ${plural(transactions.intents, "key")} carry an intent` : ""}</h2>
      <${AtWork} transactions=${transactions} />
    </section>
    <section aria-labelledby="play-title">
      <h2 id="play-title">A transfer, step by step</h2>
      ${demo ? html`<${PlayThrough} play=${play} />` : html`<${WithoutDemo} />`}
    </section>
    <${Terminal}
      lines=${[
        ["a transaction", `curl ${location.origin}/v1/txn -d '{"then":[{"op":"put","key":"a","value":"1"},{"op":"put","key":"b","value":"2"}]}'`],
        ["what became of one", `curl ${location.origin}/v1/txn/ID`],
        ["from a file", "kvstore txn transfer.json"],
        ["is any in doubt?", "kvstore status"],
        ["this play-through", `curl -X POST ${location.origin}/v1/demo/transfer -d '{"stop":"before-decision"}'`],
      ]}
      read=${[
        ["API.md", "Transactions"],
        ["DESIGN.md", "5. Transactions"],
        ["kvstore/router/coordinator.py", "the order of the messages, and where it may die"],
      ]}
    />`;
}
