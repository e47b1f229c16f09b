use std::fmt;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use super::attention::Attention;
use super::{ResBlock, TimeEmbedding, UNetConfig, weights_dtype};
use crate::engine::Backend;
use crate::engine::Cpu;
#[cfg(feature = "cuda")]
use crate::engine::Cuda;
use crate::engine::Pool;
use crate::engine::{Add, Autograd, Engine, Survey};
use crate::engine::{Conv2d, GroupNorm};
use crate::engine::{Map, Tape};
use crate::kernels::{self, Activation, Scale};
use crate::model::backward_by_autograd;
use crate::process::check_timesteps;
use crate::{Denoiser, Dropout, Error, Network, Precision, Result};

/// The network of the paper: a U-Net (Ronneberger et al. 2015) of residual blocks with a time embedding, and with
/// self-attention at low resolution. Ho et al. 2020, appendix B.
///
/// There is one skip connection per level, taken before the size is halved. Weights have the names of the reference
/// implementation in PyTorch, so that files can be exchanged in both directions; see the chapter [the
/// network](crate::docs::network).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::{Denoiser, Parameters, UNet, UNetConfig};
///
/// let config = UNetConfig { hidden_dims: vec![16, 32], ..UNetConfig::mnist() };
/// let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
/// let unet = UNet::new(&config, parameters.builder())?;
/// let x_t = Tensor::zeros((2, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// let t = Tensor::new(&[10u32, 900], &Device::Cpu)?;
/// assert_eq!(unet.forward(&x_t, &t)?.dims(), [2, 1, 28, 28]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone)]
pub struct UNet {
    config: UNetConfig,
    dtype: DType,
    precision: Precision,
    time_mlp: TimeEmbedding,
    init_conv: Conv2d,
    down_blocks: Vec<DownBlock>,
    bottleneck: Bottleneck,
    up_blocks: Vec<UpBlock>,
    out_norm: GroupNorm,
    out_conv: Conv2d,
    /// Memory for the maps of the CPU's kernels, and for gradients, reused from one pass to the next.
    pool: Arc<Pool>,
}

impl fmt::Debug for UNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UNet")
            .field("config", &self.config)
            .field("dtype", &self.dtype)
            .field("precision", &self.precision)
            .finish_non_exhaustive()
    }
}

impl UNet {
    /// Creates a network of this shape, with weights from `vb`. Weights that take gradients are shared with `vb`. All
    /// others are copied, so that later changes to them have no effect.
    ///
    /// # Errors
    /// Returns an error if the configuration is not [valid](UNetConfig::validate), if the dtype of `vb` is neither f32
    /// nor f64, or if `vb` lacks a weight.
    pub fn new(config: &UNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        kernels::check_limit()?;
        let dtype = weights_dtype(&vb)?;
        let dims = &config.hidden_dims;
        let attend = |level: usize| config.attention_resolutions.contains(&level);
        let mut blocks = Blocks { time_dim: config.time_dim, dropout: config.dropout, layer: 0 };

        let mut down_blocks = Vec::new();
        for level in 0..config.levels() {
            let (input, output, vb) =
                (dims[level], dims[level + 1], vb.pp(format!("down_blocks.{level}")));
            down_blocks.push(DownBlock {
                res1: blocks.res(input, output, vb.pp("res1"))?,
                res2: blocks.res(output, output, vb.pp("res2"))?,
                attn: attend(level).then(|| Attention::new(output, vb.pp("attn"))).transpose()?,
                downsample: Conv2d::new(output, output, 3, vb.pp("downsample"))?
                    .with_scale(Scale::Stride(2)),
            });
        }

        let (middle, middle_vb) = (dims[config.levels()], vb.pp("bottleneck"));
        let bottleneck = Bottleneck {
            res1: blocks.res(middle, middle, middle_vb.pp("res1"))?,
            attn: Attention::new(middle, middle_vb.pp("attn"))?,
            res2: blocks.res(middle, middle, middle_vb.pp("res2"))?,
        };

        let mut up_blocks = Vec::new();
        for (i, level) in (0..config.levels()).rev().enumerate() {
            let (input, output, vb) =
                (dims[level + 1], dims[level], vb.pp(format!("up_blocks.{i}")));
            up_blocks.push(UpBlock {
                upsample: Conv2d::new(input, input, 3, vb.pp("upsample"))?
                    .with_scale(Scale::Upsample),
                res1: blocks.res(2 * input, output, vb.pp("res1"))?,
                res2: blocks.res(output, output, vb.pp("res2"))?,
                attn: attend(level).then(|| Attention::new(output, vb.pp("attn"))).transpose()?,
            });
        }

        Ok(Self {
            config: config.clone(),
            dtype,
            precision: Precision::Highest,
            time_mlp: TimeEmbedding::new(config.time_dim, vb.pp("time_mlp"))?,
            init_conv: Conv2d::new(config.channels, dims[0], 3, vb.pp("init_conv"))?,
            down_blocks,
            bottleneck,
            up_blocks,
            out_norm: GroupNorm::new(dims[0], Activation::Silu, vb.pp("out_norm"))?,
            out_conv: Conv2d::new(dims[0], config.channels, 3, vb.pp("out_conv"))?,
            pool: Arc::default(),
        })
    }

