//! Networks with classes: the condition, its dropout in training, and guidance.

use candle_core::{DType, Device, Tensor};
use ddpm::data::Images;
use ddpm::nn::{
    Condition, Denoiser, DownBlockType, Model, Output, Parameters, UNet2DConfig, UpBlockType,
};
use ddpm::process::Prediction;
use ddpm::sample::{Autoguidance, Guidance, SamplerConfig};
use ddpm::{
    Checkpoint, Diffusion, NoiseSchedule, Result, Sampler, Solver, TrainConfig, Trainer, UNet,
    UNetConfig,
};

const DEVICE: Device = Device::Cpu;

fn config() -> UNetConfig {
    UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![16, 16],
        time_dim: 16,
        classes: Some(3),
        ..UNetConfig::mnist()
    }
}

/// Twelve images of three classes, whose class is visible.
fn images() -> Images {
    let pixels =
        (0..12 * 64).map(|i| (i / 64 % 3 * 100 + i % 64 * (i / 64 + 1) % 50) as u8).collect();
    Images::new(pixels, (1, 8, 8)).unwrap().with_labels((0..12).map(|i| i % 3).collect()).unwrap()
}

fn train_config(steps: u64) -> TrainConfig {
    TrainConfig { steps, batch_size: 4, class_dropout: 0.5, ..TrainConfig::mnist() }
}

