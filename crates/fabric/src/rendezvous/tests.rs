//! Leaders and nodes as threads, over the loopback interface.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::*;
use crate::link::Link;
use crate::secure::{Policy, Token};

const PATIENCE: Duration = Duration::from_secs(20);
const WEIGHTS: Fingerprint = [7; 32];
const POLICIES: [Policy; 3] = [Policy::Off, Policy::Auth, Policy::Seal];

fn lobby(policy: Policy) -> (Lobby, JoinOptions) {
    let options = LobbyOptions {
        token: Token::generate(),
        policy,
        version: "1.2.3".to_owned(),
        task: "a model".to_owned(),
        fingerprint: WEIGHTS,
        preparation: PATIENCE,
    };
    let token = options.token.clone();
    let lobby = Lobby::open("127.0.0.1:0", options).unwrap();
    let join = JoinOptions {
        leader: lobby.address().to_string(),
        token,
        policy,
        version: "1.2.3".to_owned(),
        data: None,
        patience: PATIENCE,
        admission: PATIENCE,
    };
    (lobby, join)
}

fn have_weights(_task: &str) -> Result<Fingerprint, String> {
    Ok(WEIGHTS)
}

fn plan(epoch: u32) -> EpochPlan {
    let (transport, timeout) = (Transport::Tcp, PATIENCE);
    EpochPlan { epoch, transport, arena_bytes: 1 << 16, timeout, task: format!("epoch {epoch}") }
}

fn meet(link: &dyn Link) {
    let others = || (0..link.ranks()).filter(|peer| *peer != link.rank());
    let deadline = Instant::now() + PATIENCE;
    others().for_each(|peer| link.put(peer, 0, &[b"here"], 0).unwrap());
    for peer in others() {
        while link.count(peer, 0) == 0 {
            assert_eq!(link.aborted(), None);
            assert!(Instant::now() < deadline);
            link.park(peer, 0, 0, Duration::from_millis(10));
        }
    }
}

#[test]
fn nodes_join_and_meet_in_two_epochs_with_a_spare() {
    for policy in POLICIES {
        let (lobby, options) = lobby(policy);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let seat = join(&options, |task| {
                        assert_eq!(task, "a model");
                        Ok(WEIGHTS)
                    });
                    let seat = seat.unwrap();
                    // Until the leader lets go of its end.
                    while let Ok(started) = seat.start(None) {
                        assert_eq!(started.task, format!("epoch {}", started.link.epoch()));
                        meet(&*started.link);
                    }
                });
            }
            let members = lobby.take(2, PATIENCE).unwrap();
            meet(&*lobby.start(&members, &plan(1)).unwrap());
            let spare = lobby.take(1, PATIENCE).unwrap();
            let members: Vec<Member> = members.into_iter().take(1).chain(spare).collect();
            let link = lobby.start(&members, &plan(2)).unwrap();
            assert_eq!(link.ranks(), 3);
            meet(&*link);
        });
    }
}

fn refusal(options: &JoinOptions, change: impl FnOnce(&mut JoinOptions)) -> String {
    let mut options = options.clone();
    options.patience = Duration::from_millis(500);
    change(&mut options);
    join(&options, have_weights).err().expect("it is not let in").to_string()
}

#[track_caller]
fn says(message: &str, words: &[&str]) {
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn what_differs_is_refused_with_the_reason() {
    for policy in POLICIES {
        let (lobby, options) = lobby(policy);
        let version = refusal(&options, |options| options.version = "9.9.9".to_owned());
        says(&version, &["refuses", "1.2.3", "9.9.9", "same version"]);
        let token = refusal(&options, |options| options.token = Token::generate());
        says(&token, &["refuses", "token"]);
        let weights = join(&options, |_| Ok([8; 32])).err().expect("other weights").to_string();
        says(&weights, &["weights differ", "0707070707070707", "0808080808080808"]);
        let none = join(&options, |_| Err("no such file".to_owned())).err().expect("no weights");
        says(&none.to_string(), &["no such file"]);
        assert_eq!(lobby.waiting(), 0);
    }
}

#[test]
fn no_policy_is_bargained_down_or_up() {
    for leader in POLICIES {
        for node in POLICIES.into_iter().filter(|node| *node != leader) {
            let (lobby, options) = lobby(leader);
            let message = refusal(&options, |options| options.policy = node);
            says(&message, &["policy"]);
            assert_eq!(lobby.waiting(), 0, "{leader} {node}: {message}");
        }
    }
}

#[test]
fn who_hangs_up_waits_no_longer() {
    let (lobby, options) = lobby(Policy::Auth);
    let seat = join(&options, have_weights).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while lobby.waiting() == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    drop(seat);
    while lobby.waiting() > 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let missing = lobby.take(1, Duration::from_millis(50)).err().expect("nobody waits");
    says(&missing.to_string(), &["0 of 1"]);
}

#[test]
fn strangers_at_the_door_harm_nobody() {
    for policy in POLICIES {
        let (lobby, options) = lobby(policy);
        // More than are examined at once; all say something that is no greeting.
        let strangers: Vec<_> = (0..100u32)
            .map(|at| {
                let mut stream = TcpStream::connect(lobby.address()).unwrap();
                let noise: Vec<u8> = (0..at * 7).map(|i| (i * at) as u8).collect();
                // It may be hung up on meanwhile.
                let _ = stream.write_all(&noise);
                stream
            })
            .collect();
        for mut stream in strangers.into_iter().take(3) {
            // Too short to be anything, so it is kept until the deadline; a hang-up ends it.
            stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
            let _ = stream.read(&mut [0; 1]);
        }
        join(&options, have_weights).unwrap();
        assert!(!lobby.refusals().is_empty());
    }
}

/// Somebody between a node and the leader who has no token, but passes TLS on both sides.
#[test]
fn proofs_cannot_be_passed_on_between_two_sessions() {
    let (lobby, options) = lobby(Policy::Seal);
    let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut deceived = options.clone();
    deceived.leader = door.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            let to_node = door.accept().unwrap().0;
            let to_leader = TcpStream::connect(lobby.address()).unwrap();
            let node = Channel::protected(to_node, tls::server().unwrap(), deadline).unwrap();
            let leader = Channel::protected(to_leader, tls::client().unwrap(), deadline).unwrap();
            leader.send(&node.receive(Some(deadline)).unwrap()).unwrap();
            node.send(&leader.receive(Some(deadline)).unwrap()).unwrap();
            // The node has noticed, so it sends no proof.
            assert!(node.receive(Some(deadline)).is_err());
        });
        let message = join(&deceived, have_weights).err().expect("deceived").to_string();
        says(&message, &["this node refuses", "token"]);
    });
    assert_eq!(lobby.waiting(), 0);
}
