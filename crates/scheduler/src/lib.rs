//! The batch scheduler: a pure state machine from requests to steps.
#![forbid(unsafe_code)]
pub mod batch;
