//! Sums of several ranks' numbers, added one rank after the other from the first on.

use pomona_types::GroupError;

/// Numbers that are summed at once: they stay in the nearest cache while ranks are added.
const CHUNK: usize = 2048;

/// Adds up the numbers of `ranks` ranks in order. Those of rank `me` are in `values`, where the
/// sums go; `from` gives those of another one.
pub(super) fn sum_in_order<'a>(
    values: &mut [f32],
    me: usize,
    ranks: usize,
    from: &mut dyn FnMut(usize) -> Result<&'a [f32], GroupError>,
) -> Result<(), GroupError> {
    if me == 0 {
        for rank in 1..ranks {
            add(values, from(rank)?);
        }
        return Ok(());
    }
    if ranks == 2 {
        add(values, from(0)?);
        return Ok(());
    }
    let mut sums = [0.0; CHUNK];
    for start in (0..values.len()).step_by(CHUNK) {
        let values = &mut values[start..];
        let length = values.len().min(CHUNK);
        let (values, sums) = (&mut values[..length], &mut sums[..length]);
        for rank in 0..ranks {
            let theirs: &[f32] = match rank == me {
                true => values,
                false => &from(rank)?[start..][..length],
            };
            match rank {
                0 => sums.copy_from_slice(theirs),
                _ => add(sums, theirs),
            }
        }
        values.copy_from_slice(sums);
    }
    Ok(())
}

/// Adds `numbers` to `sums`, which are as many.
pub(super) fn add(sums: &mut [f32], numbers: &[f32]) {
    assert_eq!(sums.len(), numbers.len());
    for (sum, number) in sums.iter_mut().zip(numbers) {
        *sum += number;
    }
}
