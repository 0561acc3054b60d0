//! Asking the node's name servers for what is not the node's own.

use std::{
    collections::{BTreeSet, HashMap, hash_map::RandomState},
    fmt, fs,
    hash::{BuildHasher, Hasher},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hickory_resolver::{
    NameServerPool, PoolContext, ResponseCache, TlsConfig, TtlConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
    net::{DnsError, DnsHandle, NetError, RetryDnsHandle, runtime::TokioRuntimeProvider, xfer::FirstAnswer},
    proto::{
        op::{DnsRequest, DnsRequestOptions, DnsResponse, Message, OpCode, Query, ResponseCode},
        rr::{Name, RData, Record, RecordType},
    },
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use super::{Core, NEGATIVE_TTL, table::Own};
use crate::config::{Config, Dns, Upstream};

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The stub of systemd-resolved, and where that lists the servers it asks itself. The stub is a task like
/// any other: what it asks would come back here.
const STUB: &str = "127.0.0.53:53";
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// How often that is read again: it may be a link to, or mounted from, what cannot be watched.
const PERIOD: Duration = Duration::from_secs(5);

/// How long one try may take; there are two. Callers usually wait for five seconds.
const PATIENCE: Duration = Duration::from_millis(1500);

/// How long the node remembers that a name does not exist elsewhere.
const NEGATIVE_CACHE: Duration = Duration::from_secs(5);

/// Questions that may wait for name servers at a time: of one listener, and of all together.
const PER_CLIENT: usize = 64;
const IN_ALL: usize = 512;

/// Below this name are questions by which the daemon finds out whether its own come back to it.
const LOOP: &str = "mesh-loop.";

pub(crate) type Pool = RetryDnsHandle<NameServerPool<TokioRuntimeProvider>>;

/// The name servers that are asked now.
pub(super) struct Forwarder {
    pub(super) servers: Vec<SocketAddr>,
    /// What is wrong with those that are not asked.
    pub(super) problems: Vec<String>,
    /// Whether nobody is to be asked.
    none: bool,
    pool: Option<Pool>,
    cache: ResponseCache,
    /// What the daemon's own questions are known by.
    token: String,
    /// Places of servers whose questions came back.
    circular: Mutex<BTreeSet<usize>>,
}

impl Forwarder {
    fn new(servers: Vec<SocketAddr>, problems: Vec<String>, none: bool) -> Self {
        let mut options = options();
        options.negative_max_ttl = Some(NEGATIVE_CACHE);
        let cache = ResponseCache::new(options.cache_size, TtlConfig::from_opts(&options));
        let pool = (!servers.is_empty()).then(|| pool(&servers));
        let token = format!("{:016x}", RandomState::new().build_hasher().finish());
        Self { servers, problems, none, pool, cache, token, circular: Mutex::default() }
    }

    /// Nobody: for good, or until the configuration's are known.
    pub(super) fn nobody(none: bool) -> Self {
        Self::new(Vec::new(), Vec::new(), none)
    }

    /// Whether it is known by now who is asked, or why nobody is.
    pub(super) fn is_known(&self) -> bool {
        self.none || !self.servers.is_empty() || !self.problems.is_empty()
    }

    /// The answer of a name server, or of the cache.
    pub(super) async fn ask(&self, query: Query) -> Own {
        let Some(pool) = &self.pool else {
            return Own::failed(if self.none { ResponseCode::Refused } else { ResponseCode::ServFail });
        };
        let result = match self.cache.get(&query, Instant::now()) {
            Some(known) => known,
            None => {
                let result = ask(pool, query.clone()).await;
                self.cache.insert(query, result.clone(), Instant::now());
                result
            }
        };
        own(result)
    }

    /// What is kept of an answer.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn keep(
        &self,
        query: &Query,
        result: Result<Message, NetError>,
        now: Instant,
    ) -> Option<Result<Message, NetError>> {
        self.cache.insert(query.clone(), result, now);
        self.cache.get(query, now)
    }

    /// Takes notice where a question is one of the daemon's own that came back.
    pub(super) fn hear(&self, name: &Name) -> bool {
        let mut labels = name.iter();
        let place = labels.next().and_then(|place| std::str::from_utf8(place).ok()?.parse().ok());
        let own = place.filter(|_| labels.next() == Some(self.token.as_bytes()));
        if let Some(place) = own {
            self.circular.lock().expect("nobody panics holding it").insert(place);
        }
        own.is_some()
    }

    /// Asks each server something that only this daemon would; those through which the question
    /// came back here.
    async fn find_circles(&self) -> BTreeSet<usize> {
        let mut asked = JoinSet::new();
        for (place, server) in self.servers.iter().enumerate() {
            let Ok(name) = Name::from_ascii(format!("{place}.{}.{LOOP}", self.token)) else { continue };
            let pool = pool(&[*server]);
            asked.spawn(async move { ask(&pool, Query::query(name, RecordType::A)).await.is_ok() });
        }
        asked.join_all().await;
        self.circular.lock().expect("nobody panics holding it").clone()
    }
}

impl fmt::Display for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers.iter().map(ToString::to_string).collect();
        match &*servers {
            [] if self.none => f.write_str("not the node's own, and dns.upstream names no server"),
            [] => f.write_str("not the node's own, and there is no name server to ask"),
            _ => write!(f, "not the node's own; forwarded to {}", servers.join(" or ")),
        }
    }
}

