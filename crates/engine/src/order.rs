//! What the leader of a divided model tells the other ranks before each step. They decide nothing:
//! an order has the tokens, where they stand, and what is new in block tables.

use std::collections::BTreeSet;

use bytemuck::allocation::pod_collect_to_vec;
use bytemuck::cast_slice;
use pomona_scheduler::batch::StepPlan;
use pomona_types::{BLOCK_TOKENS, TokenId};

use crate::input::{Stretch, Told};

/// What a message asks for: its first word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Run this step.
    Step,
    /// Take logits of the oldest step that was run and not asked about yet.
    Outputs,
    /// Hand over what layers of experts have counted.
    Counts,
    /// Nothing follows.
    End,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Step, Kind::Outputs, Kind::Counts, Kind::End];

    /// Becomes a message without a step.
    pub(crate) fn write(self, message: &mut Vec<u8>) {
        message.clear();
        message.extend_from_slice(&(self as u32).to_ne_bytes());
    }

    /// What a message asks for, and the rest of it.
    pub(crate) fn read(message: &[u8]) -> Option<(Kind, &[u8])> {
        let (word, rest) = message.split_first_chunk()?;
        let kind = Kind::ALL.get(u32::from_ne_bytes(*word) as usize)?;
        Some((*kind, rest))
    }
}

/// One step.
#[derive(Clone, Default, PartialEq, Debug)]
pub(crate) struct Order {
    /// Each row's tokens.
    pub(crate) stretches: Vec<Stretch>,
    /// What is new in its block tables.
    pub(crate) told: Vec<Told>,
    /// Of all stretches, concatenated.
    pub(crate) tokens: Vec<TokenId>,
    /// Block ids, as `told` counts them.
    pub(crate) blocks: Vec<u32>,
}

/// Numbers that a row takes in a message.
const ROW: usize = 6;

impl Order {
    /// Becomes the order of a plan.
    pub(crate) fn take(&mut self, plan: &StepPlan) {
        self.stretches.clear();
        self.stretches.extend(plan.rows.iter().map(Stretch::from));
        self.told.clear();
        self.told.extend(plan.rows.iter().map(Told::from));
        self.tokens.clone_from(&plan.tokens);
        self.blocks.clone_from(&plan.blocks);
    }

    /// How many rows of logits are wanted.
    pub(crate) fn outputs(&self) -> usize {
        self.stretches.iter().map(|stretch| stretch.outputs as usize).sum()
    }

    /// Writes it as a message: numbers of 32 bits.
    pub(crate) fn write(&self, message: &mut Vec<u8>) {
        Kind::Step.write(message);
        let counts = [self.stretches.len(), self.tokens.len()].map(|n| n as u32);
        message.extend_from_slice(cast_slice(&counts));
        for (s, t) in self.stretches.iter().zip(&self.told) {
            let row: [u32; ROW] = [s.slot, s.start, s.count, s.outputs, t.known, t.len];
            message.extend_from_slice(cast_slice(&row));
        }
        message.extend_from_slice(cast_slice(&self.tokens));
        message.extend_from_slice(cast_slice(&self.blocks));
    }

    /// Reads what is behind the kind; `None` if it is none.
    pub(crate) fn read(&mut self, message: &[u8]) -> Option<()> {
        let words: Vec<u32> = match message.len().is_multiple_of(size_of::<u32>()) {
            true => pod_collect_to_vec(message),
            false => return None,
        };
        let ([rows, tokens], rest) = words.split_first_chunk()?;
        let (rows, rest) = rest.split_at_checked((*rows as usize).checked_mul(ROW)?)?;
        let (tokens, blocks) = rest.split_at_checked(*tokens as usize)?;
        self.stretches.clear();
        self.told.clear();
        let (mut counted, mut slots) = (0usize, BTreeSet::new());
        for [slot, start, count, outputs, known, len] in rows.as_chunks::<ROW>().0 {
            let (slot, start, count, outputs) = (*slot, *start, *count, *outputs);
            let end = start.checked_add(count)?;
            if count == 0 || outputs > count || *len != end.div_ceil(BLOCK_TOKENS) {
                return None;
            }
            counted = counted.checked_add(count as usize)?;
            if !slots.insert(slot) {
                return None;
            }
            self.stretches.push(Stretch { slot, start, count, outputs });
            self.told.push(Told { slot, known: *known, len: *len });
        }
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        self.blocks.clear();
        self.blocks.extend_from_slice(blocks);
        (counted == self.tokens.len()).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order {
            stretches: vec![
                Stretch { slot: 3, start: 16, count: 2, outputs: 1 },
                Stretch { slot: 0, start: 0, count: 1, outputs: 0 },
            ],
            told: vec![Told { slot: 3, known: 1, len: 2 }, Told { slot: 0, known: 0, len: 1 }],
            tokens: vec![7, 8, 9],
            blocks: vec![40, 41],
        }
    }

    #[test]
    fn orders_survive_the_way() {
        for order in [order(), Order::default()] {
            let (mut message, mut read) =
                (vec![1, 2, 3], Order { tokens: vec![1], ..order.clone() });
            order.write(&mut message);
            let (kind, rest) = Kind::read(&message).unwrap();
            read.read(rest).unwrap();
            assert_eq!((kind, read), (Kind::Step, order));
        }
        let mut message = Vec::new();
        for kind in Kind::ALL {
            kind.write(&mut message);
            assert_eq!(Kind::read(&message).unwrap().0, kind);
        }
    }

    #[test]
    fn damaged_orders_are_refused() {
        let mut message = Vec::new();
        order().write(&mut message);
        assert_eq!(Kind::read(&[9, 0, 0, 0]), None);
        let message = &mut message[4..];
        for len in [0, 4, 7, 20, message.len() - 12] {
            assert_eq!(Order::default().read(&message[..len]), None, "{len} bytes");
        }
        // More outputs than tokens; no token; a slot that another row has.
        for (at, word) in [(20, 9), (16, 0), (32, 3)] {
            let mut damaged = message.to_vec();
            damaged[at] = word;
            assert_eq!(Order::default().read(&damaged), None, "byte {at}");
        }
    }
}
