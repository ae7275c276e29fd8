// The page for people. It is a client of the HTTP API like any other, and has no rules of its own.
//
// The key is in `credentials` and nowhere else: no storage, no address, no history. Whatever comes from the server or a file is put
// into the page as text and never as HTML. Files are read and sent as streams, and tables show a bounded number of rows, so that the
// size of a file does not matter.

let credentials = null;

const ROWS_SHOWN = 100;
const PAGE_ENTRIES = 25;
// A JSON document is kept in memory as a whole, so many characters of it. Lists of any length come as CSV or with one object a line.
const DOCUMENT_LENGTH_MAX = 64 << 20;
// The service describes this many rejected rows.
const ERRORS_MAX = 10_000;

// --- Elements ----------------------------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

/** An element with attributes, and children that are elements or texts. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

function button(text, action, kind = "") {
  const made = element("button", { type: "button", class: kind }, text);
  made.addEventListener("click", action);
  return made;
}

const number = (value) => value.toLocaleString();
const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

function time(text, options = { dateStyle: "medium", timeStyle: "short" }) {
  const at = new Date(text);
  return element("time", { datetime: text, title: text }, Number.isNaN(at.getTime()) ? text : at.toLocaleString(undefined, options));
}

const day = (text) => time(text, { dateStyle: "medium" });

/** Names and values, one below the other. */
function details(pairs) {
  const list = element("dl");
  for (const [name, ...values] of pairs) list.append(element("dt", {}, name), element("dd", {}, ...values));
  return list;
}

/** Counts beside each other. Each is a name, a number and a colour. */
function tiles(counts) {
  const list = element("dl", { class: "tiles" });
  for (const [name, count, kind = ""] of counts) {
    list.append(element("div", { class: count ? kind : "" }, element("dt", {}, name), element("dd", {}, number(count))));
  }
  return list;
}

/** A row of a table. The roles are said, since a narrow window lays rows out as blocks, which some browsers take for no table. */
function rowOf(cells, columns) {
  const made = cells.map((cell, column) => element("td", { role: "cell", "data-label": columns[column] }, cell));
  return element("tr", { role: "row" }, ...made);
}

/** A table that scrolls inside its frame. A row is a list of cells: elements or texts. */
function table(name, columns, rows, kind = "") {
  const names = columns.map((column) => element("th", { role: "columnheader", scope: "col" }, column));
  const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...names));
  const body = element("tbody", { role: "rowgroup" }, ...rows.map((row) => rowOf(row, columns)));
  const made = element("table", { role: "table", "aria-label": name, class: kind.includes("rows") ? "compact" : "" }, head, body);
  return element("div", { class: `scroll ${kind}`, tabindex: "0", role: "region", "aria-label": `${name}, scrollable` }, made);
}

const badge = (text, kind = "") => element("span", { class: `badge ${kind}` }, text);

function addressCell(email, type) {
  const cell = element("span", { class: "address" }, email);
  if (type === "domain") cell.append(" ", badge("domain"));
  return cell;
}

/** Offers a file of these parts for download. */
function download(name, parts, type) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// --- The API -----------------------------------------------------------------------------------------------------------------------

/** What went wrong, as a sentence that says what to do. */
class Failure extends Error {
  /** Whether the server has refused what was sent, as it is. */
  isRefusal = false;
}

const NOT_UNDERSTOOD = "The answer of the server was not understood. Use nothing of it, and try again.";
const AWAY = "The server cannot be reached. Check that it runs and that you are online, then try again.";

/** Why the server did not do what it was asked for. */
function failure(status, header, body) {
  const said = body?.message ?? `The server answered with status ${status}.`;
  const seconds = Number(header("retry-after"));
  const later = seconds > 0 ? `Try again in ${plural(seconds, "second", "seconds")}.` : "Try again a little later.";
  if (status === 401) return new Failure("The server does not accept this key. It may be mistyped, expired or revoked. Enter another one.");
  if (status === 429) return new Failure(`There were too many requests with this key. ${later}`);
  const imported = body?.details?.imported;
  const stored = imported > 0 ? ` Until then ${plural(imported, "entry was", "entries were")} stored.` : "";
  const told = new Failure(status === 503 ? `${said}${stored} ${later}` : said + stored);
  told.isRefusal = status === 400;
  return told;
}

function address(path, query = {}) {
  const set = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const parameters = set.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  return `v1/dnc${path}${parameters && "?"}${parameters}`;
}

