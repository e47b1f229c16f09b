//! Bits per dimension of images of the data.

use std::ops::ControlFlow;

use candle_core::Device;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::arguments::whole;
use super::figures::number;
use super::print::{grouped, out};
use super::result::{Interrupted, Result};
use super::sets::Set;
use crate::data::{Batch, Dataset, Subset};
use crate::denoiser::Denoiser;
use crate::eval::{Bound, Evaluated, Integrator, ProbabilityFlow, Trace, VariationalBound};
use crate::observe::Progress;
use crate::process::Diffusion;
use crate::sample::{SamplerConfig, Solver, Variance};

/// The default number of steps of the probability flow.
const STEPS: usize = 50;

/// The options for bits per dimension.
#[derive(Debug, Args)]
pub(super) struct BitsArgs {
    /// Number of images of --data whose bits per dimension are measured, chosen at random; needs --checkpoint
    #[arg(long, value_name = "N", allow_negative_numbers = true, requires = "data",
          conflicts_with = "samples", value_parser = whole::<usize>(1..=10_000_000))]
    bits: Option<usize>,
    /// Measure of the bits: bound, the variational bound, or flow, the density of the probability-flow ODE
    #[arg(long, value_name = "M", value_enum, default_value = "bound", requires = "bits")]
    bits_by: Measure,
    /// Number of terms of the bound per image, besides the decoder term; default all
    #[arg(long, value_name = "N", allow_negative_numbers = true, requires = "bits",
          value_parser = whole::<usize>(1..=1_000_000))]
    bits_terms: Option<usize>,
    /// Number of steps of the flow, with 4 evaluations and gradients of the network each; default 50
    #[arg(long, value_name = "N", allow_negative_numbers = true, requires = "bits",
          value_parser = whole::<usize>(1..=1_000_000))]
    bits_steps: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measure {
    Bound,
    Flow,
}

/// The bits per dimension of images, before they are measured.
pub(super) struct Bits<'a> {
    images: Subset<'a>,
    evaluator: Evaluator,
    /// The number of steps in which the evaluator reports its progress, per batch.
    steps: usize,
    seed: u64,
    /// The settings of the evaluator.
    json: Value,
}

enum Evaluator {
    Bound(VariationalBound),
    Flow(ProbabilityFlow),
}

impl BitsArgs {
    /// Chooses the images of the `data`, and prepares the evaluator for a network with these sampler settings. Returns
    /// `None` if no bits are asked for. `learned` tells whether the network learns the variance.
    ///
    /// # Errors
    /// Returns an error if options do not fit each other, the process or the number of images.
    pub fn prepare<'a>(
        &self,
        data: &'a Set,
        (diffusion, sampling, learned): (&Diffusion, &SamplerConfig, bool),
        seed: u64,
    ) -> Result<Option<Bits<'a>>> {
        let Some(count) = self.bits else { return Ok(None) };
        let (about, all) = (&data.about, data.images.len());
        if count > all {
            return Err(format!("--bits is {count}; {about}").into());
        }
        let other = match self.bits_by {
            Measure::Bound => self.bits_steps.map(|_| "--bits-steps is for --bits-by flow only"),
            Measure::Flow => self.bits_terms.map(|_| "--bits-terms is for --bits-by bound only"),
        };
        if let Some(message) = other {
            return Err(message.into());
        }
        let (evaluator, steps, json) = match self.bits_by {
            Measure::Bound => {
                let variance = match sampling.solver {
                    Solver::Ddpm { variance } => variance,
                    _ if learned => Variance::Learned,
                    _ => Variance::Posterior,
                };
                let clip = sampling.clip_denoised;
                let bound = VariationalBound::new(diffusion, variance, seed)?.clip_denoised(clip);
                let bound = match self.bits_terms {
                    Some(terms) => bound.sampled(terms)?,
                    None => bound,
                };
                let json = json!({
                    "measure": "variational bound",
                    "variance": variance,
                    "clip_denoised": clip,
                    "evaluations_per_image": bound.evaluations(),
                    "all_terms": self.bits_terms.is_none(),
                    "dequantisation": "none: the decoder term has an interval of 2/255 for each byte",
                });
                let steps = bound.evaluations();
                (Evaluator::Bound(bound), steps, json)
            }
            Measure::Flow => {
                let steps = self.bits_steps.unwrap_or(STEPS);
                let flow = ProbabilityFlow::new(diffusion, steps, seed)?
                    .integrator(Integrator::RungeKutta)
                    .trace(Trace::Rademacher(1))?
                    .dequantised(true);
                let json = json!({
                    "measure": "probability flow",
                    "integrator": "Runge-Kutta of order 4, equal steps of the log-SNR",
                    "steps": steps,
                    "evaluations_per_image": flow.evaluations(),
                    "trace": "one vector of random signs",
                    "dequantisation": "uniform in the interval of 2/255 of each byte",
                });
                (Evaluator::Flow(flow), steps, json)
            }
        };
        let images = Subset::random(&*data.images, count, seed)?;
        Ok(Some(Bits { images, evaluator, steps, seed, json }))
    }
}

