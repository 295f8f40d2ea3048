//! Rows of logits on their way from the device to whoever chooses tokens by them. All threads that
//! operations run on take part: a row is some fifty thousand numbers, and a step has many.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::cast_slice_mut;
use pomona_device::{DType, DeviceError, View};
use pomona_kernels::Ops;
use pomona_models::{LOGIT_ROWS_MAX, Model};

use crate::EngineError;
use crate::phases::{Phase, Phases};
use crate::sampling::Candidate;

/// Memory for a few rows of logits on the device, and for one for each thread on the host.
pub(crate) struct Logits {
    device: View,
    outputs: Vec<Output>,
    host: Mutex<Vec<HostRow>>,
    vocab: usize,
}

/// One of a step's rows of logits.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    /// Outputs of a group are taken in their order.
    pub(crate) group: usize,
    /// Its place in the group.
    pub(crate) index: u32,
}

/// A row to be used up, with scratch.
pub(crate) struct Row<'a> {
    pub(crate) logits: &'a mut [f32],
    pub(crate) candidates: &'a mut Vec<Candidate>,
}

/// Uses a row; whether the group's next one is wanted.
type Take<'a> = dyn Fn(Output, Row<'_>) -> bool + Sync + 'a;

#[derive(Default)]
struct HostRow {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Logits {
    pub(crate) fn new(ops: &dyn Ops, vocab: usize) -> Result<Logits, DeviceError> {
        let device = ops.device().alloc_view(DType::F32, &[LOGIT_ROWS_MAX, vocab])?;
        Ok(Logits { device, outputs: Vec::new(), host: Mutex::default(), vocab })
    }

    /// Hands out the logits of the last forward's outputs, of which each group has some. Groups are
    /// taken at the same time; what is made of one must not depend on another.
    pub(crate) fn each(
        &mut self,
        model: &mut dyn Model,
        ops: &dyn Ops,
        groups: impl IntoIterator<Item = u32>,
        phases: &Phases,
        take: &Take<'_>,
    ) -> Result<(), EngineError> {
        self.outputs.clear();
        for (group, count) in groups.into_iter().enumerate() {
            self.outputs.extend((0..count).map(|index| Output { group, index }));
        }
        let count = self.outputs.len();
        phases.time(Phase::Forward, || model.outputs(ops, count))?;
        for start in (0..count).step_by(LOGIT_ROWS_MAX) {
            let range = start..count.min(start + LOGIT_ROWS_MAX);
            let view = self.device.rows(0, range.len());
            phases.time(Phase::Forward, || model.logits(ops, range.clone(), &view))?;
            phases.time(Phase::Sample, || self.take_all(ops, &view, range, take))?;
        }
        Ok(())
    }

    /// Takes the outputs of this range, whose logits are in the rows of `view`.
    fn take_all(
        &self,
        ops: &dyn Ops,
        view: &View,
        range: Range<usize>,
        take: &Take<'_>,
    ) -> Result<(), DeviceError> {
        let outputs = &self.outputs[range];
        let mut end = 0;
        let groups: Vec<Range<usize>> = outputs
            .chunk_by(|a, b| a.group == b.group)
            .map(|group| {
                let start = end;
                end += group.len();
                start..end
            })
            .collect();
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let work = |_: usize| {
            let mut host = lock(&self.host).pop().unwrap_or_default();
            host.logits.resize(self.vocab, 0.0);
            while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                for row in group.clone() {
                    let bytes = cast_slice_mut(&mut host.logits);
                    if let Err(error) = ops.device().download(&view.rows(row, 1), bytes) {
                        *lock(&failure) = Some(error);
                        return;
                    }
                    let HostRow { logits, candidates } = &mut host;
                    if !take(outputs[row], Row { logits, candidates }) {
                        break;
                    }
                }
            }
            lock(&self.host).push(host);
        };
        match groups.len() {
            0 | 1 => work(0),
            _ => ops.workers().run(&work),
        }
        let failure = lock(&failure).take();
        failure.map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it is whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