/** Calls the API and returns the answer, which has succeeded. */
async function request(path, { method = "GET", query, headers = {}, body, signal } = {}) {
  const options = { method, body, signal, headers: { ...headers, ...credentials }, cache: "no-store", redirect: "error" };
  let answer;
  try {
    answer = await fetch(address(path, query), options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure(AWAY);
  }
  if (answer.ok) return answer;
  throw failure(answer.status, (name) => answer.headers.get(name), await answer.json().catch(() => null));
}

/** Calls the API and returns the JSON that it answers. */
async function call(path, options) {
  const answer = await request(path, options);
  return answer.json().catch((error) => {
    throw error.name === "AbortError" ? error : new Failure(NOT_UNDERSTOOD);
  });
}

const json = (body) => ({ headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Sends a file to the import. `progress` is told how much of it was sent; fetch() cannot say that. */
function upload(source, query, progress, signal) {
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", address("/import", query));
    for (const [name, value] of Object.entries({ ...headersOf(source), ...credentials })) sending.setRequestHeader(name, value);
    sending.responseType = "json";
    sending.upload.addEventListener("progress", (event) => progress(event.loaded / event.total));
    sending.addEventListener("load", () => {
      if (sending.status === 200 && sending.response) resolve(sending.response.data);
      else reject(failure(sending.status, (name) => sending.getResponseHeader(name), sending.response));
    });
    sending.addEventListener("error", () => reject(new Failure(`${AWAY} If the file has changed, choose it again.`)));
    sending.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    signal.addEventListener("abort", () => sending.abort());
    sending.send(source.body);
  });
}

/** Runs what a form or button starts. What goes wrong is shown in `message`. Until it ends, the button does nothing. */
async function run(starter, message, action) {
  if (starter?.ariaBusy === "true") return;
  if (starter) starter.ariaBusy = "true";
  message.textContent = "";
  try {
    await action();
  } catch (error) {
    if (error.name === "AbortError") return;
    message.textContent = error instanceof Failure ? error.message : `This page has a fault: ${error.message}. Reload it, and report this.`;
    if (!(error instanceof Failure)) console.error(error);
  } finally {
    if (starter) starter.ariaBusy = null;
  }
}

// --- The key and the views -----------------------------------------------------------------------------------------------------------

const isPlatformKey = (key) => key.startsWith("sk_user_");

$("key").addEventListener("input", () => {
  $("workspace-row").hidden = !isPlatformKey($("key").value.trim());
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(event.submitter, $("key-message"), async () => {
    const key = $("key").value.trim();
    const workspace = isPlatformKey(key) ? $("workspace").value.trim() : "";
    if (/[^\x21-\x7e]/.test(key + workspace)) throw new Failure("A key has only letters, digits and underscores. Enter it again.");
    credentials = { "X-Api-Key": key, ...(workspace && { "X-Workspace-Id": workspace }) };
    try {
      // Every key may do this, whatever its scope.
      await call("/check", { query: { email: "nobody@example.com" } });
    } catch (error) {
      credentials = null;
      throw error;
    }
    $("key-form").reset();
    $("session-text").textContent = workspace ? `Platform key, ${workspace}` : "Workspace key";
    $("key-form").hidden = true;
    $("session").hidden = $("views").hidden = false;
    show();
  });
});

// Nothing is left of the key, nor of what it showed.
$("forget").addEventListener("click", () => location.reload());

/** What a view does when it is shown. */
const onShow = {};

/** Shows the view that the address names, and moves the focus there. */
function show() {
  if (!credentials) return;
  const links = [...document.querySelectorAll("#views a")];
  const link = links.find((link) => link.hash === location.hash) ?? links[0];
  for (const other of links) {
    $(other.hash.slice(2)).hidden = other !== link;
    if (other === link) other.setAttribute("aria-current", "page");
    else other.removeAttribute("aria-current");
  }
  const view = link.hash.slice(2);
  document.title = `${link.textContent} · Do Not Contact`;
  $(`${view}-title`).focus();
  onShow[view]?.();
}

window.addEventListener("hashchange", show);

// --- Looking up ----------------------------------------------------------------------------------------------------------------------

const REASONS = {
  bounce: "a message to it bounced",
  complaint: "marked a message as spam",
  unsubscribe_link: "unsubscribed by a link",
  manual: "added by hand",
  import: "imported without a reason of its own",
};

function reasonCell(reason) {
  const meaning = REASONS[reason];
  return element("span", meaning ? { title: meaning } : {}, reason);
}

onShow.lookup = () => $("lookup-email").focus();

function verdict({ email, suppressed, entry, error }) {
  const card = element("article", { class: "card verdict" });
  const title = (text, kind) => card.append(element("h3", { class: kind }, text));
  if (error) {
    title("Not an address", "bad");
    card.append(element("p", {}, `${error.message} Nobody can say that such a text may be written to.`));
  } else if (suppressed === false && typeof email === "string") {
    title("May be written to", "good");
    card.append(element("p", {}, `Neither ${email} nor a domain above it is on the list.`));
  } else if (suppressed === true && entry) {
    title("Must not be written to", "bad");
    const isDomain = entry.entryType === "domain";
    const meaning = REASONS[entry.reason];
    card.append(
      details([
        ["On the list", element("strong", {}, entry.email), isDomain ? " with all its addresses and sub-domains" : ""],
        ["Why", entry.reason, ...(meaning ? [element("span", { class: "soft" }, `: ${meaning}`)] : [])],
        ["Since", time(entry.unsubscribedAt)],
        ["Stored", time(entry.createdAt), " by ", element("code", {}, entry.addedBy)],
      ]),
      element("div", { class: "buttons" }, button("Remove from the list", removeIt, "quiet danger")),
    );
    async function removeIt(event) {
      const what = isDomain ? `${entry.email} with all its addresses and sub-domains` : entry.email;
      if (!(await confirm("Remove from the list?", `After that, ${what} may be written to again.`))) return;
      run(event.target, $("lookup-message"), async () => {
        const asked = ++lookUpsAsked;
        await call("", { method: "DELETE", ...json({ emails: [entry.email] }) });
        await lookUp(email, asked);
      });
    }
  } else {
    throw new Failure(NOT_UNDERSTOOD);
  }
  return card;
}

let lookUpsAsked = 0;

/** Shows what is known of an address, unless something else was asked for since `asked`. */
async function lookUp(email, asked = ++lookUpsAsked) {
  const { data } = await call("/check", { query: { email } });
  if (asked === lookUpsAsked) $("lookup-result").replaceChildren(verdict(data ?? {}));
}

$("lookup-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("lookup-result").replaceChildren();
  run(event.submitter, $("lookup-message"), () => lookUp($("lookup-email").value.trim()));
});

// --- Confirming ----------------------------------------------------------------------------------------------------------------------

/** Asks whether to remove; whoever removes `count` entries at once types their number. */
function confirm(title, text, count = 0) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-row").hidden = !count;
  $("confirm-count").previousElementSibling.textContent = `Type ${count} to confirm`;
  $("confirm-count").value = "";
  $("confirm-yes").disabled = count > 0;
  $("confirm-count").oninput = () => ($("confirm-yes").disabled = $("confirm-count").value.trim() !== String(count));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// --- The list ------------------------------------------------------------------------------------------------------------------------

/** The filter as the API takes it; the cursor and the number of the first entry, of each page up to the one that is shown; what is shown. */
const list = { filter: {}, starts: [], total: 0, asked: 0 };