impl Bits<'_> {
    /// The number of images that are evaluated together. The gradients of the flow need more memory.
    fn batch(&self) -> usize {
        match self.evaluator {
            Evaluator::Bound(_) => 50,
            Evaluator::Flow(_) => 10,
        }
    }

    /// Measures the bits, prints them, and returns them with their settings. `go_on` tells after each step whether
    /// the work goes on.
    ///
    /// # Errors
    /// Returns [`Interrupted`] if the work was stopped, and the errors of the data and of the network.
    pub fn measure(
        self,
        model: &impl Denoiser,
        device: &Device,
        go_on: impl Fn() -> ControlFlow<()>,
    ) -> Result<Value> {
        let count = self.images.len();
        let steps = self.steps;
        let measure = match &self.evaluator {
            Evaluator::Bound(_) => "variational bound",
            Evaluator::Flow(_) => "probability flow",
        };
        out(format_args!("bits        of {} images of the data, {measure}", grouped(count)));
        let progress = Progress::started((count.div_ceil(self.batch()) * steps) as u64);
        let (mut bits, mut bounds) = (Vec::new(), Vec::new());
        for (number, first) in (0..count).step_by(self.batch()).enumerate() {
            let batch = Batch::read(&self.images, first..count.min(first + self.batch()), device)?;
            let seen = |Evaluated { done, .. }: Evaluated| {
                progress.advance((number * steps + done) as u64);
                Ok(go_on())
            };
            match &self.evaluator {
                Evaluator::Bound(bound) => {
                    let found = bound.evaluate(model, batch, seen)?.ok_or(Interrupted)?;
                    bits.extend(found.iter().map(|bound| bound.total));
                    bounds.extend(found);
                }
                Evaluator::Flow(flow) => {
                    let found = flow.evaluate(model, batch, seen)?.ok_or(Interrupted)?;
                    bits.extend(found.iter().map(|likelihood| likelihood.bits));
                }
            }
        }
        progress.finish();
        let (mean, error) = mean_and_error(&bits);
        let shown = error.map_or_else(String::new, |error| format!(" ± {error:.4}"));
        out(format_args!("{:28}{:>20}", "bits per dimension", format!("{mean:.4}{shown}")));
        let Self { mut json, seed, images, .. } = self;
        json["mean"] = number(mean);
        json["standard_error"] = error.map_or(Value::Null, number);
        json["images"] = json!(count);
        json["seed"] = json!(seed);
        json["conditional"] = json!(model.classes().is_some() && images.classes() > 0);
        if !bounds.is_empty() {
            let mean = Bound::mean(&bounds)?;
            json["prior"] = number(mean.prior);
            json["decoder"] = number(mean.decoder());
            let terms = mean.terms.iter().map(|term| json!([term.t, number(term.bits)]));
            json["terms"] = json!({ "fields": ["t", "bits"], "values": terms.collect::<Vec<_>>() });
        }
        Ok(json)
    }
}

/// The mean of the bits of images, and its standard error. The error is absent for one image.
fn mean_and_error(bits: &[f64]) -> (f64, Option<f64>) {
    let count = bits.len() as f64;
    let mean = bits.iter().sum::<f64>() / count;
    let variance = bits.iter().map(|bits| (bits - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, (bits.len() > 1).then(|| (variance / count).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_the_deviation_over_the_root_of_the_number() {
        // The unbiased variance of 1, 3, 5 and 7 is 20/3.
        let (mean, error) = mean_and_error(&[1.0, 3.0, 5.0, 7.0]);
        assert_eq!(mean, 4.0);
        assert!((error.unwrap() - (5.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert_eq!(mean_and_error(&[2.5]), (2.5, None));
    }
}
