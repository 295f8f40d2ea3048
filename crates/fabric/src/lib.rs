//! Ranks that talk to each other, on one machine or on many.
//!
//! Four layers: [`link`] carries bytes and notifications between two processes; [`group`] knows who
//! is there, in which epoch, and who was lost; [`coll`] has the collectives; [`xfer`] moves blocks
//! one-sidedly. Owns every wait for another rank: each has a deadline and sees an abort. Does not
//! know models.

pub mod cause;
pub mod coll;
pub mod group;
pub mod link;
pub mod measure;
pub mod nccl;
pub mod rendezvous;
pub mod secure;
pub mod wait;
pub mod xfer;
