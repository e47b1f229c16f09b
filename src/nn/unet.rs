use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use super::attention::Attention;
use super::layers::{Conv2d, GroupNorm};
use super::{ResBlock, TimeEmbedding, UNetConfig, weights_dtype};
use crate::kernels::{self, Activation};
use crate::{Denoiser, Dropout, Error, Network, Result};

/// The network of the paper: a U-Net (Ronneberger et al. 2015) of residual blocks that are told the
/// timestep, with self-attention at low resolution. Ho et al. 2020, appendix B.
///
/// One skip a level, taken before the size is halved. Weights bear the names of the reference
/// implementation in PyTorch, so files go both ways; see the chapter [the
/// network](crate::docs::network).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::{Denoiser, Parameters, UNet, UNetConfig};
///
/// let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
/// let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
/// let unet = UNet::new(&config, parameters.builder())?;
/// let x_t = Tensor::zeros((2, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// let t = Tensor::new(&[10u32, 900], &Device::Cpu)?;
/// assert_eq!(unet.forward(&x_t, &t)?.dims(), [2, 1, 28, 28]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct UNet {
    config: UNetConfig,
    dtype: DType,
    time_mlp: TimeEmbedding,
    init_conv: Conv2d,
    down_blocks: Vec<DownBlock>,
    bottleneck: Bottleneck,
    up_blocks: Vec<UpBlock>,
    out_norm: GroupNorm,
    out_conv: Conv2d,
}

impl UNet {
    /// The network of this shape, its weights taken from `vb`.
    ///
    /// # Errors
    /// If the configuration is not [valid](UNetConfig::validate), or `vb` is of another dtype than
    /// f32 or f64, or lacks a weight.
    pub fn new(config: &UNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
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
                downsample: Conv2d::new(output, output, 3, vb.pp("downsample"))?.with_stride_2(),
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
                upsample: Conv2d::new(input, input, 3, vb.pp("upsample"))?,
                res1: blocks.res(2 * input, output, vb.pp("res1"))?,
                res2: blocks.res(output, output, vb.pp("res2"))?,
                attn: attend(level).then(|| Attention::new(output, vb.pp("attn"))).transpose()?,
            });
        }

        Ok(Self {
            config: config.clone(),
            dtype,
            time_mlp: TimeEmbedding::new(config.time_dim, vb.pp("time_mlp"))?,
            init_conv: Conv2d::new(config.channels, dims[0], 3, vb.pp("init_conv"))?,
            down_blocks,
            bottleneck,
            up_blocks,
            out_norm: GroupNorm::new(dims[0], Activation::Silu, vb.pp("out_norm"))?,
            out_conv: Conv2d::new(dims[0], config.channels, 3, vb.pp("out_conv"))?,
        })
    }

    /// The network's shape.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    fn run(&self, x_t: &Tensor, t: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
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
            return Err(Error::config("dtype of x_t", x_t.dtype().as_str(), "a floating one"));
        }
        if t.dims() != [batch] {
            let expected = format!("[{batch}], one timestep for each image");
            return Err(Error::Shape { what: "t", found: t.dims().to_vec(), expected });
        }
        let t_emb = self.time_mlp.forward(t)?;
        let x = kernels::to_channels_last(&x_t.to_dtype(self.dtype)?)?;

        let mut x = self.init_conv.forward(&x)?;
        let mut skips = Vec::with_capacity(self.down_blocks.len());
        for block in &self.down_blocks {
            let skip = block.forward(&x, &t_emb, dropout)?;
            x = block.downsample.forward(&skip)?;
            skips.push(skip);
        }
        x = self.bottleneck.forward(&x, &t_emb, dropout)?;
        for (block, skip) in self.up_blocks.iter().zip(skips.iter().rev()) {
            x = block.forward(&x, skip, &t_emb, dropout)?;
        }
        let x = self.out_conv.forward(&self.out_norm.forward(&x)?)?;
        Ok(kernels::to_channels_first(&x)?.to_dtype(x_t.dtype())?)
    }
}

impl Denoiser for UNet {
    fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
        self.run(x_t, t, None)
    }

    fn forward_train(&self, x_t: &Tensor, t: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        self.run(x_t, t, Some(dropout))
    }
}

impl Network for UNetConfig {
    const KIND: &'static str = "unet";
    type Model = UNet;

    fn build(&self, vb: VarBuilder) -> Result<UNet> {
        UNet::new(self, vb)
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
    fn forward(&self, x: &Tensor, t_emb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let x = self.res1.forward_maps(x, t_emb, dropout)?;
        let x = self.res2.forward_maps(&x, t_emb, dropout)?;
        attend(&self.attn, x)
    }
}

#[derive(Debug, Clone)]
struct Bottleneck {
    res1: ResBlock,
    attn: Attention,
    res2: ResBlock,
}

impl Bottleneck {
    fn forward(&self, x: &Tensor, t_emb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let x = self.res1.forward_maps(x, t_emb, dropout)?;
        let x = self.attn.forward_maps(&x)?;
        self.res2.forward_maps(&x, t_emb, dropout)
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
    fn forward(
        &self,
        x: &Tensor,
        skip: &Tensor,
        t_emb: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        let x = self.upsample.forward(&kernels::upsample_nearest_2x(x)?)?;
        let x = Tensor::cat(&[&x, skip], 3)?;
        let x = self.res1.forward_maps(&x, t_emb, dropout)?;
        let x = self.res2.forward_maps(&x, t_emb, dropout)?;
        attend(&self.attn, x)
    }
}

fn attend(attention: &Option<Attention>, x: Tensor) -> Result<Tensor> {
    match attention {
        Some(attention) => attention.forward_maps(&x),
        None => Ok(x),
    }
}
