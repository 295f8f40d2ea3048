//! Activations in bf16, for whoever multiplies weights of BF16 by them.

use half::bf16;
use pomona_device::Pool;

use super::activations::JOIN_TOKENS;
use super::packed::BLOCK;
use super::{Inputs, Shared, spread};
use crate::Isa;
use crate::isa::{Kernel, Tier};

/// Memory for rounded activations, kept from call to call.
#[derive(Default)]
pub(crate) struct Memory(Vec<u16>);

/// A job's activations, `[tiles, blocks of 32 columns, width, 32]`: up to sixteen tokens lie side
/// by side, a block of each. Zeros fill the last block.
#[derive(Clone, Copy)]
pub(super) struct Bfloats<'a> {
    pub(super) values: &'a [u16],
    /// Tokens side by side.
    pub(super) width: usize,
}

impl Memory {
    /// Rounds all inputs.
    pub(super) fn fill(&mut self, pool: &Pool, isa: Isa, inputs: &Inputs<'_>) -> Vec<Bfloats<'_>> {
        let lane = inputs.cols.next_multiple_of(BLOCK);
        self.0.resize(self.0.len().max(inputs.lanes * lane), 0);
        let values = Shared(self.0.as_mut_ptr());
        spread(pool, JOIN_TOKENS, inputs.jobs.iter().map(|input| input.tokens), &|job, tokens| {
            let input = &inputs.jobs[job];
            let width = input.width();
            for token in tokens {
                let first = (input.first_lane + token / width * width) * lane;
                let (first, apart) = (first + token % width * BLOCK, width * BLOCK);
                isa.run(Round { x: inputs.row(job, token), to: (values, first, apart) });
            }
        });
        let of = |input: &super::Input<'_>| Bfloats {
            values: &self.0[input.first_lane * lane..],
            width: input.width(),
        };
        inputs.jobs.iter().map(of).collect()
    }
}

/// Rounds a token's numbers to the nearest ones, of two the even one.
struct Round<'a> {
    x: &'a [f32],
    /// Where its first block begins, and how far apart blocks are.
    to: (Shared<u16>, usize, usize),
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let (values, first, apart) = self.to;
        let (blocks, rest) = self.x.as_chunks::<BLOCK>();
        // SAFETY: each worker has its own tokens, within the vector, which has been sized.
        let place =
            |block: usize| unsafe { &mut *values.at(first + block * apart).cast::<[u16; BLOCK]>() };
        let bits = |x: &f32| bf16::from_f32(*x).to_bits();
        for (block, x) in blocks.iter().enumerate() {
            place(block).iter_mut().zip(x).for_each(|(to, x)| *to = bits(x));
        }
        if !rest.is_empty() {
            let place = place(blocks.len());
            place[rest.len()..].fill(0);
            place.iter_mut().zip(rest).for_each(|(to, x)| *to = bits(x));
        }
    }
}
