//! What registries that are asked over the network share: they are asked again when they fail,
//! more and more seldom; a record that breaks a rule is left out alone; and what they say goes
//! through a [`Fuse`].

use std::{
    collections::hash_map::RandomState,
    convert::Infallible,
    hash::{BuildHasher, Hasher},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::{Claims, Publisher, Services, Start, services as by_id};
use crate::model::{Service, ServiceId};

mod fuse;
mod ledger;
mod tls;

pub use fuse::Fuse;
pub use ledger::Ledger;
pub use tls::{Tls, secret};

/// The time for a connection, and for an answer: together with [`PERIOD`] less than the 10 seconds within
/// which a registry that has fallen silent is noticed.
pub const CONNECT: Duration = Duration::from_secs(2);
pub const ANSWER: Duration = Duration::from_secs(5);

/// How often a registry that says nothing is asked whether it is still there.
pub const PERIOD: Duration = Duration::from_secs(3);

/// How a connection on which nothing is said, to where nobody is any more, is found out after [`PERIOD`].
pub const KEEPALIVE: Duration = Duration::from_secs(2);
pub const KEEPALIVES: u32 = 2;

/// Pauses between attempts. A registry that is back is noticed within the longest.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_millis(500);

/// What has worked for so long has not failed again at once.
const CALM: Duration = Duration::from_secs(10);

/// How many times as long as publishing the pause between two publications is at least: what changes
/// faster is published once.
const PAUSES: u32 = 3;

/// As many problems of records are told; one more says how many others there are.
const PROBLEMS: usize = 20;

/// What a registry says.
#[derive(Debug, Default)]
pub struct Said {
    pub services: Services,
    /// Services of which it cannot be told what there is.
    pub unheard: Vec<ServiceId>,
    /// Records that are not followed, by name, and why.
    pub problems: Vec<String>,
}

impl Said {
    /// Of services that exist since then: who came first keeps what two of them want.
    pub fn by_age<T: Ord>(mut services: Vec<(T, Arc<Service>)>, mut problems: Vec<String>) -> Self {
        services.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut claims = Claims::default();
        let mut claim =
            |service: &Arc<Service>| claims.add_named(service).map_err(|clash| problems.push(clash)).is_ok();
        let services = services.into_iter().map(|(_, service)| service).filter(|service| claim(service));
        let services = by_id(services);
        Self { services, unheard: Vec::new(), problems }
    }
}

/// How one kind of registry is asked.
pub trait Client: Send {
    /// Connects anew, and reads everything.
    fn connect(&mut self) -> impl Future<Output = Result<(), String>> + Send;

    /// Waits for news: whether anything has changed, or the registry was only heard. Nothing is lost
    /// when the wait is given up.
    fn news(&mut self) -> impl Future<Output = Result<bool, String>> + Send;

    /// What is known now.
    fn read(&mut self) -> Said;
}

/// Publishes what a registry says for as long as it runs.
pub async fn run(mut client: impl Client, mut start: Start) {
    let mut fuse = Fuse::new(start.kept.take());
    let mut pause = SHORTEST;
    loop {
        let since = Instant::now();
        let Err(error) = session(&mut client, &mut fuse, &mut start).await;
        fuse.interrupted();
        start.publisher.publish(None, Some(error));
        if since.elapsed() > CALM {
            pause = SHORTEST;
        }
        tokio::time::sleep(jitter(pause)).await;
        pause = (pause * 2).min(LONGEST);
    }
}

/// Asks once how many services there are; for `mesh check`.
pub async fn check(mut client: impl Client) -> Result<usize, String> {
    client.connect().await?;
    let Said { services, problems, .. } = client.read();
    problems.into_iter().next().map_or(Ok(services.len()), Err)
}

async fn session(client: &mut impl Client, fuse: &mut Fuse, start: &mut Start) -> Result<Infallible, String> {
    client.connect().await?;
    loop {
        let began = Instant::now();
        publish(client.read(), fuse, &start.publisher);
        let due = fuse.due();
        let rest = Instant::now() + began.elapsed() * PAUSES;
        loop {
            tokio::select! {
                changed = client.news() => match changed? {
                    true => break,
                    false => start.publisher.heard(),
                },
                () = tokio::time::sleep_until(due.unwrap_or(began).into()), if due.is_some() => break,
                Ok(()) = start.reload.changed() => {
                    client.connect().await?;
                    break;
                }
            }
        }
        while Instant::now() < rest
            && let Ok(changed) = tokio::time::timeout_at(rest.into(), client.news()).await
        {
            changed?;
        }
    }
}

fn publish(Said { services, unheard, mut problems }: Said, fuse: &mut Fuse, publisher: &Publisher) {
    let more = problems.len().saturating_sub(PROBLEMS);
    problems.truncate(PROBLEMS);
    problems.extend((more > 0).then(|| format!("{more} more records are not followed")));
    publisher.problems(problems);
    let before = fuse.snapshot().clone();
    let error = fuse.pass(services, &unheard, Instant::now());
    let after = fuse.snapshot();
    let differs = |old: &Services, new: &Services| old.diff(new).next().is_some();
    let news = before.complete != after.complete
        || differs(&before.services, &after.services)
        || differs(&before.kept, &after.kept);
    publisher.publish(news.then(|| after.clone()), error);
}

/// From half of a time to all of it.
pub fn jitter(time: Duration) -> Duration {
    let random = u32::from(RandomState::new().build_hasher().finish().to_be_bytes()[0]);
    time / 2 + time * random / 512
}

/// Of what the error of a request says, the innermost: the rest repeats the address.
pub fn reason(error: reqwest::Error) -> String {
    let error = error.without_url();
    if error.is_timeout() {
        return "no answer in time".into();
    }
    let mut inner: &dyn std::error::Error = &error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// An HTTP client of the daemon's own: never through a proxy, to where no VIP is, and to nowhere else. It
/// speaks TLS only where that is asked for: a machine may have no certificates at all. `alive`: how long nothing is said
/// on a connection until it is asked whether anybody is still there.
pub fn http(
    vip_ranges: &[IpNet],
    tls: Option<&Tls>,
    alive: Option<Duration>,
) -> Result<reqwest::Client, String> {
    let http = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT)
        .tcp_keepalive(alive)
        .tcp_keepalive_interval(KEEPALIVE)
        .tcp_keepalive_retries(KEEPALIVES)
        .tcp_user_timeout(ANSWER)
        .dns_resolver(Arc::new(Resolver(vip_ranges.to_vec())));
    let http = match tls {
        None => http.tls_certs_only([]),
        Some(tls) => tls.apply(http)?,
    };
    http.build().map_err(reason)
}

/// The body of an answer, of at most `limit` bytes.
pub async fn body(mut answer: reqwest::Response, limit: usize) -> Result<Vec<u8>, Body> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| Body::Failed(reason(error)))? {
        if body.len() + chunk.len() > limit {
            return Err(Body::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Why there is no body.
#[derive(Debug)]
pub enum Body {
    TooLarge,
    Failed(String),
}

/// The URL of a registry over HTTP: one that could be a VIP would make the daemon need what it is about
/// to set up.
pub fn url(text: &str, vip_ranges: &[IpNet]) -> Result<reqwest::Url, String> {
    let url = reqwest::Url::parse(text).map_err(|error| format!("{text:?}: {error}"))?;
    if !["http", "https"].contains(&url.scheme()) || url.host_str().is_none_or(str::is_empty) {
        return Err(format!("{text:?} is not http://HOST:PORT or https://HOST:PORT"));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
        return Err(format!("{text:?} has more than {}://HOST:PORT", url.scheme()));
    }
    host(url.host_str().unwrap_or_default(), vip_ranges)?;
    Ok(url)
}

/// Whether a registry may be at this host, as a URL has it.
pub fn host(host: &str, vip_ranges: &[IpNet]) -> Result<(), String> {
    let address = host.trim_matches(['[', ']']).parse().ok();
    match address.filter(|address| is_vip(vip_ranges, *address)) {
        None => Ok(()),
        Some(address) => {
            Err(format!("{address} lies in a VIP range: the registry cannot be behind what it describes"))
        }
    }
}

pub fn is_vip(vip_ranges: &[IpNet], address: IpAddr) -> bool {
    vip_ranges.iter().any(|range| range.contains(&address.to_canonical()))
}

/// Asks the node's own resolver, and leaves out VIPs.
pub async fn resolve(name: &str, vip_ranges: &[IpNet]) -> io::Result<std::vec::IntoIter<SocketAddr>> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    let real: Vec<_> = found.filter(|found| !is_vip(vip_ranges, found.ip())).collect();
    if real.is_empty() {
        return Err(io::Error::other(format!("{name} has only VIPs for addresses")));
    }
    Ok(real.into_iter())
}

#[derive(Debug)]
struct Resolver(Vec<IpNet>);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let vip_ranges = self.0.clone();
        Box::pin(async move { Ok(Box::new(resolve(name.as_str(), &vip_ranges).await?) as Addrs) })
    }
}

