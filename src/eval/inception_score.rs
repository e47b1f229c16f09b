use rayon::prelude::*;

use super::estimate::Estimate;
use super::features::{Classes, Features};
use crate::error::{Error, Result};

/// Computes the Inception Score (Salimans et al. 2016): `exp(E[KL(p(y | x) || p(y))])` for the class probabilities
/// `p(y | x)` of the images. It is at least 1 and at most the number of classes.
///
/// The images are divided in their order into `splits` parts of equal size, up to one image. The score is the mean over
/// the parts. Papers use 50,000 images and 10 splits, and the 1,008 logits of the TensorFlow port of Inception.
/// torch-fidelity shuffles the images first. Images that are ordered by class need a random order here, too:
/// [`Features::select`] applies one.
///
/// All arithmetic is in f64. The probabilities are the softmax of the logits, or the given ones divided by their sum.
///
/// # Errors
/// Returns an error if the images have no scores, or if there are no splits or more than images.
pub fn inception_score(features: &Features, splits: usize) -> Result<Estimate> {
    let count = features.count();
    if splits == 0 || splits > count {
        let expected = format!("at least 1 and at most the number of images, {count}");
        return Err(Error::config("splits", splits, expected));
    }
    let (classes, scores) = features.scored()?;
    let rows: Vec<&[f32]> = scores.collect();
    // A product of the two counts can exceed `usize`.
    let start = |split: usize| (split as u128 * count as u128 / splits as u128) as usize;
    let score = |split: usize| score(classes, &rows[start(split)..start(split + 1)]);
    Ok(Estimate::of(&(0..splits).into_par_iter().map(score).collect::<Vec<_>>()))
}

/// The score of one part.
fn score(classes: Classes, images: &[&[f32]]) -> f64 {
    let count = images.len() as f64;
    let mut marginal = vec![0.0; classes.count()];
    // KL(p || q) is the sum of p ln p, minus the sum of p ln q. The latter has the same mean as q ln q.
    let mut negative_entropy = 0.0;
    for scores in images {
        let (probabilities, logarithms) = probabilities(classes, scores);
        for ((sum, p), log) in marginal.iter_mut().zip(probabilities).zip(logarithms) {
            *sum += p / count;
            negative_entropy += if p > 0.0 { p * log / count } else { 0.0 };
        }
    }
    let of_marginal = |q: &f64| if *q > 0.0 { q * q.ln() } else { 0.0 };
    (negative_entropy - marginal.iter().map(of_marginal).sum::<f64>()).exp()
}

/// The probabilities of an image and their logarithms.
fn probabilities(classes: Classes, scores: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let scores = scores.iter().copied().map(f64::from);
    match classes {
        Classes::Logits(_) => {
            let top = scores.clone().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = top + scores.clone().map(|score| (score - top).exp()).sum::<f64>().ln();
            let logarithms: Vec<f64> = scores.map(|score| score - log_sum).collect();
            (logarithms.iter().map(|log| log.exp()).collect(), logarithms)
        }
        Classes::Probabilities(_) => {
            let sum: f64 = scores.clone().sum();
            let probabilities: Vec<f64> = scores.map(|score| score / sum).collect();
            let logarithms = probabilities.iter().map(|p| p.ln()).collect();
            (probabilities, logarithms)
        }
    }
}
