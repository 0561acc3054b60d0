//! What reads foreign bytes, a function for each way that they come in. It takes any bytes, and panics where what they
//! come to breaks a promise. `cargo xtask fuzz` looks for such bytes; what was found, and good examples to start from,
//! is in `fuzz/corpus`, and replayed by this crate's tests.

use crate::{
    dns,
    registry::{cloudmap, consul, embedded, etcd, fuzz as registry, kubernetes},
};

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// By the name of its folder in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 13] = [
    ("cloudmap", cloudmap::fuzz::services),
    ("consul", consul::fuzz),
    ("dns_query", dns::fuzz::query),
    ("dns_reply", dns::fuzz::reply),
    ("embedded_calls", embedded::fuzz::calls),
    ("embedded_http", embedded::fuzz::http),
    ("etcd_messages", etcd::fuzz::messages),
    ("etcd_records", etcd::fuzz::records),
    ("kept", registry::kept),
    ("kubernetes", kubernetes::fuzz::messages),
    ("services_json", registry::json),
    ("services_toml", registry::toml),
    ("services_yaml", registry::yaml),
];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn what_is_in_the_corpus_breaks_nothing() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        let folders =
            fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(folders.collect::<BTreeSet<_>>(), targets);
        for (name, target) in TARGETS {
            let files: Vec<_> =
                fs::read_dir(corpus.join(name)).unwrap().map(|file| file.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name}");
            for file in files {
                eprintln!("{}", file.display());
                target(&fs::read(file).unwrap());
            }
        }
    }
}
