//! The DNS registry: SRV records, or addresses, of names that others keep, asked for again as their
//! TTLs end.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_resolver::{
    net::{DnsError, NetError},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name, RData, Record, RecordType, rdata::SRV},
    },
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use super::{
    Claims, Rules,
    file::format,
    remote::{self, Said, jitter},
    rules,
};
use crate::{
    dns::{Pool, ask, pool},
    model::{Health, Instance, Service},
};

/// Within these a name is asked for again when its TTL ends: not all the time, and not a day later.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// A name that has nothing, or that nobody answered for, is asked for again within this time.
const SOON: Duration = Duration::from_secs(5);

/// As many names are asked for at a time.
const AT_ONCE: usize = 64;

/// As many addresses of a name are taken.
const MAX: usize = 1000;

/// The keys in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    servers: Vec<String>,
    name: Vec<Entry>,
}

/// A name, and the service that it stands for: with the fields of a services file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Entry {
    srv: Option<String>,
    a: Option<String>,
    #[serde(flatten)]
    service: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Question {
    Srv(Name),
    Address(Name),
}

impl Settings {
    pub fn check(&self, rules: &Rules) -> Result<(), String> {
        self.servers(rules)?;
        if self.name.is_empty() {
            return Err("there is no [[registry.name]]".into());
        }
        let mut claims = Claims::default();
        self.name.iter().try_for_each(|entry| claims.add_named(&entry.parse(rules)?.1))
    }

    pub fn source(&self) -> String {
        self.servers.join(",")
    }

    fn servers(&self, rules: &Rules) -> Result<Vec<SocketAddr>, String> {
        if self.servers.is_empty() {
            return Err("servers names no server".into());
        }
        let server = |text: &String| {
            let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| (ip, 53).into()));
            let address: SocketAddr =
                address.map_err(|_| format!("servers: {text:?} is neither ADDRESS nor ADDRESS:PORT"))?;
            match remote::is_vip(&rules.vip_ranges, address.ip()) {
                true => Err(format!("servers: {address} lies in a VIP range")),
                false => Ok(address),
            }
        };
        self.servers.iter().map(server).collect()
    }
}

impl Entry {
    fn parse(&self, rules: &Rules) -> Result<(Question, Service), String> {
        let name = |text: &str| {
            rules::dns_name("name", text.trim_end_matches('.'))?;
            let mut name = Name::from_ascii(text).map_err(|error| format!("{text:?}: {error}"))?;
            name.set_fqdn(true);
            Ok::<_, String>(name)
        };
        let question = match (&self.srv, &self.a) {
            (Some(srv), None) => Question::Srv(name(srv)?),
            (None, Some(a)) => Question::Address(name(a)?),
            _ => return Err("each [[registry.name]] has either srv or a".into()),
        };
        let mut record = self.service.clone();
        if record.contains_key("instance") {
            return Err("instances are what the name has".into());
        }
        if self.srv.as_ref().is_some_and(|srv| srv.contains("._udp.")) {
            record.entry("protocol").or_insert(json!("udp"));
        }
        Ok((question, format::service(record.into(), rules)?))
    }
}

pub struct Client {
    pool: Pool,
    rules: Rules,
    names: Vec<Known>,
    lookups: JoinSet<(usize, Result<Answer, String>)>,
}

/// What is known of a name.
struct Known {
    question: Question,
    service: Arc<Service>,
    /// Whether there was an answer in this run.
    heard: bool,
    /// Addresses that are left out, and why.
    problems: Vec<String>,
    /// Why the last question had no answer.
    error: Option<String>,
    /// When it is asked for; none while it is.
    due: Option<Instant>,
}

/// What a name has.
#[derive(Debug)]
struct Answer {
    instances: Vec<Instance>,
    problems: Vec<String>,
    ttl: Duration,
}

/// An address, a port and a weight.
type Place = (IpAddr, u16, u16);

impl Client {
    /// With settings that were checked.
    pub fn new(settings: &Settings, rules: Rules) -> Self {
        let servers = settings.servers(&rules).unwrap_or_default();
        let names = settings.name.iter().filter_map(|entry| entry.parse(&rules).ok());
        let names = names.map(|(question, service)| Known {
            question,
            service: service.into(),
            heard: false,
            problems: Vec::new(),
            error: None,
            due: None,
        });
        Self { pool: pool(&servers), names: names.collect(), rules, lookups: JoinSet::new() }
    }

