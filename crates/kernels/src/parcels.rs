//! A group for tests: ranks that are threads.

use std::sync::{Arc, Barrier, Mutex};

use pomona_types::{Collective, GroupError};

/// Ranks that are threads and leave parcels for each other.
pub(crate) struct Parcels {
    pub(crate) rank: usize,
    /// By sender, then addressee.
    left: Arc<Vec<Vec<Mutex<Vec<u8>>>>>,
    all: Arc<Barrier>,
}

impl Parcels {
    pub(crate) fn group(ranks: usize) -> Vec<Parcels> {
        let row = || (0..ranks).map(|_| Mutex::default()).collect();
        let left = Arc::new((0..ranks).map(|_| row()).collect());
        let all = Arc::new(Barrier::new(ranks));
        let member = |rank| Parcels { rank, left: Arc::clone(&left), all: all.clone() };
        (0..ranks).map(member).collect()
    }
}

impl Collective for Parcels {
    fn rank(&self) -> usize {
        self.rank
    }
    fn ranks(&self) -> usize {
        self.left.len()
    }
    fn all_to_all(
        &self,
        sent: &[usize],
        mut out: &[u8],
        received: &[usize],
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        for (to, count) in sent.iter().enumerate() {
            let parcel;
            (parcel, out) = out.split_at(*count);
            *self.left[self.rank][to].lock().unwrap() = parcel.to_vec();
        }
        self.all.wait();
        let came = self.left.iter().map(|row| row[self.rank].lock().unwrap().clone());
        let came: Vec<Vec<u8>> = came.collect();
        assert!(came.iter().map(Vec::len).eq(received.iter().copied()), "counts known to both");
        into.copy_from_slice(&came.concat());
        self.all.wait();
        Ok(())
    }
    fn all_gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: &[u8],
        all: &mut [u8],
    ) -> Result<(), GroupError> {
        assert_eq!(own.len(), rows * widths[self.rank], "whole rows");
        for parcel in &self.left[self.rank] {
            *parcel.lock().unwrap() = own.to_vec();
        }
        self.all.wait();
        let came = self.left.iter().map(|row| row[self.rank].lock().unwrap().clone());
        let came: Vec<Vec<u8>> = came.collect();
        let part = |row: usize| widths.iter().zip(&came).map(move |(w, all)| &all[row * w..][..*w]);
        let whole: Vec<u8> = (0..rows).flat_map(part).flatten().copied().collect();
        all.copy_from_slice(&whole);
        self.all.wait();
        Ok(())
    }
    fn all_reduce(&self, _: &mut [f32]) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
    fn reduce_scatter(&self, _: &[f32], _: &[usize], _: &mut [f32]) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
    fn broadcast(&self, _: usize, _: &mut Vec<u8>) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
    fn send(&self, _: usize, _: &[u8]) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
    fn receive(&self, _: usize, _: &mut [u8]) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
    fn barrier(&self) -> Result<(), GroupError> {
        unreachable!("no operation calls it here")
    }
}
