//! Collectives against plain loops, on whatever device.

use std::sync::Arc;

use pomona_fabric::link::Link;
use pomona_fabric::nccl::{Columns, DeviceBytes, Number, Paths};
use pomona_types::GroupError;

use super::fake::Fake;
use super::{PATIENCE, Rank, alone, each_rank, shm, tcp};

/// Numbers per part, around the stand-in's pieces; the last needs several.
const COUNTS: [usize; 5] = [1, 3, 100, 4096, 20_001];

#[test]
fn results_are_those_of_plain_loops() {
    let _alone = alone();
    let fake = Fake::new();
    for ranks in 1..=4 {
        everything(&fake.paths(), shm(ranks));
    }
    everything(&fake.paths(), tcp(3));
    fake.check();
}

/// Every call, on the ranks of these links.
pub fn everything(paths: &Paths, links: Vec<Arc<dyn Link>>) {
    each_rank(paths, links, PATIENCE, |rank| {
        for (salt, count) in COUNTS.into_iter().enumerate() {
            sums(rank, count, salt);
            parts_of_sums(rank, count, salt);
            gathers(rank, count, salt);
            exchanges(rank, count, salt);
            broadcasts(rank, count, salt);
            messages(rank, count, salt);
        }
        many_calls_and_one_wait(rank);
        nothing_at_all(rank);
        what_does_not_fit(rank);
    });
}

/// Whole numbers, whose sums are exact in any order.
fn whole(rank: usize, index: usize, salt: usize) -> i32 {
    ((rank * 31 + index * 7 + salt * 13) % 101) as i32 - 50
}

fn noise(rank: usize, count: usize, salt: usize) -> Vec<u8> {
    (0..count).map(|index| (rank * 89 + index * 31 + index / 256 * 7 + salt * 13) as u8).collect()
}

fn floats(numbers: impl Iterator<Item = i32>) -> Vec<u8> {
    numbers.flat_map(|number| (number as f32).to_le_bytes()).collect()
}

fn sum(ranks: usize, index: usize, salt: usize) -> i32 {
    (0..ranks).map(|rank| whole(rank, index, salt)).sum()
}

fn sums(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks) = (comm.rank(), comm.ranks());
    let stream = device.stream();

    let own = device.put(&floats((0..count).map(|index| whole(me, index, salt))));
    let all = device.room(4 * count);
    comm.all_reduce(stream, Number::F32, own.bytes(), all.bytes()).unwrap();
    comm.wait(device.work()).unwrap();
    assert!(all.get() == floats((0..count).map(|index| sum(ranks, index, salt))));

    let own: Vec<u8> = (0..count).flat_map(|at| whole(me, at, salt).to_le_bytes()).collect();
    let all = device.put(&own);
    comm.all_reduce(stream, Number::I32, all.bytes(), all.bytes()).unwrap();
    comm.wait(device.work_so_far()).unwrap();
    let expected = (0..count).flat_map(|index| sum(ranks, index, salt).to_le_bytes());
    assert!(all.get().into_iter().eq(expected));

    // How layers sum what one rank has: the others add zeros, and bits stay what they are.
    let value = |index: usize| (index * 257) as u16 & 0x7eff | 1;
    let halves: Vec<u8> = (0..count)
        .flat_map(|index| if index % ranks == me { value(index) } else { 0 }.to_le_bytes())
        .collect();
    let all = device.put(&halves);
    comm.all_reduce(stream, Number::Bf16, all.bytes(), all.bytes()).unwrap();
    comm.wait(device.work()).unwrap();
    assert!(all.get().into_iter().eq((0..count).flat_map(|index| value(index).to_le_bytes())));
}

fn parts_of_sums(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks) = (comm.rank(), comm.ranks());
    let even = vec![count; ranks];
    let uneven = (0..ranks).map(|rank| (count + rank * 3) * usize::from(rank != 1)).collect();
    for counts in [even, uneven] {
        let total: usize = counts.iter().sum();
        let from = device.put(&floats((0..total).map(|index| whole(me, index, salt))));
        let own = device.room(4 * counts[me]);
        comm.reduce_scatter(device.stream(), Number::F32, &counts, from.bytes(), own.bytes())
            .unwrap();
        comm.wait(device.work()).unwrap();
        let start: usize = counts[..me].iter().sum();
        let expected = (start..start + counts[me]).map(|index| sum(ranks, index, salt));
        assert!(own.get() == floats(expected));
    }
}

fn gathers(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks) = (comm.rank(), comm.ranks());
    let even = vec![count; ranks];
    let uneven: Vec<usize> =
        (0..ranks).map(|rank| (count + rank * 5) * usize::from(rank != 2)).collect();
    for widths in [even, uneven] {
        for rows in [0, 1, 3] {
            let own = device.put(&noise(me, rows * widths[me], salt));
            let bytes = rows * widths.iter().sum::<usize>();
            let (scratch, all) = (device.room(bytes), device.room(bytes));
            let (own, scratch) = (own.bytes(), scratch.bytes());
            comm.all_gather_columns(
                device.stream(),
                Columns { rows, widths: &widths },
                own,
                scratch,
                all.bytes(),
            )
            .unwrap();
            comm.wait(device.work()).unwrap();
            let theirs = |rank: usize| noise(rank, rows * widths[rank], salt);
            let theirs: Vec<_> = (0..ranks).map(theirs).collect();
            let row = |row: usize| {
                let part =
                    |rank: usize| theirs[rank][row * widths[rank]..][..widths[rank]].to_vec();
                (0..ranks).flat_map(part).collect::<Vec<u8>>()
            };
            assert!(all.get().into_iter().eq((0..rows).flat_map(row)), "{rows} rows, {widths:?}");
        }
    }
}

