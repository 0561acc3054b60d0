//! How a registry over HTTPS is told from others, and shown who asks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use reqwest::{Certificate, ClientBuilder, Identity};
use serde::Deserialize;

use super::reason;

/// Files in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Who is believed; without it, whom the machine believes.
    ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
}

impl Tls {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads the files.
    pub(super) fn apply(&self, builder: ClientBuilder) -> Result<ClientBuilder, String> {
        let builder = match &self.ca_file {
            None => builder,
            Some(path) => {
                let certificates = Certificate::from_pem_bundle(read("ca_file", path)?.as_bytes());
                let certificates = certificates.map_err(|error| wrong("ca_file", path, &reason(error)))?;
                if certificates.is_empty() {
                    return Err(wrong("ca_file", path, "no certificate"));
                }
                builder.tls_certs_only(certificates)
            }
        };
        match (&self.cert_file, &self.key_file) {
            (None, None) => Ok(builder),
            (Some(cert), Some(key)) => {
                let pem = [read("cert_file", cert)?, read("key_file", key)?].join("\n");
                let identity = Identity::from_pem(pem.as_bytes());
                Ok(builder.identity(identity.map_err(|error| wrong("cert_file", cert, &reason(error)))?))
            }
            _ => Err("tls: cert_file and key_file go together".into()),
        }
    }
}

fn wrong(what: &str, path: &Path, why: &str) -> String {
    format!("{what} {}: {why}", path.display())
}

fn read(what: &str, path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| wrong(what, path, &error.to_string()))
}

/// The one line of a file that holds a secret.
pub fn secret(what: &str, path: &Path) -> Result<String, String> {
    let text = read(what, path)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() || secret.contains(|c: char| c.is_control()) {
        return Err(wrong(what, path, "this is not one line"));
    }
    Ok(secret.into())
}
