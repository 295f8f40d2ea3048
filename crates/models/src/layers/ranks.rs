//! A rank among those that a model is divided over: whom it exchanges what with.

use std::ops::Range;
use std::sync::Arc;

use pomona_device::{DType, Device, DeviceError, View};
use pomona_kernels::{Divided, LinearPart, OpError, Ops, Write};
use pomona_types::Collective;

use crate::{Division, Place};

/// The groups that a rank is in. A group of one is none.
#[derive(Clone, Default)]
pub struct Groups {
    /// Ranks that share its layers.
    pub tensor: Option<Arc<dyn Collective>>,
    /// Ranks that keep sequences together with it.
    pub context: Option<Arc<dyn Collective>>,
    /// Stages that hidden states pass through, in order.
    pub pipeline: Option<Arc<dyn Collective>>,
}

/// A rank's place, and whom it talks to.
pub struct Ranks {
    /// How the model is divided.
    pub division: Division,
    /// Where this rank stands.
    pub place: Place,
    /// Whom it talks to.
    pub groups: Groups,
}

impl Ranks {
    /// Those that share its layers, unless it has them alone.
    pub(super) fn tensor(&self) -> Option<&dyn Collective> {
        self.groups.tensor.as_deref()
    }

    /// Its layers.
    pub(super) fn layers(&self) -> Range<u32> {
        self.division.layers[self.place.stage].clone()
    }

    pub(super) fn is_first(&self) -> bool {
        self.place.stage == 0
    }

    pub(super) fn is_last(&self) -> bool {
        self.place.stage + 1 == self.division.layers.len()
    }

    /// Columns of the residual stream of each tensor rank.
    pub(super) fn hidden_columns(&self) -> Vec<Range<usize>> {
        let columns = self.division.hidden.iter();
        columns.map(|own| own.start as usize..own.end as usize).collect()
    }

    /// Makes columns whole.
    pub(super) fn gather(&self, ops: &dyn Ops, columns: &Columns) -> Result<(), OpError> {
        match self.tensor() {
            Some(group) => ops.all_gather(group, &columns.widths, &columns.own, &columns.all),
            None => Ok(()),
        }
    }

    /// The same for views that are not kept as [`Columns`].
    pub(super) fn gather_columns(
        &self,
        ops: &dyn Ops,
        parts: &[Range<u32>],
        own: &View,
        all: &View,
    ) -> Result<(), OpError> {
        match self.tensor() {
            Some(group) => ops.all_gather(group, &widths(parts, 1), own, all),
            None => Ok(()),
        }
    }

    /// Products of columns that are whole, or are made so on the way; what they are after that is
    /// left open.
    pub(super) fn linear(
        &self,
        ops: &dyn Ops,
        input: &Columns,
        parts: &[LinearPart<'_>],
        write: Write,
    ) -> Result<(), OpError> {
        let Columns { own, all, widths } = input;
        match self.tensor() {
            Some(group) => ops.divided_linear(group, &Divided { widths, own, all }, parts, write),
            None => ops.linear(all, parts, write),
        }
    }

    /// Takes the hidden states of a step from the stage before.
    pub(super) fn receive_hidden(&self, ops: &dyn Ops, x: &View) -> Result<(), OpError> {
        match &self.groups.pipeline {
            Some(group) => ops.receive(group.as_ref(), self.place.stage - 1, x),
            None => Ok(()),
        }
    }

    /// Hands them to the next one.
    pub(super) fn send_hidden(&self, ops: &dyn Ops, x: &View) -> Result<(), OpError> {
        match &self.groups.pipeline {
            Some(group) => ops.send(group.as_ref(), self.place.stage + 1, x),
            None => Ok(()),
        }
    }

    /// From the last stage to the first, which has the output matrix.
    pub(super) fn send_outputs(&self, ops: &dyn Ops, outputs: &View) -> Result<(), OpError> {
        match &self.groups.pipeline {
            Some(group) if outputs.elements() > 0 => ops.send(group.as_ref(), 0, outputs),
            _ => Ok(()),
        }
    }

    /// The other side of it.
    pub(super) fn receive_outputs(&self, ops: &dyn Ops, outputs: &View) -> Result<(), OpError> {
        let last = self.division.layers.len() - 1;
        match &self.groups.pipeline {
            Some(group) if outputs.elements() > 0 => ops.receive(group.as_ref(), last, outputs),
            _ => Ok(()),
        }
    }

    /// Brings the counters of all layers to the first rank: `own` has a row of `width` for each
    /// layer that is here. There, they come with their stages; the other ranks get none.
    pub(super) fn gather_counts(
        &self,
        own: &[u32],
        width: usize,
    ) -> Result<Vec<(usize, Vec<u32>)>, OpError> {
        // Ranks that share layers count alike.
        if self.place.tensor > 0 {
            return Ok(Vec::new());
        }
        let bytes = |words: &[u32]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>();
        let group = self.groups.pipeline.as_deref();
        if let Some(group) = group.filter(|_| !self.is_first()) {
            group.send(0, &bytes(own))?;
            return Ok(Vec::new());
        }
        let mut rows = Vec::new();
        for (stage, layers) in self.division.layers.iter().enumerate() {
            let mut came = match stage {
                0 => bytes(own),
                _ => vec![0; layers.len() * width * size_of::<u32>()],
            };
            if let Some(group) = group.filter(|_| stage > 0) {
                group.receive(stage, &mut came)?;
            }
            let words: Vec<u32> =
                came.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
            rows.extend(words.chunks_exact(width).map(|row| (stage, row.to_vec())));
        }
        Ok(rows)
    }
}

/// Activations `[tokens, width]` of which each rank computes some columns.
pub(super) struct Columns {
    /// Its own.
    pub(super) own: View,
    /// Those of all; the same memory where a rank is alone.
    pub(super) all: View,
    widths: Arc<[usize]>,
}

fn widths(parts: &[Range<u32>], unit: u32) -> Vec<usize> {
    parts.iter().map(|part| part.len() * unit as usize).collect()
}

impl Columns {
    /// Memory for `tokens` rows, of whose columns each rank has a part, in units of so many.
    pub(super) fn new(
        device: &dyn Device,
        ranks: &Ranks,
        tokens: usize,
        parts: &[Range<u32>],
        unit: u32,
    ) -> Result<Columns, DeviceError> {
        let widths: Arc<[usize]> = widths(parts, unit).into();
        let view = |width: usize| device.alloc_view(DType::F32, &[tokens, width]);
        let all = view(widths.iter().sum())?;
        let own = match ranks.tensor() {
            Some(_) => view(widths[ranks.place.tensor])?,
            None => all.clone(),
        };
        Ok(Columns { own, all, widths })
    }

    /// The first `tokens` rows.
    pub(super) fn rows(&self, tokens: usize) -> Columns {
        let (own, all) = (self.own.rows(0, tokens), self.all.rows(0, tokens));
        Columns { own, all, widths: self.widths.clone() }
    }
}