    /// Asks for the names that are due.
    fn ask(&mut self, now: Instant) {
        for (place, known) in self.names.iter_mut().enumerate() {
            if self.lookups.len() == AT_ONCE {
                return;
            }
            if known.due.take_if(|due| *due <= now).is_some() {
                let (pool, rules, question) = (self.pool.clone(), self.rules.clone(), known.question.clone());
                let port = known.service.id.port;
                self.lookups.spawn(async move { (place, resolve(&pool, &question, port, &rules).await) });
            }
        }
    }

    /// Whether an answer changes anything.
    fn take(&mut self, place: usize, answer: Result<Answer, String>, now: Instant) -> bool {
        let known = &mut self.names[place];
        match answer {
            Ok(Answer { instances, problems, ttl }) => {
                let longest = if instances.is_empty() { SOON } else { LONGEST };
                known.due = Some(now + ttl.clamp(SHORTEST, longest));
                let same = known.heard && known.error.is_none() && known.problems == problems;
                let same = same && known.service.instances == instances;
                (known.heard, known.error, known.problems) = (true, None, problems);
                if !same {
                    Arc::make_mut(&mut known.service).instances = instances;
                }
                !same
            }
            Err(why) => {
                known.due = Some(now + jitter(SOON));
                let error = Some(why);
                std::mem::replace(&mut known.error, error.clone()) != error
            }
        }
    }

    /// Whether any name was answered for; else why not.
    fn any_answer(&self) -> Result<(), String> {
        let errors: Vec<_> =
            self.names.iter().map_while(|known| Some((known, known.error.as_ref()?))).collect();
        match &*errors {
            [(known, why), ..] if errors.len() == self.names.len() => {
                Err(format!("dns {}: {why}", known.question.name()))
            }
            _ => Ok(()),
        }
    }
}

impl remote::Client for Client {
    async fn connect(&mut self) -> Result<(), String> {
        self.lookups = JoinSet::new();
        let now = Instant::now();
        self.names.iter_mut().for_each(|known| known.due = Some(now));
        self.ask(now);
        while let Some(done) = self.lookups.join_next().await {
            let (place, answer) = done.map_err(|error| error.to_string())?;
            self.take(place, answer, Instant::now());
            self.ask(now);
        }
        self.any_answer()
    }

    async fn news(&mut self) -> Result<bool, String> {
        loop {
            self.ask(Instant::now());
            let next = self.names.iter().filter_map(|known| known.due).min();
            let next = next.filter(|_| self.lookups.len() < AT_ONCE);
            let done = tokio::select! {
                Some(done) = self.lookups.join_next() => done,
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => continue,
            };
            let (place, answer) = done.map_err(|error| error.to_string())?;
            let changed = self.take(place, answer, Instant::now());
            self.any_answer()?;
            return Ok(changed);
        }
    }

    fn read(&mut self) -> Said {
        let mut said = Said::default();
        for Known { question, service, heard, problems, error, .. } in &self.names {
            if *heard {
                said.services.insert(service.id.clone(), service.clone());
            } else {
                said.unheard.push(service.id.clone());
            }
            let name = question.name();
            said.problems.extend(problems.iter().map(|problem| format!("{name}: {problem}")));
            let kept = |why| format!("{name}: {why}; what it had before stays in use");
            said.problems.extend(error.as_ref().map(kept));
        }
        said
    }
}

impl Question {
    fn name(&self) -> String {
        let (Self::Srv(name) | Self::Address(name)) = self;
        name.to_ascii().trim_end_matches('.').into()
    }
}

