//! The network composed of burn's layers, with burn's gradients, clipping and AdamW, on its CPU backend Flex.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::interpolate::{Interpolate2d, Interpolate2dConfig};
use burn::nn::loss::{MseLoss, Reduction};
use burn::nn::{
    Dropout, DropoutConfig, GroupNorm, GroupNormConfig, Linear, LinearConfig, PaddingConfig2d,
};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{gelu, silu};
use burn::tensor::module::attention;
use burn::tensor::{Device, Distribution, Tensor, TensorData};

use crate::{Config, GROUPS, LEARNING_RATE, Run, WEIGHT_DECAY, What, timesteps, waves};

/// Builds a network with random weights, and returns a run of the measure.
pub fn prepare(config: &Config, batch: usize, what: What) -> Run {
    let device = match what {
        What::TrainStep => Device::flex().autodiff(),
        What::Forward => Device::flex(),
    };
    let unet = UNet::new(config, &device);
    let shape = [batch, config.channels, config.image_size, config.image_size];
    let x = Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let t = timesteps(batch);
    if what == What::Forward {
        return Box::new(move || {
            unet.forward(x.clone(), &t);
            Ok(())
        });
    }
    let eps = x.random_like(Distribution::Normal(0.0, 1.0));
    // This clips each tensor by its own norm; burn has no clipping by the norm of all gradients.
    let mut optimizer = AdamWConfig::new()
        .with_epsilon(1e-8)
        .with_weight_decay(WEIGHT_DECAY as f32)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let mut trained = Some(unet);
    Box::new(move || {
        let unet = trained.take().ok_or("an earlier step failed")?;
        let loss =
            MseLoss::new().forward(unet.forward(x.clone(), &t), eps.clone(), Reduction::Mean);
        let gradients = GradientsParams::from_grads(loss.backward(), &unet);
        trained = Some(optimizer.step(LEARNING_RATE, unet, gradients));
        Ok(())
    })
}

fn conv(inputs: usize, outputs: usize, size: usize, stride: usize, device: &Device) -> Conv2d {
    let padding = size / 2;
    Conv2dConfig::new([inputs, outputs], [size, size])
        .with_stride([stride, stride])
        .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
        .init(device)
}

fn group_norm(width: usize, device: &Device) -> GroupNorm {
    GroupNormConfig::new(GROUPS, width).init(device)
}

#[derive(Module, Debug)]
struct NormActConv {
    norm: GroupNorm,
    conv: Conv2d,
}

impl NormActConv {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        Self { norm: group_norm(inputs, device), conv: conv(inputs, outputs, 3, 1, device) }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv.forward(silu(self.norm.forward(x)))
    }
}

#[derive(Module, Debug)]
struct ResBlock {
    block1: NormActConv,
    block2: NormActConv,
    time_emb: Linear,
    dropout: Dropout,
    shortcut: Option<Conv2d>,
}

impl ResBlock {
    fn new(inputs: usize, outputs: usize, config: &Config, device: &Device) -> Self {
        Self {
            block1: NormActConv::new(inputs, outputs, device),
            block2: NormActConv::new(outputs, outputs, device),
            time_emb: LinearConfig::new(config.time_dim, outputs).init(device),
            dropout: DropoutConfig::new(config.dropout).init(),
            shortcut: (inputs != outputs).then(|| conv(inputs, outputs, 1, 1, device)),
        }
    }

    fn forward(&self, x: Tensor<4>, temb: Tensor<2>) -> Tensor<4> {
        let temb = self.time_emb.forward(silu(temb));
        let mut h = self.block1.forward(x.clone()) + temb.clone().unsqueeze_dims(&[2, 3]);
        if self.dropout.prob > 0.0 {
            // Dropout of whole feature maps.
            h = h * self.dropout.forward(temb.ones_like()).unsqueeze_dims(&[2, 3]);
        }
        let h = self.block2.forward(h);
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

#[derive(Module, Debug)]
struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj: Conv2d,
}

impl Attention {
    fn new(width: usize, device: &Device) -> Self {
        Self {
            norm: group_norm(width, device),
            qkv: conv(width, 3 * width, 1, 1, device),
            proj: conv(width, width, 1, 1, device),
        }
    }

    fn at(level: usize, width: usize, config: &Config, device: &Device) -> Option<Self> {
        config.attention_resolutions.contains(&level).then(|| Self::new(width, device))
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, width, height, columns] = x.dims();
        let qkv = self.qkv.forward(self.norm.forward(x.clone()));
        // (batch, 1 head, positions, width) each.
        let qkv = qkv.reshape([batch, 3, width, height * columns]).swap_dims(2, 3);
        let [q, k, v] = [0, 1, 2].map(|part| qkv.clone().narrow(1, part, 1));
        let h = attention(q, k, v, None, None, Default::default());
        x.clone() + self.proj.forward(h.swap_dims(2, 3).reshape(x.dims()))
    }
}

