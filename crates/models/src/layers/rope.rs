//! Frequencies of rotary embeddings (Su et al., RoFormer, 2021) and the ways to stretch them.

/// How frequencies are changed for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scaling {
    None,
    /// All divided by this (Chen et al., position interpolation, 2023).
    Linear(f64),
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between, as Hugging
    /// Face's `rope_type: llama3` defines it.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        context: f64,
    },
}

/// One rotation: `base^(-2i / rotated)`, scaled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) base: f64,
    /// Elements of a head that are rotated; even.
    pub(crate) rotated: u32,
    pub(crate) scaling: Scaling,
}

impl Rope {
    /// Inverse frequencies, `[rotated / 2]`; `factors` divide them (GGUF's `rope_freqs`).
    pub(crate) fn inverse_frequencies(&self, factors: Option<&[f32]>) -> Vec<f32> {
        (0..self.rotated / 2)
            .map(|i| {
                // In f32, as the reference implementations compute them.
                let exponent = (2 * i) as f32 / self.rotated as f32;
                let frequency = 1.0 / (self.base as f32).powf(exponent);
                let factor = factors.map_or(1.0, |f| f[i as usize]);
                self.scale(frequency) / factor
            })
            .collect()
    }

    fn scale(&self, frequency: f32) -> f32 {
        match self.scaling {
            Scaling::None => frequency,
            Scaling::Linear(factor) => frequency / factor as f32,
            Scaling::Llama3 { factor, low, high, context } => {
                let wave = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wave < context / high {
                    frequency
                } else if wave > context / low {
                    frequency / factor as f32
                } else {
                    let smooth = (context / wave - low) / (high - low);
                    let frequency = f64::from(frequency);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                }
            }
        }
    }
}
