//! The library without a command line: trains on generated images of discs, and resumes an interrupted run.
//! `cargo run --release --example discs` takes a few minutes on 2 cores and writes to `out/discs`.

use ddpm::candle_core::Device;
use ddpm::data::Images;
use ddpm::observe::{LossCurve, MetricsFile, Progress, SampleGrid, SaveEvery, StopOnSignal};
use ddpm::{Checkpoint, Diffusion, Error, Result, TrainConfig, Trainer, UNetConfig};

/// Creates grey images of 16 x 16 pixels: a white disc of each radius at each position.
fn discs() -> Result<Images> {
    let mut pixels = Vec::new();
    for (radius, place) in (2..6).flat_map(|radius| (0..64).map(move |place| (radius, place))) {
        let (top, left) = (4 + place / 8, 4 + place % 8);
        for i in 0..16 * 16 {
            let (y, x) = (i / 16 - top, i % 16 - left);
            pixels.push(if y * y + x * x <= radius * radius { 255 } else { 0 });
        }
    }
    Images::new(pixels, (1, 16, 16))
}

fn main() -> Result<()> {
    let (images, device) = (discs()?, Device::Cpu);
    let steps = std::env::args().nth(1).and_then(|steps| steps.parse().ok()).unwrap_or(2_000);
    let config = TrainConfig { steps, batch_size: 16, ..TrainConfig::mnist() };
    let network =
        UNetConfig { image_size: 16.into(), hidden_dims: vec![16, 32], ..UNetConfig::mnist() };
    let mut trainer = match Checkpoint::open("out/discs/checkpoint") {
        Ok(saved) => {
            Trainer::resume(saved.dir(), network, config, saved.diffusion().clone(), &device)?
        }
        Err(Error::NoCheckpoint { .. }) => {
            Trainer::new(network, config, Diffusion::ddpm(), &device)?
        }
        Err(error) => return Err(error),
    };
    trainer.claim("out/discs/checkpoint")?;

    let progress = Progress::new();
    let say = progress.clone();
    let stop = StopOnSignal::install(move || say.say("stopping after this step"))?;
    let observers = (
        progress,
        stop,
        MetricsFile::new("out/discs/metrics.jsonl"),
        SaveEvery::steps(500, "out/discs/checkpoint"),
        LossCurve::steps(500, "out/discs/metrics.jsonl", "out/discs/loss.png"),
        SampleGrid::steps(500, "out/discs/samples").count(16),
    );
    trainer.fit(&images, observers)?;
    println!("step {} of {steps}: see out/discs", trainer.steps());
    Ok(())
}
