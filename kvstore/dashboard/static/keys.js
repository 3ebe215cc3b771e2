// Keys and values: browse by prefix, look, put, compare and set, delete, with the conflict shown.

import { html, useEffect, useState } from "./lib/preact-htm.js";
import { call, deleteKey, getValue, putValue } from "./api.js";
import { bytes, count, hexDump, printableLines, seconds, shellWord } from "./format.js";
import { Answer, Dialog, Field, Shard, Terminal, Text } from "./widgets.js";

const PAGE = 50;
const SHOWN_MAX = 65536; // characters of a value that are drawn at once

function textOf(array) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(array);
  } catch {
    return null;
  }
}

function jsonOf(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}

function Value({ found }) {
  const text = textOf(found.value);
  const json = text === null ? null : jsonOf(text);
  const [form, setForm] = useState(null);
  const [isWhole, setWhole] = useState(false);
  const chosen = form ?? (text === null ? "hex" : "text");
  const shown = chosen === "hex" ? hexDump(found.value) : printableLines(chosen === "json" ? json : text);
  const isCut = !isWhole && shown.length > SHOWN_MAX;
  const tab = (name, isThere) =>
    html`<button type="button" class="tab" aria-pressed=${chosen === name} disabled=${!isThere} onClick=${() => setForm(name)}>${name}</button>`;
  return html`<div class="tabs" role="group" aria-label="Show the value as">${tab("text", text !== null)}${tab("json", json !== null)}${tab("hex", true)}</div>
    <pre class="value" tabindex="0" aria-label="The value"><bdi>${isCut ? shown.slice(0, SHOWN_MAX) : shown}</bdi></pre>
    ${isCut && html`<button type="button" class="quiet small" onClick=${() => setWhole(true)}>Show all of ${bytes(found.value.length)}</button>`}`;
}

function Facts({ found }) {
  return html`<dl class="facts">
    <div><dt>version</dt><dd>${found.version}</dd></div>
    <div><dt>size</dt><dd>${bytes(found.value.length)}</dd></div>
    <div><dt>expires</dt><dd>${found.ttl === null ? "never" : `in ${seconds(found.ttl)}`}</dd></div>
    ${found.shard && html`<div><dt>owner</dt><dd><${Shard} id=${found.shard} /></dd></div>`}
    ${found.shard && html`<div><dt>partition</dt><dd>${count(found.partition)}</dd></div>`}
  </dl>`;
}

