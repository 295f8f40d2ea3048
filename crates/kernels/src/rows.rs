//! Operations that work on each row by itself: norms, rotation, gates.

use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, exp, sum_of_squares};
use crate::{Activation, RopeStyle, Write};

/// `out (+)= x / sqrt(mean(x²) + eps) * weight` for each row.
pub(crate) struct RmsNorm<'a> {
    /// `None`: in place, `out` holds the input.
    pub(crate) x: Option<&'a [f32]>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) write: Write,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let n = self.weight.len();
        for (row, out) in self.out.chunks_exact_mut(n).enumerate() {
            match self.x {
                None => {
                    let scale = inverse_rms(out, self.eps);
                    for (o, w) in out.iter_mut().zip(self.weight) {
                        *o = *o * scale * w;
                    }
                }
                Some(x) => {
                    let x = &x[row * n..][..n];
                    let scale = inverse_rms(x, self.eps);
                    for ((o, x), w) in out.iter_mut().zip(x).zip(self.weight) {
                        let value = x * scale * w;
                        *o = if self.write == Write::Add { *o + value } else { value };
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt()
}

/// Norm of each head, if asked for, then rotation (Su et al., RoFormer, 2021), in place.
pub(crate) struct Rope<'a> {
    /// `[tokens, heads, head_dim]`.
    pub(crate) x: &'a mut [f32],
    pub(crate) head_dim: usize,
    pub(crate) norm: Option<(&'a [f32], f32)>,
    /// `[tokens, rotated / 2, 2]`: cos and sin.
    pub(crate) table: &'a [f32],
    pub(crate) tokens: usize,
    pub(crate) style: RopeStyle,
}

impl Kernel for Rope<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let token_table = self.table.len() / self.tokens;
        let tokens = self.x.chunks_exact_mut(self.x.len() / self.tokens);
        for (heads, table) in tokens.zip(self.table.chunks_exact(token_table)) {
            let table = table.as_chunks::<2>().0;
            for head in heads.chunks_exact_mut(self.head_dim) {
                if let Some((weight, eps)) = self.norm {
                    let scale = inverse_rms(head, eps);
                    for (o, w) in head.iter_mut().zip(weight) {
                        *o = *o * scale * w;
                    }
                }
                match self.style {
                    RopeStyle::Halves => {
                        let (low, high) = head[..2 * table.len()].split_at_mut(table.len());
                        for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(table) {
                            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                        }
                    }
                    RopeStyle::Pairs => {
                        for (pair, [cos, sin]) in head.as_chunks_mut::<2>().0.iter_mut().zip(table)
                        {
                            let [a, b] = *pair;
                            *pair = [a * cos - b * sin, b * cos + a * sin];
                        }
                    }
                }
            }
        }
    }
}

/// `out = act(gate) * up`, with the gate in `out`.
pub(crate) struct Glu<'a> {
    pub(crate) up: &'a [f32],
    pub(crate) activation: Activation,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Glu<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        match self.activation {
            Activation::Silu => self.apply(|x| x / (1.0 + exp(-x))),
            Activation::GeluTanh => self.apply(gelu_tanh),
        }
    }
}

/// GELU with tanh (Hendrycks and Gimpel, 2016): `x / 2 * (1 + tanh(y))` is `x / (1 + exp(-2y))`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let y = SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp(-2.0 * y))
}

impl Glu<'_> {
    #[inline(always)]
    fn apply(self, act: impl Fn(f32) -> f32) {
        let (outs, rest) = self.out.as_chunks_mut::<LANES>();
        let (ups, up_rest) = self.up.as_chunks::<LANES>();
        for (out, up) in outs.iter_mut().zip(ups) {
            for i in 0..LANES {
                out[i] = act(out[i]) * up[i];
            }
        }
        for (out, up) in rest.iter_mut().zip(up_rest) {
            *out = act(*out) * up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::linear::tests::Dice;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut dice = Dice(seed);
        (0..n).map(|_| dice.real() * 4.0).collect()
    }

    /// Largest difference relative to the largest expected value.
    fn check(found: &[f32], expected: &[f64]) {
        let size = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*f) - e).abs() <= 1e-6 * size, "element {i}: {f} for {e}");
        }
    }

    #[test]
    fn rms_norm_is_its_definition_on_every_tier() {
        for n in [1, 7, 16, 33, 576] {
            let (x, weight) = (random(3 * n, 1), random(n, 2));
            let expected: Vec<f64> = x
                .chunks_exact(n)
                .flat_map(|row| {
                    let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    row.iter().zip(&weight).map(move |(v, w)| f64::from(*v) * scale * f64::from(*w))
                })
                .collect();
            for isa in Isa::available() {
                let mut out = vec![0.0; 3 * n];
                let (write, eps) = (Write::Set, 1e-5);
                let (weight, out_ref) = (&weight[..], &mut out[..]);
                isa.run(RmsNorm { x: Some(&x), weight, eps, write, out: out_ref });
                check(&out, &expected);
                let mut place = x.clone();
                isa.run(RmsNorm { x: None, weight, eps, write, out: &mut place });
                assert_eq!(place, out);
                isa.run(RmsNorm { x: Some(&x), weight, eps, write: Write::Add, out: &mut place });
                check(&place, &expected.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn rope_rotates_both_styles_and_leaves_the_rest_of_a_head() {
        let (d, rotated) = (12, 8);
        let x = random(2 * d, 3);
        let angles = random(rotated / 2, 4);
        let table: Vec<f32> = angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect();
        for style in [RopeStyle::Halves, RopeStyle::Pairs] {
            let mut expected: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            for head in 0..2 {
                for (i, a) in angles.iter().enumerate() {
                    let (p, q) = match style {
                        RopeStyle::Halves => (i, i + rotated / 2),
                        RopeStyle::Pairs => (2 * i, 2 * i + 1),
                    };
                    let (p, q, a) = (head * d + p, head * d + q, f64::from(*a));
                    let (u, v) = (expected[p], expected[q]);
                    expected[p] = u * a.cos() - v * a.sin();
                    expected[q] = v * a.cos() + u * a.sin();
                }
            }
            for isa in Isa::available() {
                let mut x = x.clone();
                let (norm, tokens) = (None, 1);
                isa.run(Rope { x: &mut x, head_dim: d, norm, table: &table, tokens, style });
                check(&x, &expected);
            }
        }
    }

    #[test]
    fn gates_are_their_definitions() {
        let (gate, up) = (random(37, 5), random(37, 6));
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu = |x: f64| {
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + y.tanh())
        };
        for isa in Isa::available() {
            for (activation, define) in
                [(Activation::Silu, &silu as &dyn Fn(f64) -> f64), (Activation::GeluTanh, &gelu)]
            {
                let mut out = gate.clone();
                isa.run(Glu { up: &up, activation, out: &mut out });
                let expected =
                    gate.iter().zip(&up).map(|(g, u)| define((*g).into()) * f64::from(*u));
                check(&out, &expected.collect::<Vec<_>>());
            }
        }
    }
}
