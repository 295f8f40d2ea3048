//! What carries the data of an epoch between machines: the leader chooses, all ranks do the same.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::link::Link;
use crate::link::mesh::MeshOptions;
use crate::link::ofi::{OfiError, OfiLink, OfiOptions};
use crate::link::tcp::{TcpLink, TcpOptions};

/// A transport.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Connections of our own; the only one that can be sealed.
    #[default]
    Tcp,
    /// libfabric, by one of its providers.
    Libfabric {
        /// As the library names it.
        provider: String,
    },
}

impl Transport {
    /// The ends of one rank.
    pub(crate) fn connect(
        &self,
        listener: &TcpListener,
        mesh: MeshOptions,
        arena_bytes: usize,
        silent_after: Duration,
    ) -> Result<Arc<dyn Link>, OfiError> {
        Ok(match self {
            Transport::Tcp => {
                let options = TcpOptions { silent_after, ..TcpOptions::new(mesh, arena_bytes) };
                Arc::new(TcpLink::connect(listener, &options)?)
            }
            Transport::Libfabric { provider } => {
                let options = OfiOptions::new(mesh, arena_bytes, provider);
                let options = OfiOptions { silent_after, ..options };
                Arc::new(OfiLink::connect(listener, &options)?)
            }
        })
    }
}
