//! Logits of tiny random checkpoints against those that transformers computed (`tools/golden`), for
//! a whole prefill, token by token, in odd chunks, and with two sequences in a batch.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use pomona_device::{ArenaDevice, DType, Device, Pool, View};
use pomona_kernels::{Batch, CpuOps, Isa, KvLayer, Ops, Span};
use pomona_models::{
    Checkpoint, Division, ExpertCounts, KvCache, LoadOptions, Model, Parallel, Quantization,
};

const BLOCK: u32 = 16;
/// Blocks of each layer group in these tests.
const BLOCKS: u32 = 16;

/// Error of logits where weights are integers: activations are rounded to 16 bits for them, and
/// random layers enlarge what that costs.
const INT4_BOUND: f32 = 1e-3;

/// A model with its cache, driven without a scheduler: sequence `s` has blocks `s * 6..` in
/// reverse order.
struct Bench {
    ops: Arc<dyn Ops>,
    model: Box<dyn Model>,
    kv: KvCache,
    groups: usize,
}

fn view(device: &dyn Device, values: &[u32]) -> View {
    let view = device.alloc_view(DType::U32, &[values.len()]).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    device.upload(&bytes, &view).unwrap();
    view
}

impl Bench {
    fn new(path: &std::path::Path, ops: Arc<dyn Ops>) -> Bench {
        Bench::of(&Checkpoint::open(path).unwrap(), ops)
    }

    fn of(checkpoint: &Checkpoint, ops: Arc<dyn Ops>) -> Bench {
        let options = LoadOptions { max_tokens: 64, max_outputs: 64 };
        let mut last = 0;
        let model = checkpoint.load(ops.as_ref(), &options, &mut |done| last = done).unwrap();
        assert!(last > 0 && last <= checkpoint.weight_bytes());
        let spec = model.spec();
        let groups = spec.layer_groups();
        let shape = [BLOCKS as usize, spec.kv_heads as usize, 16, spec.head_dim as usize];
        let cache = || ops.device().alloc_view(DType::F32, &shape).unwrap();
        let layers = spec.layers.iter().map(|_| KvLayer { k: cache(), v: cache() }).collect();
        let group = |l: usize| groups.iter().position(|g| g.layers.contains(&(l as u32))).unwrap();
        let group_of = (0..spec.layers.len()).map(group).collect();
        Bench { model, kv: KvCache { layers, group_of }, groups: groups.len(), ops }
    }

    /// Runs rows `(sequence, start, tokens)` as one batch; logits of all of them.
    fn run(&mut self, rows: &[(u32, u32, &[u32])]) -> Vec<f32> {
        self.run_for(rows, usize::MAX)
    }

    /// The same; logits of at most so many last tokens of each sequence.
    fn run_for(&mut self, rows: &[(u32, u32, &[u32])], most: usize) -> Vec<f32> {
        let device = self.ops.device().clone();
        let (mut tokens, mut positions, mut slots) = (vec![], vec![], vec![]);
        let (mut spans, mut table) = (vec![], vec![]);
        let (mut wanted, mut logit_spans) = (vec![], vec![]);
        for (sequence, start, row) in rows {
            let blocks: Vec<u32> = (0..6).rev().map(|b| sequence * 6 + b).collect();
            let (first_row, count) = (tokens.len() as u32, row.len() as u32);
            let (at, table_len) = (table.len() as u32, 6);
            let span = Span { first_row, rows: count, start: *start, table: at, table_len };
            spans.push(span);
            let rows = row.len().min(most) as u32;
            if rows > 0 {
                let (first_row, start) = (wanted.len() as u32, start + count - rows);
                logit_spans.push(Span { first_row, rows, start, ..span });
            }
            wanted.extend(first_row + count - rows..first_row + count);
            for p in *start..start + count {
                positions.push(p);
                slots.push(blocks[(p / BLOCK) as usize] * BLOCK + p % BLOCK);
            }
            tokens.extend_from_slice(row);
            table.extend(blocks);
        }
        let batch = Batch {
            tokens: view(device.as_ref(), &tokens),
            positions: view(device.as_ref(), &positions),
            slots: (0..self.groups).map(|_| view(device.as_ref(), &slots)).collect(),
            tables: vec![table; self.groups],
            spans,
            origins: Vec::new(),
            logit_rows: view(device.as_ref(), &wanted),
            logit_spans,
        };
        self.model.forward(self.ops.as_ref(), &batch, &self.kv).unwrap();
        self.model.outputs(self.ops.as_ref(), wanted.len()).unwrap();
        let vocab = self.model.spec().vocab as usize;
        let mut logits = Vec::new();
        for start in (0..wanted.len()).step_by(7) {
            let end = wanted.len().min(start + 7);
            let out = device.alloc_view(DType::F32, &[end - start, vocab]).unwrap();
            self.model.logits(self.ops.as_ref(), start..end, &out).unwrap();
            let mut bytes = vec![0; out.bytes()];
            device.download(&out, &mut bytes).unwrap();
            logits.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)));
        }
        logits
    }

    /// One sequence in chunks of the given size.
    fn chunked(&mut self, sequence: u32, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for (i, row) in tokens.chunks(chunk).enumerate() {
            logits.extend(self.run(&[(sequence, (i * chunk) as u32, row)]));
        }
        logits
    }
}