async fn resolve(
    pool: &Pool,
    question: &Question,
    port: NonZeroU16,
    rules: &Rules,
) -> Result<Answer, String> {
    let (places, ttl) = match question {
        Question::Address(name) => {
            let (addresses, ttl) = addresses(pool, name).await?;
            (addresses.into_iter().map(|address| (address, port.get(), 100)).collect(), ttl)
        }
        Question::Srv(name) => {
            let (records, mut ttl) = lookup(pool, name, RecordType::SRV).await?;
            let mut places = Vec::new();
            for SRV { port, weight, target, .. } in preferred(records) {
                let (addresses, shorter) = addresses(pool, &target).await?;
                ttl = ttl.min(shorter);
                places.extend(addresses.into_iter().map(|address| (address, port, weight)));
                if places.len() > MAX {
                    break;
                }
            }
            (places, ttl)
        }
    };
    let (instances, problems) = instances(&places, rules);
    match problems.first() {
        // Nonsense, rather than the news that there is nothing.
        Some(problem) if instances.is_empty() => Err(problem.clone()),
        _ => Ok(Answer { instances, problems, ttl }),
    }
}

/// Both families; neither is known if one is not.
async fn addresses(pool: &Pool, name: &Name) -> Result<(Vec<IpAddr>, Duration), String> {
    let (v4, v6) = tokio::join!(lookup(pool, name, RecordType::A), lookup(pool, name, RecordType::AAAA));
    let (v4, v6) = (v4?, v6?);
    let ttl = match (v4.0.is_empty(), v6.0.is_empty()) {
        (false, true) => v4.1,
        (true, false) => v6.1,
        _ => v4.1.min(v6.1),
    };
    Ok((v4.0.iter().chain(&v6.0).filter_map(address).collect(), ttl))
}

fn address(record: &Record) -> Option<IpAddr> {
    match record.data {
        RData::A(a) => Some(a.0.into()),
        RData::AAAA(aaaa) => Some(aaaa.0.into()),
        _ => None,
    }
}

/// The records that there are, for how long. That there are none is an answer; a failure is not.
async fn lookup(pool: &Pool, name: &Name, kind: RecordType) -> Result<(Vec<Record>, Duration), String> {
    match ask(pool, Query::query(name.clone(), kind)).await {
        Ok(message) if message.metadata.response_code == ResponseCode::NoError => {
            let ttl = message.answers.iter().map(|record| record.ttl).min().unwrap_or(0);
            Ok((message.answers, Duration::from_secs(ttl.into())))
        }
        Ok(message) if message.metadata.response_code == ResponseCode::NXDomain => {
            Ok((Vec::new(), Duration::ZERO))
        }
        Ok(message) => Err(format!("{kind}: {}", message.metadata.response_code)),
        Err(NetError::Dns(DnsError::NoRecordsFound(none)))
            if matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError) =>
        {
            Ok((Vec::new(), Duration::from_secs(none.negative_ttl.unwrap_or(0).into())))
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => Err(format!("{kind}: {}", none.response_code)),
        Err(NetError::Timeout) => Err(format!("{kind}: no answer in time")),
        Err(error) => Err(format!("{kind}: {error}")),
    }
}

/// The records of the first priority, with weights that mean something here: where all are zero
/// they are equal, and a zero beside others is nearly nothing.
fn preferred(records: Vec<Record>) -> Vec<SRV> {
    let records = records.into_iter().filter_map(|record| match record.data {
        // The root says that there is no such service.
        RData::SRV(srv) if !srv.target.is_root() => Some(srv),
        _ => None,
    });
    let mut records: Vec<_> = records.collect();
    let first = records.iter().map(|srv| srv.priority).min();
    records.retain(|srv| Some(srv.priority) == first);
    let equal = records.iter().all(|srv| srv.weight == 0);
    for srv in &mut records {
        srv.weight = if equal { 100 } else { srv.weight.max(1) };
    }
    records
}

/// The instances at these places, and what is wrong with the others.
fn instances(places: &[Place], rules: &Rules) -> (Vec<Instance>, Vec<String>) {
    let (mut instances, mut problems) = (Vec::new(), Vec::new());
    let mut known = HashSet::new();
    for (address, port, weight) in places {
        let Some(port) = NonZeroU16::new(*port) else {
            problems.push(format!("address {address} with port 0"));
            continue;
        };
        if let Err(why) = rules.backend(*address) {
            problems.push(why);
            continue;
        }
        let address = address.to_canonical();
        if !known.insert((address, port)) {
            continue;
        }
        if instances.len() == MAX {
            problems.push(format!("it has more than {MAX} addresses"));
            break;
        }
        let id = format!("{address}:{port}");
        instances.push(Instance { id, address, port, weight: *weight, zone: None, health: Health::Healthy });
    }
    // Answers come in any order.
    instances.sort_by_key(|one| (one.address, one.port));
    (instances, problems)
}

