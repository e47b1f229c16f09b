use std::path::Path;

use candle_core::Device;

use super::checkpoint::store::Saved;
use super::config::TrainConfig;
use super::run::View;
use super::trainer::Trainer;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::model::Architecture;
use crate::process::diffusion::Diffusion;
use crate::sample::SamplerConfig;

impl<N: Architecture> View for Trainer<N> {
    fn step(&self) -> u64 {
        self.steps()
    }

    fn images_seen(&self) -> u64 {
        self.images_seen()
    }

    fn config(&self) -> &TrainConfig {
        self.config()
    }

    fn diffusion(&self) -> &Diffusion {
        self.diffusion()
    }

    fn device(&self) -> &Device {
        self.device()
    }

    fn sampling(&self) -> Option<&SamplerConfig> {
        self.state.progress.sampling.as_ref()
    }

    fn model(&self) -> &dyn Denoiser {
        self.model()
    }

    fn averaged_model(&self) -> Result<Box<dyn Denoiser + '_>> {
        Ok(Box::new(self.ema_model()?))
    }

    fn save(&self, dir: &Path) -> Result<Saved> {
        Trainer::save(self, dir)
    }

    fn check_save(&self, dir: &Path) -> Result<()> {
        self.rehearse(dir).map(drop)
    }
}
