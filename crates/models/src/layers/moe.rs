//! The feed-forward half of a layer as experts (Shazeer et al., 2017; Jiang et al., Mixtral, 2024):
//! a router chooses a few for each token, and their results are added up by its weights.
//!
//! Three operations: who goes where, what the experts make of it, and the sum. The second leaves
//! alone what belongs to experts that are not here, so that several may hold a part of them each.

use std::ops::Range;

use pomona_device::{DType, Device, DeviceError, View};
use pomona_kernels::{
    Activation, Expert, Experts, LinearPart, Matrix, OpError, Ops, RouteWeights, Routes, Write,
};
use pomona_types::{ExpertsSpec, ModelSpec};

use super::decoder::Loader;
use crate::weights::{Name, Role};
use crate::{Blueprint, ModelError};

/// A layer's router, and those of its experts that are here.
pub(super) struct Moe {
    router: Matrix,
    experts: Vec<Expert>,
    /// The index of the first.
    first: usize,
    weights_of: RouteWeights,
    activation: Activation,
    /// `u32 [experts]`: tokens that each got, wrapping.
    loads: View,
    scratch: Scratch,
}

impl Moe {
    /// Reads a layer's router and the experts `here`.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        layer: u32,
        (blueprint, scratch): (&Blueprint, Scratch),
        here: Range<u32>,
    ) -> Result<Moe, ModelError> {
        let (spec, count) = (&blueprint.spec, scratch.experts.count as usize);
        let router = Name::Layer(layer, Role::Router);
        let router = loader.tensors.matrix(router, count, spec.hidden as usize)?;
        let router = loader.place(&router)?;
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
        let first = here.start as usize;
        let experts = here.map(expert).collect::<Result<_, _>>()?;
        let loads = loader.ops.device().alloc_view(DType::U32, &[count]);
        Ok(Moe {
            router,
            experts,
            first,
            weights_of: blueprint.route_weights,
            activation: blueprint.activation,
            loads: loads.map_err(OpError::from)?,
            scratch,
        })
    }

    /// Adds to `out: f32 [tokens, hidden]` what the experts make of `x`, which is as large, with
    /// memory `between: f32 [pairs, ffn]` each.
    pub(super) fn forward(
        &self,
        ops: &dyn Ops,
        x: &View,
        between: [&View; 2],
        out: &View,
    ) -> Result<(), OpError> {
        let s = self.scratch.rows(x.shape()[0]);
        let part = LinearPart { weight: &self.router, bias: None, out: &s.logits };
        ops.linear(x, &[part], Write::Set)?;
        let routes = Routes { ids: &s.ids, weights: &s.weights, loads: &self.loads };
        ops.route(&s.logits, self.weights_of, &routes)?;
        let experts = Experts {
            here: &self.experts,
            first: self.first,
            activation: self.activation,
            between,
        };
        ops.experts(x, &s.ids, &experts, &s.results)?;
        ops.combine(&s.results, &s.weights, Write::Add, out)
    }

    /// How many tokens each expert got so far, modulo 2^32.
    pub(super) fn loads(&self, ops: &dyn Ops) -> Result<Vec<u32>, OpError> {
        let mut bytes = vec![0; self.loads.bytes()];
        ops.device().download(&self.loads, &mut bytes)?;
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
        let results = [tokens, per_token, spec.hidden as usize];
        Ok(Scratch {
            experts,
            logits: device.alloc_view(DType::F32, &[tokens, count])?,
            ids: device.alloc_view(DType::U32, &[tokens, per_token])?,
            weights: device.alloc_view(DType::F32, &[tokens, per_token])?,
            results: device.alloc_view(DType::F32, &results)?,
        })
    }

    /// The rows of the first `tokens`.
    fn rows(&self, tokens: usize) -> Scratch {
        Scratch {
            experts: self.experts,
            logits: self.logits.rows(0, tokens),
            ids: self.ids.rows(0, tokens),
            weights: self.weights.rows(0, tokens),
            results: self.results.rows(0, tokens),
        }
    }
}
