//! The feed-forward half of a layer as experts (Shazeer et al., 2017; Jiang et al., Mixtral, 2024):
//! a router chooses a few for each token, and their results are added up by its weights.
//!
//! Three operations: who goes where, what the experts make of it, and the sum. Where experts are
//! divided over ranks, each computes its own pairs, and gets its columns of all of them before the
//! sum: so that is the same bits over any number of ranks.

use pomona_device::{DType, Device, DeviceError, View};
use pomona_kernels::{
    Activation, Expert, Experts, LinearPart, Matrix, OpError, Ops, OwnExperts, Pairs, Placement,
    RouteWeights, Routes, Write,
};
use pomona_types::{ExpertsSpec, ModelSpec};

use super::decoder::Loader;
use super::ranks::{Columns, Ranks};
use crate::weights::{Name, Role};
use crate::{Blueprint, ModelError};

/// A layer's router, and those of its experts that are here.
pub(super) struct Moe {
    router: Matrix,
    experts: Vec<Expert>,
    /// Who has which; `None` where all are here.
    placement: Option<Placement>,
    weights_of: RouteWeights,
    activation: Activation,
    /// `u32 [experts]`: tokens that each got, wrapping.
    loads: View,
    /// `u32 [ranks + 1]`: pairs that each rank computed, and the slowest of each step, wrapping.
    work: View,
    scratch: Scratch,
}

impl Moe {
    /// Reads a layer's router and the experts that are this rank's.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        layer: u32,
        blueprint: &Blueprint,
        scratch: Scratch,
    ) -> Result<Moe, ModelError> {
        let (spec, count) = (&blueprint.spec, scratch.experts.count as usize);
        let router = Name::Layer(layer, Role::Router);
        let router = loader.tensors.matrix(router, count, spec.hidden as usize)?;
        let router = loader.place(&router)?;
        let (division, own) = (&loader.ranks.division, loader.ranks.place.tensor);
        let divided = loader.ranks.tensor().is_some();
        let placement = division.experts.get(layer as usize).filter(|_| divided).cloned();
        let here: Vec<u32> = match &placement {
            Some(placement) => placement.here(own).map(|expert| expert as u32).collect(),
            None => (0..scratch.experts.count).collect(),
        };
        let mut matrix = |role: Role, expert: u32, [rows, cols]: [u32; 2]| {
            let (rows, cols) = (rows as usize, cols as usize);
            let source = loader.tensors.expert((layer, role, expert), count, [rows, cols])?;
            loader.place(&source)
        };
        let (wide, narrow) = ([spec.ffn, spec.hidden], [spec.hidden, spec.ffn]);
        let expert = |expert: u32| -> Result<Expert, ModelError> {
            Ok(Expert {
                gate: matrix(Role::Gate, expert, wide)?,
                up: matrix(Role::Up, expert, wide)?,
                down: matrix(Role::Down, expert, narrow)?,
            })
        };
        let experts = here.into_iter().map(expert).collect::<Result<_, _>>()?;
        let counters = |len| loader.ops.device().alloc_view(DType::U32, &[len]);
        let ranks = loader.ranks.tensor().map_or(0, |group| group.ranks());
        Ok(Moe {
            router,
            experts,
            placement,
            weights_of: blueprint.route_weights,
            activation: blueprint.activation,
            loads: counters(count).map_err(OpError::from)?,
            work: counters(ranks + 1).map_err(OpError::from)?,
            scratch,
        })
    }

    /// Adds to the columns of `out: [tokens, hidden]` that are the rank's what the experts make of
    /// `x`, which is as large.
    pub(super) fn forward(
        &self,
        ops: &dyn Ops,
        ranks: &Ranks,
        x: &View,
        out: &Columns,
    ) -> Result<(), OpError> {
        let s = self.scratch.rows(x.shape()[0]);
        let part = LinearPart { weight: &self.router, bias: None, out: &s.logits };
        ops.linear(x, &[part], Write::Set)?;
        let routes = Routes { ids: &s.ids, weights: &s.weights, loads: &self.loads };
        ops.route(&s.logits, self.weights_of, &routes)?;
        let [gate, up] = &s.between;
        let (here, activation) = (&self.experts, self.activation);
        let experts = Experts { here, activation, between: [gate, up] };
        let (Some(group), Some(placement)) = (ranks.tensor(), &self.placement) else {
            ops.experts(x, &s.ids, &experts, &s.results)?;
            return ops.combine(&s.results, &s.weights, Write::Add, &out.all);
        };
        let own = OwnExperts { ids: &s.own_ids, work: &self.work };
        ops.own_experts(&s.ids, placement, group.rank(), &own)?;
        ops.experts(x, &s.own_ids, &experts, &s.results)?;
        let columns = &ranks.hidden_columns();
        let pairs = Pairs { ids: &s.ids, weights: &s.weights, placement, columns };
        ops.combine_divided(group, &pairs, &s.results, Write::Add, &out.own)?;
        ranks.gather(ops, out)
    }

    /// What was counted so far, modulo 2^32: tokens of each expert, pairs of each rank, and those
    /// of the slowest rank of each step.
    pub(super) fn counts(&self, ops: &dyn Ops) -> Result<Vec<u32>, OpError> {
        let mut bytes = vec![0; self.loads.bytes() + self.work.bytes()];
        let (loads, work) = bytes.split_at_mut(self.loads.bytes());
        ops.device().download(&self.loads, loads)?;
        ops.device().download(&self.work, work)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect())
    }
}

/// Memory for a step, which all layers share. A pair is a token and one of its experts.
#[derive(Clone)]
pub(super) struct Scratch {
    pub(super) experts: ExpertsSpec,
    /// `[tokens, experts]`.
    logits: View,
    /// `[tokens, experts of a token]`, as are their weights.
    ids: View,
    weights: View,
    /// The rank's own numbers for its experts, likewise.
    own_ids: View,
    /// `[pairs, ffn]` each.
    between: [View; 2],
    /// `[tokens, experts of a token, hidden]`.
    results: View,
}

impl Scratch {
    pub(super) fn new(
        device: &dyn Device,
        spec: &ModelSpec,
        experts: ExpertsSpec,
        tokens: usize,
    ) -> Result<Scratch, DeviceError> {
        let (count, per_token) = (experts.count as usize, experts.per_token as usize);
        let hidden = spec.hidden as usize;
        let between = || device.alloc_view(DType::F32, &[tokens * per_token, spec.ffn as usize]);
        Ok(Scratch {
            experts,
            logits: device.alloc_view(DType::F32, &[tokens, count])?,
            ids: device.alloc_view(DType::U32, &[tokens, per_token])?,
            weights: device.alloc_view(DType::F32, &[tokens, per_token])?,
            own_ids: device.alloc_view(DType::U32, &[tokens, per_token])?,
            between: [between()?, between()?],
            results: device.alloc_view(DType::F32, &[tokens, per_token, hidden])?,
        })
    }

    /// The rows of the first `tokens`.
    fn rows(&self, tokens: usize) -> Scratch {
        Scratch {
            experts: self.experts,
            logits: self.logits.rows(0, tokens),
            ids: self.ids.rows(0, tokens),
            weights: self.weights.rows(0, tokens),
            own_ids: self.own_ids.rows(0, tokens),
            between: self
                .between
                .each_ref()
                .map(|view| view.rows(0, tokens * self.experts.per_token as usize)),
            results: self.results.rows(0, tokens),
        }
    }
}
