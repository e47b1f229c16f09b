//! The classifier of digits, compared with candle's convolutions, and the figures of the example `mnist-fd`.
#![allow(dead_code, reason = "a part of the example is tested")]

#[path = "../examples/mnist-fd/classifier.rs"]
mod classifier;
#[path = "small/numbers.rs"]
mod numbers;
#[path = "../examples/mnist-fd/report.rs"]
mod report;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};
use ddpm::Denoiser;
use ddpm::cli::Result;
use ddpm::data::{Images, normalized};
use ddpm::eval::{CifarClassifier, Classes, DigitClassifier, Extractor, Features};
use ddpm::nn::Parameters;
use numbers::{assert_near, points};
use report::{Reference, tally};

const SIZE: usize = DigitClassifier::SHAPE.1;

fn assert_same(found: &Tensor, expected: &Tensor) -> candle_core::Result<()> {
    assert_eq!(found.dims(), expected.dims());
    let apart = (found - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(apart < 1e-5, "{apart}");
    Ok(())
}

/// The network, composed of candle's convolutions. The image lies in a larger black one, from which the first
/// convolution takes its part. Maps of 7 pixels have patches that are half outside.
#[test]
fn the_features_of_a_moved_image_are_those_of_candles_convolutions() -> Result<()> {
    let bytes: Vec<u8> =
        points(3 * SIZE * SIZE, 1, 4).iter().map(|x| (x * 255.0).round() as u8).collect();
    let images = Images::new(bytes, DigitClassifier::SHAPE)?;
    let parameters = Parameters::new(5, DType::F32, &Device::Cpu);
    let classifier = DigitClassifier::new(parameters.builder())?;
    let vars = parameters.vars();
    let weight = |layer: &str, part: &str| vars[&format!("{layer}.{part}")].as_detached_tensor();
    let moves = [(0, 0), (2, -1), (-2, 2)];
    let found = classifier.features_of_moved(&images, &moves)?.detach();

    let mut large = vec![-1.0f32; 3 * 40 * 40];
    for (image, (down, right)) in moves.into_iter().enumerate() {
        let pixels = images.get(image).ok_or("an image")?;
        for (y, row) in pixels.chunks_exact(SIZE).enumerate() {
            let start = image as isize * 1600 + (6 + down + y as isize) * 40 + 6 + right;
            let row = row.iter().copied().map(normalized).collect::<Vec<_>>();
            large[start as usize..][..SIZE].copy_from_slice(&row);
        }
    }
    let mut maps = Tensor::from_vec(large, (3, 1, 40, 40), &Device::Cpu)?
        .narrow(2, 5, SIZE + 2)?
        .narrow(3, 5, SIZE + 2)?
        .contiguous()?;
    for (layer, channels, outputs) in [("conv1", 1, 16), ("conv2", 16, 64), ("conv3", 64, 64)] {
        // A patch is its blocks' rows and columns, then those within a block, then channels. The patches of the first
        // layer are rows of pixels.
        let kernel = weight(layer, "weight");
        let kernel = match layer {
            "conv1" => kernel.reshape((outputs, channels, 4, 4))?,
            _ => kernel
                .reshape(&[outputs, 2, 2, 2, 2, channels][..])?
                .permute([0, 5, 1, 3, 2, 4])?
                .reshape((outputs, channels, 4, 4))?,
        };
        if layer != "conv1" {
            let size = maps.dim(2)?;
            let after = 2 * size.div_ceil(2) + 1 - size;
            maps = maps.pad_with_zeros(2, 1, after)?.pad_with_zeros(3, 1, after)?;
        }
        maps = maps.contiguous()?.conv2d(&kernel.contiguous()?, 0, 2, 1, 1)?;
        maps = maps.broadcast_add(&weight(layer, "bias").reshape((1, outputs, 1, 1))?)?.relu()?;
    }
    let linear = |layer: &str| Linear::new(weight(layer, "weight"), Some(weight(layer, "bias")));
    let maps = maps.permute((0, 2, 3, 1))?.flatten_from(1)?;
    let features = linear("hidden").forward(&maps)?.relu()?;
    assert_same(&found, &features)?;
    assert_same(&classifier.logits(&found)?.detach(), &linear("output").forward(&features)?)?;

    // The first image is not moved.
    let mut first = images.clone();
    first.truncate(1);
    let extracted = classifier.extract(&first)?;
    assert_same(&Tensor::new(extracted.values(), &Device::Cpu)?, &features.get(0)?)?;
    assert_eq!(extracted.classes(), Some(Classes::Logits(10)));
    Ok(())
}

#[test]
fn a_classifier_takes_grey_digits_only_and_names_its_weights() -> Result<()> {
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("classifier.safetensors");
    let images = Images::new(vec![7; SIZE * SIZE], DigitClassifier::SHAPE)?.with_labels(vec![3])?;
    classifier::train(&images, 1, &path, &Device::Cpu, || false)?;
    let classifier = DigitClassifier::load(&path, &Device::Cpu)?;
    let coloured = Images::new(vec![7; 3 * 32 * 32], (3, 32, 32))?;
    let message = classifier.extract(&coloured).unwrap_err().to_string();
    let expected = "shape of the images is (3, 32, 32); it must be (1, 28, 28): the classifier is for grey digits";
    assert_eq!(message, expected);
    assert!(classifier.features_of_moved(&images, &[]).is_err());
    assert_eq!(classifier.extract(&Images::new(vec![], DigitClassifier::SHAPE)?)?.count(), 0);

    // The hash of another program.
    let sums = std::process::Command::new("sha256sum").arg(&path).output();
    let identity = classifier.identity();
    if let Ok(sums) = sums {
        let sum = String::from_utf8(sums.stdout)?;
        assert_eq!(sum.split_whitespace().next(), identity.weights_sha256.as_deref());
    }
    assert_eq!(identity.weights_sha256.map(|sum| sum.len()), Some(64));

    std::fs::write(&path, "{")?;
    assert!(DigitClassifier::load(&path, &Device::Cpu).is_err());
    Ok(())
}

/// The labels are the classifier's answers, except for three.
#[test]
fn accuracy_is_the_fraction_of_correct_labels() -> Result<()> {
    let (count, temp) = (10, tempfile::tempdir()?);
    let bytes = points(count * SIZE * SIZE, 1, 6).iter().map(|x| (x * 255.0) as u8).collect();
    let images = Images::new(bytes, (1, SIZE, SIZE))?.with_labels((0..10).collect())?;
    let path = temp.path().join("classifier.safetensors");
    classifier::train(&images, 1, &path, &Device::Cpu, || false)?;
    let classifier = DigitClassifier::load(&path, &Device::Cpu)?;
    let (_, probabilities) = classifier::look(&classifier, &images, || false)?;
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

#[test]
fn features_of_pictures_do_not_depend_on_the_batch() -> Result<()> {
    let parameters = Parameters::new(5, DType::F32, &Device::Cpu);
    CifarClassifier::new(parameters.builder())?;
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("classifier.safetensors");
    let vars = parameters.vars();
    let weights = vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor().clone()));
    std::fs::write(&path, safetensors::serialize(weights, None)?)?;
    let classifier = CifarClassifier::load(&path, &Device::Cpu)?;
    assert!(classifier.identity().weights_sha256.is_some());

    let bytes = points(3 * 3072, 1, 8).iter().map(|x| (x * 255.0).round() as u8).collect();
    let images = Images::new(bytes, CifarClassifier::SHAPE)?;
    let all = classifier.extract(&images)?;
    assert_eq!((all.count(), all.size()), (3, 256));
    assert_eq!(all.classes(), Some(Classes::Logits(10)));
    let alone = Features::extracted(&classifier, &images, 1)?;
    assert_eq!((alone.values(), alone.scores()), (all.values(), all.scores()));
    assert_ne!(all.values()[..256], all.values()[256..512]);

    // A picture and its mirror image have the same features, which are means over both.
    let row = CifarClassifier::SHAPE.2;
    let mirrored = (0..3).filter_map(|k| images.get(k)).flat_map(|image| {
        image.chunks(row).flat_map(|row| row.iter().rev().copied()).collect::<Vec<u8>>()
    });
    let mirrored = Images::new(mirrored.collect(), CifarClassifier::SHAPE)?;
    let of_mirrored = classifier.extract(&mirrored)?;
    assert_eq!((of_mirrored.values(), of_mirrored.scores()), (all.values(), all.scores()));
    let t = Tensor::zeros(3, DType::U32, &Device::Cpu)?;
    let [plain, other] = [&images, &mirrored].map(|images| -> Result<Vec<f32>> {
        let pixels = (0..3).filter_map(|k| images.get(k)).flatten().map(|&byte| normalized(byte));
        let x = Tensor::from_iter(pixels, &Device::Cpu)?.reshape((3, 3, row, row))?;
        Ok(classifier.model().forward(&x, &t)?.narrow(1, 10, 256)?.flatten_all()?.to_vec1()?)
    });
    for ((found, a), b) in all.values().iter().zip(plain?).zip(other?) {
        assert_eq!(*found, (a + b) * 0.5);
    }

    let grey = Images::new(vec![7; SIZE * SIZE], DigitClassifier::SHAPE)?;
    let message = classifier.extract(&grey).unwrap_err().to_string();
    assert_eq!(message, "x_t has shape [1, 1, 28, 28]; it must be (batch, 3, 32, 32)");
    let message = DigitClassifier::load(&path, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("not a classifier of digits"), "{message}");
    Ok(())
}