fn trainer(steps: u64) -> Result<Trainer<UNetConfig>> {
    Trainer::new(config(), train_config(steps), Diffusion::ddpm(), &DEVICE)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn network() -> Result<Model<UNet>> {
    Parameters::new(1, DType::F32, &DEVICE).build(&config())
}

fn predict(network: &impl Denoiser, classes: &[u32]) -> Result<Vec<f32>> {
    let x_t = Sampler::prior((classes.len(), 1, 8, 8), 0, &DEVICE)?;
    let t = Tensor::full(500u32, classes.len(), &DEVICE)?;
    let condition = Condition::classes(classes.to_vec())?;
    Ok(values(&network.denoise(&x_t, &t, &condition)?.prediction))
}

#[test]
fn a_class_changes_only_its_own_image() -> Result<()> {
    let network = network()?;
    let (a, b) = (predict(&network, &[0, 1, 2])?, predict(&network, &[0, 2, 2])?);
    assert_eq!((&a[..64], &a[128..]), (&b[..64], &b[128..]));
    assert_ne!(a[64..128], b[64..128]);
    Ok(())
}

#[test]
fn the_number_of_classes_stands_for_no_class() -> Result<()> {
    let network = network()?;
    assert_eq!(network.classes(), Some(3));
    let x_t = Sampler::prior((2, 1, 8, 8), 0, &DEVICE)?;
    let without = network.forward(&x_t, &Tensor::full(500u32, 2, &DEVICE)?)?;
    assert_eq!(predict(&network, &[3, 3])?, values(&without));
    Ok(())
}

#[test]
fn classes_that_a_network_does_not_have_are_errors() -> Result<()> {
    let message = predict(&network()?, &[0, 4]).unwrap_err().to_string();
    assert_eq!(message, "class is 4; it must be from 0 to 2, or 3 for no class");
    let plain = UNetConfig { classes: None, ..config() };
    let plain: Model<UNet> = Parameters::new(1, DType::F32, &DEVICE).build(&plain)?;
    let message = predict(&plain, &[0]).unwrap_err().to_string();
    let expected =
        "condition is classes; it must be no condition, because the network has no classes";
    assert_eq!((message.as_str(), plain.classes()), (expected, None));

    let message =
        trainer(1)?.fit(&Images::new(vec![0; 128], (1, 8, 8))?, ()).unwrap_err().to_string();
    assert_eq!(
        message,
        "classes of the data set is 0; it must be 3, the number of classes of the network"
    );
    let config = TrainConfig { class_dropout: 1.5, ..train_config(1) };
    let message = config.validate().unwrap_err().to_string();
    assert_eq!(message, "class_dropout is 1.5; it must be from 0 to 1");
    let message =
        UNetConfig { classes: Some(0), ..self::config() }.validate().unwrap_err().to_string();
    assert_eq!(message, "classes is 0; it must be from 1 to 65536");
    Ok(())
}

/// A network of Ho et al.'s kind with three vectors of classes.
fn config_2d(null_class: bool) -> UNet2DConfig {
    UNet2DConfig {
        sample_size: 8.into(),
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![DownBlockType::Plain],
        up_block_types: vec![UpBlockType::Plain],
        block_out_channels: vec![8],
        layers_per_block: 1,
        norm_num_groups: 2,
        add_attention: false,
        num_class_embeds: Some(3),
        null_class,
        ..UNet2DConfig::cifar10()
    }
}

/// As in diffusers, where `class_labels` must be given.
#[test]
fn without_a_null_class_every_vector_is_that_of_a_class() -> Result<()> {
    let network = Parameters::new(1, DType::F32, &DEVICE).build(&config_2d(false))?;
    assert_eq!((network.classes(), network.no_class()), (Some(3), None));
    let all = predict(&network, &[0, 1, 2])?;
    let alone = |class: u32| Ok::<_, ddpm::Error>(predict(&network, &[class; 3])?[128..].to_vec());
    assert_eq!(all[128..], alone(2)?);
    assert_ne!(alone(2)?, alone(1)?);
    let message = predict(&network, &[0, 3]).unwrap_err().to_string();
    assert_eq!(message, "class is 3; it must be from 0 to 2");

    let x_t = Sampler::prior((2, 1, 8, 8), 0, &DEVICE)?;
    let t = Tensor::full(500u32, 2, &DEVICE)?;
    let lack = "because the network has no vector for images without a class";
    let message = network.forward(&x_t, &t).unwrap_err().to_string();
    assert_eq!(message, format!("condition is none; it must be a class per image, {lack}"));
    let condition = Condition::classes(vec![0, 1])?;
    let message = network.denoise_with_baseline(&x_t, &t, &condition).unwrap_err().to_string();
    assert_eq!(message, format!("guidance is used; it must be unused, {lack}"));

    let with_null = Parameters::new(1, DType::F32, &DEVICE).build(&config_2d(true))?;
    assert_eq!((with_null.classes(), with_null.no_class()), (Some(2), Some(2)));
    assert_eq!(values(&with_null.forward(&x_t, &t)?), predict(&with_null, &[2, 2])?);
    // The weights are the same, and so are the vectors.
    assert_eq!(predict(&with_null, &[2, 2, 2])?, predict(&network, &[2, 2, 2])?);
    with_null.denoise_with_baseline(&x_t, &t, &condition)?;
    Ok(())
}

#[test]
fn training_hides_classes_only_from_networks_with_a_null_class() -> Result<()> {
    let trained = |null_class, class_dropout| {
        let config = TrainConfig { class_dropout, ..train_config(2) };
        let network = config_2d(null_class);
        let classes = if null_class { 2 } else { 3 };
        let labels = (0..12).map(|i| i % classes).collect();
        let images = Images::new(images().pixels().to_vec(), (1, 8, 8))?.with_labels(labels)?;
        let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &DEVICE)?;
        trainer.fit(&images, ())?;
        let guided = SamplerConfig::new(Solver::ddim(), 5).guidance(Some(Guidance::new(2.0)));
        let guided = trainer.set_sampling(guided).map_err(|error| error.to_string());
        Ok::<_, ddpm::Error>((values(&trainer.vars()["class_embedding.weight"]), guided))
    };
    let (seen, message) = trained(false, 0.0)?;
    assert_eq!(seen, trained(false, 1.0)?.0);
    let lack = "because the network has no vector for images without a class";
    assert_eq!(message, Err(format!("sampling.guidance is set; it must be none, {lack}")));
    let (seen, guided) = trained(true, 0.0)?;
    assert_ne!(seen, trained(true, 1.0)?.0);
    assert_eq!(guided, Ok(()));
    Ok(())
}

#[test]
fn a_conditional_run_that_stops_at_any_step_goes_on_bit_for_bit() -> Result<()> {
    let (temp, images) = (tempfile::tempdir().unwrap(), images());
    let mut whole = trainer(10)?;
    whole.fit(&images, ())?;
    for stop in 1..10 {
        let dir = temp.path().join(stop.to_string());
        let mut first = trainer(stop)?;
        first.fit(&images, ())?;
        first.save(&dir)?;
        let (config, train) = (config(), train_config(10));
        let mut rest = Trainer::resume(&dir, config, train, Diffusion::ddpm(), &DEVICE)?;
        rest.fit(&images, ())?;
        for (name, var) in whole.vars() {
            assert_eq!(values(var), values(&rest.vars()[name]), "{name}, stopped at {stop}");
        }
    }
    let checkpoint = Checkpoint::open(temp.path().join("9"))?;
    assert_eq!(checkpoint.ema::<UNetConfig>(&DEVICE)?.classes(), Some(3));
    Ok(())
}