/// The checkpoint of that name, its tokens and its logits.
fn golden(name: &str) -> (PathBuf, Vec<u32>, Vec<f32>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let tokens = serde_json::from_slice(&std::fs::read(folder.join("tokens.json")).unwrap());
    let expected = std::fs::read(folder.join("expected.f32")).unwrap();
    let expected = expected.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let file = folder.join("model.gguf");
    (if file.exists() { file } else { folder }, tokens.unwrap(), expected)
}

fn check(found: &[f32], expected: &[f32], bound: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let error = found.iter().zip(expected).fold(0.0f32, |m, (f, e)| m.max((f - e).abs()));
    assert!(error <= bound * size, "{what}: error {error} of {size}");
    eprintln!("{what}: relative error {:.1e}", error / size);
}

fn check_all(name: &str) {
    check_within(name, 1e-4);
}

fn check_within(name: &str, bound: f32) {
    let (folder, tokens, expected) = golden(name);
    for isa in Isa::available() {
        let memory = Arc::new(pomona_device::HostDevice::new());
        let ops = Arc::new(CpuOps::new(memory, Pool::new(2), isa));
        let mut bench = Bench::new(&folder, ops);
        let whole = bench.chunked(0, &tokens, 64);
        check(&whole, &expected, bound, &format!("{name}, {}", isa.name()));
        // However it is cut, the bits are the same.
        for chunk in [1, 5, 17] {
            assert!(bench.chunked(1, &tokens, chunk) == whole, "{name}: chunks of {chunk}");
        }
        // Beside another sequence: prefill of one, decode of the other, in one batch.
        let vocab = expected.len() / tokens.len();
        bench.chunked(0, &tokens[..40], 64);
        let both = bench.run(&[(0, 40, &tokens[40..41]), (1, 0, &tokens[..20])]);
        assert!(both[..vocab] == whole[40 * vocab..41 * vocab], "{name}: decode in a mixed batch");
        assert!(both[vocab..] == whole[..20 * vocab], "{name}: prefill in a mixed batch");
        // Where few logits are wanted, the last layer leaves out rows: what they wrote is there.
        let none = bench.run_for(&[(0, 0, &tokens[..20]), (1, 0, &tokens[..9])], 0);
        assert!(none.is_empty());
        let some = bench.run_for(&[(0, 20, &tokens[20..40]), (1, 9, &tokens[9..10])], 3);
        assert!(some[..3 * vocab] == whole[37 * vocab..40 * vocab], "{name}: the last three");
        assert!(some[3 * vocab..] == whole[9 * vocab..10 * vocab], "{name}: beside one");
    }
}

#[test]
fn llama_agrees_with_transformers() {
    check_all("llama");
}

