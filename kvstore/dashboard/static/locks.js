// Locks with fencing tokens: who holds what, who waits, and two clients side by side.

import { html, useEffect, useState } from "./lib/preact-htm.js";
import { call, pathOf, putValue } from "./api.js";
import { count, printable, seconds, shellWord } from "./format.js";
import { ageOf, useLive } from "./live.js";
import { Answer, Field, Shard, Terminal, Text } from "./widgets.js";

const TTL_S = 8;
const WAIT_S = 30;

/** Drawn again four times a second: time runs on without any event. */
function useTicking() {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((number) => number + 1), 250);
    return () => clearInterval(timer);
  }, []);
}

function Held({ locks }) {
  useTicking();
  if (!locks) return html`<p role="status">Waiting for the shards…</p>`;
  if (!locks.items.length) return html`<p class="muted">No lock is held now.</p>`;
  const age = ageOf("locks");
  return html`<div class="wide">
      <table class="cards">
        <thead>
          <tr><th scope="col">lock</th><th scope="col">holder</th><th scope="col" class="number">token</th><th scope="col">time left</th><th scope="col">who waits, in order</th><th scope="col">at</th></tr>
        </thead>
        <tbody>
          ${locks.items.map((lock) => {
            const left = Math.max(0, lock.ttl_left - age);
            return html`<tr key=${`${lock.name} ${lock.token}`}>
              <th scope="row" data-label="lock"><${Text} text=${lock.name} most=${80} /></th>
              <td data-label="holder"><${Text} text=${lock.owner || "(no name)"} most=${60} /></td>
              <td class="number" data-label="token">${lock.token}</td>
              <td data-label="time left"><meter min="0" max=${lock.ttl} value=${left} aria-label="time left"></meter> ${seconds(left)} of ${seconds(lock.ttl)}</td>
              <td data-label="who waits">
                ${lock.waiting ? html`<ol class="waiters">${lock.waiters.map((owner) => html`<li><${Text} text=${owner || "(no name)"} most=${40} /></li>`)}</ol>` : "none"}
                ${lock.waiting > lock.waiters.length && html`<span class="muted">and ${count(lock.waiting - lock.waiters.length)} more</span>`}
              </td>
              <td data-label="at"><${Shard} id=${lock.shard} /></td>
            </tr>`;
          })}
        </tbody>
      </table>
    </div>
    ${locks.count > locks.items.length && html`<p class="muted">${count(locks.items.length)} of ${count(locks.count)} are shown.</p>`}`;
}