/// Adam moves each weight with a gradient, and no other.
#[test]
fn a_hidden_class_is_not_learned_and_no_class_is() -> Result<()> {
    let moved = |class_dropout| -> Result<Vec<bool>> {
        let config = TrainConfig { class_dropout, batch_size: 12, ..train_config(1) };
        let mut trainer = Trainer::new(self::config(), config, Diffusion::ddpm(), &DEVICE)?;
        let table =
            |trainer: &Trainer<UNetConfig>| values(&trainer.vars()["class_embedding.weight"]);
        let before = table(&trainer);
        trainer.fit(&images(), ())?;
        let after = table(&trainer);
        Ok(before.chunks(16).zip(after.chunks(16)).map(|(a, b)| a != b).collect())
    };
    assert_eq!(moved(0.0)?, [true, true, true, false]);
    assert_eq!(moved(1.0)?, [false, false, false, true]);
    assert_eq!(moved(0.5)?, [true; 4]);
    Ok(())
}

/// Predicts an image as even as its class: -0.4, 0.1, 0.6, and 0.2 without a class. An even image has no contrast, so
/// one pixel is 0.
struct Even;

impl Denoiser for Even {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, condition: &Condition) -> Result<Output> {
        let batch = x_t.dim(0)?;
        let classes = match condition {
            Condition::Classes(classes) => classes.to_vec1::<u32>()?,
            _ => vec![3; batch],
        };
        let grey = classes.iter().flat_map(|&class| {
            let value = if class == 3 { 0.2 } else { 0.5 * class as f32 - 0.4 };
            (0..x_t.elem_count() / batch).map(move |i| if i == 0 { 0.0 } else { value })
        });
        Ok(Output::new(Tensor::from_vec(grey.collect::<Vec<_>>(), x_t.dims(), &DEVICE)?))
    }

    fn classes(&self) -> Option<u32> {
        Some(3)
    }
}

/// Samples one image of class 2, whose prediction is 0.6, with the baseline 0.2. Returns its second pixel.
fn guided(denoiser: &impl Denoiser, guidance: Option<Guidance>) -> Result<f32> {
    let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Sample);
    let sampler = Sampler::new(&diffusion, Solver::ddim(), 10)?;
    let sampler = sampler.condition(Condition::classes(vec![2])?).guidance(guidance)?;
    Ok(values(&sampler.sample(denoiser, (1, 1, 2, 2), 0, &DEVICE)?)[1])
}

#[test]
fn guidance_moves_predictions_away_from_the_baseline() -> Result<()> {
    for (guidance, expected) in [
        (None, 0.6),
        (Some(Guidance::new(1.0)), 0.6),
        (Some(Guidance::new(0.0)), 0.2),
        (Some(Guidance::new(1.75)), 0.9),
        // The last step, at timestep 0, determines the image.
        (Some(Guidance::new(1.75).interval(0, 0)), 0.9),
        (Some(Guidance::new(1.75).interval(1, 999)), 0.6),
        // The predictions are multiples of each other, so rescaling gives that of the network.
        (Some(Guidance::new(1.75).rescale(1.0)), 0.6),
        (Some(Guidance::new(1.75).rescale(0.25)), 0.75 * 0.9 + 0.25 * 0.6),
    ] {
        let found = guided(&Even, guidance)?;
        assert!((found - expected).abs() < 1e-5, "{guidance:?}: {found}, not {expected}");
    }
    Ok(())
}

#[test]
fn autoguidance_moves_predictions_away_from_those_of_another_network() -> Result<()> {
    let weak = ddpm::nn::from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t.zeros_like()? + 0.3)?));
    let found = guided(&Autoguidance::new(Even, weak), Some(Guidance::new(1.5)))?;
    assert!((found - (0.3 + 1.5 * 0.3)).abs() < 1e-5, "{found}");
    Ok(())
}

#[test]
fn guidance_without_classes_is_an_error() -> Result<()> {
    let guidance = Guidance::new(2.0);
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 2)?.guidance(guidance)?;
    let sample = |sampler: &Sampler, denoiser: &dyn Denoiser| {
        sampler.sample(denoiser, (1, 1, 8, 8), 0, &DEVICE).unwrap_err().to_string()
    };
    let expected = "condition is none; it must be a class per image, as guidance needs";
    assert_eq!(sample(&sampler, &network()?), expected);
    let plain: Model<UNet> =
        Parameters::new(1, DType::F32, &DEVICE).build(&UNetConfig { classes: None, ..config() })?;
    let expected = "guidance is used; it must be unused, because the network has no classes";
    assert_eq!(sample(&sampler, &plain), expected);
    for (guidance, expected) in [
        (Guidance::new(-1.0), "guidance.scale is -1; it must be finite, at least 0"),
        (guidance.rescale(2.0), "guidance.rescale is 2; it must be from 0 to 1"),
        (
            guidance.interval(9, 3),
            "guidance.interval is 9; it must be at most the last timestep, which is 3",
        ),
    ] {
        let message = sampler.clone().guidance(guidance).unwrap_err().to_string();
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn an_even_image_is_not_rescaled() -> Result<()> {
    let even = ddpm::nn::from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t.zeros_like()? + 0.5)?));
    let weak = ddpm::nn::from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t.zeros_like()? + 0.3)?));
    let guidance = Guidance::new(1.5).rescale(0.7);
    let found = guided(&Autoguidance::new(even, weak), Some(guidance))?;
    assert!((found - 0.6).abs() < 1e-5, "{found}");
    Ok(())
}

