// The ring as it is: partitions coloured by owner, virtual nodes, what moves, the walk of a key, the circle of nodes.

import { html } from "./lib/preact-htm.js";
import { count, plural } from "./format.js";

const SIZE = 600;
const MIDDLE = SIZE / 2;
const BAND = [222, 264]; // inner and outer radius of the partitions
const MOVING = [269, 282];
const TICKS = [192, 214];
const WALK = 172;
const NODES = 306; // the second circle, on which each node stands once
const MARGIN = 44; // for it and its names
const INWARD = 24; // from one stop of a walk to the next
const POINTS = 4294967296; // of the ring, as the top 32 bits

function at(turn, radius) {
  const angle = turn * 2 * Math.PI - Math.PI / 2;
  return [MIDDLE + radius * Math.cos(angle), MIDDLE + radius * Math.sin(angle)].map((part) => part.toFixed(2));
}

/** A piece of a ring from one turn (0 to 1, clockwise from the top) to another. */
function piece(from, to, [inner, outer]) {
  if (to - from >= 0.99999) {
    return `${piece(0, 0.5, [inner, outer])} ${piece(0.5, 0.99998, [inner, outer])}`;
  }
  const large = to - from > 0.5 ? 1 : 0;
  return (
    `M${at(from, outer)}A${outer} ${outer} 0 ${large} 1 ${at(to, outer)}` +
    `L${at(to, inner)}A${inner} ${inner} 0 ${large} 0 ${at(from, inner)}Z`
  );
}

function owners(map) {
  let first = 0;
  return map.owners.map(([owner, partitions]) => {
    const run = { owner, first, partitions };
    first += partitions;
    return run;
  });
}

function Band({ map }) {
  return html`<g class="band">
    ${owners(map).map(
      ({ owner, first, partitions }) => html`<path
        class="o${owner % 12}"
        d=${piece(first / map.partitions, (first + partitions) / map.partitions, BAND)}
      >
        <title>${map.members[owner].id}: partitions ${first} to ${first + partitions - 1}</title>
      </path>`,
    )}
  </g>`;
}

function Ticks({ map }) {
  return html`<g class="ticks">
    ${map.virtual_nodes.map(([point, owner]) => {
      const turn = point / POINTS;
      const [x1, y1] = at(turn, TICKS[0]);
      const [x2, y2] = at(turn, TICKS[1]);
      return html`<line class="s${owner % 12}" x1=${x1} y1=${y1} x2=${x2} y2=${y2} />`;
    })}
  </g>`;
}

function Moving({ map, steps, arrivals }) {
  return html`<g class="moving">
    ${arrivals.map((arrival) =>
      arrival.runs.map(([first, partitions]) => {
        const owner = map.members.findIndex((member) => member.id === arrival.to);
        const turn = [first / map.partitions, (first + partitions) / map.partitions];
        return html`<path key=${`${arrival.epoch} ${first}`} class="o${owner % 12} arrived" d=${piece(...turn, MOVING)}>
          <title>${arrival.from} → ${arrival.to}: arrived</title>
        </path>`;
      }),
    )}
    ${map.moves.map((move, i) =>
      move.partitions.map(([first, partitions]) => {
        const owner = map.members.findIndex((member) => member.id === move.to);
        return html`<path
          class="o${owner % 12} step-${steps[i]?.step ?? "queued"}"
          d=${piece(first / map.partitions, (first + partitions) / map.partitions, MOVING)}
        >
          <title>${move.from} → ${move.to}: ${steps[i]?.step ?? "queued"}</title>
        </path>`;
      }),
    )}
  </g>`;
}

/** The virtual nodes that the walk meets from the partition's point on, until it comes to one of its owner. */
export function stops(map, partition, owner) {
  const start = (partition / map.partitions) * POINTS;
  const nodes = map.virtual_nodes;
  if (!nodes.length) return [];
  let i = nodes.findIndex(([point]) => point >= start);
  if (i < 0) i = 0;
  const met = [];
  for (let n = 0; n < nodes.length; n += 1) {
    const [point, index] = nodes[(i + n) % nodes.length];
    const id = map.members[index].id;
    if (!met.length || met[met.length - 1].id !== id) met.push({ id, turn: point / POINTS, index });
    if (id === owner) break;
  }
  return met;
}

/** From stop to stop, a little further in each time: stops that lie close together stay apart in the picture. */
function spiral(points) {
  const parts = [];
  for (let i = 1; i < points.length; i += 1) {
    const [from, to] = [points[i - 1], points[i]];
    const length = (to.turn - from.turn + 2) % 1;
    for (let step = 0; step <= 72; step += 1) {
      const share = step / 72;
      parts.push(at(from.turn + length * share, from.radius + (to.radius - from.radius) * share));
    }
  }
  return `M${parts.map((point) => point.join(" ")).join("L")}`;
}

