//! The network composed of candle-nn's layers, with candle's gradients. Names of weights are those of PyTorch.

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{
    AdamW, Conv2d, Conv2dConfig, GroupNorm, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap,
    conv2d, group_norm, linear, loss, ops,
};

use crate::{Config, GROUPS, LEARNING_RATE, Run, WEIGHT_DECAY, What, timesteps, waves};

/// Builds a network with random weights, and returns a run of the measure.
pub fn prepare(config: &Config, batch: usize, what: What) -> Result<Run> {
    let device = Device::Cpu;
    let variables = VarMap::new();
    let unet = UNet::new(config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    let shape = (batch, config.channels, config.image_size, config.image_size);
    let x = Tensor::randn(0f32, 1.0, shape, &device)?;
    let t = timesteps(batch);
    if what == What::Forward {
        // The same weights as constants: variables would record the operations.
        let fixed = variables.data().lock().expect("one thread").clone();
        let fixed = fixed.into_iter().map(|(name, v)| (name, v.as_detached_tensor())).collect();
        let unet = UNet::new(config, VarBuilder::from_tensors(fixed, DType::F32, &device))?;
        return Ok(Box::new(move || {
            unet.forward(&x, &t)?;
            Ok(())
        }));
    }
    let eps = x.randn_like(0.0, 1.0)?;
    let params =
        ParamsAdamW { lr: LEARNING_RATE, weight_decay: WEIGHT_DECAY, ..Default::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), params)?;
    Ok(Box::new(move || {
        // candle-nn has no clipping.
        optimizer.backward_step(&loss::mse(&unet.forward(&x, &t)?, &eps)?)?;
        Ok(())
    }))
}

fn conv(
    inputs: usize,
    outputs: usize,
    size: usize,
    stride: usize,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let config = Conv2dConfig { padding: size / 2, stride, ..Default::default() };
    conv2d(inputs, outputs, size, config, vb)
}

struct NormActConv {
    norm: GroupNorm,
    conv: Conv2d,
}

impl NormActConv {
    fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: group_norm(GROUPS, inputs, 1e-5, vb.pp(0))?,
            conv: conv(inputs, outputs, 3, 1, vb.pp(2))?,
        })
    }
}

impl Module for NormActConv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(&self.norm.forward(x)?.silu()?)
    }
}

struct ResBlock {
    block1: NormActConv,
    block2: NormActConv,
    time_emb: Linear,
    dropout: f32,
    shortcut: Option<Conv2d>,
}

impl ResBlock {
    fn new(inputs: usize, outputs: usize, config: &Config, vb: VarBuilder) -> Result<Self> {
        let shortcut = || conv(inputs, outputs, 1, 1, vb.pp("shortcut"));
        Ok(Self {
            block1: NormActConv::new(inputs, outputs, vb.pp("block1"))?,
            block2: NormActConv::new(outputs, outputs, vb.pp("block2"))?,
            time_emb: linear(config.time_dim, outputs, vb.pp("time_emb.1"))?,
            dropout: config.dropout as f32,
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let temb = self.time_emb.forward(&temb.silu()?)?.unsqueeze(2)?.unsqueeze(3)?;
        let mut h = self.block1.forward(x)?.broadcast_add(&temb)?;
        if self.dropout > 0.0 && h.track_op() {
            // Dropout of whole feature maps.
            let (batch, channels, ..) = h.dims4()?;
            let ones = Tensor::ones((batch, channels, 1, 1), h.dtype(), h.device())?;
            h = h.broadcast_mul(&ops::dropout(&ones, self.dropout)?)?;
        }
        let h = self.block2.forward(&h)?;
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + h,
            None => x + h,
        }
    }
}

struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj: Conv2d,
}

impl Attention {
    fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: group_norm(GROUPS, width, 1e-5, vb.pp("norm"))?,
            qkv: conv(width, 3 * width, 1, 1, vb.pp("qkv"))?,
            proj: conv(width, width, 1, 1, vb.pp("proj"))?,
        })
    }

    fn at(level: usize, width: usize, config: &Config, vb: VarBuilder) -> Result<Option<Self>> {
        let attends = config.attention_resolutions.contains(&level);
        attends.then(|| Self::new(width, vb.pp("attn"))).transpose()
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm.forward(x)?)?.flatten_from(2)?.chunk(3, 1)?;
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]]; // (batch, width, positions)
        let scores = (q.t()?.matmul(k)? / (q.dim(1)? as f64).sqrt())?;
        // `softmax_last_dim` is faster, but has no gradient.
        let scores = match scores.track_op() {
            true => ops::softmax(&scores, D::Minus1)?,
            false => ops::softmax_last_dim(&scores)?,
        };
        x + self.proj.forward(&v.matmul(&scores.t()?)?.reshape(x.shape())?)?
    }
}

