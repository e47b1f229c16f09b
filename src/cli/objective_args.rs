use clap::{Args, ValueEnum};

use super::arguments::fraction;
use crate::train::{Loss, NoiseConfig, ObjectiveConfig, TimestepSampling, TrainConfig, Weighting};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LossName {
    Mse,
    L1,
    Huber,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WeightingName {
    Uniform,
    MinSnr,
    P2,
    Edm,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TimestepsName {
    Uniform,
    Stratified,
    LogNormal,
    Importance,
}

/// The options for the loss, the timesteps and the noise. If an option names the present setting, the parameters of
/// this setting are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Objective")]
pub(super) struct ObjectiveArgs {
    /// Loss of a value: mse, l1, or huber, which is a square up to an error of 0.1
    #[arg(long, value_name = "L", value_enum)]
    loss: Option<LossName>,
    /// Weights of the timesteps: uniform; min-snr, with gamma 5; p2, with k 1 and gamma 1; or edm, with a standard
    /// deviation of the data of 0.5
    #[arg(long, value_name = "W", value_enum)]
    weighting: Option<WeightingName>,
    /// Distribution of the timesteps: uniform; stratified over the batch; log-normal, with mean -1.2 and standard
    /// deviation 1.2; or importance, in proportion to the losses
    #[arg(long, value_name = "T", value_enum)]
    timesteps: Option<TimestepsName>,
    /// Assign the noise of a batch to its images so that the distances are small
    #[arg(long)]
    immiscible: bool,
    /// Add R times a normal number, the same for all pixels of a channel, to the noise; from 0 to 1
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = fraction)]
    offset_noise: Option<f64>,
    /// Write the loss of each quartile of the timesteps to metrics.jsonl, as loss_q0 to loss_q3
    #[arg(long)]
    loss_quartiles: bool,
}