/** The start of a day in the time zone of the reader, `days` later. */
function startOf(date, days = 0) {
  if (!date) return "";
  const [year, month, dayOfMonth] = date.split("-").map(Number);
  return new Date(year, month - 1, dayOfMonth + days).toISOString();
}

function readFilter() {
  return {
    search: $("list-search").value.trim(),
    type: $("list-type").value,
    reason: $("list-reason").value.trim(),
    createdFrom: startOf($("list-from").value),
    createdTo: startOf($("list-to").value, 1),
  };
}

const isFiltered = () => Object.values(list.filter).some((value) => value !== "");

/** Shows a page of the list, and says whether it did: not if another one was asked for since. */
async function showPage(starts = [["", 1]], filter = list.filter) {
  const asked = ++list.asked;
  const [cursor, first] = starts.at(-1);
  const { data, pagination } = await call("", { query: { ...filter, limit: PAGE_ENTRIES, cursor } });
  if (asked !== list.asked) return false;
  Object.assign(list, { filter, starts, next: [pagination.nextCursor, first + data.length], total: pagination.total });
  const rows = data.map((entry) => {
    const tick = element("input", { type: "checkbox", value: entry.email, "aria-label": `Select ${entry.email}` });
    const cells = [tick, addressCell(entry.email, entry.entryType), reasonCell(entry.reason), day(entry.unsubscribedAt), element("code", {}, entry.addedBy)];
    return rowOf(cells, ["", "Address", "Reason", "Since", "Stored by"]);
  });
  if (!rows.length) {
    let text = isFiltered() ? "Nothing on the list matches." : "Nobody is on the list yet. Import a file to begin.";
    if (first > 1) text = "Nothing more on the list matches.";
    // A page has what was found in the time for one.
    if (pagination.hasMore) text = "Nothing found so far. Next searches on.";
    rows.push(element("tr", { role: "row" }, element("td", { role: "cell", colspan: "5", class: "empty" }, text)));
  }
  $("list-rows").replaceChildren(...rows);
  $("list-card").hidden = false;
  const searched = pagination.examined ? `${plural(pagination.examined, "entry", "entries")} searched` : "";
  $("list-status").textContent = pagination.totalOmitted ? searched : plural(list.total, "entry", "entries");
  $("list-page").textContent = data.length ? `${number(first)} to ${number(first + data.length - 1)}` : "";
  $("list-back").disabled = starts.length < 2;
  $("list-next").disabled = !pagination.hasMore;
  $("list-remove-all").textContent = isFiltered() ? "Remove all that match" : "Remove all";
  $("list-remove-all").disabled = !data.length;
  ticked();
  return true;
}

const ticks = () => [...$("list-rows").querySelectorAll("input")];

function ticked() {
  const count = ticks().filter((tick) => tick.checked).length;
  $("list-remove").disabled = !count;
  $("list-remove").textContent = count ? `Remove selected (${count})` : "Remove selected";
  $("list-all").checked = count > 0 && count === ticks().length;
  $("list-all").indeterminate = count > 0 && count < ticks().length;
}

onShow.list = () => run(null, $("list-message"), () => showPage(undefined, readFilter()));

$("list-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(event.submitter, $("list-message"), () => showPage(undefined, readFilter()));
});
// The fields are empty only after this event.
$("list-form").addEventListener("reset", () => setTimeout(onShow.list));
$("list-rows").addEventListener("change", ticked);
$("list-all").addEventListener("change", () => {
  for (const tick of ticks()) tick.checked = $("list-all").checked;
  ticked();
});
$("list-next").addEventListener("click", (event) => run(event.target, $("list-message"), () => showPage([...list.starts, list.next])));
$("list-back").addEventListener("click", (event) => run(event.target, $("list-message"), () => showPage(list.starts.slice(0, -1))));

async function remove(starter, title, text, body, count) {
  if (!(await confirm(title, text, count))) return;
  await run(starter, $("list-message"), async () => {
    const { data } = await call("", { method: "DELETE", ...json(body) });
    const removed = `${plural(data.deleted, "entry", "entries")} removed`;
    if (await showPage()) $("list-status").textContent = list.total === null ? removed : `${removed}; ${number(list.total)} left`;
  });
}

$("list-remove").addEventListener("click", (event) => {
  const emails = ticks().filter((tick) => tick.checked).map((tick) => tick.value);
  const what = emails.length === 1 ? emails[0] : "These addresses and domains";
  remove(event.target, `Remove ${plural(emails.length, "entry", "entries")}?`, `${what} may be written to again after that.`, { emails });
});

$("list-remove-all").addEventListener("click", (event) => {
  // What is empty is no filter.
  const filter = Object.fromEntries(Object.entries(list.filter).filter(([, value]) => value !== ""));
  const body = { selectAll: true, ...filter };
  run(event.target, $("list-message"), async () => {
    const { data } = await call("", { method: "DELETE", ...json({ ...body, validateOnly: true }) });
    const what = isFiltered() ? "Everything that matches the filter" : "Everything on the list";
    const text = `${what} is removed for good, and may be written to again after that.`;
    if (data.deleted) await remove(null, `Remove ${plural(data.deleted, "entry", "entries")}?`, text, body, data.deleted);
  });
});

for (const format of ["csv", "ndjson"]) {
  $(`list-${format}`).addEventListener("click", (event) => {
    run(event.target, $("list-message"), async () => {
      const answer = await request("/export", { query: { ...list.filter, format } });
      let parts;
      try {
        parts = [await answer.blob()];
      } catch {
        throw new Failure("The export broke off. Nothing was saved; try again.");
      }
      download(`dnc.${format}`, parts, answer.headers.get("content-type"));
    });
  });
}

// --- Files ---------------------------------------------------------------------------------------------------------------------------