struct DownBlock {
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
    downsample: Conv2d,
}

impl DownBlock {
    fn new(level: usize, config: &Config, vb: VarBuilder) -> Result<Self> {
        let (inputs, outputs) = (config.hidden_dims[level], config.hidden_dims[level + 1]);
        Ok(Self {
            res1: ResBlock::new(inputs, outputs, config, vb.pp("res1"))?,
            res2: ResBlock::new(outputs, outputs, config, vb.pp("res2"))?,
            attn: Attention::at(level, outputs, config, vb.clone())?,
            downsample: conv(outputs, outputs, 3, 2, vb.pp("downsample"))?,
        })
    }

    /// Returns the feature map, and that of the skip connection.
    fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<(Tensor, Tensor)> {
        let skip = self.res2.forward(&self.res1.forward(x, temb)?, temb)?;
        let skip = skip.apply(&self.attn.as_ref())?;
        Ok((self.downsample.forward(&skip)?, skip))
    }
}

struct UpBlock {
    upsample: Conv2d,
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
}

impl UpBlock {
    fn new(level: usize, config: &Config, vb: VarBuilder) -> Result<Self> {
        let (outputs, inputs) = (config.hidden_dims[level], config.hidden_dims[level + 1]);
        Ok(Self {
            upsample: conv(inputs, inputs, 3, 1, vb.pp("upsample"))?,
            res1: ResBlock::new(2 * inputs, outputs, config, vb.pp("res1"))?,
            res2: ResBlock::new(outputs, outputs, config, vb.pp("res2"))?,
            attn: Attention::at(level, outputs, config, vb.clone())?,
        })
    }

    fn forward(&self, x: &Tensor, skip: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let x = self.upsample.forward(&x.upsample_nearest2d(2 * height, 2 * width)?)?;
        let x = self.res1.forward(&Tensor::cat(&[&x, skip], 1)?, temb)?;
        self.res2.forward(&x, temb)?.apply(&self.attn.as_ref())
    }
}

pub struct UNet {
    time_dim: usize,
    time_mlp: (Linear, Linear),
    init_conv: Conv2d,
    down_blocks: Vec<DownBlock>,
    bottleneck: (ResBlock, Attention, ResBlock),
    up_blocks: Vec<UpBlock>,
    out: NormActConv,
}

impl UNet {
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let levels = config.hidden_dims.len() - 1;
        let (stem, width) = (config.hidden_dims[0], config.hidden_dims[levels]);
        let (time, dim) = (vb.pp("time_mlp.mlp"), config.time_dim);
        let middle = vb.pp("bottleneck");
        let down = |level| DownBlock::new(level, config, vb.pp("down_blocks").pp(level));
        let up = |k| UpBlock::new(levels - 1 - k, config, vb.pp("up_blocks").pp(k));
        Ok(Self {
            time_dim: dim,
            time_mlp: (linear(dim, 4 * dim, time.pp(0))?, linear(4 * dim, dim, time.pp(2))?),
            init_conv: conv(config.channels, stem, 3, 1, vb.pp("init_conv"))?,
            down_blocks: (0..levels).map(down).collect::<Result<_>>()?,
            bottleneck: (
                ResBlock::new(width, width, config, middle.pp("res1"))?,
                Attention::new(width, middle.pp("attn"))?,
                ResBlock::new(width, width, config, middle.pp("res2"))?,
            ),
            up_blocks: (0..levels).map(up).collect::<Result<_>>()?,
            out: NormActConv {
                norm: group_norm(GROUPS, stem, 1e-5, vb.pp("out_norm"))?,
                conv: conv(stem, config.channels, 3, 1, vb.pp("out_conv"))?,
            },
        })
    }

    pub fn forward(&self, x: &Tensor, t: &[u32]) -> Result<Tensor> {
        let temb = Tensor::from_vec(waves(t, self.time_dim), (t.len(), self.time_dim), x.device())?;
        let temb = self.time_mlp.1.forward(&self.time_mlp.0.forward(&temb)?.gelu_erf()?)?;
        let (mut h, mut skips) = (self.init_conv.forward(x)?, Vec::new());
        for down in &self.down_blocks {
            let (smaller, skip) = down.forward(&h, &temb)?;
            h = smaller;
            skips.push(skip);
        }
        let (res1, attn, res2) = &self.bottleneck;
        h = res2.forward(&attn.forward(&res1.forward(&h, &temb)?)?, &temb)?;
        for (up, skip) in self.up_blocks.iter().zip(skips.iter().rev()) {
            h = up.forward(&h, skip, &temb)?;
        }
        self.out.forward(&h)
    }
}
