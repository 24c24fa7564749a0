//! Commands that run on the target itself: where its store is, and what its mapping says.

use clap::Args;
use std::path::PathBuf;
use virt_replica::transport::target::ROOT_DEFAULT;

/// Where this host keeps replicas.
#[derive(Debug, Args)]
pub struct HereArgs {
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = ROOT_DEFAULT)]
    root: PathBuf,
    /// Names of networks, machine types and paths of the source on this host [default: recovery.yaml beside the
    /// configuration]
    #[arg(long, value_name = "FILE")]
    mapping: Option<PathBuf>,
}

#[cfg(feature = "libvirt")]
pub use connect::connect;

#[cfg(feature = "libvirt")]
mod connect {
    use super::*;
    use crate::cli::globals::Globals;
    use crate::cli::target::CreateStore;
    use std::path::Path;
    use virt_replica::error::Result;
    use virt_replica::recovery::mapping::{MAPPING_FILE, Mapping};
    use virt_replica::wiring;
    use virt_replica::wiring::local_target::{Here, HereOptions};

    impl HereArgs {
        /// The same, and makes a store of the directory first if that is wished and it is none.
        pub fn connect_creating(&self, globals: &Globals, wish: CreateStore) -> Result<Here> {
            if wish.create_store {
                wiring::stores::create(&self.root)?;
            }
            self.connect(globals)
        }

        /// Reads the mapping and connects to libvirt.
        pub fn connect(&self, globals: &Globals) -> Result<Here> {
            connect(globals, &self.root, self.mapping.as_deref())
        }
    }

    /// The same, for a store and a mapping that were named otherwise.
    pub fn connect(globals: &Globals, root: &Path, mapping: Option<&Path>) -> Result<Here> {
        let beside = globals.config_path().with_file_name(MAPPING_FILE);
        let mapping = Mapping::load(mapping.unwrap_or(&beside), mapping.is_some())?;
        let (uri, state) = (globals.uri(), globals.state_dir.clone());
        Here::connect(HereOptions { uri, root: root.to_owned(), state, mapping })
    }
}