// The names under which JSON documents have their lists, those under which an entry has its address, and how deep a list may be: all as
// the service knows them, in src/files/json.rs.
const LISTS = ["entries", "items", "data", "results", "recipients", "members", "contacts", "emails", "Suppressions", "SuppressedDestinationSummaries"];
const ADDRESSES = ["email", "emailAddress", "EmailAddress", "email_address", "address", "recipient"];
const DEPTH_MAX = 32;
// How much of a file tells what it is.
const START_LENGTH = 1 << 16;
const SIGNATURES = { gzip: [0x1f, 0x8b], zstd: [0x28, 0xb5, 0x2f, 0xfd], zip: [0x50, 0x4b, 0x03, 0x04] };
const CSV = "text/csv";
const LINES = "application/x-ndjson";

/** The bytes of a file as they are without compression; null if this browser cannot undo it. */
function unpacked(body, packing) {
  if (!packing) return body.stream();
  try {
    return body.stream().pipeThrough(new DecompressionStream(packing));
  } catch {
    return null;
  }
}

/** The text of a file in pieces; null if this browser cannot undo its compression. */
async function textOf(body, packing) {
  const stream = unpacked(body, packing);
  if (!stream) return null;
  let label = "utf-8";
  const start = unpacked(body, packing).getReader();
  const { value = [] } = await start.read().catch(() => ({}));
  start.cancel().catch(() => {});
  if (value[0] === 0xff && value[1] === 0xfe) label = "utf-16le";
  if (value[0] === 0xfe && value[1] === 0xff) label = "utf-16be";
  return stream.pipeThrough(new TextDecoderStream(label));
}

/** What a stream of texts begins with: `length` characters, or some more, or all that there is. */
async function startOfText(stream, length) {
  const reader = stream.getReader();
  const texts = [];
  for (let left = length; left > 0; ) {
    const { done, value } = await reader.read();
    if (done) break;
    texts.push(value);
    left -= value.length;
  }
  reader.cancel().catch(() => {});
  return texts.join("");
}

