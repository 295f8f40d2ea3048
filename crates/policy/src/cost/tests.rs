use super::*;

const TWO: Setting = Setting { transport: Transport::Shm, ranks: 2 };
const SIZES: [usize; 5] = [64, 1024, 16 << 10, 256 << 10, 4 << 20];

fn sum(algorithm: Algorithm) -> Operation {
    Operation::AllReduce(algorithm)
}

fn sample(setting: Setting, operation: Operation, bytes: usize, micros: f64) -> Sample {
    Sample { setting, operation, bytes, micros }
}

/// One-shot sums that take 1 us and 1 ns for each byte, two-shot ones that take 3 us and half.
fn two_lines() -> CostModel {
    let times = [(Algorithm::OneShot, 1.0, 1e-3), (Algorithm::TwoShot, 3.0, 0.5e-3)];
    let samples = times.iter().flat_map(|(algorithm, alpha, beta)| {
        SIZES.map(|bytes| sample(TWO, sum(*algorithm), bytes, alpha + beta * bytes as f64))
    });
    CostModel::fit(&samples.collect::<Vec<_>>())
}

fn check(predicted: Option<f64>, expected: f64) {
    let predicted = predicted.expect("it was measured");
    assert!((predicted / expected - 1.0).abs() < 1e-6, "{predicted} instead of {expected}");
}

#[test]
fn a_line_is_found_and_followed_between_and_beyond_points() {
    let model = two_lines();
    for bytes in [0, 8, 64, 500, 5000, 100_000, 1 << 24] {
        let predicted = model.predict(TWO, sum(Algorithm::OneShot), bytes);
        check(predicted, 1.0 + 1e-3 * bytes as f64);
    }
    let (alpha, beta) = model.costs()[0].curve.line();
    check(Some(alpha), 1.0);
    check(Some(beta), 1e-3);
}

#[test]
fn what_was_measured_is_predicted_as_it_was() {
    // A cliff at 4 KiB, where no line goes.
    let times = [(1024, 2.0), (4096, 3.0), (16 << 10, 50.0), (64 << 10, 60.0)];
    let samples = times.map(|(bytes, micros)| sample(TWO, Operation::AllGather, bytes, micros));
    let model = CostModel::fit(&samples);
    for (bytes, micros) in times {
        check(model.predict(TWO, Operation::AllGather, bytes), micros);
    }
    check(model.predict(TWO, Operation::AllGather, 10 << 10), 26.5);
}

#[test]
fn what_was_not_measured_is_not_known() {
    let model = two_lines();
    let others = [Setting { ranks: 3, ..TWO }, Setting { transport: Transport::Tcp, ..TWO }];
    for other in others {
        assert_eq!(model.predict(other, sum(Algorithm::OneShot), 64), None);
        assert_eq!(model.best(other, 64), None);
    }
    assert_eq!(model.predict(TWO, sum(Algorithm::Ring), 64), None);
    assert_eq!(model.predict(TWO, Operation::Barrier, 0), None);
}

#[test]
fn the_quickest_algorithm_changes_where_the_lines_cross() {
    let model = two_lines();
    // 1 + x = 3 + x / 2 where x is 4 us: 4,000 bytes.
    for (bytes, best) in [
        (0, Algorithm::OneShot),
        (3999, Algorithm::OneShot),
        (4001, Algorithm::TwoShot),
        (1 << 30, Algorithm::TwoShot),
    ] {
        assert_eq!(model.best(TWO, bytes), Some(best), "{bytes}");
        assert_eq!(model.choices(Transport::Shm).algorithm(2, bytes), Some(best), "{bytes}");
    }
    assert_eq!(model.choices(Transport::Shm).algorithm(3, 64), None);
    assert!(model.choices(Transport::Ofi).is_empty());
}

#[test]
fn choices_survive_the_way_to_another_process() {
    let choices = two_lines().choices(Transport::Shm);
    let text = choices.to_string();
    assert!(text.starts_with("2:") && text.ends_with(",2:*:two-shot"), "{text}");
    assert_eq!(text.parse(), Ok(choices));
    assert_eq!("".parse(), Ok(Choices::default()));
    for wrong in ["2", "2:4", "2:x:ring", "2:4:square", "2:*:ring:1", "-1:*:ring"] {
        assert!(wrong.parse::<Choices>().is_err(), "{wrong}");
    }
}

#[test]
fn a_list_has_no_more_than_other_processes_read() {
    let sums = (1..1100).map(|ranks| {
        let setting = Setting { transport: Transport::Shm, ranks };
        sample(setting, Operation::AllReduce(Algorithm::Ring), 64, 1.0)
    });
    let choices = CostModel::fit(&sums.collect::<Vec<_>>()).choices(Transport::Shm);
    assert_eq!(choices.to_string().parse(), Ok(choices));
}

#[test]
fn times_that_are_none_do_not_count_and_noise_takes_no_time_back() {
    let times = [(64, 5.0), (128, f64::NAN), (256, -1.0), (512, 4.0), (1024, f64::INFINITY)];
    let samples = times.map(|(bytes, micros)| sample(TWO, Operation::Broadcast, bytes, micros));
    let model = CostModel::fit(&samples);
    let points = model.costs()[0].curve.points();
    assert_eq!(points.iter().map(|point| point.bytes).collect::<Vec<_>>(), [64, 512]);
    // They fall, the line does not: beyond them time stays as it is.
    check(model.predict(TWO, Operation::Broadcast, 1 << 20), 4.0);
    assert_eq!(CostModel::fit(&samples[1..3]), CostModel::default());
}

#[test]
fn lines_never_begin_below_nothing() {
    let samples = [(1000, 0.5), (2000, 2.0), (4000, 8.0)]
        .map(|(bytes, micros)| sample(TWO, Operation::SendReceive, bytes, micros));
    let (alpha, beta) = CostModel::fit(&samples).costs()[0].curve.line();
    assert!(alpha == 0.0 && beta > 0.0, "{alpha} {beta}");
}

#[test]
fn costs_from_outside_are_checked() {
    let good: Vec<Costs> = two_lines().into();
    assert_eq!(CostModel::try_from(good.clone()), Ok(two_lines()));
    let refused = |costs: Vec<Costs>| CostModel::try_from(costs).unwrap_err().to_string();
    assert!(refused([&good[..], &good[..1]].concat()).contains("twice"));
    assert!(refused(vec![good[0].clone(); CURVES_MAX + 1]).contains("4097 curves"));
    let curve = |points: &[(usize, f64)]| {
        let points = points.iter().map(|(bytes, micros)| Point { bytes: *bytes, micros: *micros });
        let curve = Curve::raw(points.collect());
        refused(vec![Costs { curve, ..good[0].clone() }])
    };
    assert!(curve(&[]).contains("no points"));
    assert!(curve(&[(8, 1.0), (8, 2.0)]).contains("order"));
    assert!(curve(&[(8, f64::NAN)]).contains("times"));
    assert!(curve(&[(8, -1.0)]).contains("times"));
}