#[test]
fn llama_3_rope_scaling_and_tied_embeddings_agree() {
    check_all("llama3");
}

#[test]
fn half_precision_and_sharded_checkpoints_agree() {
    check_all("llama-f16-sharded");
    check_all("qwen3-bf16");
}

#[test]
fn mistral_agrees_beyond_its_window() {
    check_all("mistral");
}

#[test]
fn qwen2_agrees() {
    check_all("qwen2");
}

#[test]
fn qwen3_agrees() {
    check_all("qwen3");
}

#[test]
fn mixtral_agrees_in_both_kinds_of_files() {
    check_all("mixtral");
    check_all("mixtral-gguf");
}

#[test]
fn qwen3_moe_agrees_with_experts_apart_joined_and_quantised() {
    check_all("qwen3-moe");
    check_all("qwen3-moe-joined");
    check_within("qwen3-moe-gguf", INT4_BOUND);
}

#[test]
fn loads_of_experts_add_up_to_the_tokens() {
    for (name, experts, per_token) in [("mixtral", 5, 2), ("qwen3-moe-joined", 4, 2)] {
        let (folder, tokens, _) = golden(name);
        let mut bench = Bench::new(&folder, Arc::new(CpuOps::detect(1)));
        bench.chunked(0, &tokens, 17);
        let counts = bench.model.expert_counts(bench.ops.as_ref()).unwrap();
        assert_eq!(counts.len(), 2);
        for ExpertCounts { tokens: loads, pairs, .. } in counts {
            assert_eq!((loads.len(), pairs), (experts, vec![]));
            assert_eq!(loads.iter().sum::<u32>() as usize, tokens.len() * per_token, "{loads:?}");
        }
    }
}

#[test]
fn stages_have_the_bytes_of_their_experts() {
    for name in ["mixtral", "qwen3-moe-gguf", "qwen3-moe-joined"] {
        let checkpoint = Checkpoint::open(&golden(name).0).unwrap();
        let parallel = Parallel { tensor: 1, context: 1, pipeline: 2 };
        let division = Division::new(checkpoint.spec(), parallel).unwrap();
        let bytes = |rank| checkpoint.part_bytes(&division, parallel.place(rank));
        // The last norm is not counted.
        let norm = 4 * u64::from(checkpoint.spec().hidden);
        assert_eq!(bytes(0) + bytes(1) + norm, checkpoint.weight_bytes(), "{name}");
        assert!(checkpoint.active_bytes() < checkpoint.weight_bytes(), "{name}");
    }
}

#[test]
fn experts_are_quantised_while_loading_and_routers_are_not() {
    let (folder, tokens, expected) = golden("qwen3-moe-joined");
    let mut checkpoint = Checkpoint::open(&folder).unwrap();
    // Two routers, and matrices whose rows of 40 columns are not whole groups.
    let others = checkpoint.quantise(Quantization::Int8);
    assert_eq!(others.into_iter().collect::<Vec<_>>(), [("F32".to_owned(), 4)]);
    let joined = checkpoint.tensors().iter().find(|t| t.name.ends_with("gate_up_proj")).unwrap();
    assert_eq!((joined.format.as_str(), &joined.shape[..]), ("Int8G32", &[4, 80, 32][..]));
    assert_eq!(checkpoint.matrices(&joined.name).len(), 4);
    let mut bench = Bench::of(&checkpoint, Arc::new(CpuOps::detect(2)));
    let whole = bench.chunked(0, &tokens, 64);
    let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let far = whole.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() > 0.2 * size).count();
    assert!(far * 20 < whole.len(), "{far} of {} logits are far off", whole.len());
    assert!(bench.chunked(1, &tokens, 5) == whole, "chunks");
}

#[test]
fn gemma_3_agrees_beyond_its_window() {
    check_all("gemma3");
}

#[test]
fn gptq_checkpoints_agree_in_both_versions_and_with_reordered_columns() {
    check_within("gptq-v1", INT4_BOUND);
    check_within("gptq-v2-row", INT4_BOUND);
    check_within("gptq-desc-act", INT4_BOUND);
}

