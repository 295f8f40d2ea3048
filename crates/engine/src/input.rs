//! From a plan, or a part of it, to what a model's forward takes: tokens, positions, KV slots and
//! block tables.

use bytemuck::cast_slice;
use pomona_device::{DType, Device, DeviceError, View};
use pomona_kernels::{Batch, NO_SLOT, Span};
use pomona_models::ModelPart;
use pomona_scheduler::batch::{NO_BLOCK, PlanRow};
use pomona_types::{BLOCK_TOKENS, SPLIT_BLOCKS, TokenId};

/// Some tokens of one sequence, one after another, in a forward.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Stretch {
    /// The scheduler's slot, whose block tables it uses.
    pub(crate) slot: u32,
    /// Position of its first token.
    pub(crate) start: u32,
    /// How many tokens.
    pub(crate) count: u32,
    /// Of how many of them, at the end, logits are wanted.
    pub(crate) outputs: u32,
}

impl From<&PlanRow> for Stretch {
    fn from(row: &PlanRow) -> Stretch {
        let outputs = match (row.prompt_logits, row.sample) {
            (true, _) => row.count,
            (false, true) => 1 + row.drafts,
            (false, false) => 0,
        };
        Stretch { slot: row.slot, start: row.computed, count: row.count, outputs }
    }
}

/// What a plan adds to the block tables of a slot: they are cut to `known` entries, and those up
/// to `len` follow in the plan's blocks, group by group.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Told {
    pub(crate) slot: u32,
    pub(crate) known: u32,
    pub(crate) len: u32,
}

impl From<&PlanRow> for Told {
    fn from(row: &PlanRow) -> Told {
        Told { slot: row.slot, known: row.known, len: row.table_len }
    }
}

/// Device memory for a step's input, the host arrays it is filled from, and block tables; made
/// once.
pub(crate) struct Input {
    tokens: View,
    positions: View,
    slots: Vec<View>,
    logit_rows: View,
    host_positions: Vec<u32>,
    host_slots: Vec<u32>,
    host_logit_rows: Vec<u32>,
    /// For each group and each of the scheduler's slots, as plans have told them.
    tables: Vec<Vec<Vec<u32>>>,
    keeper: Keeper,
    /// For each of the slots, which rank of the context group has its first split.
    origins: Vec<u32>,
}

/// Which of the blocks that a scheduler counts are a rank's to keep: every so-manieth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeper {
    /// Its place in its context group.
    rank: u32,
    /// Ranks of that.
    ranks: u32,
}

impl Keeper {
    /// The rank with this part of a model, which is divided like that.
    pub(crate) fn of(part: &ModelPart) -> Keeper {
        Keeper { rank: part.context_rank, ranks: part.context_ranks }
    }

    /// Blocks that it keeps of so many.
    pub(crate) fn blocks(self, all: u32) -> u32 {
        all.div_ceil(self.ranks)
    }

    /// Its own number for a block, if that is its to keep.
    fn own(self, block: u32) -> u32 {
        let own = block != NO_BLOCK && block % self.ranks == self.rank;
        if own { block / self.ranks } else { NO_BLOCK }
    }

    /// Who has the first split of a sequence that has a block as this entry of its table.
    fn origin(self, block: u32, entry: u32) -> u32 {
        let turn = entry / SPLIT_BLOCKS % self.ranks;
        (block % self.ranks + self.ranks - turn) % self.ranks
    }
}

impl Input {
    /// Room for `max_tokens` tokens of `max_seqs` sequences, and `groups` layer groups.
    pub(crate) fn new(
        device: &dyn Device,
        (max_tokens, max_seqs): (usize, usize),
        groups: usize,
        keeper: Keeper,
    ) -> Result<Input, DeviceError> {
        let view = || device.alloc_view(DType::U32, &[max_tokens]);
        Ok(Input {
            tokens: view()?,
            positions: view()?,
            slots: (0..groups).map(|_| view()).collect::<Result<_, _>>()?,
            logit_rows: view()?,
            host_positions: Vec::with_capacity(max_tokens),
            host_slots: Vec::with_capacity(max_tokens),
            host_logit_rows: Vec::with_capacity(max_tokens),
            tables: vec![vec![Vec::new(); max_seqs]; groups],
            keeper,
            origins: vec![0; max_seqs],
        })
    }