/** Write it: plainly, or only if no other client has since. */
function Editor({ name, found, onWritten }) {
  const text = found ? textOf(found.value) : "";
  // A text field would make every end of line the same, and write more than was changed.
  const isEditable = text !== null && text.length <= SHOWN_MAX && !text.includes("\r");
  const [value, setValue] = useState(isEditable ? text : "");
  const [ttl, setTtl] = useState("");
  const [answer, setAnswer] = useState(null);
  const [isAsking, setAsking] = useState(false);
  const run = async (what, done) => {
    setAnswer(null);
    try {
      const result = await what();
      setAnswer({ ok: done(result) });
      onWritten();
    } catch (problem) {
      setAnswer({ problem, isWanted: problem.status === 412 });
    }
  };
  const written = (version) => `Written at version ${version}.`;
  const put = (guard) => run(() => putValue(name, value, { ttl: ttl.trim() || undefined, ...guard }), written);
  const guard = found ? { version: found.version } : { absent: true };
  const versionNow = answer?.problem?.document.version;
  return html`<form class="editor" onSubmit=${(event) => (event.preventDefault(), put({}))}>
    ${!isEditable && html`<p class="muted">The value is ${text === null ? "not text" : text.includes("\r") ? "text with carriage returns" : "long"}: what you write here takes its place whole.</p>`}
    <${Field} label="value"><textarea rows="5" value=${value} onInput=${(event) => setValue(event.target.value)}></textarea><//>
    <${Field} label="expires after (seconds)" hint="Empty: never."><input inputmode="decimal" size="8" value=${ttl} onInput=${(event) => setTtl(event.target.value)} /><//>
    <div class="buttons">
      <button class="primary">Put</button>
      <button type="button" onClick=${() => put(guard)}>${found ? `Put only if still version ${found.version}` : "Put only if absent"}</button>
      ${found && html`<button type="button" class="danger" onClick=${() => setAsking(true)}>Delete…</button>`}
    </div>
    <${Answer} answer=${answer} />
    ${answer?.problem?.status === 412 &&
    html`<p class="conflict">
      <b>Conflict.</b> You saw ${found ? `version ${found.version}` : "no such key"}; now it is ${versionNow ? `version ${versionNow}` : "not there"}. Another client
      wrote it in between, and your write was refused instead of undoing theirs.${" "}
      <button type="button" class="quiet small" onClick=${onWritten}>Look again</button>
    </p>`}
    ${isAsking &&
    html`<${Dialog}
      title="Delete this key?"
      confirm="Delete it"
      isDangerous=${true}
      onClose=${() => setAsking(false)}
      onConfirm=${() => {
        setAsking(false);
        run(() => deleteKey(name, { version: found.version }), () => "Deleted.");
      }}
    >
      <p><${Text} text=${name} />, version ${found.version}. If another client has written it since, it stays.</p>
    <//>`}
  </form>`;
}

function Detail({ name, onChanged }) {
  const [found, setFound] = useState(undefined); // undefined: not known yet; null: no such key
  const [problem, setProblem] = useState(null);
  const [round, setRound] = useState(0);
  useEffect(() => {
    let isOver = false;
    setProblem(null);
    getValue(name).then(
      (value) => isOver || setFound(value),
      (error) => {
        if (isOver) return;
        setFound(null);
        if (error.status !== 404) setProblem(error);
      },
    );
    return () => {
      isOver = true;
    };
  }, [name, round]);
  const again = () => {
    setRound(round + 1);
    onChanged();
  };
  return html`<section class="detail" aria-labelledby="detail-title">
    <h2 id="detail-title"><${Text} text=${name} most=${200} /></h2>
    <${Answer} answer=${problem && { problem }} />
    ${found === null && !problem && html`<p class="muted" role="status">There is no such key yet.</p>`}
    ${found && html`<${Facts} found=${found} /><${Value} key=${found.version} found=${found} />`}
    ${found !== undefined && !problem && html`<${Editor} key=${name} name=${name} found=${found} onWritten=${again} />`}
  </section>`;
}

function useListing(prefix, round) {
  const [pages, setPages] = useState({ items: [], next: null, isKnown: false });
  const [problem, setProblem] = useState(null);
  const load = async (after, items, signal) => {
    const query = new URLSearchParams({ prefix, limit: String(PAGE), ...(after ? { after } : {}) });
    try {
      const page = await call("GET", `/v1/kv?${query}`, undefined, {}, signal);
      setPages({ items: [...items, ...page.items], next: page.next, isKnown: true });
      setProblem(null);
    } catch (error) {
      if (error.name !== "AbortError") setProblem(error);
    }
  };
  useEffect(() => {
    const controller = new AbortController();
    const timer = setTimeout(() => load(null, [], controller.signal), 120);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [prefix, round]);
  return { ...pages, problem, more: () => load(pages.next, pages.items) };
}

export function Keys() {
  const [prefix, setPrefix] = useState("");
  const [name, setName] = useState(null);
  const [wanted, setWanted] = useState("");
  const [round, setRound] = useState(0);
  const listing = useListing(prefix, round);
  const open = (event) => {
    event.preventDefault();
    if (wanted) setName(wanted);
  };
  const shell = shellWord(name ?? "users/1");
  return html`<h1>Keys</h1>
    <p class="lead">
      Keys are texts, values are bytes. Every change of a key gives it a higher version, so a write can ask that no other
      client has changed it since it was read.
    </p>
    <div class="halves keys">
      <section aria-labelledby="list-title">
        <h2 id="list-title">Browse</h2>
        <div class="row">
          <${Field} label="prefix"><input value=${prefix} onInput=${(event) => setPrefix(event.target.value)} /><//>
          <button type="button" class="quiet" onClick=${() => setRound(round + 1)}>Refresh</button>
        </div>
        <${Answer} answer=${listing.problem && { problem: listing.problem }} />
        <ul class="list">
          ${listing.items.map(
            (item) => html`<li key=${item.key}>
              <button type="button" class="entry" aria-pressed=${item.key === name} onClick=${() => setName(item.key)}>
                <${Text} text=${item.key} most=${120} /><span class="muted">version ${item.version}</span>
              </button>
            </li>`,
          )}
        </ul>
        ${listing.isKnown && !listing.items.length && !listing.problem && html`<p class="muted" role="status">${prefix ? "No key begins with that." : "There is no key yet."}</p>`}
        ${listing.next && html`<button type="button" class="quiet" onClick=${listing.more}>More</button>`}
        <form class="row" onSubmit=${open}>
          <${Field} label="open or make a key"><input value=${wanted} onInput=${(event) => setWanted(event.target.value)} placeholder="greeting" /><//>
          <button class="quiet">Open</button>
        </form>
      </section>
      ${name === null ? html`<p class="empty">Choose a key, or open a new one.</p>` : html`<${Detail} key=${name} name=${name} onChanged=${() => setRound(round + 1)} />`}
    </div>
    <${Terminal}
      lines=${[
        ["list", `curl '${location.origin}/v1/kv?prefix=${encodeURIComponent(prefix)}&limit=50'`],
        ["read", `curl -i ${location.origin}/v1/kv/${encodeURIComponent(name ?? "users/1")}`],
        ["write only if unchanged", `curl -i -X PUT ${location.origin}/v1/kv/${encodeURIComponent(name ?? "users/1")} -H 'If-Match: "41"' -d hello`],
        ["on the command line", `kvstore list ${shellWord(prefix || "users/")}; kvstore get ${shell}; kvstore put ${shell} hello --if-version 41`],
      ]}
      read=${[
        ["API.md", "Keys and values"],
        ["API.md", "Compare-and-set"],
      ]}
    />`;
}
