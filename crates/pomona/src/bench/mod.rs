//! Measurements: the engine alone, a server under load, and the machine's own limits beside them.

pub mod engine;
pub mod load;
pub mod machine;
pub mod prompts;
pub mod report;
pub mod served;
pub mod startup;
pub mod stats;
