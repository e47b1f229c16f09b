use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{ArgGroup, Args, ValueEnum};

use super::arguments::{fraction, whole};
use super::print::out;
use super::program::check_output;
use super::result::Result;
use super::trained::{Trained, Weights};
use crate::model::{
    Architecture, AttentionHeads, ImageSize, LucidrainsConfig, LucidrainsFile, OpenAi, UNet2DConfig,
};
use crate::process::{Diffusion, NoiseSchedule, Prediction};
use crate::sample::{DiffusersFolder, SamplerConfig, Solver, Variance};
use crate::train::WeightsFile;

/// The schedules of OpenAI's networks.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScheduleName {
    Linear,
    Cosine,
}

/// The quantities that a network of denoising-diffusion-pytorch predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Objective {
    PredV,
    PredNoise,
    PredX0,
}

/// The solvers of a folder of diffusers.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum SolverName {
    Ddpm,
    Ddim,
}

/// The options of a program that converts weights.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("program").args(["heads", "head_channels", "objective"]).requires("image_size"))]
pub struct ConvertArgs {
    /// Input for a weights file: the folder of a pipeline of diffusers, or weights of improved-diffusion,
    /// guided-diffusion or denoising-diffusion-pytorch. Input for a folder of diffusers: a checkpoint or a weights file
    /// of this crate
    #[arg(long, value_name = "PATH")]
    from: PathBuf,
    /// Output: a weights file, such as cifar10.safetensors, or a folder of diffusers
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// For a checkpoint: the averaged weights (the default), or those of the last update
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// Solver in a written folder of diffusers; the default is that of the run. The other sampler settings are those of
    /// the run. For DDIM they become the closest settings that diffusers has
    #[arg(long, value_name = "NAME", value_enum)]
    solver: Option<SolverName>,
    /// For a file of OpenAI's programs or of denoising-diffusion-pytorch, which does not state it: height and width of
    /// the images, such as 64 or 64x96; needs --heads or --head-channels for OpenAI's programs, and --objective for
    /// denoising-diffusion-pytorch
    #[arg(long, value_name = "N|HxW", requires = "program", value_parser = image_size)]
    image_size: Option<ImageSize>,
    /// For a file of denoising-diffusion-pytorch, which does not state it: the quantity that the network predicts. With
    /// a wrong one, images are wrong without an error. In that package it is pred_v if it was not given in training,
    /// and pred_noise for LearnedGaussianDiffusion
    #[arg(long, value_name = "NAME", value_enum)]
    objective: Option<Objective>,
    /// For a file of denoising-diffusion-pytorch: sinusoidal_pos_emb_theta of its training
    #[arg(long, value_name = "THETA", default_value = "10000", requires = "objective")]
    sinusoidal_pos_emb_theta: f64,
    /// For a file of OpenAI's programs: number of timesteps of its training, diffusion_steps
    #[arg(long, value_name = "N", default_value = "1000", requires = "image_size", conflicts_with = "objective", value_parser = whole::<usize>(21..=1_000_000))]
    timesteps: usize,
    /// For a file of OpenAI's programs with other than 1000 timesteps: rescale_timesteps of its training, which is true
    /// by default in improved-diffusion, and false in guided-diffusion
    #[arg(long, value_name = "true|false", requires = "image_size", conflicts_with = "objective")]
    rescale_timesteps: Option<bool>,
    /// For a file of OpenAI's programs: schedule of the timesteps
    #[arg(
        long,
        value_name = "NAME",
        value_enum,
        default_value = "linear",
        requires = "image_size",
        conflicts_with = "objective"
    )]
    schedule: ScheduleName,
    /// For a file of OpenAI's programs: number of heads of attention, num_heads, which is 4 if it was not given in
    /// training
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=1024))]
    heads: Option<usize>,
    /// For a file of OpenAI's programs: number of channels of a head, num_head_channels
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=65_536))]
    head_channels: Option<usize>,
    /// For a file of OpenAI's programs: it was trained with use_new_attention_order
    #[arg(long, requires = "image_size", conflicts_with = "objective")]
    new_attention_order: bool,
    /// For a file of OpenAI's programs or of denoising-diffusion-pytorch: dropout, which matters only for further
    /// training
    #[arg(long, value_name = "P", default_value = "0", requires = "image_size", value_parser = fraction)]
    dropout: f64,
}