/// Lines that come bit by bit.
#[derive(Debug, Default)]
pub struct Lines {
    /// The beginning of one.
    partial: Vec<u8>,
}

impl Lines {
    /// The lines that are whole with this; `None` where one has more than `limit` bytes.
    pub fn push(&mut self, bytes: &[u8], limit: usize) -> Option<Vec<Vec<u8>>> {
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > limit {
            return None;
        }
        if !bytes.contains(&b'\n') {
            return Some(Vec::new());
        }
        let end = self.partial.iter().rposition(|byte| *byte == b'\n').unwrap_or_default();
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        let lines = whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Some(lines.map(<[u8]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::rules;

    #[test]
    fn a_pause_is_half_to_all_of_what_it_is_meant_to_be() {
        for _ in 0..1000 {
            let pause = jitter(LONGEST);
            assert!((LONGEST / 2..=LONGEST).contains(&pause), "{pause:?}");
        }
    }

    #[test]
    fn urls_name_a_host_that_is_no_vip_and_nothing_else() {
        let ranges = rules::for_tests().vip_ranges;
        for good in ["http://10.0.0.1:2379", "https://etcd.example:2379/", "http://[fd00::1]:2379"] {
            url(good, &ranges).unwrap_or_else(|why| panic!("{good}: {why}"));
        }
        for (bad, why) in [
            ("10.0.0.1:2379", "10.0.0.1:2379"),
            ("ftp://x", "is not http://"),
            ("http://", "empty host"),
            ("https://x/v3", "has more than https://"),
            ("http://user@x", "has more than"),
            ("http://127.128.0.1:2379", "VIP range"),
            ("http://[::ffff:127.128.0.1]:2379", "VIP range"),
            ("http://[fd00:6d65:7368::5]", "VIP range"),
        ] {
            let refused = url(bad, &ranges).unwrap_err();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }
}