fn options() -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = PATIENCE;
    // A port of the kernel's choice: others could be some service's, which is about to start.
    options.os_port_selection = true;
    options
}

/// Asks these servers, over UDP and, where that is too small, over TCP.
pub(crate) fn pool(servers: &[SocketAddr]) -> Pool {
    let servers = servers.iter().map(|server| {
        let at_port = |mut connection: ConnectionConfig| {
            connection.port = server.port();
            connection
        };
        // TCP for what is too large for UDP.
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(at_port);
        NameServerConfig::new(server.ip(), true, connections.into())
    });
    let context = PoolContext::new(options(), TlsConfig::new().expect("there is no TLS"));
    let pool = NameServerPool::from_config(servers, Arc::new(context), TokioRuntimeProvider::default());
    RetryDnsHandle::new(pool, 1)
}

/// The same question from several clients is asked once; so one that goes in a circle waits for
/// itself, and fails.
pub(crate) async fn ask(pool: &Pool, query: Query) -> Result<Message, NetError> {
    let request = DnsRequest::from_query(query, DnsRequestOptions::default());
    let answer = pool.send(request).first_answer();
    // The pool tries for ever where it has too much to do.
    match tokio::time::timeout(2 * PATIENCE, answer).await {
        Ok(answer) => answer.map(DnsResponse::into_message),
        Err(_) => Err(NetError::Timeout),
    }
}

/// What a client is told. Negative answers are not to be kept: a service may get the name.
pub(super) fn own(result: Result<Message, NetError>) -> Own {
    match result {
        // It may hold records that no answer can.
        Ok(message) if message.metadata.op_code != OpCode::Query => Own::failed(ResponseCode::ServFail),
        Ok(message) => Own {
            code: message.metadata.response_code,
            answers: message.answers,
            // Also beside an alias (CNAME) of a name that does not exist.
            authorities: message.authorities.into_iter().map(not_kept).collect(),
            additionals: message.additionals,
        },
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            let authorities = none.soa.map(|soa| not_kept(soa.into_record_of_rdata()));
            Own { authorities: authorities.into_iter().collect(), ..Own::failed(none.response_code) }
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => Own::failed(code),
        Err(error) => {
            tracing::debug!("no answer from upstream: {error}");
            Own::failed(ResponseCode::ServFail)
        }
    }
}

/// A SOA record says how long it is kept that there is nothing.
fn not_kept(mut record: Record) -> Record {
    if let RData::SOA(data) = &mut record.data {
        data.minimum = NEGATIVE_TTL;
        record.ttl = NEGATIVE_TTL;
    }
    record
}