    /// Sets the precision of products in the crate's kernels. The default is [`Precision::Highest`].
    ///
    /// The kernels are used without gradients, and by [`forward_backward`](Denoiser::forward_backward), with f32
    /// weights on the CPU or on a CUDA device.
    ///
    /// # Errors
    /// Returns an error if this build, or the device or dtype of the network, does not support the precision.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        precision.validate()?;
        if precision.is_half() && !self.has_tape(&self.init_conv.weight) {
            let expected = format!(
                "highest or high: {precision} is for networks of f32 weights on the CPU or a CUDA device"
            );
            return Err(Error::config("precision", precision, expected));
        }
        if precision == Precision::F16 && !self.init_conv.weight.device().is_cuda() {
            let expected =
                "highest, high or bf16 on the CPU: f16 is for CUDA devices (feature `cuda`)";
            return Err(Error::config("precision", precision, expected));
        }
        #[cfg(feature = "cuda")]
        if let device @ Device::Cuda(_) = self.init_conv.weight.device() {
            crate::kernels::cuda::Gpu::of(device)?.check(precision)?;
        }
        Ok(Self { precision, ..self })
    }

    /// The configuration of the network.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// # Errors
    /// Returns an error if the shapes or dtypes of `x_t` and `t` do not fit the network.
    fn check(&self, x_t: &Tensor, t: &Tensor) -> Result<()> {
        let UNetConfig { channels, image_size, .. } = self.config;
        if x_t.rank() != 4 || x_t.dims()[1..] != [channels, image_size, image_size] {
            let expected = format!("(batch, {channels}, {image_size}, {image_size})");
            return Err(Error::Shape { what: "x_t", found: x_t.dims().to_vec(), expected });
        }
        let batch = x_t.dim(0)?;
        if batch == 0 {
            let expected = "a batch of at least one image".to_string();
            return Err(Error::Shape { what: "x_t", found: x_t.dims().to_vec(), expected });
        }
        if !x_t.dtype().is_float() {
            return Err(Error::config(
                "dtype of x_t",
                x_t.dtype().as_str(),
                "a floating-point dtype",
            ));
        }
        check_timesteps(t, batch, None)
    }

    /// The network itself: from a channels-last `x_t` and the timesteps' sinusoids.
    fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x_t: &E::Map,
        sinusoids: &E::Map,
        dropout: Option<&Dropout>,
    ) -> Result<E::Map> {
        let t_emb = self.time_mlp.run(engine, sinusoids)?;
        let mut x = engine.conv(&self.init_conv, x_t, Add::NOTHING)?;
        let mut skips = Vec::with_capacity(self.down_blocks.len());
        for block in &self.down_blocks {
            let skip = block.run(engine, &x, &t_emb, dropout)?;
            x = engine.conv(&block.downsample, &skip, Add::NOTHING)?;
            skips.push(skip);
        }
        x = self.bottleneck.run(engine, &x, &t_emb, dropout)?;
        for (block, skip) in self.up_blocks.iter().zip(skips.into_iter().rev()) {
            x = block.run(engine, &x, &skip, &t_emb, dropout)?;
        }
        engine.norm_conv(&self.out_norm, &self.out_conv, &x, Add::NOTHING)
    }

    fn forward_autograd(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        self.check(x_t, t)?;
        let x = kernels::to_channels_last(&x_t.to_dtype(self.dtype)?)?;
        let sinusoids = self.time_mlp.sinusoids(t)?.unsqueeze(1)?.unsqueeze(1)?;
        let y = self.run(&Autograd, &x, &sinusoids, dropout)?;
        Ok(kernels::to_channels_first(&y)?.to_dtype(x_t.dtype())?)
    }

    /// The output on a tape: its map, and as images.
    fn run_on<'n, B: Backend + 'n>(
        &'n self,
        tape: &Tape<'n, B>,
        x_t: &Tensor,
        t: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<(Map<B>, Tensor)> {
        let (x, sinusoids) = (tape.images(x_t)?, tape.sinusoids(&self.time_mlp, t)?);
        let y = self.run(tape, &x, &sinusoids, dropout)?;
        let output = tape.to_images(&y)?.to_dtype(x_t.dtype())?;
        Ok((y, output))
    }

    /// The kernels of the CUDA device that the weights are on.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Result<Cuda<'_>> {
        let gpu = kernels::cuda::Gpu::of(self.init_conv.weight.device())?;
        Ok(Cuda::new(gpu, &self.pool, self.precision))
    }

    /// Forward without a way back, by a backend's kernels.
    fn forward_on<B: Backend>(&self, backend: B, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
        Ok(self.run_on(&Tape::forgetful(backend), x_t, t, None)?.1)
    }

    /// Forward and back, by a backend's kernels.
    fn forward_backward_on<B: Backend>(
        &self,
        backend: B,
        x_t: &Tensor,
        t: &Tensor,
        dropout: &Dropout,
        d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
    ) -> Result<GradStore> {
        let tape = Tape::recording(backend);
        let (y, output) = self.run_on(&tape, x_t, t, Some(dropout))?;
        let d_output = d_output(&output)?;
        if d_output.dims() != output.dims() {
            let expected = format!("{:?}, that of the output", output.dims());
            let found = d_output.dims().to_vec();
            return Err(Error::Shape { what: "the output's gradient", found, expected });
        }
        tape.backward(y, &d_output)
    }

    #[cfg(test)]
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    fn survey(&self) -> Result<Survey> {
        let survey = Survey::default();
        self.run(&survey, &(), &(), None)?;
        Ok(survey)
    }

    /// Whether a tape can compute the network: it knows f32 alone, on the CPU and CUDA devices.
    fn has_tape(&self, x_t: &Tensor) -> bool {
        let (device, own) = (x_t.device(), self.init_conv.weight.device());
        let known = device.is_cpu() || cfg!(feature = "cuda") && device.is_cuda();
        self.dtype == DType::F32 && known && device.same_device(own)
    }
}

