//! A real etcd.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{certificates::Certificates, netns::Place, text, wait_until};

/// One server, until the test ends.
pub struct Etcd {
    pub address: String,
    settings: Settings,
    /// Of its root user.
    password: Option<&'static str>,
    dir: TempDir,
    server: Child,
}

/// With what it is started, each time.
struct Settings {
    place: Place,
    address: String,
    peer: String,
    /// Whether it speaks TLS, and asks clients for certificates.
    certificates: Option<Certificates>,
    options: &'static [&'static str],
}

impl Etcd {
    pub fn start() -> Self {
        Self::launch(Place::here(), None, &[])
    }

    pub fn start_at(place: Place) -> Self {
        Self::launch(place, None, &[])
    }

    pub fn start_with(certificates: Certificates) -> Self {
        Self::launch(Place::here(), Some(certificates), &[])
    }

    /// With more options on its command line.
    pub fn start_as(options: &'static [&'static str]) -> Self {
        Self::launch(Place::here(), None, options)
    }

    fn launch(place: Place, certificates: Option<Certificates>, options: &'static [&'static str]) -> Self {
        let (address, peer) = (place.free_address(), place.free_address());
        let dir = TempDir::with_prefix("mesh-etcd").unwrap();
        let settings = Settings { place, address: address.clone(), peer, certificates, options };
        let etcd = Self { address, server: settings.launch(&dir), settings, password: None, dir };
        etcd.wait();
        etcd
    }

    pub fn url(&self) -> String {
        self.settings.url()
    }

    /// From now on only users are served: a root, and one that may read what is below a prefix.
    pub fn require_password(&mut self, (user, password): (&str, &str), prefix: &str) {
        const ROOT: &str = "of root";
        for args in [
            &["user", "add", &format!("root:{ROOT}")][..],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "reader"],
            &["role", "grant-permission", "--prefix=true", "reader", "read", prefix],
            &["user", "add", &format!("{user}:{password}")],
            &["user", "grant-role", user, "reader"],
            &["auth", "enable"],
        ] {
            self.ctl(args);
        }
        self.password = Some(ROOT);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    /// After [`kill`](Self::kill), with what it held.
    pub fn restart(&mut self) {
        self.server = self.settings.launch(&self.dir);
        self.wait();
    }

    /// After [`kill`](Self::kill), with nothing.
    pub fn restart_empty(&mut self) {
        fs::remove_dir_all(self.data()).unwrap();
        self.restart();
    }

    /// After [`kill`](Self::kill): what it holds.
    pub fn backup(&self) -> TempDir {
        let backup = TempDir::with_prefix("mesh-etcd-backup").unwrap();
        copy(&self.data(), &backup.path().join("data"));
        backup
    }

    /// After [`kill`](Self::kill), with what it held at an earlier time.
    pub fn restart_from(&mut self, backup: &TempDir) {
        fs::remove_dir_all(self.data()).unwrap();
        copy(&backup.path().join("data"), &self.data());
        self.restart();
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// It takes connections, and answers nothing.
    pub fn freeze(&self) {
        kill_process(Pid::from_child(&self.server), Signal::STOP).unwrap();
    }

    pub fn thaw(&self) {
        kill_process(Pid::from_child(&self.server), Signal::CONT).unwrap();
    }

    fn client(&self) -> Command {
        let mut etcdctl = self.settings.place.command("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", &self.url()]);
        if let Some(Certificates { ca, cert, key, .. }) = &self.settings.certificates {
            etcdctl.arg("--cacert").arg(ca).arg("--cert").arg(cert).arg("--key").arg(key);
        }
        if let Some(password) = self.password {
            etcdctl.args(["--user", &format!("root:{password}")]);
        }
        etcdctl
    }

    /// What `etcdctl ARGS` prints; it must work.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.client().args(args).output().unwrap();
        assert!(output.status.success(), "etcdctl {args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn put(&self, key: &str, value: &str) {
        self.ctl(&["put", key, value]);
    }

    pub fn delete(&self, key: &str) {
        self.ctl(&["del", key]);
    }

    fn wait(&self) {
        wait_until("etcd answers", || {
            self.client().args(["endpoint", "health"]).output().unwrap().status.success()
        });
    }
}

impl Settings {
    fn url(&self) -> String {
        let scheme = if self.certificates.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    fn launch(&self, dir: &TempDir) -> Child {
        let (address, peer) = (self.url(), format!("http://{}", self.peer));
        let mut etcd = self.place.command("etcd");
        etcd.arg("--data-dir").arg(dir.path().join("data")).args(self.options);
        etcd.args(["--listen-client-urls", &address, "--advertise-client-urls", &address]);
        etcd.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        etcd.args(["--initial-cluster", &format!("default={peer}")]);
        if let Some(Certificates { ca, cert, key, .. }) = &self.certificates {
            etcd.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            etcd.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
        }
        etcd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--archive").args([from, to]).status().unwrap();
    assert!(copied.success());
}
