//! Connects without a pause.

use std::{
    collections::BTreeMap,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use mesh_tests::Mesh;

/// Dials port 80 of a VIP until told to stop.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    dialler: JoinHandle<BTreeMap<String, u64>>,
}

impl Traffic {
    pub(crate) fn start(mesh: &Mesh, vip: &str) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let address = format!("{vip}:80");
        let (task, stopped) = (mesh.workload("client"), stop.clone());
        let dialler = thread::spawn(move || {
            let mut answers = BTreeMap::new();
            while !stopped.load(Relaxed) {
                let mut client = task.command(env!("CARGO_BIN_EXE_client"));
                client.args([&address, "2", "2000"]).stdout(Stdio::piped());
                let output = client.spawn().unwrap().wait_with_output().unwrap();
                for line in String::from_utf8(output.stdout).unwrap().lines() {
                    *answers.entry(line.rsplit(' ').next().unwrap().to_owned()).or_default() += 1;
                }
            }
            answers
        });
        Self { stop, dialler }
    }

    /// How many connects there were: each was answered by one of these.
    pub(crate) fn end(self, by: &[&str]) -> u64 {
        self.stop.store(true, Relaxed);
        let answers = self.dialler.join().unwrap();
        assert!(answers.keys().all(|answer| by.contains(&&**answer)), "{answers:?}");
        answers.values().sum()
    }
}