/// Parses the size of images: a number, or height and width.
fn image_size(text: &str) -> std::result::Result<ImageSize, String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    let size = whole(1..=4096);
    Ok(ImageSize { height: size(height)?, width: size(width)? })
}

/// Converts weights: a folder of diffusers, or a file of OpenAI's programs or of denoising-diffusion-pytorch, to a
/// weights file, or a checkpoint or weights file to a folder of diffusers. A written file or folder is complete or does
/// not exist.
///
/// # Errors
/// Returns an error if a file cannot be read or written, or if the other format lacks the network, the process or the
/// sampler. The error names what the format lacks.
pub fn convert(args: &ConvertArgs) -> Result<ExitCode> {
    let (from, to) = (&*args.from, args.to.display());
    if args.image_size.is_some() && from.is_dir() {
        return Err("--image-size and the other options for a file of another program are not for a directory as --from"
            .into());
    }
    if DiffusersFolder::is_at(from) {
        args.check_target()?;
        let folder = DiffusersFolder::open(from)?;
        let weights = folder.weights(DType::F32, &Device::Cpu)?;
        let (diffusion, sampling) = (folder.diffusion(), folder.sampling());
        WeightsFile::create(&args.to, folder.network(), &weights, diffusion, Some(sampling))?;
        out(format_args!("{to}: the network, the process and the sampler of {}", from.display()));
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(image_size), Some(objective)) = (args.image_size, args.objective) {
        return args.read_lucidrains(image_size, objective);
    }
    if args.image_size.is_some() {
        return args.read_openai();
    }
    let file = match Trained::open(from, args.weights) {
        Ok(_) if args.to.extension().is_some_and(|e| e == "safetensors") => {
            let expected =
                "another name: a checkpoint or weights file becomes a folder of diffusers";
            return Err(format!("--to is {to}; it must be {expected}").into());
        }
        Ok(trained) => WeightsFile::open(trained.weights_file(args.weights))?,
        Err(error) if from.is_file() => {
            let hint = "a file of improved-diffusion or guided-diffusion needs --image-size, and --heads or \
                        --head-channels; a file of denoising-diffusion-pytorch needs --image-size and --objective";
            return Err(format!("{error}; {hint}").into());
        }
        Err(error) => return Err(error),
    };
    let asked = args.sampling(&file)?;
    let sampling = asked.for_diffusers();
    file.export_diffusers(&args.to, Some(&sampling))?;
    let steps = sampling.steps;
    out(format_args!("{to}: a pipeline of diffusers, for num_inference_steps={steps}"));
    if sampling != asked {
        let [found, written] =
            [asked, sampling].map(|sampling| format!("{}, {}", sampling.solver, sampling.spacing));
        out(format_args!("sampler: {written}, instead of {found}, which diffusers lacks"));
    }
    Ok(ExitCode::SUCCESS)
}

impl ConvertArgs {
    /// # Errors
    /// Returns an error if `--to` is not a weights file that can be written.
    fn check_target(&self) -> Result<()> {
        if self.weights.is_some() || self.solver.is_some() {
            return Err(
                "--weights and --solver are for a checkpoint or weights file as --from".into()
            );
        }
        check_output("--to", &self.to, "safetensors")
    }

