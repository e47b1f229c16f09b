//! The classifier of the example `mnist-fd`: its convolutions, compared with candle's, and its
//! figures.
#![allow(dead_code, reason = "a part of the example is tested")]

#[path = "../examples/mnist-fd/classifier.rs"]
mod classifier;
#[path = "../examples/mnist-fd/report.rs"]
mod report;

use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module};
use classifier::{Classifier, PATCH, SIZE, convolve, lay_out};
use ddpm::cli::Result;
use ddpm::data::normalized;
use ddpm::data::{Dataset, Images};
use report::{Reference, tally};

fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * (1.0 + expected.abs()), "{found}, not {expected}");
}

/// Points of uniform numbers, with a wider range for each further point.
fn points(count: usize, size: usize, seed: u32) -> Vec<f32> {
    let uniform = |i: u32| {
        let x = (i + seed).wrapping_mul(2_654_435_761);
        let x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        f64::from(x ^ (x >> 16)) / 2f64.powi(32)
    };
    (0..count * size).map(|i| (uniform(i as u32) * (1 + i % size) as f64) as f32).collect()
}

/// Values from -1 to 1 without a pattern.
fn tensor(shape: &[usize], seed: u32) -> candle_core::Result<Tensor> {
    let values = points(shape.iter().product(), 1, seed);
    Tensor::from_vec(values, shape, &Device::Cpu)?.affine(2.0, -1.0)
}

fn assert_same(found: &Tensor, expected: &Tensor) -> candle_core::Result<()> {
    assert_eq!(found.dims(), expected.dims());
    let apart = (found - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(apart < 1e-5, "{apart}");
    Ok(())
}

/// Includes maps of 7 pixels, whose last patches are half outside.
#[test]
fn a_convolution_of_patches_is_candles() -> candle_core::Result<()> {
    let (batch, channels, outputs) = (2, 3, 5);
    for (h, w) in [(14, 14), (7, 7), (8, 5)] {
        let maps = tensor(&[batch, h, w, channels], 1)?;
        let (weights, bias) = (tensor(&[outputs, PATCH * channels], 2)?, tensor(&[outputs], 3)?);
        let found = convolve(&maps, &Linear::new(weights.clone(), Some(bias.clone())))?;

        // A patch is its blocks' rows and columns, then those within a block, then channels.
        let kernel = weights
            .reshape(&[outputs, 2, 2, 2, 2, channels][..])?
            .permute([0, 5, 1, 3, 2, 4])?
            .reshape((outputs, channels, 4, 4))?;
        let around = |size: usize| 2 * size.div_ceil(2) + 1 - size;
        let maps = maps.permute((0, 3, 1, 2))?;
        let maps = maps.pad_with_zeros(2, 1, around(h))?.pad_with_zeros(3, 1, around(w))?;
        let maps = maps.contiguous()?.conv2d(&kernel.contiguous()?, 0, 2, 1, 1)?;
        let expected = maps.broadcast_add(&bias.reshape((1, outputs, 1, 1))?)?;
        assert_same(&found, &expected.permute((0, 2, 3, 1))?)?;
    }
    Ok(())
}

#[test]
fn patches_of_a_moved_image_are_those_of_candles_convolution() -> Result<()> {
    let bytes: Vec<u8> =
        points(2 * SIZE * SIZE, 1, 4).iter().map(|x| (x * 255.0).round() as u8).collect();
    let images = Images::new(bytes, (1, SIZE, SIZE))?;
    let mut pixels = [0; SIZE * SIZE];
    images.read(1, &mut pixels)?;
    let pixels = pixels.map(normalized);
    let weights = tensor(&[5, PATCH], 5)?;
    for (down, right) in [(0, 0), (2, -1), (-2, 2)] {
        let mut patches = vec![];
        lay_out(&images, 1, (down, right), &mut patches)?;
        let patches = Tensor::from_vec(patches, (SIZE / 2 * SIZE / 2, PATCH), &Device::Cpu)?;
        let found = Linear::new(weights.clone(), None).forward(&patches)?;

        // The image lies in the middle of a larger black one, from which the convolution takes its
        // part.
        let mut large = vec![-1.0f32; 40 * 40];
        for (y, row) in pixels.chunks_exact(SIZE).enumerate() {
            let start = (6 + down + y as isize) * 40 + 6 + right;
            large[start as usize..][..SIZE].copy_from_slice(row);
        }
        let large = Tensor::from_vec(large, (1, 1, 40, 40), &Device::Cpu)?;
        let part = large.narrow(2, 5, SIZE + 2)?.narrow(3, 5, SIZE + 2)?.contiguous()?;
        let expected = part.conv2d(&weights.reshape((5, 1, 4, 4))?, 0, 2, 1, 1)?;
        assert_same(&found.t()?, &expected.flatten_from(2)?.squeeze(0)?)?;
    }
    Ok(())
}

/// The labels are the classifier's answers, except for three.
#[test]
fn accuracy_is_the_fraction_of_correct_labels() -> Result<()> {
    let (count, temp) = (10, tempfile::tempdir()?);
    let bytes = points(count * SIZE * SIZE, 1, 6).iter().map(|x| (x * 255.0) as u8).collect();
    let images = Images::new(bytes, (1, SIZE, SIZE))?.with_labels((0..10).collect())?;
    let path = temp.path().join("classifier.safetensors");
    let classifier = Classifier::train(&images, 1, &path, &Device::Cpu, || false)?;
    let (_, probabilities) = classifier.look(&images, || false)?;
    let most = |p: &Vec<f32>| p.iter().copied().fold(0.0, f32::max);
    let said = |p: &Vec<f32>| p.iter().position(|&x| x == most(p)).ok_or("a class");
    let mut labels = vec![];
    for (i, p) in probabilities.iter().enumerate() {
        labels.push(((said(p)? + usize::from(i % 4 == 1)) % 10) as u8);
    }
    let images = images.with_labels(labels)?;
    assert_near(Reference::new(classifier, &images, || false)?.accuracy, 0.7);
    Ok(())
}

#[test]
fn an_image_is_clearly_of_a_class_from_over_nine_tenths() {
    let of = |class: usize, most: f32| {
        let mut probabilities = vec![(1.0 - most) / 9.0; 10];
        probabilities[class] = most;
        probabilities
    };
    let (confident, classes) = tally(&[of(3, 0.95), of(3, 0.9), of(0, 0.5), of(9, 0.9001)]);
    assert_eq!(confident, 0.5);
    assert_eq!(classes, [1, 0, 0, 2, 0, 0, 0, 0, 0, 1]);
}