    /// Takes note of what a plan adds to block tables. `None` where that cannot be: a message that
    /// was damaged.
    pub(crate) fn learn(&mut self, told: &[Told], mut blocks: &[u32]) -> Option<()> {
        for told in told {
            let added = told.len.checked_sub(told.known)? as usize;
            for tables in &mut self.tables {
                let table = tables.get_mut(told.slot as usize)?;
                let new;
                (new, blocks) = blocks.split_at_checked(added)?;
                if table.len() < told.known as usize {
                    return None;
                }
                table.truncate(told.known as usize);
                table.extend(new.iter().map(|block| self.keeper.own(*block)));
                // All groups of a sequence begin at one rank.
                if let Some((entry, block)) = (told.known..).zip(new).find(|(_, b)| **b != NO_BLOCK)
                {
                    self.origins[told.slot as usize] = self.keeper.origin(*block, entry);
                }
            }
        }
        blocks.is_empty().then_some(())
    }

    /// Copies the input of a forward to the device: `tokens` of all `stretches`, concatenated.
    pub(crate) fn batch(
        &mut self,
        device: &dyn Device,
        tokens: &[TokenId],
        stretches: &[Stretch],
    ) -> Result<Batch, DeviceError> {
        let put = |host: &[u32], view: &View| -> Result<View, DeviceError> {
            let used = view.rows(0, host.len());
            device.upload(cast_slice(host), &used)?;
            Ok(used)
        };
        let groups = self.slots.len();
        self.host_positions.clear();
        self.host_logit_rows.clear();
        let mut spans = Vec::with_capacity(stretches.len());
        let mut logit_spans = Vec::with_capacity(stretches.len());
        let (mut first_row, mut table) = (0, 0);
        for stretch in stretches {
            let Stretch { start, count: rows, outputs, .. } = *stretch;
            self.host_positions.extend(start..start + rows);
            let last = first_row + rows;
            let table_len = (start + rows).div_ceil(BLOCK_TOKENS);
            spans.push(Span { first_row, rows, start, table, table_len });
            if outputs > 0 {
                let (first_row, start) =
                    (self.host_logit_rows.len() as u32, start + rows - outputs);
                logit_spans.push(Span { first_row, rows: outputs, start, table, table_len });
            }
            self.host_logit_rows.extend(last - outputs..last);
            first_row = last;
            table += table_len;
        }
        let mut slots = Vec::with_capacity(groups);
        let mut tables = Vec::with_capacity(groups);
        for group in 0..groups {
            let table = self.group(stretches, group);
            slots.push(put(&self.host_slots, &self.slots[group])?);
            tables.push(table);
        }
        Ok(Batch {
            tokens: put(tokens, &self.tokens)?,
            positions: put(&self.host_positions, &self.positions)?,
            slots,
            tables,
            spans,
            origins: stretches.iter().map(|s| self.origins[s.slot as usize]).collect(),
            logit_rows: put(&self.host_logit_rows, &self.logit_rows)?,
            logit_spans,
        })
    }

    /// One group's concatenated tables; leaves its KV slots in `host_slots`.
    fn group(&mut self, stretches: &[Stretch], group: usize) -> Vec<u32> {
        self.host_slots.clear();
        let mut tables = Vec::new();
        for stretch in stretches {
            let end = stretch.start + stretch.count;
            let table = &self.tables[group][stretch.slot as usize];
            for position in stretch.start..end {
                let block = table[(position / BLOCK_TOKENS) as usize];
                let slot = block.checked_mul(BLOCK_TOKENS).map(|s| s + position % BLOCK_TOKENS);
                self.host_slots.push(slot.unwrap_or(NO_SLOT));
            }
            tables.extend_from_slice(&table[..end.div_ceil(BLOCK_TOKENS) as usize]);
        }
        tables
    }
}
