// The frame: navigation, theme, connection, tour; which view is shown stands in the address, after the #.

import { html, render, useEffect, useErrorBoundary, useState } from "./lib/preact-htm.js";
import { CHANGED, askForToken, question } from "./access.js";
import { Failover } from "./failover.js";
import { Keys } from "./keys.js";
import { Locks } from "./locks.js";
import { Overview } from "./overview.js";
import { RingView } from "./ring.js";
import { STEPS, Tour } from "./tour.js";
import { Transactions } from "./transactions.js";
import { useLive } from "./live.js";
import { Answer, Dialog, Field } from "./widgets.js";

const VIEWS = {
  overview: ["Overview", Overview],
  ring: ["Ring", RingView],
  locks: ["Locks", Locks],
  transactions: ["Transactions", Transactions],
  failover: ["Failover", Failover],
  keys: ["Keys", Keys],
};
const THEMES = ["auto", "light", "dark"];

/** "#locks" and "#locks/tour-7". */
function place() {
  const [view, tour] = location.hash.slice(1).split("/");
  const number = /^tour-(\d+)$/.exec(tour ?? "");
  return {
    view: VIEWS[view] ? view : "overview",
    tour: number && Number(number[1]) >= 1 && Number(number[1]) <= STEPS.length ? Number(number[1]) - 1 : null,
  };
}

function usePlace() {
  const [now, setNow] = useState(place());
  useEffect(() => {
    const follow = () => setNow(place());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return now;
}

function Theme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "auto");
  const next = () => {
    const chosen = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    try {
      localStorage.setItem("kvstore-theme", chosen);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    setTheme(chosen);
    dispatchEvent(new Event("kvstore-theme"));
  };
  return html`<button type="button" class="quiet" onClick=${next} aria-label=${`Theme: ${theme}. Change it.`}>
    <span aria-hidden="true">${{ auto: "◐", light: "☀", dark: "☾" }[theme]}</span> ${theme}
  </button>`;
}

function Connection({ connection }) {
  const says = { connecting: "connecting…", live: "live", lost: "connection lost: trying again" };
  return html`<span class="connection ${connection}" role="status" aria-live="polite"><i aria-hidden="true"></i>${says[connection]}</span>`;
}

function Header({ view, connection, onTour }) {
  return html`<header>
    <a class="brand" href="#overview"><img src="/page/icon.svg" alt="" width="24" height="24" />kvstore</a>
    <nav aria-label="Views">
      ${Object.entries(VIEWS).map(
        ([name, [title]]) => html`<a href=${`#${name}`} aria-current=${name === view ? "page" : null}>${title}</a>`,
      )}
    </nav>
    <div class="tools">
      <${Connection} connection=${connection} />
      <button type="button" class="quiet" onClick=${onTour}>Tour</button>
      <${Theme} />
    </div>
  </header>`;
}

function TokenQuestion() {
  const [asked, setAsked] = useState(question());
  const [token, setToken] = useState("");
  useEffect(() => {
    const follow = () => {
      setToken("");
      setAsked(question());
    };
    addEventListener(CHANGED, follow);
    follow();
    return () => removeEventListener(CHANGED, follow);
  }, []);
  if (!asked) return null;
  const text = token.trim();
  const isToken = /^[\x21-\x7e]+$/.test(text); // what a header can carry
  const give = () => isToken && asked.answer(text);
  return html`<${Dialog} key=${asked} title="Access token" confirm="Use it" isBusy=${!isToken} onConfirm=${give} onClose=${() => asked.answer(null)}>
    <p>
      ${asked.isRefused ? html`<b>That token is not taken here.</b>` : "What stands before this cluster lets in only who has a token."}${" "}
      This page keeps it in memory, sends it with each of its calls, and forgets it when it is closed or loaded again.
    </p>
    <form onSubmit=${(event) => (event.preventDefault(), give())}>
      <${Field} label="token"><input type="password" autocomplete="off" value=${token} onInput=${(event) => setToken(event.target.value)} /><//>
    </form>
  <//>`;
}

/** Why nothing is told of the cluster, when the answer says so. */
function Refusal({ refusal }) {
  if (!refusal) return null;
  const isOfTokens = refusal.status === 401 || Boolean(refusal.document.right);
  return html`<div class="refusal">
    <${Answer} answer=${{ problem: refusal }} />
    ${isOfTokens && html`<button type="button" onClick=${askForToken}>Enter a token…</button>`}
  </div>`;
}

function Safe({ children }) {
  const [error] = useErrorBoundary((thrown) => console.error(thrown));
  return error ? html`<p class="said warning" role="alert">This view met an error of its own. Reload the page.</p>` : children;
}

function App() {
  const { view, tour } = usePlace();
  const { connection, refusal } = useLive();
  const [title, View] = VIEWS[view];
  useEffect(() => {
    document.title = `${title} – kvstore`;
    scrollTo(0, 0);
  }, [view]);
  const go = (number) => {
    location.hash = number === null ? view : `${STEPS[number].view}/tour-${number + 1}`;
  };
  return html`<${Header} view=${view} connection=${connection} onTour=${() => go(tour ?? 0)} />
    <main id="main" tabindex="-1"><${Refusal} refusal=${refusal} /><${Safe} key=${view}><${View} /><//></main>
    <${TokenQuestion} />
    ${tour !== null && html`<${Tour} number=${tour} onStep=${go} onClose=${() => go(null)} />`}`;
}

// The link to the content must not change the address: the view stands there.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});

render(html`<${App} />`, document.getElementById("app"));
