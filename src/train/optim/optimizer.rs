use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::adam::AdamW;
use super::average::WeightAverage;
use super::ema::Ema;
use super::muon::Muon;
use super::scaler::GradScaler;
use crate::backend::{self, Counters, UpdateRule, Updater};
use crate::error::Result;

/// The optimiser of a run. It updates four things together: clipping, Adam or Muon, the average of the weights, and the
/// scale of the gradients.
///
/// On a CUDA device, the device decides whether an update is skipped. Until [`sync`](Self::sync), the counts on the
/// host assume that no update was skipped.
#[derive(Debug)]
pub(in crate::train) struct Optimizer {
    pub adam: AdamW,
    /// The optimiser of matrices, which `adam` then lacks.
    pub muon: Option<Muon>,
    pub ema: Option<Ema>,
    /// Averages beside `ema`.
    pub averages: Vec<WeightAverage>,
    pub scaler: Option<GradScaler>,
    /// The largest norm of the gradient; infinite for no clipping.
    max_norm: f64,
    updater: Box<dyn Updater>,
}

impl Optimizer {
    pub fn new(
        adam: AdamW,
        muon: Option<Muon>,
        ema: Option<Ema>,
        scaler: Option<GradScaler>,
        max_norm: Option<f64>,
    ) -> Self {
        let place = adam.place().or_else(|| muon.as_ref().and_then(Muon::place));
        let (device, dtype) = place.unwrap_or((Device::Cpu, DType::F32));
        let updater = backend::on(&device, dtype).updater(&device);
        let averages = Vec::new();
        let max_norm = max_norm.unwrap_or(f64::INFINITY);
        Self { adam, muon, ema, averages, scaler, max_norm, updater }
    }

    /// Clips the gradients of this number of images, updates the weights, and then their averages. Returns the norm
    /// before clipping. The result equals that of [`clip_grad_norm`](super::clip::clip_grad_norm), [`AdamW::step`] and
    /// [`Ema::update`].
    ///
    /// With a scaler, divides the gradients by its scale first. If the norm is not finite, changes only the scale.
    ///
    /// # Errors
    /// Returns an error if a gradient does not fit its weight.
    pub fn update(
        &mut self,
        gradients: &mut BTreeMap<String, Tensor>,
        learning_rate: f64,
        images: u64,
    ) -> Result<Tensor> {
        self.adam.check(gradients)?;
        self.muon.as_ref().map_or(Ok(()), |muon| muon.check(gradients))?;
        let (rule, mut counters) = (self.rule(), self.counters());
        let mut gradients = gradients.iter_mut().collect();
        let averages = self.ema.as_mut().map(Ema::averages_mut);
        let mut averages = averages.into_iter().flatten().collect();
        let mut weights = self.adam.states(&mut gradients, &mut averages);
        if let Some(muon) = &mut self.muon {
            weights.extend(muon.states(&mut gradients, &mut averages));
        }
        let skipped = counters.skipped;
        let norm = self.updater.update(weights, &rule, learning_rate, &mut counters);
        self.set_counters(&counters);
        let norm = norm?;
        if !self.averages.is_empty() {
            // With a scaler on a CUDA device, only the device knows whether the update was skipped.
            self.sync()?;
            if self.counters().skipped == skipped {
                self.averages.iter_mut().try_for_each(|average| average.update(images))?;
            }
        }
        Ok(norm)
    }

    /// Returns whether a recorded update can be repeated. The operations of the averages beside `ema` cannot be
    /// repeated.
    pub fn is_repeatable(&self) -> bool {
        self.averages.is_empty()
    }

    /// The factor of the loss's gradient, a scalar. `None` without a scaler.
    pub fn loss_scale(&mut self) -> Result<Option<Tensor>> {
        let counters = self.counters();
        self.scaler.as_ref().map(|_| self.updater.loss_scale(&counters)).transpose()
    }

    fn rule(&self) -> UpdateRule {
        UpdateRule {
            max_norm: self.max_norm,
            average: self.ema.as_ref().map(Ema::rule),
            scale: self.scaler.as_ref().map(GradScaler::rule),
            muon: self.muon.as_ref().map(Muon::rule),
            ..self.adam.config().rule()
        }
    }

    /// The counts as known on the host, combined into one value.
    pub fn counters(&self) -> Counters {
        Counters {
            updates: self.adam.steps(),
            average_updates: self.ema.as_ref().map_or(0, Ema::updates),
            ..self.scaler.as_ref().map(GradScaler::counters).unwrap_or_default()
        }
    }