impl Denoiser for UNet {
    fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
        let survey = self.survey()?;
        if x_t.track_op() || survey.trainable.get() || !self.has_tape(x_t) {
            return self.forward_autograd(x_t, t, None);
        }
        self.check(x_t, t)?;
        #[cfg(feature = "cuda")]
        if x_t.device().is_cuda() {
            return self.forward_on(self.cuda()?, x_t, t);
        }
        Pool::among_threads(|| {
            let backend = Cpu::new(&self.pool, self.precision, x_t.dim(0)?, false);
            self.forward_on(backend, x_t, t)
        })
    }

    fn forward_train(&self, x_t: &Tensor, t: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        self.forward_autograd(x_t, t, Some(dropout))
    }

    fn forward_backward(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        dropout: &Dropout,
        d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
    ) -> Result<GradStore> {
        // Of weights that are computed from others, candle knows how to go on.
        if x_t.track_op() || self.survey()?.derived.get() || !self.has_tape(x_t) {
            return backward_by_autograd(self, x_t, t, dropout, d_output);
        }
        self.check(x_t, t)?;
        #[cfg(feature = "cuda")]
        if x_t.device().is_cuda() {
            return self.forward_backward_on(self.cuda()?, x_t, t, dropout, d_output);
        }
        Pool::among_threads(|| {
            let backend = Cpu::new(&self.pool, self.precision, x_t.dim(0)?, true);
            self.forward_backward_on(backend, x_t, t, dropout, d_output)
        })
    }

    fn is_repeatable(&self, x_t: &Tensor) -> bool {
        let derived = self.survey().map_or(true, |survey| survey.derived.get());
        x_t.device().is_cuda() && !x_t.track_op() && !derived && self.has_tape(x_t)
    }

    fn recycle(&self, gradients: Vec<Tensor>) {
        self.pool.recycle(gradients);
    }
}

impl Network for UNetConfig {
    const KIND: &'static str = "unet";
    type Model = UNet;

    fn build(&self, vb: VarBuilder) -> Result<UNet> {
        UNet::new(self, vb)
    }

    fn with_precision(model: UNet, precision: Precision) -> Result<UNet> {
        model.with_precision(precision)
    }
}

/// What the residual blocks of a network have in common.
struct Blocks {
    time_dim: usize,
    dropout: f64,
    layer: u16,
}

