//! What earlier runs have counted and measured, and kept in files.

use pomona_policy::cost::{CostModel, Operation, Transport};
use pomona_policy::experts::{Counted, balance, place};
use serde::Deserialize;

/// Ranks that experts are placed on.
const RANKS: usize = 4;
/// Layers and experts of a layer that are placed: that takes time, which the shape of a model
/// bounds, and files of other shapes are refused.
const LAYERS_MAX: usize = 8;
const EXPERTS_MAX: usize = 64;

/// The file of `--expert-loads`, as if it were of the model at hand, and where experts go by it.
pub fn expert_counts(input: &[u8]) {
    let Ok(found) = serde_json::from_slice::<Counted>(input) else { return };
    let mut none = found.clone();
    none.tokens.iter_mut().for_each(|layer| layer.fill(0));
    let found = none.of_same_model(found).expect("weights and shape are its own");
    let later = found.with(&found.tokens);
    let layers = found.tokens.iter().chain(&later.tokens);
    let layers = layers.filter(|loads| (RANKS..=EXPERTS_MAX).contains(&loads.len()));
    for loads in layers.take(LAYERS_MAX) {
        let experts = loads.len();
        let plain: Vec<_> = (0..experts).map(|expert| vec![expert * RANKS / experts]).collect();
        let placed = place(&plain, loads, RANKS, experts);
        assert_eq!(placed.len(), experts);
        for ranks in &placed {
            let ascending = ranks.windows(2).all(|pair| pair[0] < pair[1]);
            let there = ranks.last().is_some_and(|last| *last < RANKS);
            assert!(ascending && there, "an expert is on {ranks:?} of {RANKS} ranks");
        }
        let (before, after) = (balance(&plain, loads, RANKS), balance(&placed, loads, RANKS));
        assert!(after <= before, "the busiest rank has {after} times the mean, before {before}");
    }
}

/// Of the file of `pomona fabric calibrate`, what is more than a number or a text.
#[derive(Deserialize)]
struct Calibration {
    costs: CostModel,
}

/// That file, and which algorithms ranks choose by it.
pub fn fabric_costs(input: &[u8]) {
    let Ok(Calibration { costs }) = serde_json::from_slice(input) else { return };
    for transport in [Transport::Shm, Transport::Tcp, Transport::TcpSealed, Transport::Ofi] {
        let choices = costs.choices(transport);
        // The other ranks read them on their command lines.
        let theirs = choices.to_string().parse();
        assert_eq!(theirs, Ok(choices), "ranks would choose differently");
    }
    for setting in costs.settings() {
        for operation in Operation::all() {
            for bytes in [0, 1, 4096, usize::MAX] {
                let micros = costs.predict(setting, operation, bytes);
                assert!(micros.is_none_or(|time| time >= 0.0), "{operation} takes {micros:?} us");
            }
        }
    }
}
