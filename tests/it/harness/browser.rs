//! A headless Chromium, driven over the DevTools protocol.
//!
//! One browser serves all tests of a run. Each test has a [`Page`] with cookies, storage and
//! downloads of its own. Conditions are polled inside the page, so a test waits for what it sees
//! and never for time.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::Engine as _;
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// How long a command or a condition may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts Chromium with a profile that goes away with it. The protocol is spoken over the pipes 3
/// and 4 of the browser, which are the standard input and output of this shell. When this process
/// ends, the pipe closes, and the browser ends too.
const START: &str = r#"
profile=$(mktemp -d "${TMPDIR:-/tmp}/dnc-browser-XXXXXX")
HOME=$profile "$0" --user-data-dir="$profile" "$@" 3<&0 4>&1 >/dev/null 2>&1
rm -rf "$profile"
"#;

const FLAGS: [&str; 10] = [
    "--headless=new",
    "--remote-debugging-pipe",
    // Chromium's sandbox does not run as root, nor in most containers. It only meets our own pages.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--no-first-run",
    "about:blank",
];

/// The browser of this run.
pub struct Browser {
    commands: Mutex<ChildStdin>,
    last_id: AtomicU64,
    /// Who waits for the answer to a command, by its id.
    waiting: Mutex<HashMap<u64, oneshot::Sender<Value>>>,
    /// What was reported of a page, by its session.
    events: Mutex<HashMap<String, Vec<Value>>>,
}

impl Browser {
    /// The browser, or none if there is no Chromium. That is said loudly: CI has one.
    pub fn get() -> Option<&'static Arc<Self>> {
        static BROWSER: OnceLock<Option<Arc<Browser>>> = OnceLock::new();
        let browser = BROWSER.get_or_init(Self::start).as_ref();
        if browser.is_none() {
            // Not by a macro: what those print in a test that passes is not shown.
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no chromium; the pages are not tried in a browser");
        }
        browser
    }

    fn start() -> Option<Arc<Self>> {
        let is_there =
            |name: &&str| Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        let program = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(is_there)?;
        let mut shell = Command::new("sh");
        shell.args(["-c", START, program]).args(FLAGS).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = shell.spawn().unwrap();
        let browser = Arc::new(Self {
            commands: Mutex::new(child.stdin.take().unwrap()),
            last_id: AtomicU64::new(0),
            waiting: Mutex::default(),
            events: Mutex::default(),
        });
        let messages = BufReader::new(child.stdout.take().unwrap()).split(0);
        let reader = browser.clone();
        std::thread::spawn(move || {
            for message in messages.map_while(Result::ok) {
                reader.take(serde_json::from_slice(&message).unwrap());
            }
            // Whoever still waits is told that no answer comes.
            reader.waiting.lock().unwrap().clear();
            let _ = child.wait();
        });
        Some(browser)
    }

    fn take(&self, message: Value) {
        if let Some(id) = message["id"].as_u64() {
            // A test that has failed does not wait any more.
            let _ = self.waiting.lock().unwrap().remove(&id).map(|waiting| waiting.send(message));
        } else if let Some(session) = message["sessionId"].as_str() {
            self.events.lock().unwrap().entry(session.to_owned()).or_default().push(message);
        }
    }

    /// Sends a command, to the browser or to the page of a session, and returns its result, or why
    /// there is none.
    async fn try_command(&self, session: Option<&str>, method: &str, params: Value) -> Result<Value, String> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let mut command = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = session {
            command["sessionId"] = json!(session);
        }
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, sender);
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.commands.lock().unwrap().write_all(&bytes).unwrap();
        // The page's own deadline is the more telling one.
        let answer = tokio::time::timeout(DEADLINE * 2, answer).await;
        let mut answer = answer.unwrap_or_else(|_| panic!("no answer to {method}")).expect("the browser has ended");
        if answer["error"].is_null() { Ok(answer["result"].take()) } else { Err(format!("{method}: {}", answer["error"])) }
    }

    async fn command(&self, method: &str, params: Value) -> Value {
        self.try_command(None, method, params).await.unwrap()
    }

    /// Opens a page in a context of its own, and waits until it is loaded.
    pub async fn open(self: &Arc<Self>, url: &str) -> Page {
        let context = self.command("Target.createBrowserContext", json!({})).await["browserContextId"].take();
        let target = json!({ "url": "about:blank", "browserContextId": context, "width": 1100, "height": 800 });
        let target = self.command("Target.createTarget", target).await["targetId"].take();
        let attached = self.command("Target.attachToTarget", json!({ "targetId": target, "flatten": true })).await;
        let session = attached["sessionId"].as_str().unwrap().to_owned();
        let downloads = tempfile::tempdir().unwrap();
        let behaviour = json!({ "behavior": "allow", "browserContextId": context, "downloadPath": downloads.path() });
        self.command("Browser.setDownloadBehavior", behaviour).await;
        let page = Page { browser: self.clone(), context, session, downloads };
        for domain in ["Page", "Runtime", "Log", "Network", "DOM"] {
            page.command(&format!("{domain}.enable"), json!({})).await;
        }
        page.go(url).await;
        page
    }
}

/// A page in the browser. Its context is closed when it is dropped.
pub struct Page {
    browser: Arc<Browser>,
    context: Value,
    session: String,
    downloads: tempfile::TempDir,
}

impl Page {
    /// Sends a command of the DevTools protocol, and returns its result.
    pub async fn command(&self, method: &str, params: Value) -> Value {
        self.browser.try_command(Some(&self.session), method, params).await.unwrap()
    }

    /// Opens another address, and waits until it is loaded.
    pub async fn go(&self, url: &str) {
        let opened = self.command("Page.navigate", json!({ "url": url })).await;
        assert!(opened["errorText"].is_null(), "{url}: {}", opened["errorText"]);
        self.wait("document.readyState === 'complete'").await;
    }