#[derive(Module, Debug)]
struct DownBlock {
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
    downsample: Conv2d,
}

impl DownBlock {
    fn new(level: usize, config: &Config, device: &Device) -> Self {
        let (inputs, outputs) = (config.hidden_dims[level], config.hidden_dims[level + 1]);
        Self {
            res1: ResBlock::new(inputs, outputs, config, device),
            res2: ResBlock::new(outputs, outputs, config, device),
            attn: Attention::at(level, outputs, config, device),
            downsample: conv(outputs, outputs, 3, 2, device),
        }
    }

    /// Returns the feature map, and that of the skip connection.
    fn forward(&self, x: Tensor<4>, temb: Tensor<2>) -> (Tensor<4>, Tensor<4>) {
        let mut skip = self.res2.forward(self.res1.forward(x, temb.clone()), temb);
        if let Some(attn) = &self.attn {
            skip = attn.forward(skip);
        }
        (self.downsample.forward(skip.clone()), skip)
    }
}

#[derive(Module, Debug)]
struct Bottleneck {
    res1: ResBlock,
    attn: Attention,
    res2: ResBlock,
}

#[derive(Module, Debug)]
struct UpBlock {
    interpolate: Interpolate2d,
    upsample: Conv2d,
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
}

impl UpBlock {
    fn new(level: usize, config: &Config, device: &Device) -> Self {
        let (outputs, inputs) = (config.hidden_dims[level], config.hidden_dims[level + 1]);
        Self {
            interpolate: Interpolate2dConfig::new().with_scale_factor(Some([2.0, 2.0])).init(),
            upsample: conv(inputs, inputs, 3, 1, device),
            res1: ResBlock::new(2 * inputs, outputs, config, device),
            res2: ResBlock::new(outputs, outputs, config, device),
            attn: Attention::at(level, outputs, config, device),
        }
    }

    fn forward(&self, x: Tensor<4>, skip: Tensor<4>, temb: Tensor<2>) -> Tensor<4> {
        let x = self.upsample.forward(self.interpolate.forward(x));
        let x = self.res1.forward(Tensor::cat(vec![x, skip], 1), temb.clone());
        let x = self.res2.forward(x, temb);
        match &self.attn {
            Some(attn) => attn.forward(x),
            None => x,
        }
    }
}

#[derive(Module, Debug)]
pub struct UNet {
    time_dim: usize,
    time_mlp: [Linear; 2],
    init_conv: Conv2d,
    down_blocks: Vec<DownBlock>,
    bottleneck: Bottleneck,
    up_blocks: Vec<UpBlock>,
    out: NormActConv,
}

impl UNet {
    pub fn new(config: &Config, device: &Device) -> Self {
        let levels = config.hidden_dims.len() - 1;
        let (stem, width, dim) =
            (config.hidden_dims[0], config.hidden_dims[levels], config.time_dim);
        Self {
            time_dim: dim,
            time_mlp: [(dim, 4 * dim), (4 * dim, dim)]
                .map(|(inputs, outputs)| LinearConfig::new(inputs, outputs).init(device)),
            init_conv: conv(config.channels, stem, 3, 1, device),
            down_blocks: (0..levels).map(|level| DownBlock::new(level, config, device)).collect(),
            bottleneck: Bottleneck {
                res1: ResBlock::new(width, width, config, device),
                attn: Attention::new(width, device),
                res2: ResBlock::new(width, width, config, device),
            },
            up_blocks: (0..levels).rev().map(|level| UpBlock::new(level, config, device)).collect(),
            out: NormActConv::new(stem, config.channels, device),
        }
    }

    pub fn forward(&self, x: Tensor<4>, t: &[u32]) -> Tensor<4> {
        let temb = TensorData::new(waves(t, self.time_dim), [t.len(), self.time_dim]);
        let temb = gelu(self.time_mlp[0].forward(Tensor::<2>::from_data(temb, &x.device())));
        let temb = self.time_mlp[1].forward(temb);
        let (mut h, mut skips) = (self.init_conv.forward(x), Vec::new());
        for down in &self.down_blocks {
            let (smaller, skip) = down.forward(h, temb.clone());
            h = smaller;
            skips.push(skip);
        }
        let Bottleneck { res1, attn, res2 } = &self.bottleneck;
        h = res2.forward(attn.forward(res1.forward(h, temb.clone())), temb.clone());
        for (up, skip) in self.up_blocks.iter().zip(skips.into_iter().rev()) {
            h = up.forward(h, skip, temb.clone());
        }
        self.out.forward(h)
    }
}
