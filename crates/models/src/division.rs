//! How a model is divided over ranks: who holds which layers, heads and rows of matrices.
//!
//! Every matrix is cut by its rows, its outputs, and never by its columns: a product is then one
//! rank's from the first term to the last, and the bits of a result do not depend on the number of
//! ranks. What a rank has not computed it gets from the others by joining columns. Pure.
//!
//! Context ranks divide matrices like tensor ranks, but for queries, keys and values: each computes
//! those of its whole context group, and keeps keys and values of its own splits of a sequence.

use std::ops::Range;

use pomona_kernels::Placement;
use pomona_types::ModelSpec;

use crate::weights::{Name, Role};
use crate::{ModelError, ModelPart, invalid};

/// Rows of a matrix that go to one rank together where there are enough: two packed groups, and as
/// many columns of what they make as are quantised together.
const GRAIN: u32 = 32;

/// In how many parts a model is cut, and along what. Their product is the number of ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parallel {
    /// Parts that every layer's heads are cut in.
    pub tensor: u32,
    /// Ranks that each such part has, which keep the splits of a sequence in turn.
    pub context: u32,
    /// Stages, which have some layers each.
    pub pipeline: u32,
}

impl Default for Parallel {
    fn default() -> Parallel {
        Parallel { tensor: 1, context: 1, pipeline: 1 }
    }
}

/// Where a rank stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Among those that share its layers, of tensor and context ranks alike.
    pub tensor: usize,
    /// Its stage.
    pub stage: usize,
}

impl Parallel {
    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.sharing() * self.pipeline as usize
    }

    /// How many share a layer.
    fn sharing(&self) -> usize {
        self.tensor as usize * self.context as usize
    }

    /// Where a rank stands: neighbours share layers.
    pub fn place(&self, rank: usize) -> Place {
        Place { tensor: rank % self.sharing(), stage: rank / self.sharing() }
    }

    /// The ranks that share the layers of a rank, in order.
    pub fn tensor_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - self.place(rank).tensor;
        (first..first + self.sharing()).collect()
    }

    /// The ranks that keep sequences together with a rank, in order.
    pub fn context_group(&self, rank: usize) -> Vec<usize> {
        let context = self.context as usize;
        let first = rank / context * context;
        (first..first + context).collect()
    }

    /// The ranks that hidden states pass through, in order.
    pub fn pipeline_group(&self, rank: usize) -> Vec<usize> {
        (self.place(rank).tensor..self.ranks()).step_by(self.sharing()).collect()
    }
}

/// A division that works.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Division {
    /// In how many parts.
    pub parallel: Parallel,
    /// Query heads whose attention each tensor rank has in the end.
    pub heads: Vec<Range<u32>>,
    /// Columns of the residual stream, rows of what is added to it.
    pub hidden: Vec<Range<u32>>,
    /// Rows of gate and up.
    pub ffn: Vec<Range<u32>>,
    /// Of each layer, which tensor ranks have which of its experts; none where layers have none.
    pub experts: Vec<Placement>,
    /// Rows of the embedding and of the output matrix.
    pub vocab: Vec<Range<u32>>,
    /// Layers of each stage.
    pub layers: Vec<Range<u32>>,
    /// Query heads for each KV head.
    group: u32,
}