/// Keeps one client from taking what all share.
#[derive(Debug)]
pub(super) struct Limits {
    all: Arc<Semaphore>,
    /// By listener: those of one network namespace are one.
    clients: Mutex<HashMap<u64, Arc<Semaphore>>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(IN_ALL)), clients: Mutex::default() }
    }
}

impl Limits {
    /// The right to have a question open; it ends with the permits.
    pub(super) fn enter(&self, client: u64) -> Option<[OwnedSemaphorePermit; 2]> {
        let mut clients = self.clients.lock().expect("nobody panics holding it");
        if clients.len() > IN_ALL {
            clients.retain(|_, open| open.available_permits() < PER_CLIENT);
        }
        let own = clients.entry(client).or_insert_with(|| Arc::new(Semaphore::new(PER_CLIENT)));
        let own = own.clone().try_acquire_owned().ok()?;
        Some([own, self.all.clone().try_acquire_owned().ok()?])
    }
}

/// Follows the configuration and the node's resolv.conf.
pub(super) async fn follow(core: &Core, mut config: watch::Receiver<Arc<Config>>) {
    let mut known = None;
    loop {
        let dns = config.borrow_and_update().dns.clone();
        let wanted = wanted(&dns, Path::new(RESOLV_CONF), Path::new(BEHIND_STUB));
        if known.as_ref() != Some(&wanted) {
            let (servers, problems) = wanted.clone();
            for problem in &problems {
                tracing::warn!("{problem}");
            }
            let none = dns.upstream == Upstream::These(Vec::new());
            core.forwarder.store(Arc::new(Forwarder::new(servers, problems, none)));
            core.news.notify_one();
            leave_circles(core, none).await;
            known = Some(wanted);
        }
        if let Ok(Err(_)) = tokio::time::timeout(PERIOD, config.changed()).await {
            return;
        }
    }
}

/// Does without the servers that ask this daemon in turn.
async fn leave_circles(core: &Core, none: bool) {
    let forwarder = core.forwarder.load_full();
    let circles = forwarder.find_circles().await;
    if circles.is_empty() {
        return;
    }
    let (mut servers, mut problems) = (Vec::new(), forwarder.problems.clone());
    for (place, server) in forwarder.servers.iter().enumerate() {
        if circles.contains(&place) {
            let problem = format!("the name server {server} asks this daemon in turn, so it is not asked");
            tracing::error!("{problem}");
            problems.push(problem);
        } else {
            servers.push(*server);
        }
    }
    core.forwarder.store(Arc::new(Forwarder::new(servers, problems, none)));
}

/// The servers to ask, and what is wrong with others.
fn wanted(dns: &Dns, resolv_conf: &Path, behind_stub: &Path) -> (Vec<SocketAddr>, Vec<String>) {
    if let Upstream::These(servers) = &dns.upstream {
        return (servers.clone(), Vec::new());
    }
    let (servers, problems) = listed(dns, resolv_conf);
    let is_stub = servers.iter().all(|server| server.to_string() == STUB) && !servers.is_empty();
    if is_stub && behind_stub.exists() { listed(dns, behind_stub) } else { (servers, problems) }
}

/// Those that a file lists.
fn listed(dns: &Dns, resolv_conf: &Path) -> (Vec<SocketAddr>, Vec<String>) {
    let path = resolv_conf.display();
    let text = match fs::read_to_string(resolv_conf) {
        Ok(text) => text,
        Err(error) => return (Vec::new(), vec![format!("dns.upstream: cannot read {path}: {error}")]),
    };
    let (mut servers, mut problems) = (Vec::new(), Vec::new());
    for word in name_servers(&text) {
        match word.parse().map(|ip: IpAddr| SocketAddr::new(ip, 53)) {
            Ok(server) if dns.is_own(&server) => {}
            Ok(server) => servers.push(server),
            Err(_) => problems.push(format!("dns.upstream: {path} names {word:?}, which is no address")),
        }
    }
    if servers.is_empty() {
        problems.push(format!(
            "dns.upstream: {path} names no server but this daemon: names that are not its own fail"
        ));
    }
    (servers, problems)
}