    /// Evaluates an expression in the page, awaits it if it is a promise, and returns its value.
    pub async fn eval(&self, expression: &str) -> Value {
        self.try_eval(expression).await.unwrap_or_else(|why| panic!("{expression}\n{why}"))
    }

    async fn try_eval(&self, expression: &str) -> Result<Value, String> {
        let params = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true });
        let mut answer = self.browser.try_command(Some(&self.session), "Runtime.evaluate", params).await?;
        let fault = &answer["exceptionDetails"];
        if fault.is_null() {
            return Ok(answer["result"]["value"].take());
        }
        Err(fault["exception"]["description"].as_str().map_or_else(|| fault.to_string(), str::to_owned))
    }

    /// Waits until the expression is true in the page, and returns its value.
    pub async fn wait(&self, expression: &str) -> Value {
        let polling = format!(
            "(async () => {{
                for (const end = Date.now() + {}; Date.now() < end; await new Promise((next) => setTimeout(next, 20))) {{
                    let value = false;
                    try {{ value = {expression}; }} catch {{ /* what it asks for is not there yet */ }}
                    if (value) return value;
                }}
                throw new Error('waited in vain; the page shows: ' + document.body?.innerText);
            }})()",
            DEADLINE.as_millis()
        );
        loop {
            match self.try_eval(&polling).await {
                Ok(value) => return value,
                // The page makes way for another one, which is then asked.
                Err(why) if why.contains("navigated") => {}
                Err(why) => panic!("{expression}\n{why}\nconsole: {:#?}", self.console()),
            }
        }
    }

    /// Waits until an element that the selector names is shown, and clicks it.
    pub async fn click(&self, selector: &str) {
        let element = format!("document.querySelector({})", json!(selector));
        self.wait(&format!("{element}.checkVisibility() && !{element}.disabled")).await;
        self.eval(&format!("{element}.click()")).await;
    }

    /// Replaces the text of a field as a user does: focuses it, selects everything, and types.
    pub async fn fill(&self, selector: &str, text: &str) {
        let element = format!("document.querySelector({})", json!(selector));
        self.wait(&format!("{element}.checkVisibility() && !{element}.disabled")).await;
        self.eval(&format!("{element}.focus(), {element}.select()")).await;
        if text.is_empty() {
            self.press("Delete").await;
        }
        self.command("Input.insertText", json!({ "text": text })).await;
    }

    /// Presses a key by its name, such as `Tab` or `Enter`.
    pub async fn press(&self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            " " => (32, " "),
            "Delete" => (46, ""),
            _ => panic!("{key} is not known here"),
        };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.command("Input.dispatchKeyEvent", params).await;
        }
    }

    /// Chooses files in a file field.
    pub async fn choose(&self, selector: &str, files: &[&Path]) {
        let document = self.command("DOM.getDocument", json!({ "depth": 0 })).await["root"]["nodeId"].take();
        let node = self.command("DOM.querySelector", json!({ "nodeId": document, "selector": selector })).await["nodeId"].take();
        self.command("DOM.setFileInputFiles", json!({ "nodeId": node, "files": files })).await;
    }

    /// Waits until a file of this name is downloaded, and returns its text. While it is on its way,
    /// an empty file has its name.
    pub async fn downloaded(&self, name: &str) -> String {
        let path = self.downloads.path().join(name);
        super::until(name, || async { path.metadata().is_ok_and(|file| file.len() > 0) }).await;
        std::fs::read_to_string(path).unwrap()
    }

    /// Shows the page in a window of this width, as a phone or a desktop has it, in a colour scheme
    /// (`light`, `dark`).
    pub async fn emulate(&self, width: u32, scheme: &str) {
        let metrics = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.command("Emulation.setDeviceMetricsOverride", metrics).await;
        let features = json!([
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": "reduce" },
        ]);
        self.command("Emulation.setEmulatedMedia", json!({ "features": features })).await;
    }

    /// Keeps an image of the whole page under `target/screenshots`, for people to look at.
    pub async fn screenshot(&self, name: &str) {
        let image = self.command("Page.captureScreenshot", json!({ "captureBeyondViewport": true })).await;
        let bytes = base64::engine::general_purpose::STANDARD.decode(image["data"].as_str().unwrap()).unwrap();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("{name}.png")), bytes).unwrap();
    }

    fn events(&self, method: &str) -> Vec<Value> {
        let events = self.browser.events.lock().unwrap();
        let events = events.get(&self.session).into_iter().flatten();
        events.filter(|event| event["method"] == method).map(|event| event["params"].clone()).collect()
    }

    /// The addresses of everything that was requested.
    pub fn requested(&self) -> Vec<String> {
        let requests = self.events("Network.requestWillBeSent").into_iter();
        requests.map(|params| params["request"]["url"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Everything that the browser or the page has complained about: exceptions, violations of the
    /// Content-Security-Policy, messages on the console. Answers with an error status are not in
    /// it.
    pub fn console(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for entry in self.events("Log.entryAdded") {
            if entry["entry"]["source"] != "network" {
                lines.push(entry["entry"]["text"].to_string());
            }
        }
        lines.extend(self.events("Runtime.exceptionThrown").iter().map(Value::to_string));
        lines.extend(self.events("Runtime.consoleAPICalled").iter().map(|params| params["args"].to_string()));
        lines
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // The answer is not waited for.
        let command = json!({ "id": 0, "method": "Target.disposeBrowserContext", "params": { "browserContextId": self.context } });
        let _ = self.browser.commands.lock().unwrap().write_all(format!("{command}\0").as_bytes());
        self.browser.events.lock().unwrap().remove(&self.session);
    }
}
