//! Measurements: the engine alone, a server under load, the machine's own limits beside
//! them, and how well a model predicts.

pub mod engine;
pub mod load;
pub mod machine;
pub mod prompts;
pub mod quality;
pub mod report;
pub mod served;
pub mod startup;
pub mod stats;
