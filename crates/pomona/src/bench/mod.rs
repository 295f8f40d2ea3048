//! Measurements: the engine alone, a server under load, kinds of matrices, series over lengths,
//! batches and threads, the machine's own limits beside them, and how well a model predicts.

pub mod engine;
pub mod fabric;
pub mod kernels;
pub mod load;
pub mod machine;
pub mod others;
pub mod prompts;
pub mod quality;
pub mod report;
pub mod served;
pub mod startup;
pub mod stats;
pub mod sweep;
