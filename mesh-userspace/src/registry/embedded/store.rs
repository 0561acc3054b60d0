//! The records on disk: one file, written and synchronised before a call is answered.

use std::{fs, path::Path};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::state::{Change, State};

const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("records");

/// Raised when older programs would misread the records.
const VERSION: &[u8] = b"1";
const VERSION_KEY: &str = "version";

/// Memory for the database's own cache, in bytes: everything is in [`State`] as well.
const CACHE: usize = 16 << 20;

#[derive(Debug)]
pub struct Store(Database);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Database(Box<redb::Error>),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Content(String),
}

impl<E: Into<redb::Error>> From<E> for Box<Error> {
    fn from(error: E) -> Self {
        Self::new(Error::Database(Box::new(error.into())))
    }
}

type Result<T> = std::result::Result<T, Box<Error>>;

impl Store {
    /// Opens the file, or makes it; whoever else has it open keeps it.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|error| Box::new(Error::Io(error)))?;
        }
        let store = Self(Database::builder().set_cache_size(CACHE).create(path)?);
        let write = store.0.begin_write()?;
        {
            let mut table = write.open_table(RECORDS)?;
            let version = table.get(VERSION_KEY)?.map(|version| version.value().to_vec());
            match version {
                None => drop(table.insert(VERSION_KEY, VERSION)?),
                Some(version) if version == VERSION => {}
                Some(version) => {
                    let version = String::from_utf8_lossy(&version).into_owned();
                    let what = format!("its version is {version}; this program knows version 1");
                    return Err(Box::new(Error::Content(what)));
                }
            }
        }
        write.commit()?;
        Ok(store)
    }

    pub fn load(&self) -> Result<State> {
        let mut state = State::default();
        for record in self.0.begin_read()?.open_table(RECORDS)?.iter()? {
            let (key, value) = record?;
            if key.value() != VERSION_KEY {
                state.load(key.value(), value.value()).map_err(|error| Box::new(Error::Content(error)))?;
            }
        }
        Ok(state)
    }

    /// Once this has returned, the changes outlive a crash of the machine: redb synchronises the
    /// file at every commit.
    pub fn write(&self, changes: &[Change]) -> Result<()> {
        let write = self.0.begin_write()?;
        {
            let mut table = write.open_table(RECORDS)?;
            for (key, value) in changes {
                match value {
                    Some(value) => drop(table.insert(key.as_str(), value.as_slice())?),
                    None => drop(table.remove(key.as_str())?),
                }
            }
        }
        Ok(write.commit()?)
    }
}
