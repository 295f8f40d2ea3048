//! The other ranks of a divided model, as the first one has them: processes that it starts on this
//! machine, or nodes that join it.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use pomona_fabric::coll::Choices;
use pomona_fabric::group::GroupOptions;
use pomona_fabric::group::local::{LocalGroup, LocalMember, LocalOptions};
use pomona_fabric::link::Link;
use pomona_fabric::rendezvous::{EpochPlan, Fingerprint, Lobby, LobbyOptions, Member, Transport};
use pomona_fabric::secure::Token;
use pomona_types::{GroupError, LostCause};
use serde::{Deserialize, Serialize};

use crate::calibration;
use crate::cli::{EngineArgs, NodeTransport};
use crate::models::progress::say;

/// How long nodes may take to join.
const JOIN_LIMIT: Duration = Duration::from_secs(600);
/// The same where somebody asks again and again.
const QUICK: Duration = Duration::from_millis(500);
/// How long a node may take to find the weights, which it may have to download.
const PREPARATION: Duration = Duration::from_secs(3600);
/// How long ranks may take to connect to each other.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The ranks of one replica but the first, running.
pub struct Crew {
    link: Arc<dyn Link>,
    choices: Choices,
    /// Dropped last: it ends them.
    held: Held,
}

/// What keeps them.
enum Held {
    Local(#[expect(dead_code, reason = "its end is theirs")] LocalGroup),
    Nodes(#[expect(dead_code, reason = "their connections are open as long")] Vec<Member>),
}

impl Drop for Crew {
    fn drop(&mut self) {
        if let Held::Nodes(_) = self.held {
            // Those that were told that it is over have ended; the others join again.
            let (rank, epoch) = (0, self.link.epoch());
            let cause = LostCause::Failed("the first rank gave this epoch up".to_owned());
            self.link.abort(GroupError::PeerLost { rank, epoch, cause });
        }
    }
}

/// What nodes are told to do.
#[derive(Serialize, Deserialize)]
pub struct Task {
    /// The model as the leader names it.
    pub model: String,
    /// The leader's flags for the engine.
    pub flags: Vec<String>,
}

/// Where nodes come to, for all replicas.
pub struct Door {
    lobby: Lobby,
    transport: NodeTransport,
    epoch: u32,
    /// How long nodes may take to join.
    patience: Duration,
}

impl Door {
    /// Opens it at an address, for nodes that have these weights.
    pub fn open(
        address: &str,
        model: &str,
        args: &EngineArgs,
        weights: Fingerprint,
    ) -> Result<Door> {
        let nodes = &args.nodes;
        let given = nodes.token()?;
        let shown = given.is_none();
        let token = given.unwrap_or_else(Token::generate);
        let task = Task { model: model.to_owned(), flags: args.to_flags() };
        let options = LobbyOptions {
            token: token.clone(),
            policy: nodes.node_security,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: serde_json::to_string(&task)?,
            fingerprint: weights,
            preparation: PREPARATION,
        };
        let lobby = Lobby::open(address, options)?;
        let wanted = args.parallel.processes() - args.parallel.data_parallel_size as usize;
        say(&format!(
            "waiting for {wanted} of: pomona node --join {} --token {}",
            lobby.address(),
            if shown { token.reveal() } else { "TOKEN" },
        ));
        let transport = nodes.node_transport;
        Ok(Door { lobby, transport, epoch: 0, patience: JOIN_LIMIT })
    }

    /// From now on, whoever does not wait there already is not waited for: who asks, asks again.
    pub fn be_quick(&mut self) {
        self.patience = QUICK;
    }

    /// Takes the nodes of one replica.
    fn take(&mut self, ranks: usize, arena_bytes: usize) -> Result<Crew> {
        let members = self.lobby.take(ranks - 1, self.patience)?;
        self.epoch += 1;
        let (epoch, task) = (self.epoch, String::new());
        let transport = match self.transport {
            NodeTransport::Tcp => Transport::Tcp,
            NodeTransport::Libfabric => self.lobby.libfabric(&members).unwrap_or_else(|error| {
                say(&format!("{error}: ranks talk over tcp"));
                Transport::Tcp
            }),
        };
        let timeout = CONNECT_LIMIT;
        let plan = EpochPlan { epoch, transport, arena_bytes, timeout, task };
        let link = self.lobby.start(&members, &plan)?;
        // What was measured on one machine tells nothing of the wires between several.
        let choices = Choices::default();
        Ok(Crew { link, choices, held: Held::Nodes(members) })
    }
}

impl Crew {
    /// Finds the ranks from 1 on of one of a model's replicas: at the door if there is one,
    /// otherwise it starts them on this machine.
    pub fn find(
        (model, replica): (&str, usize),
        args: &EngineArgs,
        arena_bytes: usize,
        door: Option<&mut Door>,
    ) -> Result<Crew> {
        let ranks = args.parallel.division().ranks();
        if let Some(door) = door {
            return door.take(ranks, arena_bytes);
        }
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let group =
            GroupOptions { identity: identity(), ranks_min: ranks, ..GroupOptions::new(ranks) };
        let options = LocalOptions { group, spares: 0, arena_bytes };
        let choices = calibration::choices();
        let group = LocalGroup::spawn(&options, |_| {
            let mut command = Command::new(&program);
            command.args(["rank", model, "--replica", &replica.to_string()]);
            command.args(["--sums", &choices.to_string()]).args(args.to_flags());
            command
        });
        let group = group.context("cannot start the processes of the other ranks")?;
        let link = group.next_epoch().context("the other ranks did not start")?;
        Ok(Crew { link, choices, held: Held::Local(group) })
    }

    /// Which algorithm makes which sum.
    pub fn choices(&self) -> Choices {
        self.choices.clone()
    }

    /// The first rank's own ends.
    pub fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }
}

/// What ranks of one group have to agree on before anything else.
fn identity() -> String {
    format!("pomona {}", env!("CARGO_PKG_VERSION"))
}

/// Takes the place that was kept for this process.
pub fn join() -> Result<LocalMember> {
    LocalMember::join(&identity()).context(
        "`pomona rank` is started by the first rank: write --tensor-parallel-size or the like to \
         `pomona serve`",
    )
}

/// Returns when the first rank has ended. A rank does not end before, for others may be in the last
/// call still, and would lose it there.
pub fn await_end(link: &dyn Link) {
    const LOOK: Duration = Duration::from_millis(5);
    while link.aborted().is_none() {
        std::thread::sleep(LOOK);
    }
}

/// Tells the other ranks why this one ends, if it is not because the group has.
pub fn leave(link: &dyn Link, outcome: Result<()>) -> Result<()> {
    let Err(error) = outcome else { return Ok(()) };
    if let Some(why) = link.aborted() {
        return match why {
            GroupError::Ended(_) => Ok(()),
            why => Err(why.into()),
        };
    }
    let (rank, epoch) = (link.rank(), link.epoch());
    let cause = LostCause::Failed(format!("{error:#}"));
    link.abort(GroupError::PeerLost { rank, epoch, cause });
    Err(error.context(format!("rank {rank}")))
}