impl Blocks {
    fn res(&mut self, input: usize, output: usize, vb: VarBuilder) -> Result<ResBlock> {
        self.layer += 1;
        ResBlock::new(input, output, self.time_dim, vb)?.with_dropout(self.dropout, self.layer)
    }
}

#[derive(Debug, Clone)]
struct DownBlock {
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
    downsample: Conv2d,
}

impl DownBlock {
    /// The skip: what the level hands over to its counterpart on the way up.
    fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        t_emb: &E::Map,
        dropout: Option<&Dropout>,
    ) -> Result<E::Map> {
        let x = self.res1.run(engine, x, t_emb, dropout)?;
        let x = self.res2.run(engine, &x, t_emb, dropout)?;
        attend(engine, &self.attn, x)
    }
}

#[derive(Debug, Clone)]
struct Bottleneck {
    res1: ResBlock,
    attn: Attention,
    res2: ResBlock,
}

impl Bottleneck {
    fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        t_emb: &E::Map,
        dropout: Option<&Dropout>,
    ) -> Result<E::Map> {
        let x = self.res1.run(engine, x, t_emb, dropout)?;
        let x = self.attn.run(engine, &x)?;
        self.res2.run(engine, &x, t_emb, dropout)
    }
}

#[derive(Debug, Clone)]
struct UpBlock {
    upsample: Conv2d,
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
}

impl UpBlock {
    fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        skip: &E::Map,
        t_emb: &E::Map,
        dropout: Option<&Dropout>,
    ) -> Result<E::Map> {
        let x = engine.conv(&self.upsample, x, Add::NOTHING)?;
        let x = engine.concatenate(&x, skip)?;
        let x = self.res1.run(engine, &x, t_emb, dropout)?;
        let x = self.res2.run(engine, &x, t_emb, dropout)?;
        attend(engine, &self.attn, x)
    }
}

fn attend<'n, E: Engine<'n>>(
    engine: &E,
    attention: &'n Option<Attention>,
    x: E::Map,
) -> Result<E::Map> {
    match attention {
        Some(attention) => attention.run(engine, &x),
        None => Ok(x),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{Parameters, Sampler};

    /// What [`Precision::High`] is on a CPU with AMX, on whatever this one has; beside `Highest`, whose
    /// own error `tests/precision.rs` holds ten times lower.
    #[test]
    fn three_bf16_products_are_good_to_16_bits() -> Result<()> {
        let attentive = UNetConfig {
            hidden_dims: vec![24, 40, 64],
            attention_resolutions: vec![0, 1],
            channels: 3,
            image_size: 16,
            ..UNetConfig::mnist()
        };
        for (name, config) in [("mnist", UNetConfig::mnist()), ("attentive", attentive)] {
            let shape = (2, config.channels, config.image_size, config.image_size);
            let [x, target] = [5, 6].map(|seed| Sampler::prior(shape, seed, &Device::Cpu));
            let (x, target, t) = (x?, target?, Tensor::new(&[40u32, 700], &Device::Cpu)?);
            // The output, and all gradients.
            let pass = |precision| -> Result<[Vec<f32>; 2]> {
                let parameters = Parameters::new(3, DType::F32, &Device::Cpu);
                let unet = parameters.build(&config)?.with_precision(precision)?;
                let mut output = Vec::new();
                let mut d_output = |y: &Tensor| {
                    output = y.flatten_all()?.to_vec1()?;
                    Ok((y - &target)?)
                };
                let found = unet.forward_backward(&x, &t, &Dropout::new(0, 0), &mut d_output)?;
                let gradients = parameters.vars().into_values().map(|var| {
                    let gradient = found.get(&var).expect("a gradient");
                    Ok(gradient.flatten_all()?.to_vec1::<f32>()?)
                });
                let gradients: Result<Vec<_>> = gradients.collect();
                Ok([output, gradients?.concat()])
            };
            let (exact, high) = (pass(Precision::Highest)?, pass(Precision::High)?);
            let errors = [0, 1].map(|i| {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = exact[i].iter().zip(&high[i]).map(|(a, b)| square(a - b)).sum();
                (off / exact[i].iter().map(|&x| square(x)).sum::<f64>()).sqrt()
            });
            // About 2.2e-5 and 3.2e-5.
            for (off, most) in errors.into_iter().zip([4e-5, 6e-5]) {
                // Less than the least would be f32's own products.
                assert!((5e-6..most).contains(&off), "{name}: {errors:?}");
            }
        }
        Ok(())
    }
}