impl Division {
    /// Divides a model, as evenly as it goes.
    ///
    /// # Errors
    /// When there are more ranks than parts to give them; says how many would do.
    pub fn new(spec: &ModelSpec, parallel: Parallel) -> Result<Division, ModelError> {
        let Parallel { tensor, context, pipeline: stages } = parallel;
        if tensor == 0 || context == 0 || stages == 0 {
            return Err(invalid!("a model is divided over one rank at least, not over none"));
        }
        // As many heads as there are is also far below the rows of any matrix.
        let experts = spec.experts.map_or(u32::MAX, |experts| experts.count);
        let most = spec.heads.min(spec.hidden).min(spec.ffn).min(spec.vocab).min(experts);
        let Some(sharing) = tensor.checked_mul(context).filter(|sharing| *sharing <= most) else {
            let context = match context {
                1 => String::new(),
                _ => format!(" times --context-parallel-size {context}"),
            };
            return Err(invalid!(
                "--tensor-parallel-size {tensor}{context}: the model has {} query heads{}, and \
                 each rank needs one: choose {most} or fewer",
                spec.heads,
                spec.experts.map_or(String::new(), |e| format!(" and {} experts", e.count)),
            ));
        };
        let layers = spec.layers.len() as u32;
        if stages > layers {
            return Err(invalid!(
                "--pipeline-parallel-size {stages}: the model has {layers} layers, and each stage \
                 needs one: choose {layers} or fewer"
            ));
        }
        let evenly = |count: u32| {
            let grain = if count / GRAIN >= sharing { GRAIN } else { 1 };
            cut(count, sharing, grain)
        };
        Ok(Division {
            parallel,
            heads: cut(spec.heads, sharing, 1),
            hidden: evenly(spec.hidden),
            // Experts stay whole.
            ffn: match spec.experts {
                None => evenly(spec.ffn),
                Some(_) => vec![0..spec.ffn; sharing as usize],
            },
            experts: spec.experts.map_or(Vec::new(), |experts| {
                let parts = cut(experts.count, sharing, 1).into_iter().enumerate();
                let holders = parts.flat_map(|(rank, own)| own.map(move |_| vec![rank]));
                Placement::new(holders.collect())
                    .map_or(Vec::new(), |all| vec![all; layers as usize])
            }),
            vocab: evenly(spec.vocab),
            layers: stages_of(spec, stages),
            group: spec.heads / spec.kv_heads,
        })
    }

    /// The same with other places for experts: by layer and expert, the tensor ranks that have it.
    ///
    /// # Errors
    /// When those are not places for the model's experts on its ranks.
    pub fn with_experts(self, places: Vec<Vec<Vec<usize>>>) -> Result<Division, ModelError> {
        let experts: Vec<Placement> = places.into_iter().filter_map(Placement::new).collect();
        let alike = |(new, old): (&Placement, &Placement)| {
            new.experts() == old.experts() && new.ranks() <= self.hidden.len()
        };
        if experts.len() != self.experts.len() || !experts.iter().zip(&self.experts).all(alike) {
            return Err(invalid!("places of experts that are not those of the model or its ranks"));
        }
        Ok(Division { experts, ..self })
    }

    /// The query heads that a tensor rank computes: those of its context group.
    pub fn computed_heads(&self, tensor: usize) -> Range<u32> {
        let group = self.parallel.context_group(tensor);
        let (first, last) = (group[0], group[group.len() - 1]);
        self.heads[first].start..self.heads[last].end
    }

    /// Of those, counted from the first, what each rank of the group has in the end.
    pub(crate) fn context_heads(&self, tensor: usize) -> Vec<Range<usize>> {
        let first = self.computed_heads(tensor).start;
        let group = self.parallel.context_group(tensor).into_iter();
        let heads = group.map(|rank| &self.heads[rank]);
        heads.map(|h| (h.start - first) as usize..(h.end - first) as usize).collect()
    }

    /// The KV heads that these read. Neighbours may hold the same one.
    pub fn kv_heads(&self, tensor: usize) -> Range<u32> {
        let heads = self.computed_heads(tensor);
        heads.start / self.group..heads.end.div_ceil(self.group)
    }

    /// Query heads of a tensor rank's first KV head that are on the rank before.
    pub fn skipped(&self, tensor: usize) -> u32 {
        self.computed_heads(tensor).start % self.group
    }

    /// The rows of a matrix, and those of them that a tensor rank has. What is no matrix of a
    /// layer's width is whole everywhere.
    pub(crate) fn rows(&self, spec: &ModelSpec, tensor: usize, name: Name) -> Rows {
        let of = |all: u32, own: &Range<u32>| Rows { all, own: own.clone() };
        let heads = |all: u32, own: &Range<u32>| Rows {
            all: all * spec.head_dim,
            own: own.start * spec.head_dim..own.end * spec.head_dim,
        };
        match name {
            Name::Embedding | Name::Output => of(spec.vocab, &self.vocab[tensor]),
            Name::Layer(_, role) | Name::Bias(_, role) => match role {
                Role::Query => heads(spec.heads, &self.computed_heads(tensor)),
                Role::Key | Role::Value => heads(spec.kv_heads, &self.kv_heads(tensor)),
                Role::AttentionOut | Role::Down => of(spec.hidden, &self.hidden[tensor]),
                Role::Gate | Role::Up => of(spec.ffn, &self.ffn[tensor]),
                _ => of(1, &(0..1)),
            },
            _ => of(1, &(0..1)),
        }
    }

