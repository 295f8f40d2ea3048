//! Ranks that are threads of one process and exchange bytes through channels.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use pomona_types::{Collective, GroupError};

/// One rank's ends of a group's channels.
pub struct Threads {
    rank: usize,
    to: Vec<Mutex<Sender<Vec<u8>>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

/// A group of so many ranks.
pub fn group(ranks: usize) -> Vec<Arc<dyn Collective>> {
    let (mut to, mut from): (Vec<Vec<_>>, Vec<Vec<_>>) = Default::default();
    to.resize_with(ranks, Vec::new);
    from.resize_with(ranks, Vec::new);
    for sender in 0..ranks {
        for receiver in 0..ranks {
            let (tx, rx) = channel();
            to[sender].push(Mutex::new(tx));
            from[receiver].push(Mutex::new(rx));
        }
    }
    let ends = to.into_iter().zip(from).enumerate();
    ends.map(|(rank, (to, from))| Arc::new(Threads { rank, to, from }) as Arc<dyn Collective>)
        .collect()
}

impl Threads {
    fn put(&self, to: usize, bytes: &[u8]) {
        // A rank that is gone is found out by those who wait for it.
        let _ = self.to[to].lock().unwrap_or_else(PoisonError::into_inner).send(bytes.to_vec());
    }

    fn take(&self, from: usize) -> Result<Vec<u8>, GroupError> {
        let channel = self.from[from].lock().unwrap_or_else(PoisonError::into_inner);
        channel.recv().map_err(|_| GroupError::Ended(format!("rank {from} is gone")))
    }

    /// What every rank has put, in order.
    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        (0..self.to.len()).for_each(|to| self.put(to, bytes));
        (0..self.from.len()).map(|from| self.take(from)).collect()
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn all_gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: &[u8],
        all: &mut [u8],
    ) -> Result<(), GroupError> {
        let parts = self.exchange(own)?;
        let mut at = 0;
        for row in 0..rows {
            for (part, width) in parts.iter().zip(widths) {
                all[at..at + width].copy_from_slice(&part[row * width..][..*width]);
                at += width;
            }
        }
        assert_eq!(at, all.len());
        Ok(())
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), GroupError> {
        let parts = self.exchange(bytemuck::cast_slice(values))?;
        values.fill(0.0);
        for part in parts {
            let part: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(&part);
            values.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn reduce_scatter(&self, _: &[f32], _: &[usize], _: &mut [f32]) -> Result<(), GroupError> {
        unreachable!("no model uses it")
    }

    fn all_to_all(
        &self,
        _: &[usize],
        _: &[u8],
        _: &[usize],
        _: &mut [u8],
    ) -> Result<(), GroupError> {
        unreachable!("no model uses it")
    }

    fn broadcast(&self, root: usize, message: &mut Vec<u8>) -> Result<(), GroupError> {
        if self.rank == root {
            (0..self.to.len()).filter(|to| *to != root).for_each(|to| self.put(to, message));
        } else {
            *message = self.take(root)?;
        }
        Ok(())
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        self.put(to, bytes);
        Ok(())
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), GroupError> {
        bytes.copy_from_slice(&self.take(from)?);
        Ok(())
    }

    fn barrier(&self) -> Result<(), GroupError> {
        self.exchange(&[]).map(|_| ())
    }
}
