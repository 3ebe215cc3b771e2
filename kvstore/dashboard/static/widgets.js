// Parts that several views have in common.

import { html, useEffect, useRef, useState } from "./lib/preact-htm.js";
import { count, milliseconds, plural, bytes, printable } from "./format.js";
import { live } from "./live.js";

/** A text of a client, apart from the direction of writing around it. */
export function Text({ text, most = 200 }) {
  return html`<bdi class="text" title=${printable(text)}>${printable(text, most)}</bdi>`;
}

/** The index of the colour of a shard, which its home, the node of its name, has too: its place in the map. */
export function colourOf(shard) {
  const members = live.map?.members ?? [];
  const index = members.findIndex((member) => member.id === shard);
  return index < 0 ? "none" : String(index % 12);
}

export function Shard({ id }) {
  return html`<span class="shard"><i class="chip c${colourOf(id)}" aria-hidden="true"></i>${id}</span>`;
}

/** Status for people who do not see the page: said when it changes. */
export function Said({ level = "ok", children }) {
  return html`<p class="said ${level}" role="status" aria-live="polite">${children}</p>`;
}

/** The right that a call lacks, as the answer of a router or proxy that knows rights names it. */
function MissingRight({ document }) {
  if (!document?.right) return null;
  const keys = document.prefix ? html` for keys that begin with <${Text} text=${document.prefix} />` : "";
  return html`The right <b><${Text} text=${document.right} /></b>${keys} is missing.${" "}`;
}

/** The answer to something that was done here: null, {ok: text} or {problem: Problem}. */
export function Answer({ answer }) {
  return html`<div role="status" aria-live="polite" class="answer">
    ${answer?.ok && html`<p class="said ok">${answer.ok}</p>`}
    ${answer?.problem &&
    html`<p class="said ${answer.isWanted ? "wanted" : "warning"}">
      <b>${answer.problem.status || ""} ${answer.problem.code ?? ""}</b> ${printable(answer.problem.message)}${" "}
      <${MissingRight} document=${answer.problem.document} />
      <span class="muted">${printable(answer.problem.document?.next_step ?? "")}</span>
    </p>`}
  </div>`;
}

function Copy({ line }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(line);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  if (!navigator.clipboard) return null;
  return html`<button class="quiet small" type="button" onClick=${copy} aria-label=${`Copy ${line}`}>
    ${isCopied ? "copied" : "copy"}
  </button>`;
}

/** A document that this router serves, at a heading of it. */
const heading = (file, title) => `/page/docs/${file}#:~:text=${encodeURIComponent(`# ${title}`)}`;

/** The command line asks the usual address, unless it is told another one. */
function elsewhere() {
  const isUsual = ["http://127.0.0.1:8080", "http://localhost:8080"].includes(location.origin);
  return isUsual ? [] : [["once, for the kvstore lines", `export KVSTORE_URL=${location.origin}`]];
}

/** What does or asks the same from a terminal, and where to read on. `lines`: [what it does, command]; `read`: a
 * document and a heading of it, or a file of the repository and what it tells. */
export function Terminal({ lines, read }) {
  return html`<section class="terminal" aria-labelledby="terminal-title">
    <h2 id="terminal-title">The same from a terminal</h2>
    <dl>
      ${[...elsewhere(), ...lines].map(
        ([what, line]) =>
          html`<div>
            <dt>${what}</dt>
            <dd><code>${line}</code><${Copy} line=${line} /></dd>
          </div>`,
      )}
    </dl>
    <p class="muted">
      Read on:${" "}
      ${read.map(([file, about]) =>
        file.endsWith(".md")
          ? html`<a href=${heading(file, about)}>${about}</a>${", "}`
          : html`${about}: <code>${file}</code>${", "}`,
      )}
      <a href="/openapi.json">every call of this router</a>.
    </p>
  </section>`;
}

export function Field({ label, hint, children }) {
  return html`<label class="field"><span>${label}</span>${children}${hint && html`<small>${hint}</small>`}</label>`;
}

/** A question before something is done. `children`: what would happen. */
export function Dialog({ title, confirm, isBusy, isDangerous, onConfirm, onClose, children }) {
  const ref = useRef(null);
  useEffect(() => {
    const dialog = ref.current;
    if (!dialog.open) dialog.showModal();
    return () => dialog.close();
  }, []);
  return html`<dialog ref=${ref} aria-labelledby="dialog-title" onCancel=${onClose} onClose=${onClose}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
    <div class="buttons">
      <button type="button" class="quiet" onClick=${onClose}>${confirm ? "Leave it" : "Close"}</button>
      ${confirm &&
      html`<button type="button" class=${isDangerous ? "danger" : "primary"} disabled=${isBusy} onClick=${onConfirm}>
        ${confirm}
      </button>`}
    </div>
  </dialog>`;
}

/** What would move. */
export function Plan({ plan }) {
  if (!plan.moves.length) return html`<p>Nothing would move.</p>`;
  return html`<p>
      <b>${plural(plan.partitions, "partition")}</b> of ${count(live.cluster?.partitions)} would move, with about${" "}
      ${count(plan.keys)} keys (${bytes(plan.bytes)}). No call fails because of it.
    </p>
    <table class="plan">
      <thead>
        <tr><th scope="col">from</th><th scope="col">to</th><th scope="col" class="number">partitions</th><th scope="col" class="number">keys</th></tr>
      </thead>
      <tbody>
        ${plan.moves.map(
          (move) => html`<tr>
            <td><${Shard} id=${move.from} /></td>
            <td><${Shard} id=${move.to} /></td>
            <td class="number">${count(move.partitions)}</td>
            <td class="number">${count(move.keys)}</td>
          </tr>`,
        )}
      </tbody>
    </table>`;
}

export function Pause({ ms }) {
  return html`<span>${ms ? milliseconds(ms) : "–"}</span>`;
}
