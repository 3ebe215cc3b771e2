// Access tokens, which a proxy before the router may ask for: kept in memory only, and sent with every call.

const asked = {
  question: null, // while it is asked: {isRefused, answer(text or null)}
  isDeclined: false,
};
let token = null;
let pending = null; // the promise of an answer, for all calls that wait for one

export const CHANGED = "kvstore-access";

/** What is asked of the person now, or null. */
export const question = () => asked.question;

/** Ask for a token; true when there is one, false when the person leaves it. */
export function askForToken() {
  pending ??= new Promise((resolve) => {
    const mine = {
      isRefused: token !== null,
      answer: (text) => {
        if (asked.question !== mine) return; // a dialog that goes away says once more that it is closed
        asked.question = pending = null;
        asked.isDeclined = text === null;
        if (text !== null) token = text;
        dispatchEvent(new Event(CHANGED));
        resolve(text !== null);
      },
    };
    asked.question = mine;
    dispatchEvent(new Event(CHANGED));
  });
  return pending;
}

/** A browser asks for names and passwords by itself; it does not ask for tokens. */
function wantsToken(answer) {
  const scheme = answer.headers.get("WWW-Authenticate");
  return answer.status === 401 && (scheme === null || /\bbearer\b/i.test(scheme));
}

/** fetch, with the token if there is one. A 401 did nothing: once there is another token, the call is made again.
 * `isBackground`: not asked for by a person, who is not asked twice because of it. */
export async function send(path, { isBackground = false, ...init } = {}) {
  for (;;) {
    const used = token;
    const headers = used === null ? init.headers : { ...init.headers, Authorization: `Bearer ${used}` };
    const answer = await fetch(path, { ...init, headers, cache: "no-store", redirect: "error" });
    if (!wantsToken(answer)) return answer;
    if (token !== used) continue;
    if (isBackground && asked.isDeclined) return answer;
    if (!(await askForToken())) return answer;
  }
}