function Walk({ map, way }) {
  const hashed = parseInt(way.hash.slice(0, 8), 16) / POINTS;
  const begin = way.partition / map.partitions;
  const met = stops(map, way.partition, way.owner).map((stop, i) => ({ ...stop, radius: WALK - INWARD * Math.min(i, 4) }));
  const [kx, ky] = at(hashed, BAND[1] + 26);
  const [bx, by] = at(hashed, BAND[1] + 6);
  return html`<g class="walk">
    <line x1=${kx} y1=${ky} x2=${bx} y2=${by} />
    <circle cx=${kx} cy=${ky} r="7" />
    <path class="partition" d=${piece(begin, begin + Math.max(1 / map.partitions, 0.004), [BAND[0] - 6, BAND[1] + 6])} />
    <path class="path" d=${spiral([{ turn: begin, radius: BAND[0] - 6 }, ...met])} />
    ${met.map(({ id, turn, radius, index }, i) => {
      const [x, y] = at(turn, radius);
      const [tx, ty] = at(turn + 21 / (2 * Math.PI * radius), radius);
      const isOwner = i === met.length - 1;
      return html`<circle class="o${index % 12} ${isOwner ? "owner" : "passed"}" cx=${x} cy=${y} r=${isOwner ? 9 : 6} />
        <text x=${tx} y=${Number(ty) + 5} class=${isOwner ? "owner" : "passed"}>${id}</text>`;
    })}
  </g>`;
}

/** The nodes at their hashes; from the home of the key's owner clockwise to the nodes with its copies. */
function Nodes({ map, way }) {
  const place = new Map(map.nodes.map((node) => [node.id, node.point / POINTS]));
  const kept = way?.hash ? [way.primary, ...way.copies] : [];
  const home = way?.hash ? place.get(way.owner) : undefined;
  const last = kept.filter((id) => place.has(id)).map((id) => (place.get(id) - home + 1) % 1);
  const far = home === undefined ? 0 : Math.max(0, ...last);
  return html`<g class="nodes">
    <circle class="circle" cx=${MIDDLE} cy=${MIDDLE} r=${NODES} />
    ${far > 0 && html`<path class="copies" d=${spiral([{ turn: home, radius: NODES }, { turn: home + far, radius: NODES }])} />`}
    ${map.nodes.map(({ id }) => {
      const turn = place.get(id);
      const [x, y] = at(turn, NODES);
      const [tx, ty] = at(turn, NODES + 24);
      const index = map.members.findIndex((member) => member.id === id);
      const role = kept[0] === id ? "primary" : kept.includes(id) ? "copy" : "";
      const says = { primary: ": the primary", copy: ": a copy" }[role] ?? "";
      return html`<g class=${role}>
        <rect class=${index < 0 ? "none" : `o${index % 12}`} x=${x - 8} y=${y - 8} width="16" height="16" rx="3"><title>node ${id}${says}</title></rect>
        <text x=${tx} y=${Number(ty) + 5}>${id}</text>
      </g>`;
    })}
  </g>`;
}

function summary(map) {
  const partitions = map.members.map((member, i) => {
    const owned = map.owners.reduce((sum, [owner, run]) => sum + (owner === i ? run : 0), 0);
    return `${member.id} owns ${count(owned)}`;
  });
  const moving = map.moves.reduce((sum, move) => sum + move.partitions.reduce((all, [, run]) => all + run, 0), 0);
  return `The ring: ${count(map.partitions)} partitions; ${partitions.join(", ")}; ${moving ? plural(moving, "partition") : "none"} to move.`;
}

/** `way`: what GET /v1/explain says of a key, or null. `steps`: of the moves, in their order. `arrivals`: of late. */
export function Ring({ map, way, steps, arrivals }) {
  const margin = map.replicas > 1 ? MARGIN : 0;
  const box = `${-margin} ${-margin} ${SIZE + 2 * margin} ${SIZE + 2 * margin}`;
  return html`<svg class="ring" viewBox=${box} role="img" aria-label=${summary(map)}>
    ${margin > 0 && html`<${Nodes} map=${map} way=${way} />`}
    <${Band} map=${map} />
    <${Ticks} map=${map} />
    <${Moving} map=${map} steps=${steps} arrivals=${arrivals} />
    ${way && way.hash && html`<${Walk} map=${map} way=${way} />`}
    <text class="big" x=${MIDDLE} y=${MIDDLE - 8}>${count(map.partitions)}</text>
    <text x=${MIDDLE} y=${MIDDLE + 20}>partitions</text>
    <text x=${MIDDLE} y=${MIDDLE + 44}>epoch ${map.epoch}</text>
  </svg>`;
}