    fn set_counters(&mut self, counters: &Counters) {
        self.adam.set_steps(counters.updates);
        if let Some(ema) = &mut self.ema {
            ema.set_updates(counters.average_updates);
        }
        if let Some(scaler) = &mut self.scaler {
            scaler.set_counters(counters);
        }
    }

    /// Returns the exact counts. Waits for the device if it can skip updates.
    pub fn exact_counters(&self) -> Result<Counters> {
        let counters = self.counters();
        if self.scaler.is_some() { self.updater.read(&counters) } else { Ok(counters) }
    }

    /// Returns the scaler with the exact counts. Waits for the device.
    pub fn exact_scaler(&self) -> Result<Option<GradScaler>> {
        let Some(scaler) = &self.scaler else { return Ok(None) };
        let mut scaler = scaler.clone();
        scaler.set_counters(&self.exact_counters()?);
        Ok(Some(scaler))
    }

    /// Replaces all counts by the exact ones. Waits for the device if it can skip updates.
    pub fn sync(&mut self) -> Result<()> {
        self.assume(&self.exact_counters()?);
        Ok(())
    }

    /// Prepares for recording the next update, or for repeating a recorded one.
    pub fn stage(&mut self, learning_rate: f64) -> Result<()> {
        let counters = self.counters();
        self.updater.stage(learning_rate, &counters)
    }

    /// Sets the counts to those that the device is known to have. After an update was recorded without running, they
    /// are those before it.
    pub fn assume(&mut self, counters: &Counters) {
        self.set_counters(counters);
        self.updater.assume(counters);
    }

    /// Counts one repetition of a recorded update.
    pub fn count_repeated(&mut self) {
        let mut counters = self.counters();
        self.rule().count(&mut counters);
        self.assume(&counters);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::adam::{AdamConfig, WeightDecay};
    use super::super::clip::clip_grad_norm;
    use super::super::ema::EmaConfig;
    use super::*;

    #[test]
    fn one_pass_does_what_three_do() -> Result<()> {
        let weights = |dtype| -> Result<BTreeMap<String, Var>> {
            let names = ["a", "b", "idle"].into_iter().zip([3, 40_000, 5]);
            names
                .map(|(name, count)| {
                    let values =
                        (Tensor::arange(0f64, count as f64, &Device::Cpu)? * 0.37)?.sin()?;
                    Ok((name.to_string(), Var::from_tensor(&values.to_dtype(dtype)?)?))
                })
                .collect()
        };
        for decay in [WeightDecay::None, WeightDecay::L2(0.1), WeightDecay::Decoupled(0.1)] {
            let config = AdamConfig { weight_decay: decay, ..AdamConfig::adam(1e-2) };
            let ema = EmaConfig { decay: 0.9, warmup: true };
            let (fast, slow) = (weights(DType::F32)?, weights(DType::F64)?);
            let (average, adam) = (Some(Ema::new(ema, &fast)?), AdamW::new(config, &fast)?);
            let mut run = Optimizer::new(adam, None, average, None, None);
            let (mut adam, mut average) = (AdamW::new(config, &slow)?, Ema::new(ema, &slow)?);
            for (step, max_norm) in [0.5, 1e9, f64::INFINITY].into_iter().enumerate() {
                run.max_norm = max_norm;
                let of = |vars: &BTreeMap<String, Var>| -> Result<BTreeMap<String, Tensor>> {
                    let gradient = |(name, var): (&String, &Var)| {
                        Ok((name.clone(), ((var.as_detached_tensor() * 3.0)? + step as f64)?))
                    };
                    vars.iter().filter(|(name, _)| *name != "idle").map(gradient).collect()
                };
                let norm = run.update(&mut of(&fast)?, 1e-2, 1)?;
                let mut gradients = of(&slow)?;
                let expected = clip_grad_norm(&mut gradients, max_norm)?;
                adam.step(&gradients, 1e-2)?;
                average.update(&slow)?;
                let (norm, expected) = (norm.to_scalar::<f32>()?, expected.to_scalar::<f64>()?);
                assert!((f64::from(norm) / expected - 1.0).abs() < 1e-6, "{norm}, {expected}");
            }
            let close = |a: &Tensor, b: &Tensor| -> Result<()> {
                let off = (a.to_dtype(DType::F64)? - b)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(off < 1e-6, "{decay:?}: off by {off}");
                Ok(())
            };
            for (name, var) in &fast {
                close(var, &slow[name])?;
                close(&run.ema.as_ref().unwrap().averages()[name], &average.averages()[name])?;
            }
        }
        Ok(())
    }
}