/// What the records of an answer come to.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(records: &[Record]) {
    let rules = rules::for_tests();
    let mut places: Vec<Place> =
        records.iter().filter_map(address).map(|address| (address, 80, 100)).collect();
    let targets = preferred(records.to_vec());
    places.extend(targets.iter().map(|srv| (IpAddr::from([10, 0, 0, 1]), srv.port, srv.weight)));
    let (instances, problems) = instances(&places, &rules);
    super::fuzz::instances(&instances, &rules);
    super::fuzz::problems(&problems);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings(text: &str) -> Result<Settings, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        settings.check(&rules::for_tests()).map(|()| settings)
    }

    #[test]
    fn names_are_services_with_the_fields_of_a_services_file() {
        let settings = settings(
            r#"
servers = ["10.0.0.2", "[fd00::2]:5353"]
[[name]]
srv = "_http._tcp.backend.example."
port = 80
name = "backend"
namespace = "service.local"
policy = "random"
aliases = ["backend"]
[[name]]
srv = "_dns._udp.backend.example"
port = 53
name = "names"
namespace = "service.local"
[[name]]
a = "db.example"
port = 5432
name = "db"
namespace = "service.local"
"#,
        )
        .unwrap();
        let parsed: Vec<_> =
            settings.name.iter().map(|entry| entry.parse(&rules::for_tests()).unwrap()).collect();
        let ids: Vec<_> = parsed.iter().map(|(_, service)| service.id.to_string()).collect();
        assert_eq!(
            ids,
            ["backend.service.local:80/tcp", "names.service.local:53/udp", "db.service.local:5432/tcp"]
        );
        assert!(parsed.iter().all(|(question, _)| question.name().ends_with(".example")));
    }

    #[test]
    fn mistakes_are_named() {
        let one = |entry: &str| format!("servers = [\"10.0.0.2\"]\n[[name]]\n{entry}");
        let rest = "port = 80\nname = \"x\"\nnamespace = \"y\"";
        for (text, why) in [
            ("name = []".to_owned(), "missing field `servers`"),
            ("servers = []\nname = []".into(), "servers names no server"),
            ("servers = [\"10.0.0.2\"]\nname = []".into(), "there is no [[registry.name]]"),
            ("servers = [\"x\"]\nname = []".into(), "neither ADDRESS"),
            ("servers = [\"127.128.0.1\"]\nname = []".into(), "lies in a VIP range"),
            (one(rest), "either srv or a"),
            (one(&format!("a = \"x\"\nsrv = \"x\"\n{rest}")), "either srv or a"),
            (one(&format!("a = \"\u{fc}.example\"\n{rest}")), "is not a DNS name"),
            (one(&format!("a = \"x\"\n{rest}\ncolour = 1")), "colour"),
            (one(&format!("a = \"x\"\n{rest}\nvip = \"8.8.8.8\"")), "outside the configured ranges"),
            (one(&format!("a = \"x\"\n{rest}\ninstance = []")), "instances are what the name has"),
            (one("a = \"x\"\nport = -1\nname = \"x\"\nnamespace = \"y\""), "-1"),
            (one(&format!("a = \"x\"\n{rest}\n[[name]]\na = \"z\"\n{rest}")), "defined twice"),
        ] {
            let refused = settings(&text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    fn srv(priority: u16, weight: u16, target: &str) -> Record {
        let data = SRV::new(priority, weight, 80, Name::from_ascii(target).unwrap());
        Record::from_rdata(Name::root(), 60, RData::SRV(data))
    }

    #[test]
    fn the_first_priority_counts_and_weights_are_shares() {
        let weights =
            |records: Vec<Record>| preferred(records).iter().map(|srv| srv.weight).collect::<Vec<_>>();
        assert_eq!(weights(vec![srv(2, 5, "spare."), srv(1, 10, "a."), srv(1, 0, "b.")]), [10, 1]);
        assert_eq!(weights(vec![srv(1, 0, "a."), srv(1, 0, "b.")]), [100, 100]);
        assert_eq!(weights(vec![srv(0, 0, ".")]), [0; 0]);
    }

    #[test]
    fn hostile_addresses_are_left_out_alone() {
        let places =
            ["169.254.169.254", "127.0.0.1", "127.128.0.1", "::1", "0.0.0.0", "10.0.0.1", "10.0.0.1"];
        let places: Vec<Place> = places.iter().map(|address| (address.parse().unwrap(), 80, 100)).collect();
        let (taken, problems) = instances(&places, &rules::for_tests());
        assert_eq!((taken.len(), problems.len()), (1, 5));
        assert_eq!(taken[0].id, "10.0.0.1:80");
        let many: Vec<Place> = (0..2000u16)
            .map(|n| (IpAddr::from([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]]), 80, 1))
            .collect();
        let (taken, problems) = instances(&many, &rules::for_tests());
        assert_eq!((taken.len(), problems.len()), (MAX, 1));
    }

    fn client(names: usize) -> Client {
        let names = (0..names)
            .map(|n| format!("[[name]]\na = \"n{n}\"\nport = 80\nname = \"n{n}\"\nnamespace = \"x\"\n"));
        let text = format!("servers = [\"127.0.0.1:1\"]\n{}", names.collect::<String>());
        Client::new(&settings(&text).unwrap(), rules::for_tests())
    }

    fn first(said: &Said) -> &Service {
        said.services.values().next().unwrap()
    }

    fn answer(address: &str, ttl: u64) -> Answer {
        let (instances, problems) = instances(&[(address.parse().unwrap(), 80, 100)], &rules::for_tests());
        Answer { instances, problems, ttl: Duration::from_secs(ttl) }
    }

    #[test]
    fn a_failure_keeps_what_a_name_had_and_is_named() {
        use remote::Client as _;
        let mut client = client(2);
        let now = Instant::now();
        assert!(client.take(0, Ok(answer("10.0.0.1", 30)), now));
        assert!(!client.take(0, Ok(answer("10.0.0.1", 30)), now));
        assert!(client.take(1, Err("A: no answer in time".into()), now));
        let said = client.read();
        assert_eq!((said.services.len(), said.unheard.len(), said.problems.len()), (1, 1, 1));
        assert_eq!(client.any_answer(), Ok(()));

        client.take(0, Err("A: Server Failure".into()), now);
        let said = client.read();
        assert_eq!(first(&said).instances.len(), 1);
        assert!(said.problems[0].starts_with("n0: A: Server Failure; what it had"), "{:?}", said.problems);
        assert!(client.any_answer().unwrap_err().starts_with("dns n0: "));

        let none = Answer { instances: Vec::new(), problems: Vec::new(), ttl: Duration::ZERO };
        assert!(client.take(0, Ok(none), now));
        assert_eq!(first(&client.read()).instances.len(), 0);
    }

    #[test]
    fn a_name_is_asked_for_again_within_bounds() {
        let mut client = client(1);
        let now = Instant::now();
        for (ttl, due) in [(0, 1), (30, 30), (86_400, 60)] {
            client.take(0, Ok(answer("10.0.0.1", ttl)), now);
            assert_eq!(client.names[0].due, Some(now + Duration::from_secs(due)));
        }
        let none = Answer { instances: Vec::new(), problems: Vec::new(), ttl: LONGEST };
        client.take(0, Ok(none), now);
        assert_eq!(client.names[0].due, Some(now + SOON));
    }

    proptest! {
        #[test]
        fn no_places_do_harm(places in prop::collection::vec((any::<IpAddr>(), any::<u16>(), any::<u16>()), 0..50)) {
            let rules = rules::for_tests();
            let (instances, _) = instances(&places, &rules);
            prop_assert!(instances.iter().all(|one| rules.backend(one.address).is_ok()));
            prop_assert!(instances.iter().all(|one| rules::instance_id(&one.id).is_ok()));
        }
    }
}
