//! The losses of importance sampling of timesteps. Nichol and Dhariwal 2021, section 3.3, with the constants of their
//! code.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::image_losses::ImageLoss;
use super::stateful::{Fields, Kind, Stateful, Tensors};
use super::timesteps::TimestepSampling;
use crate::error::{Error, Result};
use crate::kernels::{with_values, with_values_mut};
use crate::memory::zeros;

/// Number of losses that are kept for each timestep.
const LENGTH: usize = 10;

/// The fraction of draws that are uniform, so that every timestep is drawn again.
const UNIFORM: f64 = 0.001;

/// The last losses of each timestep.
#[derive(Debug)]
pub(super) struct LossHistory {
    /// (timesteps, [`LENGTH`]), the oldest of a timestep first, and 0 where there is none yet.
    losses: Tensor,
    /// (timesteps): the number of losses.
    counts: Tensor,
}

impl LossHistory {
    /// # Errors
    /// Returns an error if there is not enough memory.
    pub fn new(timesteps: usize) -> Result<Self> {
        let empty = |shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(zeros("losses of the timesteps", shape)?, shape, &Device::Cpu)?)
        };
        Ok(Self { losses: empty(&[timesteps, LENGTH])?, counts: empty(&[timesteps])? })
    }

    /// Returns the probability of each timestep. It is proportional to the root mean square of the last losses of the
    /// timestep, except for the uniform draws. Returns `None`, which stands for equal probabilities, until every
    /// timestep has ten losses. Also returns `None` if all losses are 0.
    pub fn probabilities(&self) -> Result<Option<Vec<f64>>> {
        let probabilities = with_values([&self.losses, &self.counts], |[losses, counts]| {
            if counts.iter().any(|&count| (count as usize) < LENGTH) {
                return None;
            }
            let square = |loss: &f32| f64::from(*loss) * f64::from(*loss);
            let root = |losses: &[f32; LENGTH]| {
                (losses.iter().map(square).sum::<f64>() / LENGTH as f64).sqrt()
            };
            let mut all: Vec<f64> = losses.as_chunks().0.iter().map(root).collect();
            let (sum, count) = (all.iter().sum::<f64>(), all.len() as f64);
            all.iter_mut().for_each(|p| *p = (1.0 - UNIFORM) * (*p / sum) + UNIFORM / count);
            (sum > 0.0).then_some(all)
        })?;
        Ok(probabilities)
    }

    /// Adds the losses of an update, in the order of the images. A loss that is not finite ends the run when it is
    /// read. It is omitted here, so that no probability is NaN until then.
    pub fn record(&mut self, images: &[ImageLoss]) -> Result<()> {
        let Self { losses, counts } = self;
        with_values_mut(losses, |losses| {
            with_values_mut(counts, |counts| {
                let rows = losses.as_chunks_mut::<LENGTH>().0;
                for ImageLoss { t, loss, .. } in images.iter().filter(|of| of.loss.is_finite()) {
                    let t = *t as usize;
                    let (Some(row), Some(count)) = (rows.get_mut(t), counts.get_mut(t)) else {
                        continue;
                    };
                    if (*count as usize) < LENGTH {
                        row[*count as usize] = *loss;
                        *count += 1.0;
                    } else {
                        row.rotate_left(1);
                        row[LENGTH - 1] = *loss;
                    }
                }
            })
        })??;
        Ok(())
    }
}

/// The kind of the [`LossHistory`].
pub(super) const TIMESTEPS: Kind = Kind {
    name: "timesteps",
    weights: false,
    files: |train| usize::from(train.timesteps == TimestepSampling::Importance),
    setting: "train.timesteps",
    fields: &[],
    check: |_, _| Ok(()),
};

impl Stateful for LossHistory {
    fn kind(&self) -> &'static Kind {
        &TIMESTEPS
    }

    fn tensors(&self) -> Option<Tensors> {
        let Self { losses, counts } = self;
        Some(BTreeMap::from([("losses".into(), losses.clone()), ("counts".into(), counts.clone())]))
    }

    fn restore(&mut self, mut tensors: Tensors, _: &Fields) -> Result<()> {
        let mut take = |name: &str| -> Result<Tensor> {
            let tensor = tensors.remove(name).ok_or_else(|| Error::external(name))?;
            Ok(tensor.to_device(&Device::Cpu)?.contiguous()?)
        };
        let (losses, counts) = (take("losses")?, take("counts")?);
        let is_count = |count: &&f32| (0..=LENGTH).any(|length| length as f32 == **count);
        let wrong =
            with_values([&counts], |[counts]| counts.iter().find(|c| !is_count(c)).copied())?;
        if let Some(count) = wrong {
            let expected = format!("a whole number from 0 to {LENGTH}");
            return Err(Error::config("counts of timesteps.safetensors", count, expected));
        }
        *self = Self { losses, counts };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected numbers come from the published algorithm, written with NumPy.
    #[test]
    fn probabilities_are_those_of_the_published_algorithm() -> Result<()> {
        let file: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/data/importance.json")).unwrap();
        let timesteps = file["timesteps"].as_u64().unwrap() as usize;
        let mut history = LossHistory::new(timesteps)?;
        let mut uniform = 0;
        for update in file["updates"].as_array().unwrap() {
            let images: Vec<ImageLoss> = update["losses"]
                .as_array()
                .unwrap()
                .iter()
                .map(|pair| ImageLoss {
                    t: pair[0].as_u64().unwrap() as u32,
                    loss: pair[1].as_f64().unwrap() as f32,
                    weight: 1.0,
                })
                .collect();
            history.record(&images)?;
            let expected: Option<Vec<f64>> =
                serde_json::from_value(update["probabilities"].clone()).unwrap();
            let found = history.probabilities()?;
            uniform += usize::from(found.is_none());
            assert_eq!(found.is_some(), expected.is_some());
            for (found, expected) in found.into_iter().flatten().zip(expected.into_iter().flatten())
            {
                assert!((found / expected - 1.0).abs() < 1e-12, "{found}, not {expected}");
            }
        }
        assert!(uniform > 0 && uniform < file["updates"].as_array().unwrap().len());
        Ok(())
    }

    #[test]
    fn losses_that_are_not_finite_and_zeros_make_no_probability_nan() -> Result<()> {
        let mut history = LossHistory::new(2)?;
        let image = |t, loss| ImageLoss { t, loss, weight: 1.0 };
        let both = |loss| [image(0, loss), image(1, loss)];
        (0..LENGTH).try_for_each(|_| history.record(&both(f32::NAN)))?;
        assert_eq!(history.probabilities()?, None);
        (0..LENGTH).try_for_each(|_| history.record(&both(0.0)))?;
        assert_eq!(history.probabilities()?, None);
        history.record(&[image(1, 1.0), image(7, 1.0), image(0, f32::INFINITY)])?;
        let found = history.probabilities()?.unwrap();
        assert_eq!(found[0], 0.5 * UNIFORM);
        assert!((found[1] - (1.0 - 0.5 * UNIFORM)).abs() < 1e-15, "{found:?}");
        Ok(())
    }
}