    fn read_openai(&self) -> Result<ExitCode> {
        self.check_target()?;
        let (Some(image_size), Some(heads)) = (self.image_size, self.attention()) else {
            return Err("--image-size needs --heads or --head-channels".into());
        };
        let steps = self.timesteps;
        let time_scale = match self.rescale_timesteps {
            Some(true) => 1000.0 / steps as f64,
            Some(false) => 1.0,
            None if steps == 1000 => 1.0,
            None => {
                return Err(
                    format!("--timesteps {steps} needs --rescale-timesteps true or false").into()
                );
            }
        };
        let settings = OpenAi {
            new_attention_order: self.new_attention_order,
            time_scale,
            dropout: self.dropout,
            ..OpenAi::new(image_size, heads)
        };
        let (network, weights) = settings.load(&self.from, DType::F32, &Device::Cpu)?;
        let (schedule, name) = match self.schedule {
            ScheduleName::Linear => (NoiseSchedule::linear_scaled(steps), "linear"),
            ScheduleName::Cosine => (NoiseSchedule::cosine(steps), "cosine"),
        };
        let diffusion = Diffusion::new(schedule?, Prediction::Epsilon);
        WeightsFile::create(&self.to, &network, &weights, &diffusion, None)?;
        let (to, from) = (self.to.display(), self.from.display());
        let levels = network.block_out_channels;
        out(format_args!("{to}: the network of {from}, with {levels:?} channels"));
        out(format_args!("process: {steps} timesteps, {name} schedule"));
        Ok(ExitCode::SUCCESS)
    }

    fn read_lucidrains(&self, image_size: ImageSize, objective: Objective) -> Result<ExitCode> {
        self.check_target()?;
        let file = LucidrainsFile::load(&self.from, DType::F32, &Device::Cpu)?;
        let network = LucidrainsConfig {
            sinusoidal_pos_emb_theta: self.sinusoidal_pos_emb_theta,
            dropout: self.dropout,
            ..file.network(image_size)?
        };
        if network.learned_variance && objective != Objective::PredNoise {
            return Err("--objective must be pred_noise for this file: the network learns the variance, and the process \
                        for such networks, LearnedGaussianDiffusion, has no other"
                .into());
        }
        let prediction = match objective {
            Objective::PredV => Prediction::Velocity,
            Objective::PredNoise => Prediction::Epsilon,
            Objective::PredX0 => Prediction::Sample,
        };
        let diffusion = Diffusion::new(file.schedule()?, prediction);
        WeightsFile::create(&self.to, &network, &file.weights(), &diffusion, None)?;
        let (to, from) = (self.to.display(), self.from.display());
        let (dim, mults) = (network.dim, network.dim_mults);
        out(format_args!("{to}: the network of {from}, with {dim} times {mults:?} channels"));
        let steps = diffusion.schedule().steps();
        out(format_args!("process: {steps} timesteps, prediction of {prediction}"));
        Ok(ExitCode::SUCCESS)
    }

    fn attention(&self) -> Option<AttentionHeads> {
        let channels = self.head_channels.map(AttentionHeads::Channels);
        channels.or(self.heads.map(AttentionHeads::Count))
    }

    /// The sampler settings of the folder: those of the run, with the given solver.
    fn sampling(&self, file: &WeightsFile) -> Result<SamplerConfig> {
        let usual = SamplerConfig::usual(file.diffusion());
        let run = file.sampling().copied().unwrap_or(usual);
        Ok(match self.solver {
            None => run,
            Some(SolverName::Ddim) => {
                SamplerConfig { solver: Solver::ddim(), steps: usual.steps, ..run }
            }
            Some(SolverName::Ddpm) => {
                let learned = file.network_kind() == UNet2DConfig::KIND
                    && file.architecture::<UNet2DConfig>()?.learns_variance();
                let variance = Variance::Learned;
                let solver = if learned { Solver::Ddpm { variance } } else { Solver::ddpm() };
                SamplerConfig { solver, steps: file.diffusion().schedule().steps(), ..run }
            }
        })
    }
}
