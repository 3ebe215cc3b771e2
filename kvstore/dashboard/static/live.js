// What the router tells of the cluster, kept up to date: one stream of server-sent events for the whole page.

import { useEffect, useState } from "./lib/preact-htm.js";
import { send } from "./access.js";
import { problemOf } from "./api.js";

const HISTORY_MAX = 300;
const ARRIVED_MS = 60000;
const SILENCE_MS = 20000; // the router says something every 15 s
const FIRST_WAIT_MS = 400;
const WAIT_MS_MAX = 5000;

export const live = {
  connection: "connecting", // connecting, live, lost
  refusal: null, // Problem: why the router, or a proxy before it, tells nothing
  router: null,
  demo: false,
  map: null,
  cluster: null,
  moves: null,
  changes: null,
  locks: null,
  transactions: null,
  play: null,
  failover: null,
  history: [],
  arrivals: [], // what has changed hands of late: {epoch, from, to, partitions, runs, at}
  seenAt: {}, // performance.now() of the newest document of each kind
};

const listeners = new Set();
let isPlanned = false;

/** Redraw once a frame, however much has come. */
function changed() {
  if (isPlanned) return;
  isPlanned = true;
  const draw = () => {
    isPlanned = false;
    for (const listener of listeners) listener();
  };
  setTimeout(draw, 16);
}

/** The component is drawn again whenever something has come. */
export function useLive() {
  const [, draw] = useState(0);
  useEffect(() => {
    const listener = () => draw((number) => number + 1);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, []);
  return live;
}

function ownersOf(map) {
  return map.owners.flatMap(([owner, run]) => new Array(run).fill(map.members[owner].id));
}

/** Moves of small stores are over in a blink: what changed hands stays to be seen for a while. */
function noteArrivals(before, after) {
  const now = performance.now();
  live.arrivals = live.arrivals.filter((arrival) => now - arrival.at < ARRIVED_MS);
  if (!before || before.partitions !== after.partitions) return;
  const [then, owners] = [ownersOf(before), ownersOf(after)];
  const found = new Map();
  for (let partition = 0; partition < owners.length; partition += 1) {
    if (owners[partition] === then[partition]) continue;
    const way = `${then[partition]} ${owners[partition]}`;
    const arrival = found.get(way) ?? { epoch: after.epoch, from: then[partition], to: owners[partition], partitions: 0, runs: [], at: now };
    const last = arrival.runs[arrival.runs.length - 1];
    if (last && last[0] + last[1] === partition) last[1] += 1;
    else arrival.runs.push([partition, 1]);
    arrival.partitions += 1;
    found.set(way, arrival);
  }
  live.arrivals = [...live.arrivals, ...found.values()];
}

function take(kind, document) {
  const now = performance.now();
  const map = kind === "map" ? document : kind === "snapshot" ? document.map : null;
  if (map) noteArrivals(live.map, map);
  if (kind === "snapshot") {
    const { history, rates, ...known } = document;
    Object.assign(live, { demo: false, play: null, failover: null, ...known });
    live.history = history ?? [];
    for (const name of Object.keys(known)) live.seenAt[name] = now;
  } else if (kind === "rates") {
    live.history = [...live.history, document].slice(-HISTORY_MAX);
  } else {
    live[kind] = document;
    live.seenAt[kind] = now;
  }
  changed();
}

/** Seconds since the newest document of that kind came. */
export function ageOf(kind) {
  return (performance.now() - (live.seenAt[kind] ?? performance.now())) / 1000;
}

let lastId = null;
let waitMs = FIRST_WAIT_MS;
let current = null;

function parse(block) {
  let kind = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
    else if (line.startsWith("id: ")) lastId = line.slice(4);
  }
  if (data) take(kind, JSON.parse(data));
}

async function listenOnce(controller) {
  const headers = { Accept: "text/event-stream" };
  if (lastId !== null) headers["Last-Event-ID"] = lastId;
  const answer = await send("/v1/events", { headers, signal: controller.signal, isBackground: true });
  live.refusal = answer.ok ? null : await problemOf(answer);
  if (!answer.ok) throw live.refusal;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const silence = setTimeout(() => controller.abort(), SILENCE_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(silence));
    if (done) return;
    waitMs = FIRST_WAIT_MS;
    if (live.connection !== "live") {
      live.connection = "live";
      changed();
    }
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      parse(text.slice(0, end));
      text = text.slice(end + 2);
    }
  }
}

async function listen() {
  for (;;) {
    // A page that is not looked at does not listen: a browser has only six connections to a router.
    while (document.hidden) await new Promise((resolve) => addEventListener("visibilitychange", resolve, { once: true }));
    current = new AbortController();
    try {
      await listenOnce(current);
    } catch {
      // The connection broke, the router is away or refuses, or the page was hidden: try again.
    }
    if (!document.hidden) {
      live.connection = "lost";
      changed();
    }
    await new Promise((resolve) => setTimeout(resolve, waitMs));
    waitMs = Math.min(2 * waitMs, WAIT_MS_MAX);
  }
}

addEventListener("visibilitychange", () => {
  if (document.hidden && current) current.abort();
});
listen();
