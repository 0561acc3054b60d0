//! Certificates, made for one test.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::text;

/// An authority, and a certificate of its for 127.0.0.1, for servers and clients alike. It has no common name: etcd's
/// gateway refuses clients that have one.
pub struct Certificates {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    _dir: TempDir,
}

impl Certificates {
    pub fn make() -> Self {
        let dir = TempDir::with_prefix("mesh-certificates").unwrap();
        let at = |name: &str| dir.path().join(name);
        openssl(
            dir.path(),
            "-keyout ca.key -out ca.pem -subj /CN=authority -addext basicConstraints=critical,CA:TRUE",
        );
        openssl(
            dir.path(),
            "-CA ca.pem -CAkey ca.key -keyout key.pem -out cert.pem -subj /O=mesh \
             -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE \
             -addext extendedKeyUsage=serverAuth,clientAuth",
        );
        Self { ca: at("ca.pem"), cert: at("cert.pem"), key: at("key.pem"), _dir: dir }
    }
}

fn openssl(dir: &Path, args: &str) {
    let mut openssl = Command::new("openssl");
    openssl.args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split(' '));
    let output = openssl.args(args.split_ascii_whitespace()).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}
