//! The `[dns]` table.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Component, Path, PathBuf},
};

use ipnet::IpNet;
use mesh_common::abi::MAX_EXCLUDED;
use serde::Deserialize;

use crate::registry::rules;

/// How names are answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    pub listen: Vec<SocketAddr>,
    /// Where clients ask whose connects are not translated.
    pub outside: Vec<SocketAddr>,
    /// In lower case. Names below these never leave the node.
    pub suffixes: Vec<String>,
    /// Whether tasks' queries come here, whichever name server they ask.
    pub intercept: bool,
    /// Below the managed cgroup: these, with everything below them, ask whom they ask.
    pub exclude: Vec<PathBuf>,
    pub upstream: Upstream,
}

/// Who is asked for names that are not the node's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// The name servers in /etc/resolv.conf.
    Auto,
    /// None of them: nobody.
    These(Vec<SocketAddr>),
}

impl Dns {
    /// What is only read at start.
    pub(super) fn at_start(&self) -> (&[SocketAddr], &[SocketAddr], bool, &[PathBuf]) {
        (&self.listen, &self.outside, self.intercept, &self.exclude)
    }

    /// Whether the daemon itself listens there.
    pub fn is_own(&self, address: &SocketAddr) -> bool {
        self.listen.contains(address) || self.outside.contains(address)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    listen: Vec<toml::Spanned<String>>,
    outside: Vec<toml::Spanned<String>>,
    suffixes: Vec<toml::Spanned<String>>,
    intercept: bool,
    exclude: Vec<toml::Spanned<String>>,
    upstream: toml::Spanned<RawUpstream>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "dns.upstream must be \"auto\" or a list of addresses")]
enum RawUpstream {
    Word(String),
    List(Vec<String>),
}

impl Default for Raw {
    fn default() -> Self {
        let spanned = |text: &str| toml::Spanned::new(0..0, text.to_owned());
        Self {
            listen: vec![spanned("127.64.0.53:53")],
            outside: Vec::new(),
            suffixes: vec![spanned("service.local")],
            intercept: true,
            exclude: Vec::new(),
            upstream: toml::Spanned::new(0..0, RawUpstream::Word("auto".into())),
        }
    }
}

impl Raw {
    /// Where in the file it is wrong, and why.
    pub(super) fn check(&self, vips: &[IpNet]) -> Result<Dns, (usize, String)> {
        let unicast = |address: IpAddr| {
            // Only a socket with one address answers from the address that was asked.
            let why = if address.is_unspecified() {
                "stands for every address; name those that are meant"
            } else if address.is_multicast() {
                "is not a unicast address"
            } else if vips.iter().any(|range| range.contains(&address)) {
                "lies in a VIP range"
            } else {
                return Ok(());
            };
            Err(format!("{address} {why}"))
        };
        let (mut listen, mut outside) = (Vec::new(), Vec::new());
        for (key, list, addresses) in
            [("listen", &self.listen, &mut listen), ("outside", &self.outside, &mut outside)]
        {
            for text in list {
                let fail = |why: String| (text.span().start, format!("dns.{key}: {why}"));
                let address: SocketAddr = text
                    .get_ref()
                    .parse()
                    .ok()
                    .filter(|address: &SocketAddr| address.port() != 0)
                    .ok_or_else(|| fail(format!("{:?} is not ADDRESS:PORT", text.get_ref())))?;
                unicast(address.ip()).map_err(fail)?;
                addresses.push(address);
            }
        }
        let twice = self.outside.iter().zip(&outside).find(|(_, address)| listen.contains(address));
        if let Some((text, address)) = twice {
            return Err((text.span().start, format!("dns.outside: {address} is in dns.listen")));
        }
        let mut suffixes = Vec::new();
        for text in &self.suffixes {
            let suffix = text.get_ref().trim_end_matches('.').to_lowercase();
            rules::dns_name("suffix", &suffix)
                .map_err(|why| (text.span().start, format!("dns.suffixes: {why}")))?;
            suffixes.push(suffix);
        }
        let mut exclude = Vec::new();
        for text in &self.exclude {
            let fail = |why: &str| (text.span().start, format!("dns.exclude: {:?} {why}", text.get_ref()));
            let path = Path::new(text.get_ref().trim_start_matches('/'));
            if path.as_os_str().is_empty() {
                return Err(fail("would be all; dns.intercept = false says that"));
            }
            if !path.components().all(|part| matches!(part, Component::Normal(_))) {
                return Err(fail("is not the path of a cgroup below node.cgroup"));
            }
            if exclude.len() == MAX_EXCLUDED {
                return Err(fail("is one too many"));
            }
            exclude.push(path.to_owned());
        }
        let fail = |why: String| (self.upstream.span().start, format!("dns.upstream: {why}"));
        let upstream = match self.upstream.get_ref() {
            RawUpstream::Word(word) if word == "auto" => Upstream::Auto,
            RawUpstream::Word(word) => return Err(fail(format!("{word:?} is neither \"auto\" nor a list"))),
            RawUpstream::List(list) => {
                let mut these = Vec::new();
                for text in list {
                    let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| (ip, 53).into()));
                    let address: SocketAddr =
                        address.map_err(|_| fail(format!("{text:?} is neither ADDRESS nor ADDRESS:PORT")))?;
                    unicast(address.ip()).map_err(fail)?;
                    let own = [("listen", &listen), ("outside", &outside)];
                    if let Some((key, _)) = own.into_iter().find(|(_, list)| list.contains(&address)) {
                        return Err(fail(format!(
                            "{address} is in dns.{key}: questions would go in a circle"
                        )));
                    }
                    these.push(address);
                }
                Upstream::These(these)
            }
        };
        Ok(Dns { listen, outside, suffixes, intercept: self.intercept, exclude, upstream })
    }
}
