// Ten steps through the ideas, about two minutes each, for one person or in front of a class.

import { html, useEffect, useRef } from "./lib/preact-htm.js";

export const STEPS = [
  {
    view: "overview",
    title: "A cluster at a glance",
    text: "Keys live on shards, shards on nodes; a router stands before them and knows who owns what. The sentence on top says how all of it is; the curves show what this router answers in each second.",
    look: "Find the shards in the table, each with its share of the 4,096 partitions. In a terminal: kvstore put greeting hello. It appears within a second.",
  },
  {
    view: "ring",
    title: "From a key to its shard",
    text: "A key’s hash names one of 4,096 partitions. From the partition’s point one walks clockwise to the first virtual node whose shard has room.",
    look: "Type a key under “The way of a key”, then change one letter: its hash, and with it its place, is another one.",
  },
  {
    view: "ring",
    title: "Why virtual nodes",
    text: "With one point for each shard, chance would give one of them half of the ring. With 64 points each, and a bound on what one may take, the shares are even.",
    look: "Compare the percentages below the ring. In a terminal: kvstore ring.",
  },
  {
    view: "ring",
    title: "A shard joins",
    text: "Only the partitions that the newcomer needs move, and only to it: a fifth, when four become five. A plain “hash modulo number of shards” would move four fifths.",
    look: "Press “Add a shard…”, read the plan, confirm. Each group is copied, catches up, is frozen for some milliseconds, and changes hands.",
  },
  {
    view: "keys",
    title: "A key, its version, a conflict",
    text: "Every change of a key gets a higher version. “Put only if still version N” refuses to undo what another client wrote in between.",
    look: "Open a key here and in a second window. Write it there, then use “Put only if…” here: 412, and nothing is lost.",
  },
  {
    view: "locks",
    title: "A lock is a lease",
    text: "A lock ends by itself unless its holder renews it: a holder that died must not block all others for ever. Those who wait are served in their order.",
    look: "Let Alice take the lock, then Bob: he waits. Release it, and he has it at once.",
  },
  {
    view: "locks",
    title: "The stale holder",
    text: "A holder may be asleep while its lease ends, and write afterwards as if it still held it. So every grant has a higher token, and the store itself compares it.",
    look: "Let Alice take it and do nothing for eight seconds while Bob waits. Then let her write: 412 lock-lost.",
  },
  {
    view: "transactions",
    title: "Two shards, one decision",
    text: "The participant prepares and votes; the anchor writes the decision, which is the moment of the commit; the participant finishes. No reader ever sees half of it.",
    look: "Press “Transfer 10” and follow the messages. (This and the next step need kvstore up --demo.)",
  },
  {
    view: "transactions",
    title: "The coordinator dies",
    text: "Between vote and decision no other may touch the prepared key: it is in doubt. What finds it asks the anchor, and the answer is final, whichever it is.",
    look: "Kill the coordinator before it decides, then after. The first transfer is aborted, the second committed; the sum stays the same.",
  },
  {
    view: "failover",
    title: "A node dies",
    text: "Every record of a shard is on the disks of its primary and its copies before a client is answered. So a copy may take over: once the lease that it granted is over, in a new term, with all that was acknowledged.",
    look: "Kill a node, and follow the line of time: lease, silence, promotion, the first write. (This needs kvstore up --demo, and two copies.)",
  },
];

export function Tour({ number, onStep, onClose }) {
  const step = STEPS[number];
  const title = useRef(null);
  useEffect(() => title.current?.focus(), [number]);
  return html`<aside class="tour" aria-labelledby="tour-title">
    <div>
      <p class="muted">Tour, step ${number + 1} of ${STEPS.length}</p>
      <h2 id="tour-title" tabindex="-1" ref=${title}>${step.title}</h2>
    </div>
    <p>${step.text}</p>
    <p class="look"><b>See it:</b> ${step.look}</p>
    <div class="buttons">
      <button type="button" class="quiet" onClick=${onClose}>End</button>
      <button type="button" disabled=${number === 0} onClick=${() => onStep(number - 1)}>Back</button>
      <button type="button" class="primary" disabled=${number === STEPS.length - 1} onClick=${() => onStep(number + 1)}>Next</button>
    </div>
  </aside>`;
}