    /// What one rank has of a model.
    pub fn part(&self, spec: &ModelSpec, place: Place) -> ModelPart {
        let layers = &self.layers[place.stage];
        let len = |range: &Range<u32>| range.end - range.start;
        let spec = ModelSpec {
            heads: len(&self.computed_heads(place.tensor)),
            kv_heads: len(&self.kv_heads(place.tensor)),
            ffn: len(&self.ffn[place.tensor]),
            layers: spec.layers[layers.start as usize..layers.end as usize].to_vec(),
            ..spec.clone()
        };
        let context_ranks = self.parallel.context;
        let context_rank = place.tensor as u32 % context_ranks;
        ModelPart { spec, first_layer: layers.start, context_ranks, context_rank }
    }
}

/// A matrix's rows in the file, and those of them that are one rank's.
pub(crate) struct Rows {
    pub(crate) all: u32,
    pub(crate) own: Range<u32>,
}

impl Rows {
    pub(crate) fn range(&self) -> Range<usize> {
        self.own.start as usize..self.own.end as usize
    }
}

/// `0..count` in as many parts, none empty, in whole grains.
fn cut(count: u32, parts: u32, grain: u32) -> Vec<Range<u32>> {
    let grains = u64::from(count.div_ceil(grain));
    let at = |part: u32| {
        let first = grains * u64::from(part) / u64::from(parts);
        (first as u32 * grain).min(count)
    };
    (0..parts).map(|part| at(part)..at(part + 1)).collect()
}