/** What of the API takes this file: its media type and encoding, and the bytes to send. `column` is the one that the user has named. */
async function recognize(file, column) {
  if (!file.size) throw new Failure("The file is empty. Choose another one.");
  const read = async (length) => {
    try {
      const text = await textOf(file, packing);
      return text && (await startOfText(text, length));
    } catch {
      throw new Failure("The file cannot be read. If it is compressed, it may be damaged; if it has changed, choose it again.");
    }
  };
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  const signature = Object.entries(SIGNATURES).find(([, bytes]) => bytes.every((byte, at) => head[at] === byte));
  const packing = signature?.[0] ?? "";
  if (packing === "zip") throw new Failure("This is a zip archive or a spreadsheet. Save it as CSV, and choose that file.");
  const source = { name: file.name, size: file.size, body: file, packing, type: CSV };
  const start = await read(START_LENGTH);
  if (start === null) return { ...source, type: /json/i.test(file.name) ? LINES : CSV };
  if (!/^\s*[{[]/.test(start)) return source;
  if (isLines(start, column)) return { ...source, type: LINES };
  const text = await read(DOCUMENT_LENGTH_MAX + 1);
  if (text.length > DOCUMENT_LENGTH_MAX) {
    throw new Failure("The JSON document is too large for a browser. Bring it with one object a line, or use the command dnc import.");
  }
  return { ...source, body: new Blob(elementsOf(text).map((each) => `${each}\n`)), packing: "", type: LINES, isDocument: true };
}

/** Whether JSON that begins so has one object a line. */
function isLines(start, column) {
  const text = start.trimStart();
  if (text[0] !== "{") return false;
  const [line] = text.split("\n", 1);
  const rest = text.slice(line.length);
  // A line that is longer than what is looked at.
  if (!rest && start.length >= START_LENGTH) return false;
  let first;
  try {
    first = JSON.parse(line);
  } catch {
    // An object that is not whole on its first line is a document.
    return line.trimEnd().endsWith("}");
  }
  const isObject = (value) => value !== null && typeof value === "object";
  const inner = ([name, value]) => (isObject(value) && !Array.isArray(value) ? Object.keys(value).map((key) => `${name}.${key}`) : []);
  const names = [...Object.keys(first), ...Object.entries(first).flatMap(inner)];
  if (names.some((name) => name === column || ADDRESSES.includes(name))) return true;
  if (LISTS.some((name) => Object.hasOwn(first, name) && isObject(first[name]))) return false;
  return rest.trim() !== "";
}

/**
 * The elements of all lists in a file of JSON documents, each as it is written, in one line. Nothing of them is read here: so numbers
 * keep their digits, and the service sees a name that an object has twice.
 */
function elementsOf(text) {
  const elements = [];
  let lists = 0;
  let at = 0;
  const skipSpace = () => {
    while (at < text.length && " \t\r\n".includes(text[at])) at += 1;
    return at < text.length;
  };
  /** Passes over a value or a name, and returns it. */
  const pass = () => {
    const begin = at;
    for (let depth = 0; at < text.length; ) {
      const sign = text[at];
      if (depth === 0 && at > begin && ",:]} \t\r\n".includes(sign)) break;
      at += 1;
      if (sign === '"') {
        for (; at < text.length && text[at] !== '"'; at += 1) if (text[at] === "\\") at += 1;
        at += 1;
      } else if (sign === "[" || sign === "{") {
        depth += 1;
      } else if (sign === "]" || sign === "}") {
        depth -= 1;
        if (depth === 0) break;
      }
    }
    return text.slice(begin, at);
  };
  /** Looks for lists in the list or object that begins here. It is valid, and so are those in it. */
  const look = (depth) => {
    if (depth > DEPTH_MAX) throw new Failure("The lists in the JSON document are too deep inside. Take them out, and try again.");
    const isList = text[at] === "[";
    if (isList) lists += 1;
    at += 1;
    for (skipSpace(); text[at] !== "]" && text[at] !== "}"; skipSpace()) {
      if (isList) {
        // In valid JSON a line break stands between values, and in none of them.
        elements.push(pass().replace(/[\r\n]\s*/g, " "));
      } else {
        const name = JSON.parse(pass());
        skipSpace();
        at += 1;
        skipSpace();
        if (LISTS.includes(name) && (text[at] === "[" || text[at] === "{")) look(depth + 1);
        else pass();
      }
      skipSpace();
      if (text[at] === ",") at += 1;
    }
    at += 1;
  };
  while (skipSpace()) {
    const begin = at;
    try {
      JSON.parse(pass());
    } catch (error) {
      throw new Failure(`The file is not valid JSON: ${error.message}. Mend it, or use the command dnc import, which leaves out only what is faulty.`);
    }
    at = begin;
    if (text[at] !== "[" && text[at] !== "{") throw new Failure("The file is not valid JSON: text stands outside of its lists and objects.");
    look(1);
  }
  if (!lists) throw new Failure(`The JSON document has no list of entries in it. It is looked for as ${LISTS.join(", ")}.`);
  return elements;
}

const headersOf = (source) => ({ "Content-Type": source.type, ...(source.packing && { "Content-Encoding": source.packing }) });

/** The sign between the cells of a CSV file: the most frequent one in its first line. */
function delimiterOf(start) {
  const line = start.split(/[\r\n]/).find((each) => each.trim()) ?? "";
  const bare = line.replace(/"[^"]*"/g, "");
  const counts = [",", ";", "\t"].map((sign) => [sign, bare.split(sign).length]);
  return counts.reduce((best, next) => (next[1] > best[1] ? next : best))[0];
}

/** Cuts text into rows, each with the number of the line on which it begins. Blank lines are none. */
class Cutter {
  #delimiter;
  #text = "";
  #at = 0;
  #line = 1;
  #first = 1;
  #isQuoted = false;
  #isCellStart = true;
  #isAfterReturn = false;

  /** A row of CSV with this sign between its cells; without one, a row is a line. */
  constructor(delimiter = null) {
    this.#delimiter = delimiter;
  }

  push(text) {
    const rows = [];
    this.#text += text;
    let begin = 0;
    for (; this.#at < this.#text.length; this.#at++) {
      const sign = this.#text[this.#at];
      if (sign === "\n" && this.#isAfterReturn) {
        // The second half of a line break.
        if (!this.#isQuoted) begin = this.#at + 1;
      } else if (sign === "\n" || sign === "\r") {
        this.#line += 1;
        if (!this.#isQuoted) {
          this.#cut(rows, this.#text.slice(begin, this.#at));
          begin = this.#at + 1;
        }
      } else if (sign === '"' && this.#delimiter && (this.#isQuoted || this.#isCellStart)) {
        // A doubled quote closes the cell and opens it again.
        this.#isQuoted = !this.#isQuoted;
        this.#isCellStart = !this.#isQuoted;
      } else if (!this.#isQuoted) {
        this.#isCellStart = sign === this.#delimiter;
      }
      this.#isAfterReturn = sign === "\r";
    }
    this.#text = this.#text.slice(begin);
    this.#at = this.#text.length;
    return rows;
  }

  finish() {
    const rows = [];
    this.#cut(rows, this.#text);
    return rows;
  }

  #cut(rows, text) {
    if (text.trim()) rows.push({ line: this.#first, text });
    this.#first = this.#line;
    this.#isCellStart = true;
  }
}

/** The rows of a file in groups, as they are read; nothing if this browser cannot undo its compression. */
async function* rowsOf({ body, packing, type }) {
  const text = await textOf(body, packing);
  if (!text) return;
  let cutter = type === LINES ? new Cutter() : null;
  for (const reader = text.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    cutter ??= new Cutter(delimiterOf(value));
    yield cutter.push(value);
  }
  if (cutter) yield cutter.finish();
}

/** The texts of the rows on these lines, by line, and the first row of the file. */
async function textsOf(source, lines) {
  const texts = new Map();
  let first = null;
  const last = Math.max(...lines);
  for await (const rows of rowsOf(source)) {
    for (const row of rows) {
      first ??= row;
      if (lines.has(row.line)) texts.set(row.line, row.text);
      if (row.line >= last) return { texts, first };
    }
  }
  return { texts, first };
}

/** The parts of a file view: where a file is chosen, what is going on, and the result. */
function fileView(view, start) {
  const part = (selector) => $(view).querySelector(selector);
  const parts = { message: part(":scope > .message"), working: part(".working"), reading: part(".reading"), result: part(".result"), choose: part(".choose") };
  const take = (file) => {
    if (!parts.working.hidden) {
      parts.message.textContent = `${file.name} was not taken, since another file was in work. Wait for that one or cancel it, then choose this one again.`;
      return;
    }
    parts.reading.querySelector("form").reset();
    parts.reading.open = false;
    start(file);
  };
  $(`${view}-file`).addEventListener("change", (event) => {
    const [file] = event.target.files;
    // The same file can be chosen again.
    if (file) take(file);
    event.target.value = "";
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    $(view).addEventListener(kind, (event) => {
      event.preventDefault();
      part(".drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    if ($(view).hidden || event.target.closest?.("input, textarea")) return;
    const text = event.clipboardData.getData("text");
    const file = event.clipboardData.files[0] ?? (text && new File([text], "pasted.csv"));
    if (file) take(file);
  });
  return { ...parts, take, file: $(`${view}-file`) };
}

/** Goes back to where a file is chosen. */
function chooseAnother({ choose, reading, result, message, file }) {
  result.replaceChildren();
  message.textContent = "";
  choose.hidden = false;
  reading.hidden = true;
  file.focus();
}

const chooseButton = (view, text) => button(text, () => chooseAnother(view));

/** Shows that something is going on while `action` runs; the cancel button gives it up. Without a result, another file is chosen. */
async function working({ working: card, message, result, choose, reading }, action) {
  const [label, progress, cancel] = card.children;
  const abort = new AbortController();
  cancel.onclick = () => abort.abort();
  progress.id = `${card.parentElement.id}-progress`;
  label.htmlFor = progress.id;
  result.replaceChildren();
  progress.removeAttribute("value");
  const report = (text, fraction) => {
    if (label.textContent !== text) label.textContent = text;
    if (fraction < 1) progress.value = fraction;
    else progress.removeAttribute("value");
  };
  card.hidden = false;
  choose.hidden = reading.hidden = true;
  await run(null, message, () => action(report, abort.signal));
  card.hidden = true;
  choose.hidden = result.hasChildNodes();
}

function bytes(count) {
  const units = ["bytes", "KB", "MB", "GB"];
  const unit = Math.min(Math.floor(Math.log10(Math.max(count, 1)) / 3), 3);
  return `${(count / 1000 ** unit).toLocaleString(undefined, { maximumFractionDigits: unit ? 1 : 0 })} ${units[unit]}`;
}

// --- Importing -----------------------------------------------------------------------------------------------------------------------

const importing = fileView("import", preview);
let chosen = null;

const readingOf = () => ({ from: $("import-from").value, column: $("import-column").value.trim() });

async function preview(file) {
  chosen = file;
  await working(importing, async (report, signal) => {
    report(`Reading ${file.name}`);
    // What is imported is read as it was shown, even if the form is changed after that.
    const reading = readingOf();
    const source = { ...(await recognize(file, reading.column)), reading };
    const query = { ...reading, validateOnly: true, preview: ROWS_SHOWN };
    const told = `Reading ${source.name}; nothing is stored yet`;
    report(told);
    const data = await readable(importing, () => upload(source, query, (fraction) => report(told, fraction), signal));
    const rows = data.preview?.rows ?? [];
    const [known, texts] = await Promise.all([knownOf(rows, signal), rejectedTexts(source, data.errors ?? [])]);
    importing.result.replaceChildren(...previewed(source, data, rows, known, texts));
    importing.result.querySelector("h3").focus();
  });
}

/** Does what reads a file. Whatever becomes of it, the file can then be read in another way. */
async function readable({ reading }, read) {
  try {
    const answer = await read();
    reading.hidden = false;
    return answer;
  } catch (error) {
    reading.open = error.isRefusal === true;
    reading.hidden = !reading.open;
    throw error;
  }
}

/** Those of the rows whose address is on the list already. */
async function knownOf(rows, signal) {
  const emails = rows.filter((row) => row.email && !row.excluded).map((row) => row.email);
  if (!emails.length) return new Set();
  const { data } = await call("/check", { method: "POST", signal, ...json({ emails }) });
  return new Set(data.filter(({ email, entry }) => entry?.email === email).map(({ email }) => email));
}

/** What stands in the first rejected rows. It is only shown beside them, so a file that cannot be read any more is no failure. */
async function rejectedTexts(source, errors) {
  const shown = errors.slice(0, ROWS_SHOWN).map((error) => error.line);
  if (!shown.length) return new Map();
  return textsOf(source, new Set(shown)).then(({ texts }) => texts, () => new Map());
}

/** What became of the rows of a file, or would. */
function outcome(data) {
  const counts = [["New", data.imported, "good"], ["Already on the list", data.skipped], ["Rejected", data.failed ?? 0, "bad"]];
  if (data.excluded) counts.push(["Left out", data.excluded]);
  if (data.reasonsCut) counts.push(["Reason shortened", data.reasonsCut]);
  if (data.timesDropped) counts.push(["Time not known", data.timesDropped]);
  return tiles(counts);
}

function previewed(source, data, rows, known, texts) {
  const errors = new Map((data.errors ?? []).map((error) => [error.line, error]));
  const total = data.imported + data.skipped + (data.failed ?? 0) + (data.excluded ?? 0);
  const title = element("h3", { tabindex: "-1" }, source.name);
  const facts = [bytes(source.size), data.preview?.readAs && `read as: ${data.preview.readAs}`, source.packing, plural(total, "row", "rows")];
  const seen = new Set();
  const rowsOfLine = new Map();
  for (const { line } of rows) rowsOfLine.set(line, (rowsOfLine.get(line) ?? 0) + 1);
  const lines = rows.map((row) => {
    const error = errors.get(row.line);
    let becomes = badge("New", "good");
    if (row.excluded) becomes = badge("Left out: may be written to, as the file says");
    else if (error) {
      // An error names its line, and a line may have several addresses.
      const what = rowsOfLine.get(row.line) > 1 ? "One of this line is rejected" : "Rejected";
      becomes = element("span", {}, badge(what, "bad"), ` ${error.message}`);
    } else if (known.has(row.email)) becomes = badge("Already on the list");
    else if (seen.has(row.email)) becomes = badge("Repeated");
    if (!error && !row.excluded) seen.add(row.email);
    const reason = row.reason || (row.excluded || error ? "" : element("span", { class: "soft", title: "The row says none" }, "import"));
    return [String(row.line), addressCell(row.email, row.type), reason, row.unsubscribedAt ? day(row.unsubscribedAt) : "", becomes];
  });
  const shown = [
    element("div", { class: "head" }, title, element("p", { class: "soft" }, facts.filter(Boolean).join(" · "))),
    outcome(data),
  ];
  const buttons = element("div", { class: "buttons" });
  if (data.imported) buttons.append(button(`Import ${plural(data.imported, "new entry", "new entries")}`, () => store(source), "primary"));
  if (errors.size) buttons.append(rejectsButton(source, data));
  buttons.append(chooseButton(importing, "Choose another file"));
  shown.push(buttons);
  if (lines.length) {
    const which = total > lines.length ? `The first ${lines.length} of ${number(total)} rows` : "All rows";
    const place = source.isDocument ? "No." : "Line";
    shown.push(element("h4", {}, which), table("Rows of the file", [place, "Address", "Reason", "Since", "Becomes"], lines, "rows"));
  }
  if (errors.size) shown.push(...rejected(source, data, texts));
  return shown;
}

/** The rejected rows and why. */
function rejected(source, data, texts) {
  const rows = data.errors.slice(0, ROWS_SHOWN).map(({ line, message }) => [String(line), texts.get(line) ?? "", message]);
  const which = data.failed > rows.length ? `The first ${rows.length} of ${number(data.failed)} rejected rows` : "Rejected rows";
  const place = source.isDocument ? "No." : "Line";
  return [element("h4", {}, which), table("Rejected rows", [place, "What it says", "Why it is rejected"], rows, "rows rejects")];
}

const rejectsButton = (source, data) =>
  button("Download rejected rows", (event) => run(event.target, importing.message, () => downloadRejects(source, data)));

/** Makes a file of the rejected rows with all their columns, to be mended and imported. */
async function downloadRejects(source, { errors, failed, preview }) {
  const { texts, first } = await textsOf(source, new Set(errors.map((error) => error.line))).catch(() => {
    throw new Failure("The file cannot be read any more. If it has changed, choose it again.");
  });
  const name = source.name.replace(/(\.(csv|tsv|txt|json|ndjson|jsonl|gz|zst))+$/i, "");
  const quoted = (text) => (/[",;\t\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  let lines;
  if (source.type === LINES) {
    lines = errors.map(({ line, code, message }) => {
      const why = { rejectedLine: line, rejectedCode: code, rejectedCause: message };
      try {
        return JSON.stringify({ ...why, ...Object(JSON.parse(texts.get(line))) });
      } catch {
        return JSON.stringify({ ...why, email: texts.get(line) ?? "" });
      }
    });
  } else {
    const sign = first ? delimiterOf(first.text) : ",";
    // A header is no row of the preview.
    const hasHeader = first !== null && preview?.rows[0]?.line !== first.line;
    // Without a header the row as a whole is the address that is to be mended.
    const row = (text = "") => (hasHeader ? text : quoted(text));
    const head = ["rejected_line", "rejected_code", "rejected_cause", hasHeader ? first.text : "email"].join(sign);
    lines = [head, ...errors.map(({ line, code, message }) => [line, code, quoted(message), row(texts.get(line))].join(sign))];
  }
  download(`${name}.rejected.${source.type === LINES ? "ndjson" : "csv"}`, [`${lines.join("\n")}\n`], source.type);
  const missing = [];
  if (failed > ERRORS_MAX) missing.push(`The file has the first ${number(ERRORS_MAX)} of ${number(failed)} rejected rows; mend these, and import the original again to see more.`);
  if (!texts.size) missing.push("This browser cannot unpack the file, so only the lines and causes are in it.");
  importing.message.textContent = missing.join(" ");
}

async function store(source) {
  let isDone = false;
  await working(importing, async (report, signal) => {
    const told = `Importing ${source.name}`;
    report(told);
    // The preview tells whether the file has a header.
    const data = await upload(source, { ...source.reading, preview: 1 }, (fraction) => report(told, fraction), signal);
    isDone = true;
    const title = element("h3", { tabindex: "-1" }, `${plural(data.imported, "entry was", "entries were")} imported`);
    const buttons = element("div", { class: "buttons" });
    if (data.failed) buttons.append(rejectsButton(source, data));
    buttons.append(chooseButton(importing, "Import another file"), element("a", { href: "#/list" }, "See the list"));
    importing.result.replaceChildren(title, outcome(data), buttons);
    if (data.failed) importing.result.append(...rejected(source, data, await rejectedTexts(source, data.errors)));
    title.focus();
  });
  if (!isDone) {
    // Given up or broken off.
    const text = "It is not known whether the import ended. What was stored stays on the list, and importing the whole file again is safe.";
    importing.result.replaceChildren(
      element("p", {}, text),
      element("div", { class: "buttons" }, button("Import again", () => store(source), "primary"), chooseButton(importing, "Choose another file")),
    );
    importing.choose.hidden = true;
  }
}

$("import-reading").addEventListener("submit", (event) => {
  event.preventDefault();
  if (chosen) preview(chosen);
});

$("import-text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  importing.take(new File([$("import-text").value], "pasted.csv"));
});

// --- Checking a mailing list ---------------------------------------------------------------------------------------------------------

const checking = fileView("check", (file) => split(file));
let checked = null;

// What the answer adds at the end of a row: whether the row is suppressed, why, what is on the list, and what is wrong.
const CSV_ANSWER = /^([\s\S]*)([,;\t])(suppressed|true|false)\2("(?:[^"]|"")*"|(?:(?!\2)[^"])*)\2("(?:[^"]|"")*"|(?:(?!\2)[^"])*)\2([A-Za-z_]*)$/;
const JSON_ANSWER = /^([\s\S]*?),?"suppressed":(true|false),"reason":(?:null|"(?:[^"\\]|\\.)*"),"matched":(?:null|"(?:[^"\\]|\\.)*"),"error":(null|"[A-Z_]*")\}$/;

