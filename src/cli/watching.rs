//! The observers that watch a run of a program.

use std::fs;
use std::path::Path;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::print::out;
use super::recipe::{Recipe, TrainArgs};
use super::result::Result;
use crate::data::Dataset;
use crate::error::Error;
use crate::eval::Extractor;
use crate::files;
use crate::observe::{Best, GradientNorms, HeldOutLoss, Judge, SaveBest, TensorBoard};
use crate::process::Diffusion;
use crate::sample::SamplerConfig;
use crate::train::Observer;

/// Loads the extractor by which samples are judged, if they are.
///
/// # Errors
/// Returns an error if only one of both options is given, and the errors of the file.
pub(super) fn extractor<N>(
    recipe: &Recipe<N>,
    args: &TrainArgs,
    device: &Device,
) -> Result<Option<Box<dyn Extractor>>> {
    match (recipe.judge, &recipe.extractor) {
        (0, _) if args.judges() => Err("--extractor and --judge-share need --judge N".into()),
        (0, _) => Ok(None),
        (_, None) => Err("--judge needs --extractor KIND:FILE".into()),
        (_, Some(extractor)) => extractor.open(device).map(Some),
    }
}

/// The observers that watch a run, except for those that every run has.
pub(super) struct Watching<'a> {
    held_out: Option<HeldOutLoss<'a>>,
    norms: GradientNorms,
    tensorboard: Option<TensorBoard>,
    judge: Option<Judge<'a>>,
    best: Option<SaveBest>,
}

impl<'a> Watching<'a> {
    /// Creates the observers of a recipe. `best` and `tensorboard` are their directories.
    pub fn new<N>(
        recipe: &Recipe<N>,
        (images, held_out): (&'a dyn Dataset, Option<&'a dyn Dataset>),
        extractor: Option<&'a dyn Extractor>,
        (best, tensorboard): (&Path, &Path),
    ) -> Self {
        let judge = extractor.map(|extractor| {
            Judge::new(extractor, images).count(recipe.judge).share(recipe.judge_share)
        });
        // The judge chooses the best checkpoint, because samples are what a user wants.
        let metric = match (&judge, held_out) {
            (Some(_), _) => Some(Judge::SLICED),
            (None, Some(_)) => Some(HeldOutLoss::NAME),
            (None, None) => None,
        };
        Self {
            held_out: held_out.map(|images| HeldOutLoss::steps(recipe.held_out_every, images)),
            norms: GradientNorms::steps(recipe.gradient_norms),
            tensorboard: recipe.tensorboard.then(|| TensorBoard::new(tensorboard)),
            judge,
            best: metric.map(|metric| SaveBest::lowest(metric, best)),
        }
    }

    /// The name of the number that the progress shows.
    pub fn shown(&self) -> &'static str {
        if self.judge.is_some() { Judge::SLICED } else { HeldOutLoss::NAME }
    }

    pub fn observers(&mut self) -> impl Observer {
        let Self { held_out, norms, tensorboard, judge, best } = self;
        (held_out.as_mut(), norms, tensorboard.as_mut(), judge.as_mut(), best.as_mut())
    }

    /// Prints the best checkpoint, if there is one.
    pub fn report(&self) {
        let best = self.best.as_ref().and_then(|best| Some((best.best()?, best.checkpoint())));
        let Some((Best { metric, value, step, .. }, dir)) = best else { return };
        let name = if metric == HeldOutLoss::NAME { "held-out loss" } else { metric };
        out(format_args!("best     {name} {value:.4}, at step {step}: {}", dir.display()));
    }
}

/// The way in which samples are judged: the content of `judge.json` in the directory of a run. Numbers of another way
/// cannot be compared.
#[derive(PartialEq, Serialize, Deserialize)]
pub(super) struct Way {
    samples: usize,
    sampling: SamplerConfig,
    extractor: String,
    weights_sha256: Option<String>,
}

impl Way {
    /// The way of a run whose grids have the sampler settings `sampling`.
    pub fn of<N>(
        recipe: &Recipe<N>,
        diffusion: &Diffusion,
        sampling: SamplerConfig,
        extractor: &dyn Extractor,
    ) -> Self {
        let identity = extractor.identity();
        Self {
            samples: recipe.judge,
            sampling: Judge::usual(diffusion, sampling),
            extractor: identity.name,
            weights_sha256: identity.weights_sha256,
        }
    }

    /// Writes the file, unless it has this way. If it has another one, calls `keep` first, to keep what was judged in
    /// that way.
    pub fn record(&self, path: &Path, keep: impl FnOnce() -> Result<()>) -> Result<()> {
        let text = files::existing(fs::read(path)).map_err(Error::io(path))?;
        match text.map(|text| serde_json::from_slice::<Self>(&text).ok()) {
            Some(Some(before)) if before == *self => return Ok(()),
            Some(_) => keep()?,
            None => {}
        }
        Ok(files::write(path, format!("{}\n", serde_json::to_string(self)?).as_bytes())?)
    }
}