impl ObjectiveArgs {
    /// Replaces the values of the configuration for which an option was given.
    pub fn apply(&self, config: &TrainConfig) -> TrainConfig {
        let ObjectiveConfig { loss, weighting, variational_bound } = config.objective;
        let loss = match (self.loss, loss) {
            (None, loss) | (Some(LossName::Huber), loss @ Loss::Huber { .. }) => loss,
            (Some(LossName::Mse), _) => Loss::Mse,
            (Some(LossName::L1), _) => Loss::L1,
            (Some(LossName::Huber), _) => Loss::Huber { delta: 0.1 },
        };
        let weighting = match (self.weighting, weighting) {
            (None, weighting)
            | (Some(WeightingName::MinSnr), weighting @ Weighting::MinSnr { .. })
            | (Some(WeightingName::P2), weighting @ Weighting::P2 { .. })
            | (Some(WeightingName::Edm), weighting @ Weighting::Edm { .. }) => weighting,
            (Some(WeightingName::Uniform), _) => Weighting::Uniform,
            (Some(WeightingName::MinSnr), _) => Weighting::MinSnr { gamma: 5.0 },
            (Some(WeightingName::P2), _) => Weighting::P2 { k: 1.0, gamma: 1.0 },
            (Some(WeightingName::Edm), _) => Weighting::Edm { sigma_data: 0.5 },
        };
        let timesteps = match (self.timesteps, config.timesteps) {
            (None, timesteps)
            | (Some(TimestepsName::LogNormal), timesteps @ TimestepSampling::LogNormal { .. }) => {
                timesteps
            }
            (Some(TimestepsName::Uniform), _) => TimestepSampling::Uniform,
            (Some(TimestepsName::Stratified), _) => TimestepSampling::Stratified,
            (Some(TimestepsName::LogNormal), _) => {
                TimestepSampling::LogNormal { mean: -1.2, std: 1.2 }
            }
            (Some(TimestepsName::Importance), _) => TimestepSampling::Importance,
        };
        TrainConfig {
            objective: ObjectiveConfig { loss, weighting, variational_bound },
            timesteps,
            noise: NoiseConfig {
                offset: self.offset_noise.unwrap_or(config.noise.offset),
                immiscible: self.immiscible || config.noise.immiscible,
            },
            loss_quartiles: self.loss_quartiles || config.loss_quartiles,
            ..config.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::TrainArgs;
    use crate::train::LearningRateSchedule;

    fn applied(config: &TrainConfig, args: &str) -> Result<TrainConfig, String> {
        let args = TrainArgs::parse(args.split_whitespace()).map_err(|error| error.to_string())?;
        args.apply(config).map_err(|error| error.to_string())
    }

    #[test]
    fn options_set_the_objective_the_timesteps_the_noise_and_the_schedule() -> Result<(), String> {
        let recipe = TrainConfig::mnist();
        assert_eq!(applied(&recipe, "")?, recipe);
        let objective = |loss, weighting| TrainConfig {
            objective: ObjectiveConfig { loss, weighting, variational_bound: None },
            ..recipe.clone()
        };
        let timesteps = |timesteps| TrainConfig { timesteps, ..recipe.clone() };
        let edm = Weighting::Edm { sigma_data: 0.5 };
        for (args, expected) in [
            ("--loss l1 --weighting edm", objective(Loss::L1, edm)),
            ("--loss huber", objective(Loss::Huber { delta: 0.1 }, Weighting::Uniform)),
            ("--weighting min-snr", objective(Loss::Mse, Weighting::MinSnr { gamma: 5.0 })),
            ("--weighting p2", objective(Loss::Mse, Weighting::P2 { k: 1.0, gamma: 1.0 })),
            ("--timesteps stratified", timesteps(TimestepSampling::Stratified)),
            ("--timesteps importance", timesteps(TimestepSampling::Importance)),
            (
                "--timesteps log-normal",
                timesteps(TimestepSampling::LogNormal { mean: -1.2, std: 1.2 }),
            ),
            (
                "--immiscible --offset-noise 0.1",
                TrainConfig {
                    noise: NoiseConfig { offset: 0.1, immiscible: true },
                    ..recipe.clone()
                },
            ),
            ("--loss-quartiles", TrainConfig { loss_quartiles: true, ..recipe.clone() }),
            (
                "--warmup-steps 7 --cooldown 0.25",
                TrainConfig { warmup_steps: 7, cooldown: 0.25, ..recipe.clone() },
            ),
            (
                "--schedule inverse-sqrt --reference-steps 70",
                TrainConfig {
                    schedule: LearningRateSchedule::InverseSqrt { reference_steps: 70 },
                    ..recipe.clone()
                },
            ),
        ] {
            let found = applied(&recipe, args)?;
            assert_eq!(found, expected, "{args}");
            // Every setting can be reset, except for those that can only be switched on.
            let back = "--loss mse --weighting uniform --timesteps uniform --offset-noise 0 --schedule constant \
                        --warmup-steps 0 --cooldown 0";
            let found = applied(&found, back)?;
            let TrainConfig { noise, loss_quartiles, .. } = &found;
            let switches = (noise.immiscible, *loss_quartiles);
            let mut expected = recipe.clone();
            (expected.noise.immiscible, expected.loss_quartiles) = switches;
            assert_eq!(found, expected, "{args}");
        }
        Ok(())
    }

    #[test]
    fn options_keep_the_parameters_of_what_they_name() -> Result<(), String> {
        let config = TrainConfig {
            objective: ObjectiveConfig {
                loss: Loss::Huber { delta: 0.3 },
                weighting: Weighting::MinSnr { gamma: 3.0 },
                variational_bound: None,
            },
            timesteps: TimestepSampling::LogNormal { mean: 0.0, std: 1.0 },
            schedule: LearningRateSchedule::InverseSqrt { reference_steps: 9 },
            ..TrainConfig::mnist()
        };
        let same =
            "--loss huber --weighting min-snr --timesteps log-normal --schedule inverse-sqrt";
        assert_eq!(applied(&config, same)?, config);
        let found = applied(&config, "--reference-steps 8")?;
        assert_eq!(found.schedule, LearningRateSchedule::InverseSqrt { reference_steps: 8 });
        Ok(())
    }

    #[test]
    fn recompute_is_switched_on_and_off() -> Result<(), String> {
        let recompute =
            |recompute, args| applied(&TrainConfig { recompute, ..TrainConfig::mnist() }, args);
        for (before, args, after) in [
            (false, "", false),
            (true, "", true),
            (false, "--recompute", true),
            (false, "--recompute --steps 3", true),
            (false, "--recompute true", true),
            (true, "--recompute false", false),
        ] {
            assert_eq!(recompute(before, args)?.recompute, after, "{before} {args}");
        }
        assert!(recompute(false, "--recompute 2").is_err());
        Ok(())
    }

    #[test]
    fn mistakes_name_the_option_and_what_is_allowed() {
        for (args, expected) in [
            ("--loss l3", ["--loss", "mse, l1, huber"]),
            ("--weighting snr", ["--weighting", "uniform, min-snr, p2, edm"]),
            ("--timesteps normal", ["--timesteps", "uniform, stratified, log-normal, importance"]),
            ("--offset-noise 2", ["--offset-noise", "a number from 0 to 1"]),
            ("--warmup-steps -1", ["--warmup-steps", "a whole number from 0 to"]),
            ("--cooldown 1.5", ["--cooldown", "a number from 0 to 1"]),
            ("--schedule inverse-sqrt", ["--schedule inverse-sqrt", "--reference-steps N"]),
            ("--reference-steps 9", ["--reference-steps", "--schedule inverse-sqrt"]),
            ("--schedule cosine --reference-steps 9", ["--reference-steps", "inverse-sqrt"]),
            ("--schedule inverse-sqrt --reference-steps 0", ["--reference-steps", "from 1 to"]),
        ] {
            let message = applied(&TrainConfig::mnist(), args).map(drop).unwrap_err();
            for part in expected {
                assert!(message.contains(part), "{args}: {message}");
            }
        }
    }
}
