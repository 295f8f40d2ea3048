//! From a plan to what the model's forward takes: tokens, positions, KV slots and block tables.

use bytemuck::cast_slice;
use pomona_device::{DType, Device, DeviceError, View};
use pomona_kernels::{Batch, Span};
use pomona_scheduler::batch::StepPlan;
use pomona_types::BLOCK_TOKENS;

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
}

impl Input {
    /// Room for `max_tokens` tokens of `max_seqs` sequences, and `groups` layer groups.
    pub(crate) fn new(
        device: &dyn Device,
        max_tokens: usize,
        max_seqs: usize,
        groups: usize,
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
        })
    }

    /// Copies a plan to the device.
    pub(crate) fn batch(
        &mut self,
        device: &dyn Device,
        plan: &StepPlan,
    ) -> Result<Batch, DeviceError> {
        let put = |host: &[u32], view: &View| -> Result<View, DeviceError> {
            let used = view.rows(0, host.len());
            device.upload(cast_slice(host), &used)?;
            Ok(used)
        };
        let groups = self.slots.len();
        self.host_positions.clear();
        self.host_logit_rows.clear();
        let mut spans = Vec::with_capacity(plan.rows.len());
        let (mut first_row, mut table) = (0, 0);
        for row in &plan.rows {
            self.host_positions.extend(row.computed..row.computed + row.count);
            let last = first_row + row.count;
            let wanted = if row.prompt_logits {
                first_row..last
            } else {
                last - u32::from(row.sample)..last
            };
            self.host_logit_rows.extend(wanted);
            let (rows, start, table_len) = (row.count, row.computed, row.table_len);
            spans.push(Span { first_row, rows, start, table, table_len });
            first_row = last;
            table += table_len;
        }
        let mut slots = Vec::with_capacity(groups);
        let mut tables = Vec::with_capacity(groups);
        for group in 0..groups {
            let table = self.group(plan, group);
            slots.push(put(&self.host_slots, &self.slots[group])?);
            tables.push(table);
        }
        Ok(Batch {
            tokens: put(&plan.tokens, &self.tokens)?,
            positions: put(&self.host_positions, &self.positions)?,
            slots,
            tables,
            spans,
            logit_rows: put(&self.host_logit_rows, &self.logit_rows)?,
        })
    }

    /// One group's concatenated tables, brought up to date; leaves its KV slots in `host_slots`.
    fn group(&mut self, plan: &StepPlan, group: usize) -> Vec<u32> {
        self.host_slots.clear();
        let mut tables = Vec::new();
        for row in &plan.rows {
            let added = (row.table_len - row.known) as usize;
            let start = row.added as usize + group * added;
            let table = &mut self.tables[group][row.slot as usize];
            table.truncate(row.known as usize);
            table.extend_from_slice(&plan.blocks[start..start + added]);
            for position in row.computed..row.computed + row.count {
                let block = table[(position / BLOCK_TOKENS) as usize];
                self.host_slots.push(block * BLOCK_TOKENS + position % BLOCK_TOKENS);
            }
            tables.extend_from_slice(table);
        }
        tables
    }
}
