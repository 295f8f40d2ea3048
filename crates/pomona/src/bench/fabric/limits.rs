//! What a transport is held against: a copy in memory, or one way over a plain socket.

use std::hint::black_box;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result};
use pomona_fabric::coll::Comm;
use pomona_policy::cost::Point;
use pomona_types::Collective;

use super::{Job, Wire};
use crate::bench::stats::Deciles;

/// Times at each size.
const TRIES: usize = 41;
/// Bytes that are copied in one of them at least, so that the clock's steps do not matter.
const COPIED_BYTES_MIN: usize = 256 << 10;

/// Measures what the job's transport is held against. All ranks have to; the first two know.
pub fn measure(control: &Comm, job: &Job) -> Result<Vec<Point>> {
    let point = |bytes: usize, times| Point { bytes, micros: Deciles::of(times).p50 };
    if job.wire == Wire::Shm {
        let copied = job.sizes.iter().map(|bytes| point(*bytes, copy(*bytes))).collect();
        control.barrier()?;
        return Ok(copied);
    }
    let mut socket = meet(control)?;
    let mut found = Vec::new();
    for bytes in job.sizes.iter().copied() {
        if let Some(socket) = &mut socket {
            let times = there_and_back(socket, control.rank() == 0, bytes);
            found.push(point(bytes, times.context("the plain socket to compare with failed")?));
        }
    }
    control.barrier()?;
    Ok(found)
}

/// Times of copies from one place to another, microseconds.
fn copy(bytes: usize) -> Vec<f64> {
    let (source, mut target) = (vec![1u8; bytes], vec![0u8; bytes]);
    let copies = COPIED_BYTES_MIN.div_ceil(bytes.max(1));
    let mut time = || {
        let begun = Instant::now();
        for _ in 0..copies {
            black_box(&mut target[..]).copy_from_slice(black_box(&source));
        }
        begun.elapsed().as_secs_f64() * 1e6 / copies as f64
    };
    (0..TRIES).map(|_| time()).collect()
}

/// A socket between the first two ranks.
fn meet(control: &Comm) -> Result<Option<TcpStream>> {
    let mut port = Vec::new();
    let socket = match control.rank() {
        0 => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port")?;
            port = listener.local_addr()?.port().to_le_bytes().to_vec();
            control.broadcast(0, &mut port)?;
            Some(listener.accept().context("the second rank does not connect")?.0)
        }
        rank => {
            control.broadcast(0, &mut port)?;
            let port = port.first_chunk().context("no port came")?;
            let address = (Ipv4Addr::LOCALHOST, u16::from_le_bytes(*port));
            (rank == 1).then(|| TcpStream::connect(address)).transpose()?
        }
    };
    if let Some(socket) = &socket {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
    }
    Ok(socket)
}

/// Times of half a way there and back, microseconds.
fn there_and_back(socket: &mut TcpStream, first: bool, bytes: usize) -> io::Result<Vec<f64>> {
    let mut buffer = vec![1; bytes];
    let mut time = || {
        let begun = Instant::now();
        if first {
            write(socket, &buffer)?;
        }
        read(socket, &mut buffer)?;
        if !first {
            write(socket, &buffer)?;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e6 / 2.0)
    };
    (0..TRIES).map(|_| time()).collect()
}

/// Writes without sleeping.
fn write(mut socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads without sleeping.
fn read(mut socket: &TcpStream, bytes: &mut [u8]) -> io::Result<()> {
    let mut have = 0;
    while have < bytes.len() {
        match socket.read(&mut bytes[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(got) => have += got,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