#[test]
fn awq_checkpoints_agree() {
    check_within("awq", INT4_BOUND);
}

#[test]
fn weights_quantised_while_loading_give_nearby_logits_however_the_work_is_cut() {
    let (folder, tokens, expected) = golden("llama");
    let plain = Checkpoint::open(&folder).unwrap();
    for (to, bound) in [(Quantization::Int8, 0.1), (Quantization::Int4, 0.7)] {
        let mut checkpoint = Checkpoint::open(&folder).unwrap();
        // Rows of 48 columns are not whole groups.
        let others = checkpoint.quantise(to);
        assert_eq!(others.into_iter().collect::<Vec<_>>(), [("F32".to_owned(), 3)]);
        assert!(checkpoint.weight_bytes() < plain.weight_bytes() / 2);
        let mut bench = Bench::of(&checkpoint, Arc::new(CpuOps::detect(2)));
        let whole = bench.chunked(0, &tokens, 64);
        let squares = |of: &mut dyn Iterator<Item = f32>| of.map(|v| v * v).sum::<f32>();
        let size = squares(&mut expected.iter().copied());
        let error = squares(&mut whole.iter().zip(&expected).map(|(a, b)| a - b));
        let error = (error / size).sqrt();
        eprintln!("{to:?}: relative error {error:.3}");
        assert!(error > 0.0 && error < bound, "{to:?}: {error}");
        assert!(bench.chunked(1, &tokens, 5) == whole, "{to:?}: chunks");
    }
}

#[test]
fn what_is_quantised_already_stays_as_it_is() {
    let (folder, tokens, _) = golden("awq");
    let mut checkpoint = Checkpoint::open(&folder).unwrap();
    let others = checkpoint.quantise(Quantization::Int8);
    assert_eq!(others.into_iter().collect::<Vec<_>>(), [("Int4G32".to_owned(), 14)]);
    let formats = |name: &str| {
        let mut tensors = checkpoint.tensors().iter();
        tensors.find(|tensor| tensor.name == name).map(|tensor| tensor.format.clone()).unwrap()
    };
    assert_eq!(formats("lm_head.weight"), "Int8G64");
    assert_eq!(formats("model.layers.0.mlp.up_proj.weight"), "Int4G32");
    let mut bench = Bench::of(&checkpoint, Arc::new(CpuOps::detect(1)));
    assert!(bench.chunked(0, &tokens, 64).iter().all(|logit| logit.is_finite()));
}

/// The seat of a GPU: a device whose memory faults when the host touches it gives equal logits.
fn same_on_a_guarded_arena(path: &std::path::Path, tokens: &[u32], arena_bytes: usize) {
    let memory = Arc::new(ArenaDevice::new(arena_bytes).unwrap());
    let arena = Arc::new(CpuOps::new(memory, Pool::new(2), Isa::detect()));
    let there = Bench::new(path, arena).chunked(0, tokens, 20);
    let here = Bench::new(path, Arc::new(CpuOps::detect(2))).chunked(0, tokens, 20);
    assert!(here == there, "logits differ between devices");
}

#[test]
fn a_forward_never_touches_memory_itself() {
    for name in ["gemma3", "qwen3-moe"] {
        let (folder, tokens, _) = golden(name);
        same_on_a_guarded_arena(&folder, &tokens, 1 << 28);
    }
}

#[test]
fn smollm2_runs_on_a_guarded_arena_with_equal_logits() {
    let Some(path) = std::env::var_os("POMONA_TEST_SMOLLM2") else {
        let required = std::env::var("POMONA_REQUIRE").is_ok_and(|r| r.contains("smollm2"));
        assert!(!required, "POMONA_TEST_SMOLLM2 must name SmolLM2's GGUF");
        eprintln!("SKIPPED: set POMONA_TEST_SMOLLM2 to SmolLM2's GGUF to run this test");
        return;
    };
    let tokens: Vec<u32> = (0..60).map(|i| 500 + i * 37).collect();
    same_on_a_guarded_arena(path.as_ref(), &tokens, 2 << 30);
}
