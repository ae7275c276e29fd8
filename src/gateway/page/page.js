// The page for people. It is a client of the HTTP API like any other, and has no rules of its own.
//
// The key is in `credentials` and nowhere else: no storage, no address, no history. Whatever comes from the server or a file is put
// into the page as text and never as HTML.

let credentials = null;

const $ = (id) => document.getElementById(id);

/** An element with attributes, and children that are elements or texts. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

// --- The API ---------------------------------------------------------------------------------------------------------------------

/** What went wrong, as a sentence that says what to do. */
class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Why the server did not do what it was asked for. */
function failure(status, header, body) {
  const said = body?.message ?? `The server answered with status ${status}.`;
  const seconds = Number(header("retry-after"));
  const later = seconds > 0 ? `Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.` : "Try again a little later.";
  if (status === 401) return new Failure("The server does not accept this key. It may be mistyped, expired or revoked. Enter another one.", status);
  if (status === 429) return new Failure(`There were too many requests with this key. ${later}`, status);
  if (status === 503) return new Failure(`${said} ${later}`, status);
  return new Failure(said, status);
}

/** Calls the API and returns the answer, which has succeeded. */
async function request(path, { method = "GET", query = {}, headers = {}, body, signal } = {}) {
  const set = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const parameters = set.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  const options = { method, body, signal, headers: { ...headers, ...credentials }, cache: "no-store", redirect: "error" };
  let answer;
  try {
    answer = await fetch(`v1/dnc${path}${parameters && "?"}${parameters}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Check that it runs and that you are online, then try again.");
  }
  if (answer.ok) return answer;
  throw failure(answer.status, (name) => answer.headers.get(name), await answer.json().catch(() => null));
}

/** Calls the API and returns the JSON that it answers. */
async function call(path, options) {
  return (await request(path, options)).json();
}

/** Runs what a form or button starts. What goes wrong is shown in `message`; meanwhile the button does nothing. */
async function run(button, message, action) {
  if (button.ariaBusy === "true") return;
  button.ariaBusy = "true";
  message.textContent = "";
  try {
    await action();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401 && message !== $("key-message")) {
      forgetKey(error.message);
      return;
    }
    message.textContent = error.message;
    if (!(error instanceof Failure)) throw error;
  } finally {
    button.ariaBusy = null;
  }
}

// --- The key ---------------------------------------------------------------------------------------------------------------------

const isPlatformKey = (key) => key.startsWith("sk_user_");

function forgetKey(why = "") {
  credentials = null;
  $("key").value = "";
  $("app").hidden = $("session").hidden = true;
  $("start").hidden = false;
  $("lookup-result").replaceChildren();
  $("key-message").textContent = why;
  $("key").focus();
}

$("key").addEventListener("input", () => {
  $("workspace-row").hidden = !isPlatformKey($("key").value.trim());
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(event.submitter, $("key-message"), async () => {
    const key = $("key").value.trim();
    const workspace = isPlatformKey(key) ? $("workspace").value.trim() : "";
    credentials = { "X-Api-Key": key, ...(workspace && { "X-Workspace-Id": workspace }) };
    try {
      // Every key may do this, whatever its scope.
      await call("/check", { query: { email: "nobody@example.com" } });
    } catch (error) {
      credentials = null;
      throw error;
    }
    $("key").value = "";
    $("session-text").textContent = workspace ? `Platform key, ${workspace}` : "Workspace key";
    $("start").hidden = true;
    $("app").hidden = $("session").hidden = false;
    $("lookup-email").focus();
  });
});

$("forget").addEventListener("click", () => forgetKey());

// --- Looking up ------------------------------------------------------------------------------------------------------------------

const REASONS = {
  bounce: "Messages to it bounced",
  complaint: "Marked a message as spam",
  unsubscribe_link: "Unsubscribed by a link",
  manual: "Added by hand",
  import: "Imported without a reason of its own",
};

const time = (text) => {
  const shown = new Date(text).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  return element("time", { datetime: text, title: text }, shown);
};

function details(pairs) {
  const list = element("dl");
  for (const [name, ...values] of pairs) list.append(element("dt", {}, name), element("dd", {}, ...values));
  return list;
}

function verdict({ email, suppressed, entry, error }) {
  const card = element("article", { class: "card verdict" });
  if (error) {
    card.append(
      element("h3", { class: "bad" }, "Not an address"),
      element("p", {}, `${error.message} Nobody can say that such a text may be written to.`),
    );
  } else if (!suppressed) {
    card.append(
      element("h3", { class: "good" }, "May be written to"),
      element("p", {}, `Neither ${email} nor a domain above it is on the list.`),
    );
  } else {
    card.append(element("h3", { class: "bad" }, "Must not be written to"));
    // A long answer may leave the entry away.
    if (entry) {
      const what = entry.entryType === "domain" ? "Domain, with all addresses and sub-domains" : "Address";
      const meaning = REASONS[entry.reason];
      card.append(
        details([
          ["On the list", element("strong", {}, entry.email)],
          ["What it is", what],
          ["Why", entry.reason, ...(meaning ? [element("span", { class: "hint" }, ` · ${meaning}`)] : [])],
          ["Since", time(entry.unsubscribedAt)],
          ["Stored", time(entry.createdAt), " by ", element("code", {}, entry.addedBy)],
        ]),
      );
    }
  }
  return card;
}

$("lookup-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(event.submitter, $("lookup-message"), async () => {
    $("lookup-result").replaceChildren();
    const { data } = await call("/check", { query: { email: $("lookup-email").value.trim() } });
    $("lookup-result").replaceChildren(verdict(data));
  });
});