#[test]
fn labels_and_guidance_that_do_not_fit_are_refused_before_they_matter() -> Result<()> {
    let mut trainer = trainer(2)?;
    let mut batch = ddpm::data::Batch::from(Sampler::prior((2, 1, 8, 8), 0, &DEVICE)?);
    batch.classes = Some(Tensor::new(&[0u32, 1, 2], &DEVICE)?);
    let (t, eps) = (Tensor::new(&[1u32, 2], &DEVICE)?, batch.images.clone());
    let message = trainer.step_with(&batch, &t, &eps).unwrap_err().to_string();
    assert_eq!(message, "the list of classes has shape [3]; it must be [2], one per image");

    let config = UNetConfig { classes: None, ..config() };
    let mut plain = Trainer::new(config, train_config(1), Diffusion::ddpm(), &DEVICE)?;
    let sampling = ddpm::sample::SamplerConfig::new(Solver::ddim(), 2);
    let guided = sampling.guidance(Some(Guidance::new(2.0)));
    let message = plain.set_sampling(guided).unwrap_err().to_string();
    let expected = "sampling.guidance is set; it must be none, because the network has no classes";
    assert_eq!(message, expected);
    trainer.set_sampling(guided)
}

#[test]
fn a_guided_image_does_not_depend_on_the_others() -> Result<()> {
    let (network, guidance) = (network()?, Guidance::new(3.0).rescale(0.7));
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 3)?.guidance(guidance)?;
    let of = |classes: &[u32]| Ok(sampler.clone().condition(Condition::classes(classes.to_vec())?));
    let all = |sampler: Result<Sampler>, count| -> Result<Vec<f32>> {
        Ok(values(&sampler?.sample(&network, (count, 1, 8, 8), 4, &DEVICE)?))
    };
    let (three, last) = (all(of(&[0, 1, 2]), 3)?, all(of(&[2]).map(|s| s.first_image(2)), 1)?);
    assert_eq!(three[128..], last);
    Ok(())
}

#[test]
fn images_need_not_be_square() -> Result<()> {
    let size = ddpm::nn::ImageSize { height: 4, width: 12 };
    let config = UNetConfig { image_size: size, classes: None, ..config() };
    let json = serde_json::to_string(&config).unwrap();
    assert!(json.contains(r#""image_size":{"height":4,"width":12}"#), "{json}");
    assert_eq!(serde_json::from_str::<UNetConfig>(&json).unwrap(), config);
    let json = serde_json::to_string(&self::config()).unwrap();
    assert!(json.contains(r#""image_size":8,"#), "{json}");

    let images = Images::new((0..6 * 48).map(|i| (i * 7 % 256) as u8).collect(), (1, 4, 12))?;
    let train = TrainConfig { steps: 2, ..train_config(2) };
    let mut trainer = Trainer::new(config, train, Diffusion::ddpm(), &DEVICE)?;
    trainer.fit(&images, ())?;
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 2)?;
    let drawn = sampler.sample(&trainer.ema_model()?, (1, 1, 4, 12), 0, &DEVICE)?;
    assert!(values(&drawn).iter().all(|value| value.is_finite()));
    let x_t = Tensor::zeros((1, 1, 8, 8), DType::F32, &DEVICE)?;
    let message = trainer.model().forward(&x_t, &Tensor::new(&[0u32], &DEVICE)?).unwrap_err();
    let expected = "x_t has shape [1, 1, 8, 8]; it must be (batch, 1, 4, 12)";
    assert_eq!(message.to_string(), expected);
    let wrong =
        UNetConfig { image_size: ddpm::nn::ImageSize { height: 4, width: 7 }, ..self::config() };
    let message = wrong.validate().unwrap_err().to_string();
    assert_eq!(
        message,
        "image_size is 7; it must be a multiple of 2, because hidden_dims halves it 1 times"
    );
    Ok(())
}
