//! A TCP link with faults: it cuts or stalls connections, slows them down, loses bytes, accepts no
//! new connections, or leads to another server.
//!
//! A fault applies to existing connections, to new ones, or to both. When one side closes a stalled
//! connection, the other side is not notified, as with a pulled cable. So the database keeps the
//! sessions of a client that is gone.

#![allow(dead_code, reason = "each program that includes this file uses a part of it")]

use std::{
    collections::HashSet,
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::Interest,
    net::{TcpSocket, TcpStream},
    sync::watch,
};

/// What the link does with the bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Forwards them.
    Pass,
    /// Forwards this many bytes a second in each direction.
    Slow(usize),
    /// Forwards nothing and closes nothing. The bytes arrive once the flow is `Pass` again.
    Stall,
    /// Receives them and discards them.
    Lose,
    /// Closes the connection, on both sides.
    Cut,
}

/// A TCP proxy on a port of its own. Connections end with the runtime that made them.
pub struct Proxy {
    address: SocketAddr,
    link: Arc<Link>,
}

struct Link {
    target: Mutex<String>,
    for_new: watch::Sender<Flow>,
    is_taking: watch::Sender<bool>,
    connections: Mutex<Vec<Connection>>,
    made: AtomicUsize,
    forwarded: AtomicUsize,
}

struct Connection {
    /// Has no receiver once the connection is closed.
    flow: watch::Sender<Flow>,
    client_has_it: Arc<AtomicBool>,
    client_port: Option<u16>,
}

/// Connections that wait to be accepted before the kernel drops further attempts.
const BACKLOG: u32 = 64;

impl Proxy {
    /// A working link to the server of `url`.
    pub async fn to(url: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(BACKLOG).unwrap();
        let address = listener.local_addr().unwrap();
        let link = Arc::new(Link {
            target: Mutex::new(host_and_port(url)),
            for_new: watch::Sender::new(Flow::Pass),
            is_taking: watch::Sender::new(true),
            connections: Mutex::default(),
            made: AtomicUsize::new(0),
            forwarded: AtomicUsize::new(0),
        });
        tokio::spawn({
            let link = link.clone();
            async move {
                let mut is_taking = link.is_taking.subscribe();
                loop {
                    let _ = is_taking.wait_for(|is_taking| *is_taking).await;
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        _ = is_taking.changed() => continue,
                    };
                    if let Ok((near, _)) = accepted {
                        link.made.fetch_add(1, Ordering::Relaxed);
                        tokio::spawn(link.clone().serve(near));
                    }
                }
            }
        });
        Self { address, link }
    }

    /// `url` with the address of this link.
    pub fn url(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.address.port())).unwrap();
        url.to_string()
    }

    /// Sets the flow of existing and new connections.
    pub fn all(&self, flow: Flow) {
        self.new_ones(flow);
        self.existing(flow);
    }

    /// Sets the flow of existing connections.
    pub fn existing(&self, flow: Flow) {
        for connection in self.link.connections.lock().unwrap().iter() {
            connection.flow.send_replace(flow);
        }
    }

    /// Sets the flow of new connections, and accepts them.
    pub fn new_ones(&self, flow: Flow) {
        self.link.for_new.send_replace(flow);
        self.link.is_taking.send_replace(true);
    }

    /// Cuts every connection, and refuses new ones.
    pub fn cut(&self) {
        self.all(Flow::Cut);
    }

    /// Lets everything pass again, on stalled connections as well.
    pub fn mend(&self) {
        self.all(Flow::Pass);
    }

    /// A fail-over as a client sees it: existing connections stay silent forever, and new ones lead
    /// to the server of `url`.
    pub fn fail_over(&self, url: &str) {
        self.existing(Flow::Stall);
        self.redirect(url);
    }

    /// Leads new connections to the server of `url`.
    pub fn redirect(&self, url: &str) {
        *self.link.target.lock().unwrap() = host_and_port(url);
        self.new_ones(Flow::Pass);
    }

    /// Existing connections stall, and the kernel does not answer new attempts to connect.
    pub async fn unreachable(&self) {
        self.existing(Flow::Stall);
        self.link.is_taking.send_replace(false);
        // The kernel completes connections until the listener's backlog is full.
        let mut filling = Vec::new();
        while let Ok(Ok(connection)) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(self.address)).await {
            filling.push(connection);
        }
        let mut is_taking = self.link.is_taking.subscribe();
        tokio::spawn(async move {
            let _ = is_taking.wait_for(|is_taking| *is_taking).await;
            drop(filling);
        });
    }

    /// Connections that the client has open now.
    pub fn open(&self) -> usize {
        let owned = owned_ports();
        let is_open = |connection: &&Connection| {
            !connection.flow.is_closed()
                && connection.client_has_it.load(Ordering::Relaxed)
                && connection.client_port.is_none_or(|port| owned.as_ref().is_none_or(|owned| owned.contains(&port)))
        };
        self.link.connections.lock().unwrap().iter().filter(is_open).count()
    }

    /// All connections that were accepted so far.
    pub fn made(&self) -> usize {
        self.link.made.load(Ordering::Relaxed)
    }

    /// The bytes that were forwarded so far, in both directions.
    pub fn forwarded(&self) -> usize {
        self.link.forwarded.load(Ordering::Relaxed)
    }
}