fn name_servers(resolv_conf: &str) -> impl Iterator<Item = &str> {
    let words = resolv_conf.lines().map(str::split_whitespace);
    words.filter_map(|mut words| words.next().filter(|word| *word == "nameserver").and(words.next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(upstream: Upstream) -> Dns {
        Dns {
            listen: vec!["127.64.0.53:53".parse().unwrap()],
            outside: Vec::new(),
            suffixes: Vec::new(),
            intercept: true,
            exclude: Vec::new(),
            upstream,
        }
    }

    fn from_resolv_conf(text: &str) -> (Vec<String>, Vec<String>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let (servers, problems) = wanted(&dns(Upstream::Auto), file.path(), Path::new("/nowhere"));
        (servers.iter().map(ToString::to_string).collect(), problems)
    }

    #[test]
    fn behind_the_stub_of_systemd_resolved_its_own_servers_are_asked() {
        let (stub, behind) =
            (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        fs::write(stub.path(), "nameserver 127.0.0.53\noptions edns0 trust-ad\n").unwrap();
        fs::write(behind.path(), "nameserver 10.0.0.2\n").unwrap();
        let servers = |behind: &Path| wanted(&dns(Upstream::Auto), stub.path(), behind).0;
        assert_eq!(servers(behind.path()), ["10.0.0.2:53".parse().unwrap()]);
        assert_eq!(servers(Path::new("/nowhere")), [STUB.parse().unwrap()]);
    }

    #[test]
    fn the_node_s_servers_are_asked_but_never_the_daemon_itself() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 127.64.0.53\nnameserver 10.0.0.2 # first\n\
                    \tnameserver fd00::2\n;nameserver 9.9.9.9\nnameserver";
        assert_eq!(from_resolv_conf(text), (vec!["10.0.0.2:53".into(), "[fd00::2]:53".into()], vec![]));
        let (servers, problems) = from_resolv_conf("nameserver 127.64.0.53\n");
        assert_eq!((servers.len(), problems.len()), (0, 1));
        assert!(problems[0].contains("no server but this daemon"), "{problems:?}");
        let (servers, problems) = from_resolv_conf("nameserver fe80::1%eth0\nnameserver 10.0.0.2\n");
        assert_eq!(servers, ["10.0.0.2:53"]);
        assert!(problems[0].contains("\"fe80::1%eth0\""), "{problems:?}");
        let (_, problems) = wanted(&dns(Upstream::Auto), Path::new("/nowhere"), Path::new("/nowhere"));
        assert!(problems[0].contains("/nowhere"), "{problems:?}");
    }

    #[test]
    fn a_question_that_comes_back_is_recognized() {
        let forwarder = Forwarder::new(vec!["10.0.0.2:53".parse().unwrap()], Vec::new(), false);
        let hear = |name: &str| forwarder.hear(&Name::from_ascii(name).unwrap());
        assert!(!hear("www.example.com."));
        // Another daemon's: it is found only if it is passed on.
        assert!(!hear("0.0123456789abcdef.mesh-loop."));
        assert!(forwarder.circular.lock().unwrap().is_empty());
        assert!(hear(&format!("0.{}.MESH-LOOP.", forwarder.token)));
        assert_eq!(*forwarder.circular.lock().unwrap(), BTreeSet::from([0]));
    }

    #[test]
    fn one_client_cannot_take_what_all_share() {
        let limits = Limits::default();
        let greedy: Vec<_> = (0..2 * PER_CLIENT).map_while(|_| limits.enter(1)).collect();
        assert_eq!(greedy.len(), PER_CLIENT);
        assert!(limits.enter(2).is_some());
        drop(greedy);
        assert!(limits.enter(1).is_some());
        let all: Vec<_> = (10..).map_while(|client| limits.enter(client)).collect();
        assert_eq!(all.len(), IN_ALL);
    }

    #[test]
    fn clients_that_are_gone_are_forgotten() {
        let limits = Limits::default();
        for client in 0..10 * IN_ALL as u64 {
            limits.enter(client);
        }
        assert!(limits.clients.lock().unwrap().len() <= IN_ALL + 2);
    }
}
