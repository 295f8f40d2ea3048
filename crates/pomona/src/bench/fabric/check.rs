//! Whether a cost model is right: what it predicts beside what was measured, and what it would have
//! chosen beside the best.

use pomona_policy::cost::{CostModel, Operation, Setting};
use serde::Serialize;

use super::{Figure, Run};
use crate::bench::stats::Deciles;

/// How far a prediction may lie from the middle of what was measured.
pub const ERROR_MAX: f64 = 0.25;
/// How much longer than the best algorithm's the chosen one's time may be.
pub const LOSS_MAX: f64 = 1.3;

/// A call beside its prediction.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Compared {
    /// Which.
    pub operation: Operation,
    /// Of how many bytes.
    pub bytes: usize,
    /// Microseconds.
    pub predicted: f64,
    /// Microseconds, the middle.
    pub measured: f64,
}

impl Compared {
    /// How far the prediction lies from it, as a share of it.
    pub fn error(&self) -> f64 {
        (self.predicted / self.measured - 1.0).abs()
    }
}

/// A sum by the algorithm that the model chooses, beside the best.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Choice {
    /// Of how many bytes.
    pub bytes: usize,
    /// What was chosen.
    pub chosen: Operation,
    /// What was the best.
    pub best: Operation,
    /// The time of the one over that of the other.
    pub loss: f64,
}

/// What came of a check in one setting.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Where.
    pub setting: Setting,
    /// Each call that the model knows.
    pub calls: Vec<Compared>,
    /// Each size of sums.
    pub choices: Vec<Choice>,
}

impl Verdict {
    /// Compares what was measured with what a model says.
    pub fn of(run: &Run, model: &CostModel) -> Verdict {
        let setting = run.job.setting();
        let compared = |figure: &Figure| {
            let Figure { operation, bytes, us, .. } = *figure;
            let predicted = model.predict(setting, operation, bytes)?;
            Some(Compared { operation, bytes, predicted, measured: us.p50 })
        };
        let calls = run.figures.iter().filter_map(compared).collect();
        let choice = |bytes: &usize| {
            let chosen = Operation::AllReduce(model.best(setting, *bytes)?);
            let sums = run.figures.iter().filter(|one| {
                one.bytes == *bytes && matches!(one.operation, Operation::AllReduce(_))
            });
            let best = sums.min_by(|a, b| a.us.p50.total_cmp(&b.us.p50))?;
            let loss = run.figure(chosen, *bytes)?.us.p50 / best.us.p50;
            Some(Choice { bytes: *bytes, chosen, best: best.operation, loss })
        };
        Verdict { setting, calls, choices: run.job.sizes.iter().filter_map(choice).collect() }
    }

    /// How far the predictions of one call lie off, the middle one of all sizes.
    pub fn middle_error(&self, operation: Operation) -> Option<f64> {
        let of = self.calls.iter().filter(|call| call.operation == operation);
        let errors: Vec<f64> = of.map(Compared::error).collect();
        (!errors.is_empty()).then(|| Deciles::of(errors).p50)
    }

    /// Predictions that are too far off.
    pub fn wrong(&self) -> impl Iterator<Item = &Compared> {
        self.calls.iter().filter(|call| call.error() > ERROR_MAX)
    }

    /// Choices that cost too much.
    pub fn bad(&self) -> impl Iterator<Item = &Choice> {
        self.choices.iter().filter(|choice| choice.loss > LOSS_MAX)
    }
}

/// The sizes at which a model was measured in a setting, and between each two of them another one,
/// at which it was not.
pub fn sizes_to_check(model: &CostModel, setting: Setting) -> Vec<usize> {
    let costs = model.costs().iter().filter(|costs| costs.setting == setting);
    let points = costs.flat_map(|costs| costs.curve.points());
    let mut sizes: Vec<usize> = points.map(|point| point.bytes).filter(|size| *size > 0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let middle = |pair: &[usize]| ((pair[0] as f64 * pair[1] as f64).sqrt() as usize) & !3;
    let between: Vec<usize> = sizes.windows(2).map(middle).collect();
    sizes.extend(between);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use pomona_fabric::secure::Policy;
    use pomona_policy::cost::{Algorithm, Sample, Transport};

    use super::super::{Job, Times, Wire};
    use super::*;

    const ONE: Operation = Operation::AllReduce(Algorithm::OneShot);
    const TWO: Operation = Operation::AllReduce(Algorithm::TwoShot);

    fn job() -> Job {
        let (policy, provider) = (Policy::Off, None);
        Job { wire: Wire::Shm, policy, ranks: 2, sizes: vec![1024], rounds: 1, provider }
    }

    /// A model of one-shot and two-shot sums of 1 KiB.
    fn model(one: f64, two: f64) -> CostModel {
        let setting = Setting { transport: Transport::Shm, ranks: 2 };
        let sample = |operation, micros| Sample { setting, operation, bytes: 1024, micros };
        CostModel::fit(&[sample(ONE, one), sample(TWO, two)])
    }

    /// What was measured: everything takes 10 us, one-shot sums as long as is said.
    fn run(one: f64) -> Run {
        let times = |case: &(Operation, usize)| vec![if case.0 == ONE { one } else { 10.0 }];
        let times = job().cases().iter().map(times).collect();
        Run::new(job(), Times { limits: Vec::new(), times })
    }

    #[test]
    fn predictions_may_be_a_quarter_off() {
        assert_eq!(Verdict::of(&run(10.0), &model(12.4, 7.6)).wrong().count(), 0);
        let verdict = Verdict::of(&run(10.0), &model(12.6, 7.4));
        assert_eq!(verdict.wrong().map(|call| call.operation).collect::<Vec<_>>(), [ONE, TWO]);
    }

    #[test]
    fn a_choice_may_be_a_third_slower_than_the_best() {
        // One-shot sums were to be the quickest.
        assert_eq!(Verdict::of(&run(12.9), &model(9.0, 10.0)).bad().count(), 0);
        let verdict = Verdict::of(&run(13.1), &model(9.0, 10.0));
        assert_eq!(verdict.bad().map(|choice| choice.chosen).collect::<Vec<_>>(), [ONE]);
        assert_eq!(Verdict::of(&run(13.1), &model(10.0, 9.0)).bad().count(), 0);
    }

    #[test]
    fn sizes_between_those_that_were_measured_are_checked_too() {
        let setting = Setting { transport: Transport::Shm, ranks: 2 };
        let sample = |bytes| Sample { setting, operation: ONE, bytes, micros: 1.0 };
        let model = CostModel::fit(&[sample(64), sample(256), sample(1024)]);
        assert_eq!(sizes_to_check(&model, setting), [64, 128, 256, 512, 1024]);
        assert!(sizes_to_check(&model, Setting { ranks: 3, ..setting }).is_empty());
    }
}