/// The local ports of the connections that a process on this machine has open; `None` where the
/// kernel does not say. A client that closes a connection while it sends is not noticed at the
/// other end: the end of its stream waits behind the bytes that a stalled link does not take.
fn owned_ports() -> Option<HashSet<u16>> {
    let table = std::fs::read_to_string("/proc/self/net/tcp").ok()?;
    let ports = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, port) = fields.get(1)?.split_once(':')?;
        // A connection without an inode has no process any more.
        let is_owned = *fields.get(9)? != "0";
        is_owned.then(|| u16::from_str_radix(port, 16).ok()).flatten()
    });
    Some(ports.collect())
}

fn host_and_port(url: &str) -> String {
    let url = url::Url::parse(url).unwrap();
    format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432))
}

impl Link {
    async fn serve(self: Arc<Self>, near: TcpStream) {
        let client_has_it = Arc::new(AtomicBool::new(true));
        let mut flow = {
            let mut connections = self.connections.lock().unwrap();
            connections.retain(|connection| !connection.flow.is_closed());
            let (sender, flow) = watch::channel(*self.for_new.borrow());
            let client_port = near.peer_addr().ok().map(|address| address.port());
            connections.push(Connection { flow: sender, client_has_it: client_has_it.clone(), client_port });
            flow
        };
        let _ = near.set_nodelay(true);
        let mut far: Option<TcpStream> = None;
        let (mut up, mut down) = (Pipe::default(), Pipe::default());
        loop {
            let now = *flow.borrow_and_update();
            let is_gone = !client_has_it.load(Ordering::Relaxed);
            match now {
                Flow::Cut => return,
                // The server is not notified of a client that leaves now, until the link works
                // again.
                Flow::Stall => tokio::select! {
                    () = closed(&near), if !is_gone => client_has_it.store(false, Ordering::Relaxed),
                    changed = flow.changed() => if changed.is_err() { return },
                },
                _ if is_gone => return,
                Flow::Pass | Flow::Slow(_) | Flow::Lose => {
                    if far.is_none() {
                        let target = self.target.lock().unwrap().clone();
                        far = TcpStream::connect(target).await.ok();
                    }
                    let Some(far) = &far else { return };
                    let _ = far.set_nodelay(true);
                    tokio::select! {
                        () = up.run(&near, far, now, &self.forwarded) => return,
                        () = down.run(far, &near, now, &self.forwarded) => return,
                        changed = flow.changed() => if changed.is_err() { return },
                    }
                }
            }
        }
    }
}

/// One direction of a connection, with the bytes that were read but not forwarded yet.
#[derive(Default)]
struct Pipe(Vec<u8>);

impl Pipe {
    /// Forwards until one of the ends is closed. It may be dropped at any time and run again.
    async fn run(&mut self, from: &TcpStream, to: &TcpStream, flow: Flow, forwarded: &AtomicUsize) {
        let waiting = &mut self.0;
        loop {
            while !waiting.is_empty() {
                if to.writable().await.is_err() {
                    return;
                }
                match to.try_write(waiting) {
                    Ok(written) => {
                        waiting.drain(..written);
                        forwarded.fetch_add(written, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
            let most = match flow {
                Flow::Slow(bytes_per_sec) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    (bytes_per_sec / 20).max(1)
                }
                _ => 64 << 10,
            };
            if from.readable().await.is_err() {
                return;
            }
            waiting.resize(most, 0);
            let read = from.try_read(waiting);
            waiting.truncate(if flow == Flow::Lose { 0 } else { *read.as_ref().unwrap_or(&0) });
            match read {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

/// Waits until the peer has closed a connection that is not being read.
async fn closed(connection: &TcpStream) {
    while let Ok(ready) = connection.ready(Interest::READABLE).await {
        if ready.is_read_closed() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
