//! The measurement itself: every rank makes the same calls, and all learn what they took.

use std::time::Instant;

use anyhow::Result;
use pomona_fabric::coll::Comm;
use pomona_policy::cost::Operation;
use pomona_types::{Collective, GroupError};

use super::Job;

/// How long calls of one kind are repeated before the next kind's turn, microseconds.
const TURN_US: f64 = 3000.0;
/// And how often at most.
const TURN_CALLS_MAX: usize = 300;
/// Calls of each kind before the first turn, which tell how many make one.
const FIRST_CALLS: usize = 5;

/// The times of each of the job's cases, microseconds. Kinds of calls take turns, so that what
/// disturbs the machine for a while disturbs all alike.
pub fn run(
    comm: &mut Comm,
    job: &Job,
    tick: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Vec<Vec<f64>>, GroupError> {
    let cases = job.cases();
    let widest = job.sizes.iter().copied().max().unwrap_or(0);
    let mut hands = Hands::new(comm.ranks(), widest);
    let mut turns = vec![1; cases.len()];
    let mut times = vec![Vec::new(); cases.len()];
    for at in [0..cases.len(), 0..cases.len()].into_iter().flatten() {
        let first = hands.time(comm, cases[at], FIRST_CALLS)?;
        // All ranks see the same times, so they agree. The first ones of all are of cold memory.
        let calls = TURN_US / first.into_iter().fold(TURN_US, f64::min).max(0.1);
        turns[at] = (calls as usize).clamp(1, TURN_CALLS_MAX);
    }
    let parts = job.rounds as usize * cases.len();
    for round in 0..job.rounds as usize {
        for (at, case) in cases.iter().enumerate() {
            times[at].extend(hands.time(comm, *case, turns[at])?);
            tick(round * cases.len() + at + 1, parts);
        }
    }
    Ok(times)
}

/// What calls work with.
struct Hands {
    numbers: Vec<f32>,
    own: Vec<u8>,
    all: Vec<u8>,
    widths: Vec<usize>,
    message: Vec<u8>,
    times: Vec<u8>,
}

impl Hands {
    fn new(ranks: usize, widest: usize) -> Hands {
        Hands {
            numbers: vec![0.0; widest / 4],
            own: vec![1; widest],
            all: vec![0; widest * ranks],
            widths: vec![0; ranks],
            message: Vec::with_capacity(widest),
            times: Vec::new(),
        }
    }

    /// Times so many calls, each from a barrier until the last rank has its result.
    fn time(
        &mut self,
        comm: &mut Comm,
        (operation, bytes): (Operation, usize),
        calls: usize,
    ) -> Result<Vec<f64>, GroupError> {
        if let Operation::AllReduce(algorithm) = operation {
            comm.force(Some(algorithm));
        }
        self.widths.fill(bytes);
        self.message.resize(bytes, 1);
        let mut own = Vec::with_capacity(calls * 8);
        for _ in 0..calls {
            comm.barrier()?;
            let begun = Instant::now();
            let share = self.call(comm, operation, bytes)?;
            own.extend((begun.elapsed().as_secs_f64() * 1e6 * share).to_le_bytes());
        }
        self.times.resize(own.len() * comm.ranks(), 0);
        comm.all_gather(1, &vec![own.len(); comm.ranks()], &own, &mut self.times)?;
        let (times, _) = self.times.as_chunks::<8>();
        let of =
            |call: usize| times.iter().skip(call).step_by(calls).map(|t| f64::from_le_bytes(*t));
        Ok((0..calls).map(|call| of(call).fold(0.0, f64::max)).collect())
    }

    /// One call. Returns which share of its time counts on this rank.
    fn call(&mut self, comm: &Comm, operation: Operation, bytes: usize) -> Result<f64, GroupError> {
        match operation {
            Operation::AllReduce(_) => comm.all_reduce(&mut self.numbers[..bytes / 4])?,
            Operation::AllGather => {
                let all = &mut self.all[..bytes * self.widths.len()];
                comm.all_gather(1, &self.widths, &self.own[..bytes], all)?;
            }
            Operation::Broadcast => comm.broadcast(0, &mut self.message)?,
            Operation::Barrier => comm.barrier()?,
            Operation::SendReceive => return self.there_and_back(comm, bytes),
        }
        Ok(1.0)
    }

    fn there_and_back(&mut self, comm: &Comm, bytes: usize) -> Result<f64, GroupError> {
        let buffer = &mut self.own[..bytes];
        match comm.rank() {
            0 => {
                comm.send(1, buffer)?;
                comm.receive(1, buffer)?;
                Ok(0.5)
            }
            1 => {
                comm.receive(0, buffer)?;
                comm.send(0, buffer)?;
                Ok(0.0)
            }
            _ => Ok(0.0),
        }
    }
}
