//! What `/metrics` costs, of a model without experts and of models with many: the time that a
//! thread of the front end is busy with the answer, without a socket.

use std::time::Instant;

use bytes::Bytes;

use crate::{gateway, replica};

/// Scrapes of each model.
const SCRAPES: usize = 201;
/// Layers and experts of each; the last has more than are told one by one.
const MODELS: [(usize, usize); 4] = [(0, 0), (32, 8), (64, 64), (94, 128)];

pub fn measure() {
    println!("\nscrapes: layers, experts of each        us: median (min to max)      bytes");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (layers, experts) in MODELS {
        let gateway = match layers {
            0 => gateway(replica::null(0)),
            _ => gateway(replica::of_experts(layers, experts)),
        };
        let mut bytes = 0;
        let mut scrape = || {
            let begun = Instant::now();
            let (status, text) = runtime.block_on(gateway.call("GET", "/metrics", Bytes::new()));
            let us = begun.elapsed().as_secs_f64() * 1e6;
            assert_eq!(status, 200);
            bytes = text.len();
            us
        };
        let mut us: Vec<f64> = (0..SCRAPES).map(|_| scrape()).collect();
        us.sort_by(f64::total_cmp);
        let (median, min, max) = (us[SCRAPES / 2], us[0], us[SCRAPES - 1]);
        println!("{layers:>7}, {experts:<14} {median:>30.0} ({min:.0} to {max:.0}) {bytes:>10}");
    }
}