/// Layers of each stage. The first has the embedding and the output matrix as well, whose rows are
/// weighed against a layer's, so that the slowest stage is as fast as can be.
fn stages_of(spec: &ModelSpec, stages: u32) -> Vec<Range<u32>> {
    let layers = spec.layers.len() as u32;
    let [hidden, ffn, heads, kv_heads, head_dim, vocab] =
        [spec.hidden, spec.ffn, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab]
            .map(u64::from);
    // Of experts, a layer costs the time of those that a token meets.
    let met = spec.experts.map_or(1, |experts| u64::from(experts.per_token));
    let layer = 2 * (heads + kv_heads) * head_dim + 3 * ffn * met;
    let output = vocab;
    debug_assert!(hidden > 0);
    let slowest = |first: u32| {
        let others = u64::from((layers - first).div_ceil((stages - 1).max(1)));
        (u64::from(first) * layer + output).max(others * layer)
    };
    let first = match stages {
        1 => layers,
        _ => (1..=layers - (stages - 1)).min_by_key(|first| slowest(*first)).unwrap_or(1),
    };
    let rest = layers - first;
    let others = (0..stages - 1).map(|stage| {
        let at = |stage: u32| first + rest * stage / (stages - 1);
        at(stage)..at(stage + 1)
    });
    std::iter::once(0..first).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use pomona_types::{ExpertsSpec, LayerKind};

    use super::*;

    fn smollm2() -> ModelSpec {
        ModelSpec {
            architecture: "llama".into(),
            hidden: 576,
            ffn: 1536,
            experts: None,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            vocab: 49_152,
            max_position: 8192,
            layers: vec![LayerKind::Full; 30],
        }
    }

    fn divide(tensor: u32, pipeline: u32) -> Result<Division, String> {
        let parallel = Parallel { tensor, context: 1, pipeline };
        Division::new(&smollm2(), parallel).map_err(|error| error.to_string())
    }

    #[test]
    fn heads_are_divided_within_groups_and_their_kv_heads_held_twice() {
        let division = divide(2, 1).unwrap();
        assert_eq!(division.heads, [0..4, 4..9]);
        assert_eq!([0, 1].map(|t| division.kv_heads(t)), [0..2, 1..3]);
        assert_eq!([0, 1].map(|t| division.skipped(t)), [0, 1]);
        let part = division.part(&smollm2(), Place { tensor: 1, stage: 0 }).spec;
        assert_eq!((part.heads, part.kv_heads, part.ffn), (5, 2, 768));
    }

    #[test]
    fn parts_cover_everything_once_and_none_is_empty() {
        for tensor in 1..=9 {
            let division = divide(tensor, 1).unwrap();
            let parts = [&division.heads, &division.hidden, &division.ffn, &division.vocab];
            for (parts, count) in parts.into_iter().zip([9, 576, 1536, 49_152]) {
                let joined: Vec<u32> = parts.iter().flat_map(Clone::clone).collect();
                assert!(joined.into_iter().eq(0..count) && parts.iter().all(|p| !p.is_empty()));
            }
        }
        for stages in 1..=30 {
            let layers = divide(1, stages).unwrap().layers;
            assert!(layers.iter().flat_map(Clone::clone).eq(0..30), "{layers:?}");
            assert!(layers.iter().all(|l| !l.is_empty()) && layers.len() == stages as usize);
        }
    }

    #[test]
    fn the_first_stage_has_fewer_layers_for_it_has_the_vocabulary() {
        // A layer has 6,144 rows, the vocabulary 49,152: eight layers' worth.
        assert_eq!(divide(1, 2).unwrap().layers, [0..11, 11..30]);
    }

    #[test]
    fn what_cannot_be_divided_is_refused_with_what_can() {
        assert!(divide(10, 1).unwrap_err().contains("choose 9 or fewer"));
        assert!(divide(1, 31).unwrap_err().contains("choose 30 or fewer"));
        assert!(divide(0, 1).is_err());
    }

    #[test]
    fn experts_go_where_they_are_told_to() {
        let experts = Some(ExpertsSpec { count: 3, per_token: 2 });
        let spec = ModelSpec { experts, layers: vec![LayerKind::Full; 2], ..smollm2() };
        let parallel = Parallel { tensor: 2, ..Parallel::default() };
        let division = || Division::new(&spec, parallel).unwrap();
        let plain = division().experts;
        assert_eq!(
            plain.iter().map(|p| p.holders().to_vec()).collect::<Vec<_>>(),
            [vec![vec![0], vec![1], vec![1]], vec![vec![0], vec![1], vec![1]],]
        );
        let moved = vec![vec![vec![0, 1], vec![0], vec![1]], vec![vec![1], vec![0, 1], vec![0]]];
        let found = division().with_experts(moved.clone()).unwrap();
        assert_eq!(found.experts[1].here(0).collect::<Vec<_>>(), [1, 2]);
        let mut wrong = [(); 4].map(|()| moved.clone());
        wrong[0].pop();
        wrong[1][0].pop();
        wrong[2][0][1] = vec![2];
        wrong[3][1][0].clear();
        for wrong in wrong {
            assert!(division().with_experts(wrong).is_err());
        }
        let dense = Division::new(&smollm2(), parallel).unwrap();
        assert!(dense.clone().with_experts(vec![]).unwrap() == dense);
        assert!(dense.with_experts(moved).is_err());
    }

    #[test]
    fn ranks_have_their_places() {
        let parallel = Parallel { tensor: 2, context: 1, pipeline: 3 };
        assert_eq!(parallel.ranks(), 6);
        assert_eq!(parallel.place(3), Place { tensor: 1, stage: 1 });
        assert_eq!(parallel.tensor_group(3), [2, 3]);
        assert_eq!(parallel.pipeline_group(3), [1, 3, 5]);
        let parallel = Parallel { tensor: 2, context: 2, pipeline: 2 };
        assert_eq!(parallel.place(6), Place { tensor: 2, stage: 1 });
        assert_eq!(parallel.tensor_group(6), [4, 5, 6, 7]);
        assert_eq!(parallel.context_group(6), [6, 7]);
        assert_eq!(parallel.pipeline_group(6), [2, 6]);
    }

    #[test]
    fn context_ranks_compute_the_heads_of_their_group() {
        let parallel = Parallel { tensor: 2, context: 2, pipeline: 1 };
        let division = Division::new(&smollm2(), parallel).unwrap();
        assert_eq!(division.heads, [0..2, 2..4, 4..6, 6..9]);
        let of = |t| (division.computed_heads(t), division.kv_heads(t), division.skipped(t));
        assert_eq!([of(0), of(1)], [(0..4, 0..2, 0), (0..4, 0..2, 0)]);
        assert_eq!([of(2), of(3)], [(4..9, 1..3, 1), (4..9, 1..3, 1)]);
        assert_eq!(division.context_heads(3), [0..2, 2..5]);
        let refused = Division::new(&smollm2(), Parallel { context: 5, ..parallel });
        assert!(refused.unwrap_err().to_string().contains("choose 9 or fewer"));
    }
}