/** Collects rows, and keeps them as blobs, which a browser may put on disk. */
class Pile {
  count = 0;
  #rows = [];
  #blobs = [];

  add(row) {
    this.#rows.push(row);
    if (this.#rows.length >= 10_000) this.#pack();
  }

  #pack() {
    this.#blobs.push(new Blob(this.#rows.splice(0)));
  }

  parts() {
    this.#pack();
    return this.#blobs;
  }
}

async function split(file, column = "") {
  checked = file;
  await working(checking, async (report, signal) => {
    report(`Reading ${file.name}`);
    const list = await recognize(file, column);
    const sent = { method: "POST", query: { column }, headers: headersOf(list), body: list.body, signal };
    const answer = await readable(checking, () => request("/check", sent));
    const [clear, suppressed] = [new Pile(), new Pile()];
    let unreadable = 0;
    const isCsv = list.type === CSV;
    const take = ({ text }) => {
      const match = (isCsv ? CSV_ANSWER : JSON_ANSWER).exec(text);
      if (!match) throw new Failure("The answer of the server cannot be read. Use nothing of it, and try again.");
      const [, row, ...rest] = match;
      const said = isCsv ? rest[1] : rest[0];
      const wrong = isCsv ? rest[4] : rest[1].replaceAll(/null|"/g, "");
      if (said === "suppressed") {
        clear.add(`${row}\n`);
        suppressed.add(`${text}\n`);
      } else if (said === "false") {
        clear.add(isCsv ? `${row}\n` : `${row}}\n`);
        clear.count += 1;
      } else {
        suppressed.add(`${text}\n`);
        suppressed.count += 1;
        if (wrong) unreadable += 1;
      }
    };
    let cutter = isCsv ? null : new Cutter();
    try {
      for (const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        cutter ??= new Cutter(delimiterOf(value));
        cutter.push(value).forEach(take);
        report(`${plural(clear.count + suppressed.count, "row", "rows")} checked`);
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof Failure) throw error;
      throw new Failure("The check broke off before its end. Use nothing of it, and try again.");
    }
    cutter?.finish().forEach(take);
    showSplit(list, clear, suppressed, unreadable);
  });
}

function showSplit(list, clear, suppressed, unreadable) {
  const ending = list.type === CSV ? "csv" : "ndjson";
  const name = list.name.replace(/(\.(csv|tsv|txt|json|ndjson|jsonl|gz|zst))+$/i, "");
  const offer = (pile, what, kind) => {
    const made = button(`Download ${plural(pile.count, `${what} row`, `${what} rows`)}`, () => download(`${name}.${what}.${ending}`, pile.parts(), list.type), kind);
    made.disabled = !pile.count;
    return made;
  };
  const total = clear.count + suppressed.count;
  const title = element("h3", { tabindex: "-1" }, list.name);
  checking.result.replaceChildren(
    element("div", { class: "head" }, title, element("p", { class: "soft" }, `${bytes(list.size)} · ${plural(total, "row", "rows")}`)),
    tiles([
      ["May be written to", clear.count, "good"],
      ["Must not be written to", suppressed.count, "bad"],
      ["Of these, no address", unreadable],
    ]),
    element("div", { class: "buttons" }, offer(clear, "clear", "primary"), offer(suppressed, "suppressed", ""), chooseButton(checking, "Check another list")),
    element("p", { class: "soft" }, "The clear file has the columns of your list. The suppressed one also says why each row must not be written to."),
  );
  title.focus();
}

$("check-reading").addEventListener("submit", (event) => {
  event.preventDefault();
  if (checked) split(checked, $("check-column").value.trim());
});

// --- Summary -------------------------------------------------------------------------------------------------------------------------

const resultOf = (view) => [$(view).querySelector(".message"), $(view).querySelector(".result")];

onShow.summary = () => {
  const [message, result] = resultOf("summary");
  run(null, message, async () => {
    const { data } = await call("/summary");
    const ofType = (type) => data.reasons.filter((row) => row.type === type).reduce((sum, row) => sum + row.count, 0);
    const largest = Math.max(1, ...data.reasons.map((row) => row.count));
    const rows = data.reasons.map(({ type, reason, count }) => {
      const bar = element("div", { class: `chart ${type}`, "aria-hidden": "true" }, element("div"));
      bar.firstChild.style.inlineSize = `${(100 * count) / largest}%`;
      const link = button(reason, () => showReason(type, reason), "link");
      const share = (count / data.total).toLocaleString(undefined, { style: "percent", maximumFractionDigits: 1 });
      return [link, type === "domain" ? "Domains" : "Addresses", number(count), share, bar];
    });
    const counts = [["On the list", data.total]];
    if (!data.otherReasons) counts.push(["Addresses", ofType("email")], ["Domains", ofType("domain")]);
    result.replaceChildren(tiles(counts));
    if (rows.length) result.append(table("Entries by reason and type", ["Reason", "Type", "Entries", "Share", "Chart"], rows, "summary"));
    if (data.otherReasons) {
      result.append(element("p", { class: "soft" }, `${plural(data.otherReasons, "other reason", "other reasons")} with ${plural(data.otherEntries, "entry", "entries")}.`));
    }
    if (!data.total) result.append(element("p", { class: "soft" }, "Nobody is on the list yet. Import a file to begin."));
  });
};

/** Shows the entries of a reason in the list. */
function showReason(type, reason) {
  $("list-form").reset();
  $("list-type").value = type;
  $("list-reason").value = reason;
  location.hash = "#/list";
}

// --- History -------------------------------------------------------------------------------------------------------------------------

function selected({ named, filter }) {
  if (named != null) return plural(named, "named entry", "named entries");
  const parts = Object.entries(filter ?? {}).map(([name, value]) => {
    if (name === "createdFrom" || name === "createdTo") return `stored ${name === "createdTo" ? "before" : "from"} ${new Date(value).toLocaleString()}`;
    return name === "search" ? `address contains ${value}` : `${name} ${value}`;
  });
  return parts.length ? parts.join(", ") : "everything";
}

onShow.history = () => {
  const [message, result] = resultOf("history");
  run(null, message, async () => {
    const query = { limit: PAGE_ENTRIES };
    const [{ data: imports }, { data: deletions }] = await Promise.all([call("/imports", { query }), call("/deletions", { query })]);
    const key = (id) => element("code", {}, id);
    const importRows = imports.map((row) => {
      const end = row.finishedAt ? "complete" : badge("running or broken off", "bad");
      return [time(row.startedAt), key(row.addedBy), number(row.imported), number(row.skipped), number(row.failed), end];
    });
    const deletionRows = deletions.map((row) => [time(row.startedAt), key(row.deletedBy), number(row.deleted), selected(row)]);
    const none = (text) => element("p", { class: "soft" }, text);
    result.replaceChildren(
      element("h3", {}, "Imports"),
      importRows.length ? table("Imports", ["Started", "By", "New", "Already there", "Rejected", "End"], importRows) : none("Nothing was imported yet."),
      element("h3", {}, "Deletions"),
      deletionRows.length ? table("Deletions", ["Started", "By", "Removed", "What was asked for"], deletionRows) : none("Nothing was removed yet."),
    );
  });
};
