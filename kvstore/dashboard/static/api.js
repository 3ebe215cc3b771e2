// The router's public API, as any program may call it.

import { send } from "./access.js";

export class Problem extends Error {
  /** `document`: the RFC 9457 problem of the answer. */
  constructor(document) {
    super(document.detail || document.title || "The request failed.");
    this.document = document;
    this.status = document.status;
    this.code = document.code;
  }
}

const UNREACHED = {
  status: 0,
  code: "unreachable",
  title: "The router cannot be reached",
  detail: "The router does not answer.",
  next_step: "Is `kvstore up` still running? This page goes on by itself when it is back.",
};

/** Of an answer that is none of the router's, nor a problem document, only the status is known. */
export async function problemOf(answer) {
  const { status } = answer;
  try {
    const document = await answer.json();
    return new Problem({ ...document, status });
  } catch {
    return new Problem({ status, detail: `The router, or a proxy before it, answered ${status} and did not say why.` });
  }
}

/** A path with the key in it. A lone surrogate is no Unicode text, and refused. */
export function pathOf(prefix, key) {
  try {
    return prefix + encodeURIComponent(key);
  } catch {
    throw new Problem({ status: 400, code: "key-not-utf8", detail: "The key is not Unicode text." });
  }
}

async function ask(method, path, { body, headers, signal } = {}) {
  let answer;
  try {
    answer = await send(path, { method, body, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(UNREACHED);
  }
  if (answer.ok || answer.status === 304) return answer;
  throw await problemOf(answer);
}

/** JSON in, JSON out (or null). Raises Problem. */
export async function call(method, path, document, headers = {}, signal = undefined) {
  const body = document === undefined ? undefined : JSON.stringify(document);
  const answer = await ask(method, path, { body, headers, signal });
  return answer.status === 204 || answer.headers.get("Content-Type") === null ? null : answer.json();
}

/** A change of the cluster: the id of the resource that tells how far it is. Raises Problem. */
export async function beginChange(method, path, document) {
  const answer = await ask(method, path, { body: document === undefined ? undefined : JSON.stringify(document) });
  return answer.headers.get("Location").split("/").pop();
}

// A browser rewrites a path that ends in a segment "." or "..", in whatever way it is written: those two go by batch.
const DOTS = new Set([".", ".."]);

function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

async function batch(op) {
  const { results } = await call("POST", "/v1/batch", { ops: [op] });
  if (results[0].status >= 400) throw new Problem(results[0]);
  return results[0];
}

/** {value: Uint8Array, version, shard, partition, ttl}. Raises Problem. */
export async function getValue(key) {
  if (DOTS.has(key)) {
    const found = await batch({ op: "get", key });
    const value = found.value_base64 === undefined ? new TextEncoder().encode(found.value) : fromBase64(found.value_base64);
    return { value, version: found.version, shard: null, partition: null, ttl: found.ttl ?? null };
  }
  const answer = await ask("GET", pathOf("/v1/kv/", key));
  const ttl = answer.headers.get("Kv-Ttl");
  return {
    value: new Uint8Array(await answer.arrayBuffer()),
    version: Number(answer.headers.get("ETag").replaceAll('"', "")),
    shard: answer.headers.get("Kv-Shard"),
    partition: Number(answer.headers.get("Kv-Partition")),
    ttl: ttl === null ? null : Number(ttl),
  };
}

/** Headers of a conditional or fenced write. */
export function conditions({ version, absent, token } = {}) {
  const headers = {};
  if (version) headers["If-Match"] = `"${version}"`;
  if (absent) headers["If-None-Match"] = "*";
  if (token) headers["Lock-Token"] = String(token);
  return headers;
}

/** The new version. Raises Problem. */
export async function putValue(key, value, { ttl, ...guard } = {}) {
  if (DOTS.has(key) && !Object.keys(conditions(guard)).length) {
    return (await batch({ op: "put", key, value, ...(ttl ? { ttl } : {}) })).version;
  }
  const query = ttl ? `?ttl=${encodeURIComponent(ttl)}` : "";
  const answer = await ask("PUT", pathOf("/v1/kv/", key) + query, { body: value, headers: conditions(guard) });
  return Number(answer.headers.get("ETag").replaceAll('"', ""));
}

export async function deleteKey(key, guard = {}) {
  if (DOTS.has(key) && !Object.keys(conditions(guard)).length) return void (await batch({ op: "delete", key }));
  await ask("DELETE", pathOf("/v1/kv/", key), { headers: conditions(guard) });
}