function Client({ name, lock, about }) {
  const [token, setToken] = useState(null);
  const [state, setState] = useState("idle"); // idle, waiting, holding, stale
  const [answer, setAnswer] = useState(null);
  const { locks } = useLive();
  const held = locks?.items.find((item) => item.name === lock);
  useEffect(() => {
    // It learns nothing by itself: that is the point. The pane only says what it does not know.
    if (token === null || !locks || ageOf("locks") > 1) return;
    if (state === "holding" && held?.token !== token) setState("stale");
    if (state === "stale" && held?.token === token) setState("holding"); // what was told was older than the grant
  }, [locks]);
  const attempt = async (what) => {
    setAnswer(null);
    try {
      setAnswer({ ok: await what() });
    } catch (problem) {
      setAnswer({ problem, isWanted: problem.code === "lock-lost" || problem.code === "locked" });
    }
  };
  const take = () =>
    attempt(async () => {
      setState("waiting");
      try {
        const granted = await call("POST", pathOf("/v1/locks/", lock), { ttl: TTL_S, wait: WAIT_S, owner: name });
        setToken(granted.token);
        setState("holding");
        return `Granted with token ${granted.token}, for ${TTL_S} s.`;
      } catch (error) {
        setState(token ? "stale" : "idle");
        throw error;
      }
    });
  const renew = () =>
    attempt(async () => {
      await call("PUT", pathOf("/v1/locks/", lock), undefined, { "Lock-Token": String(token) });
      setState("holding");
      return `Renewed: another ${TTL_S} s.`;
    });
  const release = () =>
    attempt(async () => {
      await call("DELETE", pathOf("/v1/locks/", lock), undefined, { "Lock-Token": String(token) });
      setState("idle");
      setToken(null);
      return "Released: the first in the queue has it now.";
    });
  const write = () =>
    attempt(async () => {
      const version = await putValue(lock, `written by ${name}`, token ? { token } : {});
      return `Written: the store took it, at version ${version}.`;
    });
  const says = {
    idle: "holds nothing",
    waiting: "waits in the queue…",
    holding: `holds it, token ${token}`,
    stale: `still thinks that it holds it, token ${token}`,
  };
  return html`<article class="pane ${state}" aria-labelledby=${`client-${name}`}>
    <h3 id=${`client-${name}`}>${name}</h3>
    <p class="muted">${about}</p>
    <p class="state"><span class="badge ${state === "holding" ? "ok" : state === "stale" ? "warning" : state === "waiting" ? "busy" : ""}">${says[state]}</span></p>
    <div class="buttons">
      <button type="button" class="primary" disabled=${state === "waiting" || state === "holding"} onClick=${take}>Take, or wait</button>
      <button type="button" disabled=${token === null} onClick=${renew}>Renew</button>
      <button type="button" disabled=${token === null} onClick=${release}>Release</button>
      <button type="button" onClick=${write}>Write ${token === null ? "without a token" : `with token ${token}`}</button>
    </div>
    <${Answer} answer=${answer} />
  </article>`;
}

export function Locks() {
  const { locks } = useLive();
  const [lock, setLock] = useState("demo/lock");
  return html`<h1>Locks</h1>
    <p class="lead">
      A lock is a lease: it ends by itself unless it is renewed. Every grant has a token that rises for ever, and a write to
      the key of that name must show the holder’s token. A holder that slept too long is refused by the store itself.
    </p>
    <section aria-labelledby="held-title">
      <h2 id="held-title">Held now</h2>
      <${Held} locks=${locks} />
    </section>
    <section aria-labelledby="two-title">
      <h2 id="two-title">Two clients, one lock</h2>
      <ol class="recipe">
        <li>Let Alice take the lock, then let Bob take it: he waits.</li>
        <li><b>Hand on:</b> Alice releases, and Bob has it at once. <b>Lose:</b> instead do nothing for ${TTL_S} s: the lease ends, and Bob has it.</li>
        <li>Now let Alice write with her old token: <b>412 lock-lost</b>. Bob’s write is taken.</li>
      </ol>
      <${Field} label="lock and key"><input value=${lock} onInput=${(event) => setLock(event.target.value || "demo/lock")} /><//>
      <div class="panes">
        <${Client} key=${`a ${lock}`} name="Alice" lock=${lock} about="takes the lock, and may fall asleep" />
        <${Client} key=${`b ${lock}`} name="Bob" lock=${lock} about="waits for it, and gets the next token" />
      </div>
    </section>
    <${Terminal}
      lines=${[
        ["take it, or wait", `curl -X POST ${location.origin}/v1/locks/${encodeURIComponent(lock)} -d '{"ttl":8,"wait":30,"owner":"me"}'`],
        ["write with its token", `curl -X PUT ${location.origin}/v1/kv/${encodeURIComponent(lock)} -H 'Lock-Token: 12' -d hello`],
        ["those held", `curl ${location.origin}/v1/locks`],
        ["run a command under it", `kvstore lock ${shellWord(printable(lock))} --wait 30 -- ./report.sh`],
      ]}
      read=${[
        ["API.md", "Locks"],
        ["DESIGN.md", "4. The lock table"],
        ["kvstore/transactions/locks.py", "what a textbook lock gets wrong"],
      ]}
    />`;
}