fn exchanges(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks) = (comm.rank(), comm.ranks());
    // Nobody but rank 1 sends to the last rank.
    let length = |from: usize, to: usize| {
        (count + from * 11 + to) * usize::from(to != ranks - 1 || from == 1)
    };
    let sent: Vec<usize> = (0..ranks).map(|to| length(me, to)).collect();
    let received: Vec<usize> = (0..ranks).map(|from| length(from, me)).collect();
    let part = |from: usize, to: usize| noise(from * 17 + to, length(from, to), salt);
    let out = device.put(&(0..ranks).flat_map(|to| part(me, to)).collect::<Vec<u8>>());
    let into = device.room(received.iter().sum());
    comm.all_to_all(device.stream(), &sent, out.bytes(), &received, into.bytes()).unwrap();
    comm.wait(device.work()).unwrap();
    assert!(into.get().into_iter().eq((0..ranks).flat_map(|from| part(from, me))));
}

fn broadcasts(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    for root in 0..comm.ranks() {
        let bytes = device.put(&noise(comm.rank(), count, salt));
        comm.broadcast(device.stream(), root, bytes.bytes()).unwrap();
        comm.wait(device.work()).unwrap();
        assert!(bytes.get() == noise(root, count, salt));
    }
}

fn messages(rank: &mut Rank, count: usize, salt: usize) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks) = (comm.rank(), comm.ranks());
    // Down the line, as between stages, without a meeting of all.
    let bytes = device.put(&noise(me, count, salt));
    if me > 0 {
        comm.receive(device.stream(), me - 1, bytes.bytes()).unwrap();
    }
    if me + 1 < ranks {
        comm.send(device.stream(), me + 1, bytes.bytes()).unwrap();
    }
    comm.wait(device.work()).unwrap();
    assert!(bytes.get() == noise(0, count, salt));
    comm.barrier(device.work()).unwrap();
}

fn many_calls_and_one_wait(rank: &mut Rank) {
    const COUNT: usize = 1000;
    let Rank { comm, device, .. } = rank;
    let ranks = comm.ranks();
    let numbers = device.put(&floats((0..COUNT).map(|index| (index % 3) as i32)));
    for _ in 0..5 {
        comm.all_reduce(device.stream(), Number::F32, numbers.bytes(), numbers.bytes()).unwrap();
        comm.broadcast(device.stream(), ranks - 1, numbers.bytes()).unwrap();
    }
    comm.wait(device.work()).unwrap();
    // A second wait has nothing to compare.
    comm.wait(device.work()).unwrap();
    let expected = (0..COUNT).map(|index| (index % 3 * ranks.pow(5)) as i32);
    assert!(numbers.get() == floats(expected));
}

fn nothing_at_all(rank: &mut Rank) {
    let Rank { comm, device, .. } = rank;
    let (stream, nothing) = (device.stream(), device.room(0));
    let (none, nothing) = (vec![0; comm.ranks()], nothing.bytes());
    comm.all_reduce(stream, Number::F32, nothing, nothing).unwrap();
    comm.reduce_scatter(stream, Number::F32, &none, nothing, nothing).unwrap();
    comm.all_gather(stream, &none, nothing, nothing).unwrap();
    comm.all_to_all(stream, &none, nothing, &none, nothing).unwrap();
    comm.broadcast(stream, 0, nothing).unwrap();
    comm.wait(device.work()).unwrap();
}

fn what_does_not_fit(rank: &mut Rank) {
    let Rank { comm, device, .. } = rank;
    let (me, ranks, stream) = (comm.rank(), comm.ranks(), device.stream());
    let memory = device.room(64);
    let bytes = |count: usize| -> DeviceBytes { memory.bytes().part(0..count) };
    let ones = vec![1; ranks];
    let endless = Columns { rows: usize::MAX, widths: &[2; 4] };
    let refused = [
        comm.all_reduce(stream, Number::F32, bytes(6), bytes(6)),
        comm.all_reduce(stream, Number::F32, memory.bytes().part(2..6), bytes(4)),
        comm.all_reduce(stream, Number::F32, bytes(8), bytes(4)),
        comm.reduce_scatter(stream, Number::I32, &ones, bytes(4 * ranks), bytes(8)),
        comm.reduce_scatter(stream, Number::I32, &[1; 9], bytes(36), bytes(4)),
        comm.all_gather(stream, &ones, bytes(1), bytes(ranks + 1)),
        comm.all_gather(stream, &[usize::MAX, 2], bytes(1), bytes(1)),
        comm.all_gather_columns(stream, endless, bytes(1), bytes(1), bytes(1)),
        comm.all_to_all(stream, &ones, bytes(ranks), &[0; 9], bytes(0)),
        comm.broadcast(stream, ranks, bytes(1)),
        comm.send(stream, me, bytes(1)),
        comm.receive(stream, ranks, bytes(1)),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(GroupError::Invalid(_))), "{refused:?}");
    }
    // Nothing was called, and nothing is lost.
    comm.barrier(device.work()).unwrap();
}
