//! What the processes on the machines do: they are this same program, with words that say so.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use pomona_fabric::coll::{Comm, World};
use pomona_fabric::link::Link;
use pomona_fabric::rendezvous::{EpochPlan, JoinOptions, Lobby, LobbyOptions, Transport, join};
use pomona_fabric::secure::{Policy, Token};
use pomona_types::{Collective, GroupError};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const ARENA: usize = 1 << 20;
const WEIGHTS: [u8; 32] = [7; 32];
const VERSION: &str = "a version";

/// What stands for the text of a prompt.
pub const MARKER: &str = "the prompt that nobody else may read";

/// `lead ADDRESS POLICY TRANSPORT TOKEN WORK NODES`
pub fn lead(words: &[String]) {
    let [address, policy, transport, token, work, nodes] = words else { panic!("{words:?}") };
    let nodes: usize = nodes.parse().unwrap();
    let options = LobbyOptions {
        token: token.parse().unwrap(),
        policy: policy.parse().unwrap(),
        version: VERSION.to_owned(),
        task: work.clone(),
        fingerprint: WEIGHTS,
        preparation: PATIENCE,
    };
    let lobby = Lobby::open(address.as_str(), options).unwrap();
    let mut members = lobby.take(nodes, PATIENCE).unwrap();
    // The rank of a node is its place on the test bed.
    members.sort_by_key(|member| member.data.ip());
    let transport = match transport.as_str() {
        "tcp" => Transport::Tcp,
        _ => lobby.libfabric(&members).unwrap(),
    };
    let (timeout, task) = (PATIENCE, work.clone());
    let plan = EpochPlan { epoch: 1, transport, arena_bytes: ARENA, timeout, task };
    labour(lobby.start(&members, &plan).unwrap(), work);
}

/// `join ADDRESS POLICY TOKEN`
pub fn node(words: &[String]) {
    let [address, policy, token] = words else { panic!("{words:?}") };
    let token: Token = token.parse().unwrap();
    let policy: Policy = policy.parse().unwrap();
    let options = JoinOptions {
        leader: address.clone(),
        token,
        policy,
        version: VERSION.to_owned(),
        data: None,
        patience: PATIENCE,
        admission: PATIENCE,
    };
    let seat = join(&options, |_| Ok(WEIGHTS)).unwrap();
    let started = seat.start(None).unwrap();
    labour(started.link, &started.task);
}

/// Does the work, and prints `DONE`, or `LOST`, whom, and why.
fn labour(link: Arc<dyn Link>, work: &str) {
    let comm = World::new(link).with_limit(PATIENCE).all(ARENA).unwrap();
    let result = match work {
        "collectives" => collectives(&comm),
        "prompt" => prompt(&comm),
        "sums" => sums(&comm),
        other => panic!("there is no work '{other}'"),
    };
    match result {
        Ok(()) => println!("DONE"),
        Err(GroupError::PeerLost { rank, cause, .. }) => println!("LOST {rank} {cause}"),
        Err(other) => println!("FAILED {other}"),
    }
}

fn number(rank: usize, at: usize) -> f32 {
    ((rank * 7919 + at * 104_729) % 100_003) as f32 * 1.1f32.powi((at % 61) as i32 - 30)
}

/// All of them, at sizes of one piece and of many, beside plain loops.
fn collectives(comm: &Comm) -> Result<(), GroupError> {
    let (me, ranks) = (comm.rank(), comm.ranks());
    for count in [1, 1000, 300_000] {
        let own = |rank: usize| -> Vec<f32> { (0..count).map(|at| number(rank, at)).collect() };
        let mut expected = own(0);
        for rank in 1..ranks {
            expected.iter_mut().zip(own(rank)).for_each(|(sum, number)| *sum += number);
        }
        let bits = |all: &[f32]| -> Vec<u32> { all.iter().map(|one| one.to_bits()).collect() };
        let mut sums = own(me);
        comm.all_reduce(&mut sums)?;
        assert_eq!(bits(&sums), bits(&expected), "sums of {count}");

        let mut counts = vec![count / ranks; ranks];
        counts[0] += count % ranks;
        let start: usize = counts[..me].iter().sum();
        let mut part = vec![0.0; counts[me]];
        comm.reduce_scatter(&own(me), &counts, &mut part)?;
        assert_eq!(bits(&part), bits(&expected[start..start + counts[me]]), "parts of {count}");

        let bytes = |rank: usize, salt: usize| vec![(rank * 16 + salt) as u8; count];
        let mut all = vec![0; ranks * count];
        comm.all_gather(1, &vec![count; ranks], &bytes(me, 0), &mut all)?;
        let joined: Vec<u8> = (0..ranks).flat_map(|rank| bytes(rank, 0)).collect();
        assert!(all == joined, "a gather of {count}");

        let out: Vec<u8> = (0..ranks).flat_map(|to| bytes(me, to)).collect();
        comm.all_to_all(&vec![count; ranks], &out, &vec![count; ranks], &mut all)?;
        let came: Vec<u8> = (0..ranks).flat_map(|from| bytes(from, me)).collect();
        assert!(all == came, "an exchange of {count}");

        let mut message = if me == 1 { bytes(1, 9) } else { Vec::new() };
        comm.broadcast(1, &mut message)?;
        assert!(message == bytes(1, 9), "a broadcast of {count}");
        comm.barrier()?;
    }
    Ok(())
}

/// The leader sends text to all.
fn prompt(comm: &Comm) -> Result<(), GroupError> {
    for _ in 0..20 {
        let mut message = Vec::new();
        if comm.rank() == 0 {
            message = MARKER.repeat(10).into_bytes();
        }
        comm.broadcast(0, &mut message)?;
        assert!(message.starts_with(MARKER.as_bytes()));
    }
    comm.barrier()
}

/// Sums until somebody is lost.
fn sums(comm: &Comm) -> Result<(), GroupError> {
    comm.barrier()?;
    println!("READY");
    loop {
        comm.all_reduce(&mut [1.0; 2000])?;
        // Leaves the cores to the others: there are more ranks than cores.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Looks at all packets that pass the switch until its input ends, and prints in how many it saw
/// the marker, and how many there were.
pub fn capture() {
    let every = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no memory is handed over.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, every.into()) };
    assert!(socket >= 0, "a socket for packets: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let limit = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    // SAFETY: the option is a `timeval`, which lives through the call.
    let set = unsafe {
        let (option, bytes) = ((&raw const limit).cast(), size_of_val(&limit) as libc::socklen_t);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, option, bytes)
    };
    assert_eq!(set, 0);
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = ended.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        flag.store(true, std::sync::atomic::Ordering::Release);
    });
    println!("READY");
    let (mut packets, mut seen) = (0, 0);
    let mut packet = vec![0u8; 1 << 17];
    loop {
        // SAFETY: the buffer lives through the call and is as long as is said.
        let got =
            unsafe { libc::recv(socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => {
                packets += 1;
                let mut windows = packet[..got].windows(MARKER.len());
                seen += usize::from(windows.any(|window| window == MARKER.as_bytes()));
            }
            // Nothing for a while.
            Err(_) if ended.load(std::sync::atomic::Ordering::Acquire) => break,
            Err(_) => {}
        }
    }
    println!("SEEN {seen} {packets}");
}
